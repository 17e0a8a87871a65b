"""What the site needs beyond MkDocs: notebooks as pages, and links that leave docs/.

MkDocs knows nothing outside of docs/. Each notebook becomes a page of it, and so does each script,
and each folder of scripts, that a page links to; the links of the README, which is no page, are
looked at too. What leads nowhere is a warning, and with that an error of a strict build.
"""

import json
import logging
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LOG = logging.getLogger('mkdocs.hooks.links')  # a strict build counts what is warned below `mkdocs`
DOCS, NOTEBOOKS, SOURCE = 'docs', 'notebooks', 'source'  # SOURCE: of the site, where scripts are
FENCE = '````'
LANGUAGES = {'.py': 'python', '.sh': 'bash', '.yaml': 'yaml'}
# [text](target#anchor), of targets that are no URL.
_LINK = re.compile(r'(?<=\]\()(?!\w+:)([^)#\s]*)(#[^)\s]*)?(?=\))')
_HEADING = re.compile(r'(?m)^#+ +(.+)$')
_CODE = re.compile(r'(?ms)^(`{3,}).*?^\1$')


def on_files(files: Files, config: Any) -> Files:
  """Adds the notebooks, and what pages link to outside of docs/."""
  _check_readme()
  linked: set[str] = set()

  def generate(uri: str, content: str) -> None:
    inclusion = InclusionLevel.NOT_IN_NAV if uri.startswith(SOURCE) else InclusionLevel.UNDEFINED
    files.append(File.generated(config, uri, content=content, inclusion=inclusion))

  for page in [file for file in files.documentation_pages() if file.generated_by is None]:
    _with_links(page.content_string, f'{DOCS}/{page.src_uri}', linked.add)
  for path in sorted((ROOT / NOTEBOOKS).glob('*.ipynb')):
    name = f'{NOTEBOOKS}/{path.name}'
    generate(_uri(name), _with_links(_notebook(path), name, linked.add))
  for name in sorted(linked):
    if not name.startswith((f'{DOCS}/', f'{NOTEBOOKS}/')):
      generate(_uri(name), _source(name))
  return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
  """Leads links out of docs/ to the pages of what they name."""
  if page.file.generated_by is not None:
    return markdown
  return _with_links(markdown, f'{DOCS}/{page.file.src_uri}', lambda name: None)


def _with_links(markdown: str, name: str, note: Callable[[str], Any]) -> str:
  """A page with its links to files outside of docs/ as the site has them.

  Args:
    markdown: the page.
    name: of the file that it is of, from the root of the repository.
    note: told the name of each file or folder that is linked to.
  """
  folder, own_folder = posixpath.dirname(name), posixpath.dirname(_uri(name))

  def replace(match: re.Match[str]) -> str:
    link, anchor = match[1], match[2] or ''
    target = posixpath.normpath(posixpath.join(folder, link))
    # What stays within docs/ is checked by MkDocs.
    if not link or (name.startswith(f'{DOCS}/') and target.startswith(f'{DOCS}/')):
      return match[0]
    if not (ROOT / target).exists():
      LOG.warning('%s links to %s, which is not there', name, target)
      return match[0]
    note(target)
    return posixpath.relpath(_uri(target), own_folder or '.') + anchor

  parts, start = [], 0
  for code in _CODE.finditer(markdown):
    parts += [_LINK.sub(replace, markdown[start : code.start()]), code[0]]
    start = code.end()
  return ''.join([*parts, _LINK.sub(replace, markdown[start:])])


def _uri(name: str) -> str:
  """Where a file of the repository is within the site's pages."""
  if name.startswith(f'{DOCS}/'):
    return name.removeprefix(f'{DOCS}/')
  if name.startswith(f'{NOTEBOOKS}/'):
    return str(Path(name).with_suffix('.md'))
  return f'{SOURCE}/{name}.md'


def _notebook(path: Path) -> str:
  """A notebook as a page."""
  cells = json.loads(path.read_text(encoding='utf-8'))['cells']
  parts = []
  for cell in cells:
    text = ''.join(cell['source'])
    parts.append(text if cell['cell_type'] == 'markdown' else f'{FENCE}python\n{text}\n{FENCE}')
  first, *rest = parts
  where = f'*This is `{NOTEBOOKS}/{path.name}` of the repository, without its outputs.*'
  return '\n\n'.join([first, where, *rest])


def _source(name: str) -> str:
  """A script, or all of a folder, as a page."""
  path = ROOT / name
  paths = [path] if path.is_file() else sorted(child for child in path.iterdir() if child.is_file())
  parts = [f'# {name}']
  for each in paths:
    if each != path:
      parts.append(f'## {each.name}')
    language = LANGUAGES.get(each.suffix, 'text')
    parts.append(f'{FENCE}{language}\n{each.read_text(encoding="utf-8").rstrip()}\n{FENCE}')
  return '\n\n'.join(parts)


def _check_readme() -> None:
  """Warns of links of the README that lead nowhere, to a heading that is not there among them."""
  markdown = (ROOT / 'README.md').read_text(encoding='utf-8')
  for match in _LINK.finditer(_CODE.sub('', markdown)):
    target, anchor = match[1], match[2]
    path = ROOT / (target or 'README.md')
    if not path.exists():
      LOG.warning('README.md links to %s, which is not there', target)
    elif anchor and path.suffix == '.md':
      headings = _HEADING.findall(_CODE.sub('', path.read_text(encoding='utf-8')))
      if anchor[1:] not in {slugify(heading, '-') for heading in headings}:
        LOG.warning('README.md links to %s%s, and there is no such heading', target, anchor)
