"""Bad input through the front door: one line that names the culprit and the remedy, nothing else.

No traceback, a non-zero exit status, no half-written file and no folder left behind.
"""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from tiny_model import TEXTS, without, write_tiny_model

import unclip_jax
from unclip_jax import Sampling, StartNoise, UnclipError
from unclip_jax.cli import main

ROOT = Path(__file__).parent.parent
APPLE, ROCKET, _ = TEXTS


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
  return write_tiny_model(tmp_path_factory.mktemp('model'))


@pytest.fixture
def model(pristine, tmp_path):
  """A copy to damage."""
  return Path(shutil.copytree(pristine, tmp_path / 'model'))


@pytest.fixture(scope='module')
def loaded(pristine):
  return unclip_jax.load(pristine)


def complaint(capsys, *args: object) -> str:
  """What a command that fails says."""
  with pytest.raises(SystemExit) as stop:
    main([str(arg) for arg in args])
  assert stop.value.code == 1
  shown = capsys.readouterr()
  assert shown.out == ''
  (line,) = shown.err.splitlines()
  assert line.startswith('unclip-jax: error: ')
  return line


def refuse(capsys, model: object, out: Path, *args: object) -> str:
  """What `generate` says where it fails before anything is drawn."""
  line = complaint(capsys, 'generate', '--model', model, '--out', out, '--no-cache', *args)
  assert not out.exists()
  return line


# --- Prompts and settings, on the command line.


@pytest.mark.parametrize(
  ('args', 'parts'),
  [
    ([''], ['the prompt is empty', 'say what']),
    ([APPLE, '  '], ['prompt 2 is empty']),
    (['a red\x07apple'], ['U+0007', 'character 6', 'remove']),
    (['a red\napple'], ['U+000A']),
    (['a \udcff'], ['not valid Unicode', 'UTF-8']),
    ([APPLE, '--negative-prompt', 'no\x00thing'], ['negative prompt', 'U+0000']),
    ([APPLE, '--num-images', 0], ['number of images is 0', '1 or more']),
    ([APPLE, '--num-images', -3], ['number of images is -3']),
    ([APPLE, '--seed', -1], ['seed is -1', '0 or more']),
    ([APPLE, '--seed', 2**32], ['seed is 4294967296', 'at most 4294967295']),
    ([APPLE, '--first-image', -1], ['first image is -1']),
    ([APPLE, '--batch-size', 0], ['batch size is 0']),
    ([APPLE, '--devices', 0], ['number of devices is 0']),
    ([APPLE, '--devices', 999], ['999 devices', 'ask for']),
    ([APPLE, '--dtype', 'float8'], ["'float8'", 'float32, bfloat16 or float16']),
    ([APPLE, '--size', 48], ['no size 48', '16 or 32']),
    ([APPLE, '--prior-steps', 0], ['prior', '0 is too few']),
    ([APPLE, '--decoder-steps', -5], ['decoder', '-5 is too few']),
    ([APPLE, '--upsampler-steps', 1001], ['upsampler', '1001', 'at most 1000']),
    ([APPLE, '--prior-candidates', 0], ['candidates is 0']),
    ([APPLE, '--decoder-sampler', 'euler'], ["decoder: there is no sampler 'euler'", 'ddim']),
    ([APPLE, '--upsampler-sampler', ''], ['upsampler', 'no sampler']),
    ([APPLE, '--upsampler-steps', 0, '--size', 16], ['upsampler 0', '0 is too few']),
    ([APPLE, '--num-images', 10**10], ['4294967295']),
    ([APPLE, '--num-images', 10**9], ['1,000,000,000 pictures', '10,000 of one call']),
    ([APPLE, '--decoder-guidance', '1e300'], ['decoder: guidance scale is 1e+300', 'finite']),
    ([APPLE, '--decoder-guidance', -1], ['decoder: guidance scale -1 is negative']),
    ([APPLE, '--prior-guidance', 'nan'], ['prior: guidance scale is nan', 'finite']),
    ([APPLE, '--decoder-sampler', 'ddim', '--decoder-eta', 1.5], ['eta 1.5', '0..1']),
    ([APPLE, '--decoder-eta', 0.5], ['decoder: eta is without effect on ddpm', 'ddim']),
    (
      [APPLE, '--negative-prompt', 'a cat', '--decoder-guidance', 1],
      ['negative prompt is without effect', 'guidance'],
    ),
  ],
)
def test_a_prompt_or_setting_that_cannot_be(capsys, pristine, tmp_path, args, parts):
  line = refuse(capsys, pristine, tmp_path / 'deep' / 'out', *args)
  assert not (tmp_path / 'deep').exists()
  for part in parts:
    assert part in line


