"""The package as it is installed: what importing costs, what a wheel holds, and that it paints."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SOURCES = ('unclip_jax', 'setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE', 'NOTICE')


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
  done = subprocess.run(
    command,
    cwd=cwd,
    env=os.environ | env,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
  return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
  """A wheel built from a copy of the tree: setuptools would leave its folders in the tree."""
  folder = tmp_path_factory.mktemp('wheel')
  tree = folder / 'tree'
  tree.mkdir()
  for name in SOURCES:
    if (ROOT / name).is_dir():
      shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns('__pycache__'))
    else:
      shutil.copy(ROOT / name, tree / name)
  # Without isolation nothing is downloaded: setuptools is there by the `test` extra.
  build = (sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', folder, tree)
  run(*build, cwd=folder)
  (path,) = folder.glob('*.whl')
  return path


def test_importing_pulls_in_neither_torch_nor_tensorflow():
  # Names of the package are imported when they are first used: each is.
  script = """
import sys, unclip_jax, unclip_jax.cli
for name in unclip_jax.__all__:
  getattr(unclip_jax, name)
print(*sys.modules)
"""
  modules = {name.partition('.')[0] for name in run(sys.executable, '-c', script).split()}
  assert {'jax', 'flax', 'tokenizers'} <= modules
  assert not modules & {
    'torch',
    'tensorflow',
    'diffusers',
    'matplotlib',
    'tensorboardX',
    'resvg_py',
  }


def test_the_import_arrows_hold():
  lint_imports = Path(sys.executable).parent / 'lint-imports'
  out = run(lint_imports, '--no-cache')
  assert re.search(r'[1-9]\d* kept, 0 broken', out)


def test_a_wheel_holds_the_package_and_nothing_else(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  in_tree = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / 'unclip_jax').rglob('*')
    if path.is_file() and '__pycache__' not in path.parts
  }
  assert {name for name in names if '.dist-info/' not in name} == in_tree
  assert 'unclip_jax/py.typed' in names
  assert 'unclip_jax/assets/default/vocabulary.json' in names
  licences = {name.rpartition('/')[2] for name in names if '/licenses/' in name}
  assert licences == {'LICENSE', 'NOTICE'}


def test_a_wheel_installed_elsewhere_generates_a_picture(wheel, tmp_path):
  place = tmp_path / 'place'
  pip = (sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--target')
  run(*pip, place, wheel)
  env = {'PYTHONPATH': str(place), 'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  script = 'import unclip_jax; print(unclip_jax.__file__)'
  assert run(sys.executable, '-c', script, cwd=tmp_path, **env).startswith(str(place))
  command = (place / 'bin' / 'unclip-jax', 'generate', 'a red apple, flat style', '--out', 'out')
  run(sys.executable, *command, cwd=tmp_path, **env)
  pictures = [path for path in (tmp_path / 'out').glob('*.png') if path.name != 'grid.png']
  assert pictures
  for path in pictures:
    with Image.open(path) as picture:
      pixels = np.asarray(picture)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.std() > 5, 'a picture of one colour'


def test_versions_agree(wheel):
  config = configparser.RawConfigParser()
  config.read(ROOT / 'setup.cfg')
  version = config['metadata']['version']
  assert wheel.name.startswith(f'unclip_jax-{version}-')
  assert f'\nversion: {version}\n' in (ROOT / 'CITATION.cff').read_text()
  assert f'\n## {version}' in (ROOT / 'CHANGELOG.md').read_text()


def test_no_setting_stands_in_both_files():
  with (ROOT / 'pyproject.toml').open('rb') as file:
    tools = tomllib.load(file)
  config = configparser.RawConfigParser()
  config.read(ROOT / 'setup.cfg')
  assert set(tools) == {'build-system', 'tool'}
  assert 'setuptools' not in tools['tool']
  assert all(name == 'metadata' or name.startswith('options') for name in config.sections())


def test_the_readme_has_the_two_commands_that_ci_runs():
  text = (ROOT / 'README.md').read_text()
  for name, part in (('generate', 'unclip-jax generate'), ('test', 'pytest')):
    block = re.search(rf'^<!-- ci: {name} -->\n+```bash\n(.*?)^```$', text, re.M | re.S)
    assert block, name
    assert part in block[1]
    assert 'pip install -e' in block[1]
