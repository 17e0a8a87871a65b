"""Programs compiled ahead: `generate` with the same settings finds all of them."""

import json
import os
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tiny_model import CONFIG, TEXTS, write_tiny_model

from unclip_jax import Sampling
from unclip_jax.cli import main
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.systems import ahead, requests

SETTINGS = (
  *('--prior-steps', '2', '--prior-candidates', '1', '--decoder-sampler', 'ddim'),
  *('--prior-guidance', '2', '--prior-guidance-interval', '0.3', '1'),
  *('--decoder-guidance', '1', '--size', '16'),
)
# Commands, with kernels laid out by columns though they are small; after each a line of what the
# cache holds then.
BY_COLUMNS = """
import json, os, sys
from unclip_jax.systems import by_columns
by_columns.MIN_SIZE = 256
from unclip_jax.cli import main
for args in json.loads(sys.argv[1]):
  try:
    main(args)
  except SystemExit as stop:
    if stop.code:
      raise
  print('kept:', *os.listdir('cache'), file=sys.stderr)
"""


def run(folder, devices, *commands):
  """Commands in a process of their own, whose cache is in the folder; groups of 2 share parameters.

  Returns what they said, and the names of the cache's programs after each.
  """
  env = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={devices}',
  }
  if devices > 1:
    more = ('--devices', str(devices), '--model-devices', '2')
    commands = [(*args, *more) for args in commands]
  command = [sys.executable, '-c', BY_COLUMNS, json.dumps(commands)]
  done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  lines = [line.split()[1:] for line in done.stderr.splitlines() if line.startswith('kept: ')]
  assert len(lines) == len(commands)
  return done.stdout, *({name for name in line if name.endswith('-cache')} for line in lines)


@pytest.mark.parametrize('devices', [1, 4])
def test_generate_compiles_nothing_after_compile(tmp_path, devices):
  write_tiny_model(tmp_path / 'model')
  for weights in (tmp_path / 'model').glob('*.safetensors'):
    weights.rename(weights.with_suffix('.aside'))
    weights.write_bytes(b'')
  # Over 2 groups of devices a batch of 3 is filled up to 4.
  sizes, num_compiled = ('2,4', 2) if devices == 1 else ('3,4', 1)
  compile_model = ('compile', 'model', '--batch-sizes', sizes, *SETTINGS)
  said, compiled = run(tmp_path, devices, compile_model)
  assert said.count('decoder') == num_compiled
  assert str(tmp_path / 'cache') in said
  assert len(compiled) > 10
  for weights in (tmp_path / 'model').glob('*.aside'):
    weights.rename(weights.with_suffix('.safetensors'))
  (tmp_path / 'prompts.txt').write_text('\n'.join(TEXTS))
  prompts = ('--prompts', 'prompts.txt') if devices == 1 else TEXTS
  generate = ('generate', *prompts, '--model', 'model', *SETTINGS)
  # What needs other programs does compile them: the first comparison can fail.
  others = (*generate, '--prior-sampler', 'ddim', '--out', 'other')
  _, after, more = run(tmp_path, devices, generate, others)
  assert after == compiled
  assert more > compiled


@pytest.fixture
def cache(tmp_path):
  """A cache of programs with nothing in it."""
  before = jax.config.jax_compilation_cache_dir
  compilation_cache.reset_cache()
  jax.config.update('jax_enable_compilation_cache', True)
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'cache'))
  yield
  jax.config.update('jax_compilation_cache_dir', before)
  compilation_cache.reset_cache()


@pytest.mark.usefixtures('cache')
def test_what_is_cached_is_counted(tmp_path):
  text = CONFIG.clip.text
  tokenizer = Tokenizer.train(TEXTS * 3, text.vocab_size, text.context_length)
  as_is = Sampling()
  samplings = requests.Samplings(as_is, as_is, as_is)
  request = requests.example(CONFIG, tokenizer, None, 1, samplings, None, 16)
  told = []
  stages = ahead.compile_stages(CONFIG, request, jnp.float32, report=told.append)
  assert [stage.stage for stage in stages] == ['clip', 'prior', 'decoder'] == told
  clip, prior, decoder = stages
  # One for keys, one for the text (the empty caption's is the same); and the images in the end.
  assert (clip.num_programs, prior.num_programs, decoder.num_programs) == (2, 4, 4)
  assert clip.argument_bytes > request.tokens.ids.nbytes
  assert decoder.argument_bytes > prior.argument_bytes > 0 and decoder.temp_bytes > 0
  assert all(stage.num_cached == 0 and stage.seconds > 0 for stage in stages)
  jax.clear_caches()
  again = ahead.compile_stages(CONFIG, request, jnp.float32)
  assert [stage.num_cached for stage in again] == [2, 4, 4]


@pytest.mark.usefixtures('cache')
def test_programs_that_cannot_be_kept_are_an_error(tmp_path, capsys):
  """A limit on the size of files stands in for a full disk."""
  model = write_tiny_model(tmp_path / 'model')
  jax.clear_caches()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
  try:
    with pytest.raises(SystemExit) as stop:
      main(['compile', str(model), *SETTINGS])
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert stop.value.code == 1
  shown = capsys.readouterr()
  assert shown.out == ''
  assert 'warning' not in shown.err
  *_, line = shown.err.splitlines()
  assert f'programs cannot be kept in {tmp_path / "cache"} (OSError: ' in line
  assert 'File too large' in line
  assert not list((tmp_path / 'cache').glob('*-cache'))


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    (['--batch-sizes', '1,x'], "--batch-sizes '1,x': give whole numbers"),
    (['--batch-sizes', '0'], 'give whole numbers from 1 on'),
    (['--devices', '2'], '2 devices were asked for, there are 1'),
    (['--size', '20'], 'no size 20'),
    (['--dtype', 'float8'], 'float32, bfloat16 or float16'),
    (['--decoder-steps', '0'], 'decoder: sampling steps: 0 is too few'),
  ],
)
@pytest.mark.usefixtures('cache')
def test_slips_are_one_line(tmp_path, capsys, args, words):
  model = write_tiny_model(tmp_path)
  with pytest.raises(SystemExit) as stop:
    main(['compile', str(model), *args])
  assert stop.value.code in (1, 2)
  (line,) = capsys.readouterr().err.splitlines()
  assert words in line