def test_words_that_are_no_numbers_are_a_usage_error(capsys, pristine):
  with pytest.raises(SystemExit) as stop:
    main(['generate', APPLE, '--seed', 'seven'])
  assert stop.value.code == 2
  line = capsys.readouterr().err
  assert "'--seed'" in line and 'integer' in line and 'see unclip-jax --help' in line
  assert line.count('\n') == 1


def test_an_over_long_prompt_is_drawn_and_the_warning_shows_what_was_cut(
  capsys, pristine, tmp_path
):
  text = APPLE + ' and then a very long story about everything else'
  args = ['generate', text, '--model', pristine, '--out', tmp_path, '--no-cache', '--size', 16]
  with pytest.raises(SystemExit) as stop:
    main([str(arg) for arg in args])
  assert stop.value.code == 0
  warnings = [line for line in capsys.readouterr().err.splitlines() if 'warning' in line]
  (line,) = warnings
  assert line.startswith('unclip-jax: warning: the prompt ')
  assert line.endswith("everything else'")
  assert '12 tokens' in line
  assert len(list(tmp_path.glob('*.png'))) == 2


# --- The same and more through the API.


@pytest.mark.parametrize(
  ('call', 'match'),
  [
    (lambda m: m.generate(7), 'a prompt must be text or a list of texts, not int'),
    (lambda m: m.generate(b'apple'), 'not bytes'),
    (lambda m: m.generate(None), 'not NoneType'),
    (lambda m: m.generate([APPLE, 3.5]), 'prompt 2 must be text, not float'),
    (lambda m: m.generate([]), 'there is no prompt'),
    (lambda m: m.generate(APPLE, seed=1.5), 'seed must be a whole number, not 1.5'),
    (lambda m: m.generate(APPLE, num_images=True), 'whole number, not True'),
    (lambda m: m.generate(APPLE, num_images='4'), "whole number, not '4'"),
    (lambda m: m.generate(APPLE, negative_prompt=['x']), 'negative prompt must be text'),
    (lambda m: m.generate(APPLE, prior=Sampling(num_steps=2.5)), 'prior.*2.5 is not a whole'),
    (lambda m: m.generate(APPLE, prior=Sampling(guidance_scale='big')), "a number, not 'big'"),
    (lambda m: m.generate(APPLE, prior=Sampling(variance='learned')), 'no learned variance'),
    (lambda m: m.generate(APPLE, decoder=Sampling(variance='huge')), "'huge'"),
    (lambda m: m.generate(APPLE, decoder=Sampling(spacing='odd')), "no spacing 'odd'"),
    (
      lambda m: m.generate(APPLE, decoder=Sampling(sampler='ddim', variance='learned')),
      'variance is without effect',
    ),
    (lambda m: m.generate(APPLE, upsampler=Sampling(guidance_scale=2)), 'it is not guided'),
    (lambda m: m.sample(APPLE, z_i=np.zeros((2, 16))), r'z_i has the shape \[2, 16\].*\[1, 16\]'),
    (lambda m: m.sample(APPLE, z_t=np.full((1, 16), np.nan)), 'z_t must hold finite'),
    (lambda m: m.sample(APPLE, z_t=np.zeros((1, 16), int)), 'floating-point'),
    (
      lambda m: m.sample(APPLE, start_noise=StartNoise(decoder=np.zeros((1, 8, 8, 3)))),
      r'start_noise.decoder.*\[1, 16, 16, 3\]',
    ),
    (lambda m: without(m, 'prior').generate(APPLE), 'this model has no prior'),
    (lambda m: without(m, 'clip').encode_text(APPLE), 'this model has no clip'),
    (lambda m: m.encode_image(np.zeros((16, 16, 3))), r'\[n, h, w, 3\], not \[16, 16, 3\]'),
    (lambda m: m.encode_image(np.zeros((1, 16, 16, 3), int)), 'uint8, or float'),
    (lambda m: unclip_jax.load(''), "model '': give 'default' or a folder"),
    (lambda m: unclip_jax.load(3), 'model 3'),
    (lambda m: unclip_jax.preset('huge'), "no preset 'huge': take one of tiny"),
  ],
)
def test_a_call_that_cannot_be(loaded, call, match):
  with pytest.raises(UnclipError, match=match) as caught:
    call(loaded)
  assert '\n' not in str(caught.value)


# --- Places to write to.


