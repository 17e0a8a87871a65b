"""What documents say of the commands is what these take; the API pages leave nothing out."""

import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import nbformat
import pytest
import typer

import unclip_jax
from unclip_jax.cli import app

ROOT = Path(__file__).parent.parent
DOCS = ROOT / 'docs'
PAGES = [ROOT / 'README.md', *sorted(DOCS.glob('*.md')), *sorted(ROOT.glob('notebooks/*.ipynb'))]
COMMANDS = typer.main.get_command(app).commands
# The command line, whose page is docs/using.md.
NOT_OF_THE_API = tuple(f'unclip_jax.{name}' for name in ('cli', '__main__', 'display', 'terminal'))


def read(path):
  if path.suffix == '.md':
    return path.read_text(encoding='utf-8')
  cells = nbformat.read(path, as_version=4).cells
  return '\n\n'.join(cell.source for cell in cells if cell.cell_type == 'markdown')


def blocks(text):
  """The commands of its blocks of shell: what follows the command's own name, in words."""
  for block in re.findall(r'(?ms)^```bash\n(.*?)^```$', text):
    for line in block.replace('\\\n', ' ').splitlines():
      found = re.search(r'(?:^|[\s/])unclip-jax (.*)', line)
      if found and not line.startswith('pip '):
        yield shlex.split(found[1], comments=True)


def inline(text):
  """The same of its running text; values may be left out there."""
  for words in re.findall(r'`unclip-jax ([a-z][^`]*)`', text):
    yield words.split()


def options_of(command):
  return {name for param in command.params for name in (*param.opts, *param.secondary_opts)}


def test_using_lists_all_commands():
  table = re.findall(r'(?m)^\| `([a-z-]+)` \| ', read(DOCS / 'using.md').split('\n## ')[0])
  assert sorted(table) == sorted(COMMANDS)


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_commands_are_written_right(path):
  text = read(path)
  for name, *words in blocks(text):
    # Parsed, not run; what is wrong with it is raised.
    COMMANDS[name].make_context(name, words)
  for name, *words in inline(text):
    asked = {word.split('=')[0] for word in words if word.startswith('-')} - {'--help'}
    assert asked <= options_of(COMMANDS[name]), f'unclip-jax {name} {" ".join(words)}'


def test_a_wrong_option_is_seen():
  (words,) = blocks('```bash\n.venv/bin/unclip-jax plan prior \\\n    --gpu h100:8  # eight\n```')
  with pytest.raises(Exception, match='No such option: --gpu'):
    COMMANDS[words[0]].make_context(words[0], words[1:])


def test_using_names_options_that_are_there():
  text = read(DOCS / 'using.md')
  known = set().union(*map(options_of, COMMANDS.values()), {'--help'})
  assert set(re.findall(r'`(--[a-z-]*[a-z])(?=[ `])', text)) <= known
  settings = text.split('\n## Settings\n')[1].split('\n## ')[0]
  names = re.findall(r'(?m)^\| `([a-z-]+)` \| `[a-z_]+` \|', settings)
  for_stages = {
    name.removeprefix('--decoder-')
    for name in options_of(COMMANDS['generate'])
    if name.startswith('--decoder-')
  }
  assert set(names) == for_stages


def test_api_pages_list_all_modules():
  listed = re.findall(r'(?m)^::: ([\w.]+)$', '\n'.join(map(read, DOCS.glob('api/*.md'))))
  assert len(set(listed)) == len(listed)
  found = pkgutil.walk_packages(unclip_jax.__path__, 'unclip_jax.')
  modules = [module.name for module in found if not module.ispkg]
  # Some are listed by what is public in them, under the name that it is imported by.
  homes = set(listed)
  for name in set(listed) - set(modules):
    parent, _, last = name.rpartition('.')
    homes.add(getattr(importlib.import_module(parent), last).__module__)
  expected = {module for module in modules if not module.startswith(NOT_OF_THE_API)}
  assert expected <= homes
