"""Programs in folders: written for any platform, read back, refused where they cannot run."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from jax import export
from tiny_model import TEXTS, load_tiny

import unclip_jax
from unclip_jax import Sampling, UnclipError, fuse, load_exported, write_exported
from unclip_jax.cli import main

APPLE, ROCKET, _ = TEXTS


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return load_tiny(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
  """A program for this machine and others."""
  out = tmp_path_factory.mktemp('exported') / 'program'
  write_exported(fuse(model, 2, size=16), out, ['cuda', 'tpu', 'cpu'])
  return out


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / 'copy')


def change(folder, **fields):
  path = folder / 'program.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_program_read_back_draws_the_same_images(model, folder):
  program = load_exported(folder)
  settings = {'decoder': Sampling(guidance_scale=3.0), 'negative_prompt': 'a dog'}
  images = program.generate(TEXTS, 7, **settings)
  assert np.abs(images.astype(int) - model.generate(TEXTS, 7, size=16, **settings)).max() <= 1
  assert images.std() > 5
  with pytest.raises(UnclipError, match='the program has 4'):
    program.generate(APPLE, decoder=Sampling(num_steps=2))
  # The folder is a model, too.
  assert set(unclip_jax.load(folder).params) == {'clip', 'prior', 'decoder'}


def test_settings_are_part_of_the_program(model, tmp_path):
  asked = {
    'prior': Sampling(num_steps=2),
    'decoder': Sampling(num_steps=2, sampler='ddim', guidance_scale=1),
    'num_candidates': 1,
    'size': 16,
  }
  write_exported(fuse(model, **asked), tmp_path / 'program')
  images = load_exported(tmp_path / 'program').generate(APPLE, 3)
  assert np.abs(images.astype(int) - model.generate(APPLE, 3, **asked)).max() <= 1


def test_the_statistics_of_analytic_travel_with_the_program(model, tmp_path):
  power = {'decoder': np.linspace(0.3, 0.9, 1000, dtype='f')}
  measured = dataclasses.replace(model, eps_power=power)
  asked = {'decoder': Sampling(num_steps=3, sampler='analytic'), 'size': 16}
  write_exported(fuse(measured, **asked), tmp_path / 'program')
  images = load_exported(tmp_path / 'program').generate(APPLE, 3)
  assert np.abs(images.astype(int) - measured.generate(APPLE, 3, **asked)).max() <= 1
  with pytest.raises(UnclipError, match='decoder: analytic needs statistics'):
    fuse(model, **asked)


def test_other_platforms_are_lowered_here_and_refused_here(model, tmp_path):
  write_exported(fuse(model, 2, size=16), tmp_path / 'program', ['cuda', 'tpu'])
  blob = bytearray((tmp_path / 'program' / 'program.bin').read_bytes())
  assert export.deserialize(blob).platforms == ('cuda', 'tpu')
  with pytest.raises(UnclipError, match=r'was exported for cuda and tpu, this machine has cpu'):
    load_exported(tmp_path / 'program')


def test_the_command_writes_it(folder, tmp_path, capsys):
  settings = ('--batch-size', '2', '--decoder-steps', '3', '--size', '16', '--dtype', 'bfloat16')
  args = ['export', str(folder), str(tmp_path / 'new' / 'program'), '--platforms', 'tpu, cuda']
  with pytest.raises(SystemExit) as stop:
    main([*args, *settings])
  assert stop.value.code == 0
  assert capsys.readouterr().out.split() == [str(tmp_path / 'new' / 'program')]
  fields = json.loads((tmp_path / 'new' / 'program' / 'program.json').read_text())
  assert fields['platforms'] == ['tpu', 'cuda']
  assert (fields['batch_size'], fields['dtype'], fields['size']) == (2, 'bfloat16', 16)
  assert fields['jax_version'] == jax.__version__
  assert fields['inputs']['decoder.plan.t'] == 'int32[3]'
  assert fields['inputs']['decoder.guidance_scale'] == 'float32[]'


@pytest.mark.parametrize(
  ('platforms', 'words'),
  [
    (['gpu'], "no platform 'gpu': take cpu, cuda, rocm, tpu"),
    (['cpu', 'cpu'], 'give each once'),
    ([], 'one at least'),
  ],
)
def test_platforms_that_are_none_are_refused(model, tmp_path, platforms, words):
  with pytest.raises(UnclipError, match=words):
    write_exported(fuse(model, 2, size=16), tmp_path / 'program', platforms)
  assert not (tmp_path / 'program').exists()


def test_a_folder_that_holds_something_is_left_alone(model, copy):
  before = sorted(path.name for path in copy.iterdir())
  with pytest.raises(UnclipError, match='is there already'):
    write_exported(fuse(model, 2, size=16), copy)
  assert sorted(path.name for path in copy.iterdir()) == before


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'format_version': 2}, 'format version 2, this program reads 1'),
    ({'format_version': None}, 'format version None'),
    ({'calling_convention_version': 3}, 'calling convention 3, jax .* runs'),
    ({'calling_convention_version': 99, 'jax_version': '9.9'}, 'exported by jax 9.9 with'),
    ({'surplus': 1}, 'lacks surplus, or should not have it'),
    ({'samplings': {}}, 'samplings lack prior'),
    ({'batch_size': 4}, 'given other inputs than this version makes'),
    ({'batch_size': 'two'}, 'must be a whole number'),
    ({'dtype': 'float8'}, 'no dtype'),
    ({'samplings': {'prior': {'steps': 3}, 'decoder': {}, 'upsampler': {}}}, "field 'steps'"),
  ],
)
def test_a_program_of_another_version_says_so(copy, fields, words):
  change(copy, **fields)
  with pytest.raises(UnclipError, match=words):
    load_exported(copy)


def test_damaged_programs_are_refused(copy, tmp_path):
  program = copy / 'program.bin'
  whole = program.read_bytes()
  program.write_bytes(whole[:-1000])
  with pytest.raises(UnclipError, match=r'program\.bin is damaged or cut short'):
    load_exported(copy)
  program.unlink()
  with pytest.raises(UnclipError, match=r'cannot read .*program\.bin'):
    load_exported(copy)
  program.write_bytes(whole)
  (copy / 'prior.safetensors').unlink()
  with pytest.raises(UnclipError, match=r'names prior\.safetensors, which is not there'):
    load_exported(copy)
  (copy / 'program.json').write_text('{')
  with pytest.raises(UnclipError, match='not valid JSON'):
    load_exported(copy)
  (copy / 'program.json').write_text('[]')
  with pytest.raises(UnclipError, match='not a JSON object'):
    load_exported(copy)
  (copy / 'program.json').unlink()
  with pytest.raises(UnclipError, match='is no exported program'):
    load_exported(copy)
  with pytest.raises(UnclipError, match='is no exported program'):
    load_exported(tmp_path / 'nowhere')


def test_a_program_that_the_compiler_cannot_read_is_refused(copy):
  from hashlib import sha256

  blob = bytearray((copy / 'program.bin').read_bytes())
  middle = blob.index(b'StableHLO') + 40
  blob[middle : middle + 64] = bytes(64)
  (copy / 'program.bin').write_bytes(blob)
  change(copy, sha256=sha256(blob).hexdigest())
  with pytest.raises(UnclipError, match=r'cannot (compile|read) it'):
    load_exported(copy).generate(['a', 'b'])


def test_bytes_that_are_no_program_are_refused(copy):
  """As of a later version of jax.export: what it says fits, but it cannot be read."""
  from hashlib import sha256

  (copy / 'program.bin').write_bytes(b'of another serialisation')
  change(copy, sha256=sha256(b'of another serialisation').hexdigest())
  with pytest.raises(UnclipError, match='cannot read it'):
    load_exported(copy)