def test_a_folder_that_cannot_be_written(capsys, pristine, tmp_path):
  (tmp_path / 'file').write_text('mine')
  for out in (tmp_path / 'file', tmp_path / 'file' / 'out'):
    args = ('generate', APPLE, '--model', pristine, '--no-cache', '--out', out)
    line = complaint(capsys, *args)
    assert f'cannot write to the folder {out}' in line
    assert 'choose another' in line
  assert (tmp_path / 'file').read_text() == 'mine'


def test_a_disk_that_fills_up_leaves_whole_files_and_names_them(capsys, pristine, tmp_path):
  """A limit on the size of files stands in for it: the pictures fit, the grid does not."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  args = ['generate', APPLE, '--model', pristine, '--out', tmp_path, '--no-cache', '--size', 16]
  resource.setrlimit(resource.RLIMIT_FSIZE, (2500, hard))
  try:
    with pytest.raises(SystemExit) as stop:
      main([str(arg) for arg in [*args, '--num-images', 4]])
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert stop.value.code == 1
  shown = capsys.readouterr()
  *_, line = shown.err.splitlines()
  assert line.startswith(f'unclip-jax: error: cannot write {tmp_path / "grid.png"} (')
  assert 'free some space' in line
  kept = [tmp_path / f'a-red-apple-flat-style-0{i}.png' for i in range(4)]
  assert shown.out.splitlines() == [str(path) for path in kept]
  assert sorted(tmp_path.iterdir()) == kept
  assert {path.read_bytes()[-8:-4] for path in kept} == {b'IEND'}


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path):
  (tmp_path / 'file').write_text('')
  code = 'from unclip_jax import terminal; terminal.use_cache(True)'
  env = os.environ | {'PYTHONPATH': str(ROOT), 'XDG_CACHE_HOME': str(tmp_path / 'file')}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)
  done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
  assert done.returncode == 0
  (line,) = done.stderr.splitlines()
  assert line.startswith('unclip-jax: warning: no compiled programs are kept')


def test_a_program_of_the_cache_that_is_cut_short_is_made_again(tmp_path):
  code = """
import jax
from unclip_jax import terminal
terminal.use_cache(True)
with terminal.plain_warnings():
  print(jax.jit(lambda x: x + 1)(2.0))
