"""The command line, as people see it: files, what is in them, and what is said."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import run
from etils import epath
from PIL import Image
from rich.console import Console
from tiny_model import TEXTS, write_tiny_model

import unclip_jax
from unclip_jax.cli.info import num_bytes
from unclip_jax.display import StageDisplay
from unclip_jax.images import make_grid, read_picture, read_text, save_png, slugs
from unclip_jax.systems.samples import Progress

ROOT = Path(__file__).parent.parent
APPLE, ROCKET, _ = TEXTS


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return write_tiny_model(tmp_path_factory.mktemp('model'))


def generate(model: Path, out: Path, *args: object) -> int:
  return run('generate', '--model', model, '--out', out, '--no-cache', *args)


def pixels(path: Path) -> np.ndarray:
  with Image.open(path) as picture:
    return np.asarray(picture)


def test_pictures_are_named_described_and_gathered_in_a_grid(model, tmp_path, capsys):
  out = tmp_path / 'new' / 'out'
  assert generate(model, out, APPLE, ROCKET, '--num-images', 2, '--seed', 7) == 0
  names = [
    'a-red-apple-flat-style-00.png',
    'a-red-apple-flat-style-01.png',
    'a-rocket-on-a-blue-background-00.png',
    'a-rocket-on-a-blue-background-01.png',
    'grid.png',
  ]
  shown = capsys.readouterr()
  assert shown.out.split() == [str(out / name) for name in names]
  assert sorted(path.name for path in out.iterdir()) == names
  for stage in ('clip', 'prior', 'decoder', 'upsampler 0'):
    assert f'{stage}: compiling' in shown.err
    assert f'{stage}: done' in shown.err
  images = unclip_jax.load(model).generate([APPLE, ROCKET], 7, 2)
  for name, image in zip(names, images, strict=False):
    np.testing.assert_array_equal(pixels(out / name), image)
  grid = pixels(out / 'grid.png')
  np.testing.assert_array_equal(grid[4:36, 40:72], images[1])
  np.testing.assert_array_equal(grid[40:72, 4:36], images[2])

  text = read_text(out / names[3])
  assert text['prompt'] == ROCKET
  assert (text['seed'], text['index']) == ('7', '1')
  assert text['Software'].startswith(f'unclip_jax {unclip_jax.__version__}, jax {jax.__version__}')
  settings = json.loads(text['settings'])
  assert settings['decoder'] == {
    'num_steps': 4,
    'sampler': 'ddpm',
    'spacing': 'strided',
    'variance': 'learned',
    'guidance_scale': 2.0,
  }
  assert settings['size'] == 32
  assert read_text(out / 'grid.png')['prompt'] == f'{APPLE}\n{ROCKET}'


def test_a_grid_of_one_picture_each_comes_near_a_square(model, tmp_path):
  assert generate(model, tmp_path, *TEXTS, '--size', 16) == 0
  first, _, third = (pixels(tmp_path / f'{slug}-00.png') for slug in slugs(list(TEXTS)))
  grid = pixels(tmp_path / 'grid.png')
  assert grid.shape == (44, 44, 3)
  np.testing.assert_array_equal(grid[4:20, 4:20], first)
  np.testing.assert_array_equal(grid[24:40, 4:20], third)


def test_settings_reach_the_stages_and_the_files(model, tmp_path):
  options = (
    *('--prior-steps', 2, '--prior-sampler', 'ddim', '--prior-guidance', 1.5, '--prior-eta', 0.5),
    *('--prior-candidates', 3, '--decoder-steps', 3, '--decoder-sampler', 'ddim'),
    *('--decoder-guidance', 3, '--decoder-eta', 0.25, '--negative-prompt', ROCKET, '--size', 16),
    *('--first-image', 5, '--batch-size', 1),
  )
  assert generate(model, tmp_path, APPLE, *options) == 0
  (path,) = tmp_path.glob('*-05.png')
  settings = json.loads(read_text(path)['settings'])
  strided = {'sampler': 'ddim', 'spacing': 'strided'}
  assert settings['prior'] == {'num_steps': 2, 'eta': 0.5, 'guidance_scale': 1.5, **strided}
  assert settings['decoder'] == {'num_steps': 3, 'eta': 0.25, 'guidance_scale': 3.0, **strided}
  assert settings['candidates'] == 3
  assert settings['negative_prompt'] == ROCKET
  assert settings['upsamplers'] == []
  expected = unclip_jax.load(model).sample(
    APPLE,
    first_image=5,
    negative_prompt=ROCKET,
    prior=unclip_jax.Sampling(2, 'ddim', 1.5, 0.5),
    decoder=unclip_jax.Sampling(3, 'ddim', 3, 0.25),
    num_candidates=3,
    size=16,
    batch_size=1,
  )
  np.testing.assert_array_equal(pixels(path), expected.images[0])


def test_the_same_command_writes_the_same_bytes_and_keeps_its_programs(model, tmp_path):
  env = os.environ | {'PYTHONPATH': str(ROOT), 'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)
  code = 'from unclip_jax.cli import main; main()'
  for out in ('first', 'second'):
    command = [sys.executable, '-c', code, 'generate', APPLE, '--size', '16', '--seed', '3']
    command += ['--model', str(model), '--out', out]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = {path.name for path in (tmp_path / 'cache' / 'unclip_jax').glob('*-cache')}
    if out == 'first':
      before = kept
  assert len(before) >= 3
  assert kept == before, 'the second time compiled something'
  first, second = (sorted((tmp_path / name).iterdir()) for name in ('first', 'second'))
  assert [path.name for path in first] == ['a-red-apple-flat-style-00.png', 'grid.png']
  for one, other in zip(first, second, strict=True):
    assert one.read_bytes() == other.read_bytes()


def test_info_describes_the_model(model, capsys):
  assert run('info', '--model', model) == 0
  shown = capsys.readouterr().out
  loaded = unclip_jax.load(model)
  total = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
  assert f'{total:,}' in shown
  for part in ('clip', 'prior', 'decoder', 'upsampler 0', '16, 32 px', jax.__version__, 'MiB'):
    assert part in shown
  assert f'{len(jax.devices())} × {jax.devices()[0].device_kind}' in shown


def test_info_reads_no_weights(model, capsys, monkeypatch):
  """It serves for models that are larger than memory."""

  def refuse(*args, **kwargs):
    raise AssertionError('weights are read')

  for place in ('ByteRanges.array', 'LazyTensor.read'):
    monkeypatch.setattr(f'unclip_jax.weights.byte_ranges.{place}', refuse)
  assert run('info', '--model', model) == 0
  assert 'decoder' in capsys.readouterr().out


def test_info_shows_a_stage_without_weights(model, tmp_path, capsys):
  copy = Path(shutil.copytree(model, tmp_path / 'model'))
  manifest = json.loads((copy / 'unclip.json').read_text())
  del manifest['stages']['prior']
  (copy / 'unclip.json').write_text(json.dumps(manifest))
  assert run('info', '--model', copy) == 0
  lines = capsys.readouterr().out.splitlines()
  (prior,) = [line for line in lines if line.startswith('prior')]
  params = dict(unclip_jax.load(copy).params)
  assert 'missing' in prior
  (total,) = [line for line in lines if line.startswith('all')]
  assert f'{sum(leaf.size for leaf in jax.tree.leaves(params)):,}' in total


def test_the_files_of_an_index_are_counted(tmp_path):
  for name, size in (('1.bin', 100), ('2.bin', 30)):
    (tmp_path / name).write_bytes(bytes(size))
  index = epath.Path(tmp_path) / 'model.bin.index.json'
  index.write_text(json.dumps({'weight_map': {'a': '1.bin', 'b': '2.bin', 'c': '1.bin'}}))
  assert num_bytes(index) == 130 + len(index.read_text())
  assert num_bytes(epath.Path(tmp_path) / '1.bin') == 100
  assert num_bytes(epath.Path(tmp_path)) == 260 + len(index.read_text())


@pytest.mark.parametrize('command', [['--help'], ['generate', '--help'], ['info', '--help'], []])
def test_help_is_given(command, capsys):
  assert run(*command) in (0, 2)
  shown = capsys.readouterr().out
  assert 'Usage: unclip-jax' in shown
  if 'generate' in command:
    for option in ('--num-images', '--prior-guidance', '--decoder-eta', '--upsampler-steps'):
      assert option in shown


def test_version_is_given(capsys):
  assert run('--version') == 0
  assert capsys.readouterr().out == f'unclip-jax {unclip_jax.__version__}\n'


def test_help_does_not_wait_for_jax():
  code = (
    'import sys\nfrom unclip_jax.cli import main\n'
    "try:\n  main(['generate', '--help'])\nexcept SystemExit:\n  assert 'jax' not in sys.modules"
  )
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  subprocess.run([sys.executable, '-c', code], env=env, check=True, capture_output=True)


def test_a_terminal_shows_a_line_for_each_stage(capsys):
  console = Console(force_terminal=True, width=80, color_system=None)
  with StageDisplay(console, ['prior', 'upsampler_0']) as display:
    for batch in (0, 1):
      for stage in ('prior', 'upsampler_0'):
        for status in ('preparing', 'sampling', 'done'):
          display(Progress(stage, status, batch, 2))
  *_, prior, upsampler = [line for line in capsys.readouterr().out.splitlines() if '✓' in line]
  assert 'prior' in prior
  assert 'upsampler 0' in upsampler
  assert 'done' in prior
  assert 'done' in upsampler


def test_names_made_of_prompts():
  prompts = ['A red  apple, flat style!', 'a red apple: flat style', 'Ein Äpfelchen', '??', '../x']
  assert slugs(prompts) == [
    'a-red-apple-flat-style',
    'a-red-apple-flat-style-2',
    'ein-äpfelchen',
    'image',
    'x',
  ]
  assert len(slugs(['赤い' * 200])[0].encode()) <= 80


def test_a_grid_with_an_unfinished_row_and_text_beyond_latin(tmp_path):
  images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
  grid = make_grid(images, 2)
  assert grid.shape == (16, 18, 3)
  assert (grid[4:6, 11:14] == 1).all()
  assert (grid[10:12, 4:7] == 2).all()
  assert (grid[10:12, 11:14] == 255).all()
  save_png(tmp_path / 'a.png', grid, {'prompt': 'りんご 🍎', 'note': 'plain'})
  assert read_text(tmp_path / 'a.png') == {'prompt': 'りんご 🍎', 'note': 'plain'}


def test_variations_of_a_picture(model, tmp_path, capsys):
  picture = np.zeros((20, 30, 4), np.uint8)
  picture[:, :15] = [200, 30, 30, 255]
  Image.fromarray(picture).save(tmp_path / 'red.png')
  out = tmp_path / 'out'
  assert generate(model, out, '--image', tmp_path / 'red.png', '-n', 2) == 0
  assert {path.name for path in out.iterdir()} == {'red-00.png', 'red-01.png', 'grid.png'}
  assert 'prior' not in capsys.readouterr().err
  assert (pixels(out / 'red-00.png') != pixels(out / 'red-01.png')).any()
  about = json.loads(read_text(out / 'red-00.png')['settings'])
  assert about['image'] == str(tmp_path / 'red.png') and 'prior' not in about
  assert generate(model, out, 'a cat', '--image', tmp_path / 'red.png', '--offload') == 0
  expected = unclip_jax.load(model)
  z_i = expected.encode_image(read_picture(tmp_path / 'red.png')[None])
  samples = expected.sample('a cat', z_i=z_i)
  np.testing.assert_array_equal(pixels(out / 'a-cat-red-00.png'), samples.images[0])


@pytest.mark.parametrize(
  'mode', ['RGB', 'RGBA', 'LA', 'L', 'P', '1', 'CMYK', 'I;16', 'F', 'F to 1']
)
def test_a_picture_of_any_mode_is_read(mode, tmp_path):
  levels = np.arange(0, 240, 40, dtype=np.uint8).reshape(2, 3)
  path = tmp_path / ('picture.tif' if mode in ('CMYK', 'F', 'F to 1') else 'picture.png')
  grey = Image.fromarray(levels)
  match mode:
    case 'I;16':
      picture = Image.fromarray(levels.astype(np.uint16) * 257)
    case 'F' | 'F to 1':
      levels[0, 0] = 255
      divisor = 255 if mode == 'F to 1' else 1
      picture = Image.fromarray(levels.astype(np.float32) / divisor)
    case 'RGBA' | 'LA':
      picture = grey.convert(mode)
      picture.putalpha(Image.fromarray(np.uint8([[255, 255, 255], [255, 255, 0]])))
      levels[1, 2] = 255  # what shows through is white
    case _:
      picture = grey.convert(mode)
  exif = Image.Exif()
  exif[0x0112] = 6  # turned a quarter
  picture.save(path, **({'exif': exif} if mode == 'RGB' else {}))
  read = read_picture(path)
  assert read.dtype == np.uint8 and read.shape[2] == 3
  if mode == 'RGB':
    np.testing.assert_array_equal(read[..., 0], np.rot90(levels, -1))
  elif mode != '1':
    assert np.abs(read.astype(int) - levels[..., None]).max() <= 1


def test_what_is_no_picture_is_named(model, tmp_path, capsys):
  (tmp_path / 'text.png').write_text('no picture')
  for name, words in (('none.png', 'there is no picture'), ('text.png', 'is not a picture')):
    assert generate(model, tmp_path / 'out', '--image', tmp_path / name) == 1
    assert words in capsys.readouterr().err
  assert generate(model, tmp_path / 'out') == 2
  assert 'give a PROMPT' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_a_model_is_converted_and_opens_again(model, tmp_path, capsys):
  assert run('convert', model, tmp_path / 'half', '--dtype', 'bfloat16') == 0
  assert capsys.readouterr().out.split() == [str(tmp_path / 'half')]
  ours, theirs = unclip_jax.load(model), unclip_jax.load(tmp_path / 'half')
  assert theirs.config == ours.config
  for one, other in zip(*map(jax.tree.leaves, (ours.params, theirs.params)), strict=True):
    np.testing.assert_allclose(np.asarray(other), np.asarray(one), rtol=1e-2, atol=1e-6)
  assert run('convert', model, tmp_path / 'orbax', '--to', 'orbax') == 0
  exact = unclip_jax.load(tmp_path / 'orbax')
  jax.tree.map(np.testing.assert_array_equal, dict(exact.params), dict(ours.params))
  assert run('info', '--model', tmp_path / 'orbax') == 0
  assert 'decoder' in capsys.readouterr().out
  shutil.rmtree(tmp_path / 'orbax' / 'decoder.orbax')
  assert run('info', '--model', tmp_path / 'orbax') == 1
  assert 'names decoder.orbax, which is not there' in capsys.readouterr().err
  assert run('convert', model, tmp_path / 'half') == 1
  assert 'half is there already' in capsys.readouterr().err
  assert run('convert', model, '') == 1
  assert 'has no name' in capsys.readouterr().err
  for args, words in (
    (('--to', 'onnx'), "there is no format 'onnx'"),
    (('--dtype', 'int8'), "there is no dtype 'int8'"),
    (('--to', 'diffusers'), 'cannot be written as UnCLIPPipeline of diffusers: decoder.text'),
  ):
    assert run('convert', model, tmp_path / 'new', *args) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / 'new').exists()