"""
  env = os.environ | {'PYTHONPATH': str(ROOT), 'XDG_CACHE_HOME': str(tmp_path)}
  env.pop('JAX_COMPILATION_CACHE_DIR', None)

  def run() -> list[str]:
    done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    assert done.stdout == '3.0\n', done.stderr
    return done.stderr.splitlines()

  assert run() == []
  programs = sorted((tmp_path / 'unclip_jax').glob('jit__lambda*-cache'))
  whole = {path: path.read_bytes() for path in programs}
  for path in programs:
    cut(path, len(whole[path]) // 2)
  (line,) = run()
  assert line.startswith('unclip-jax: warning: a compiled program in the cache was damaged')
  assert programs and all(len(path.read_bytes()) > len(whole[path]) // 2 for path in programs)
  assert run() == []


# --- Models.


def edit_manifest(model: Path, **changes: object) -> None:
  path = model / 'unclip.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_config(model: Path, stage: str, **changes: object) -> None:
  config = json.loads((model / 'unclip.json').read_text())['config']
  config[stage] |= changes
  edit_manifest(model, config=config)


def edit_tensors(path: Path, edit) -> None:
  tensors = safetensors_numpy.load_file(path)
  edit(tensors)
  safetensors_numpy.save_file(tensors, path)


def cut(path: Path, to: int) -> None:
  path.write_bytes(path.read_bytes()[:to])


def put_nan(tensors) -> None:
  tensors['network.query'][3] = np.nan


def stretch(tensors) -> None:
  tensors['network.query'] = np.zeros(99, np.float32)


IMPOSSIBLE = {'image_size': 16, 'patch_size': 0, 'width': 24, 'depth': 1, 'num_heads': 2}

DAMAGES = {
  'no folder': (shutil.rmtree, ['there is no model folder', 'check the path']),
  'no manifest': (lambda m: (m / 'unclip.json').unlink(), ['not a model', 'unclip.json']),
  'manifest cut short': (lambda m: cut(m / 'unclip.json', 300), ['unclip.json', 'valid JSON']),
  'newer format': (lambda m: edit_manifest(m, format_version=9), ['version 9', 'upgrade']),
  'unknown field': (lambda m: edit_config(m, 'prior', widht=4), ['config.prior', "'widht'"]),
  'wrong type': (lambda m: edit_config(m, 'prior', width='4'), ['config.prior.width', 'int']),
  'unknown stage': (
    lambda m: edit_manifest(m, stages={'painter': 'prior.safetensors'}),
    ["'painter'", 'clip, prior, decoder'],
  ),
  'stages that do not fit': (
    lambda m: edit_config(m, 'prior', embed_dim=99),
    ['clip.embed_dim is 16', 'prior.embed_dim is 99', 'must be equal'],
  ),
  'a word that is none': (
    lambda m: edit_config(m, 'prior', diffusion={'prediction': 'x0'}),
    ['prior.diffusion.prediction', "'x0'", 'eps, x_0, v'],
  ),
  'no network possible': (
    lambda m: edit_config(m, 'clip', vision=IMPOSSIBLE),
    ['unclip.json', 'no network can be built'],
  ),
  'another architecture': (
    lambda m: edit_config(m, 'prior', depth=3),
    ['prior.safetensors', 'lacks network.blocks', 'another configuration'],
  ),
  'no weights': (
    lambda m: (m / 'decoder.safetensors').unlink(),
    ['decoder.safetensors', 'not there', 'download'],
  ),
  'weights cut short': (
    lambda m: cut(m / 'decoder.safetensors', 20000),
    ['decoder.safetensors', 'cut short', 'again'],
  ),
  'empty weights': (lambda m: cut(m / 'clip.safetensors', 0), ['clip.safetensors', 'cut short']),
  'no safetensors': (
    lambda m: (m / 'clip.safetensors').write_bytes(struct.pack('<Q', 10**12) + b'PK'),
    ['clip.safetensors', 'not a safetensors file'],
  ),
  'a NaN': (
    lambda m: edit_tensors(m / 'prior.safetensors', put_nan),
    ['prior.safetensors', 'network.query', 'NaN'],
  ),
  'a missing tensor': (
    lambda m: edit_tensors(m / 'prior.safetensors', lambda t: t.pop('statistics.std')),
    ['prior.safetensors', 'lacks statistics.std'],
  ),
  'an extra tensor': (
    lambda m: edit_tensors(
      m / 'prior.safetensors', lambda t: t.update(bonus=np.zeros(2, np.float32))
    ),
    ['prior.safetensors', 'has bonus'],
  ),
  'a tensor of another shape': (
    lambda m: edit_tensors(m / 'prior.safetensors', stretch),
    ['network.query', '[99]', '[32]'],
  ),
  'no tokenizer': (lambda m: (m / 'tokenizer.json').unlink(), ['tokenizer.json', 'not there']),
  'a tokenizer cut short': (
    lambda m: cut(m / 'tokenizer.json', 500),
    ['tokenizer', 'tokenizer.json', 'cannot be read'],
  ),
  "another model's tokenizer": (
    lambda m: (m / 'tokenizer.json').write_text(
      (m / 'tokenizer.json')
      .read_text()
      .replace('"max_length":12', '"max_length":13')
      .replace('"Fixed":12', '"Fixed":13')
    ),
    ['the tokenizer of', '13 tokens', 'take the tokenizer of that model'],
  ),
}


# `info` reads no weights.
ONLY_READING_FINDS = {
  'another architecture',
  'weights cut short',
  'empty weights',
  'no safetensors',
  'a NaN',
  'a missing tensor',
  'an extra tensor',
  'a tensor of another shape',
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_model_that_is_not_whole(capsys, model, tmp_path, damage):
  change, parts = DAMAGES[damage]
  change(model)
  line = refuse(capsys, model, tmp_path / 'out', APPLE)
  assert str(model) in line
  for part in parts:
    assert part in line
  if damage in ONLY_READING_FINDS:
    with pytest.raises(SystemExit) as stop:
      main(['info', '--model', str(model)])
    assert stop.value.code == 0
    assert 'decoder' in capsys.readouterr().out
  else:
    assert complaint(capsys, 'info', '--model', model) == line


def test_a_model_without_a_stage_serves_what_it_can(capsys, model, tmp_path):
  stages = json.loads((model / 'unclip.json').read_text())['stages']
  edit_manifest(model, stages={'clip': stages['clip']})
  assert unclip_jax.load(model).encode_text(APPLE).shape == (1, 16)
  line = refuse(capsys, model, tmp_path / 'out', APPLE)
  assert 'this model has no prior, only clip' in line


def test_an_installation_without_a_model(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr('unclip_jax.systems.loading.DEFAULT_FOLDER', tmp_path / 'nothing')
  line = refuse(capsys, 'default', tmp_path / 'out', APPLE)
  assert 'without a default model' in line
