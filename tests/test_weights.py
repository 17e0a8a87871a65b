"""Weights files and model folders: what goes in comes out, and each damage is named."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as reference
from safetensors import safe_open

from unclip_jax.types import UnclipError
from unclip_jax.weights.folder import read_manifest, read_stage, write_model
from unclip_jax.weights.safetensors import load_params, save_params, write_atomically

GOLDEN = Path(__file__).parent / 'golden' / 'format_v1'


def make_params() -> dict:
  draw = np.random.default_rng(0)
  return {
    'embed': {'table': jnp.asarray(draw.normal(size=(5, 3)), jnp.float32)},
    'blocks': [{'scale': jnp.asarray(draw.normal(size=3), jnp.bfloat16)}, {'scale': jnp.ones(3)}],
    'count': jnp.asarray(7, jnp.int32),
  }


def expected_of(params):
  return jax.eval_shape(lambda: params)


def assert_same(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def only_files(folder: Path) -> set[str]:
  return {path.name for path in folder.rglob('*') if path.is_file()}


@pytest.fixture
def saved(tmp_path):
  params = make_params()
  save_params(tmp_path / 'prior.safetensors', params)
  return tmp_path / 'prior.safetensors', params


# --- A file.


def test_round_trip_keeps_every_bit(saved):
  path, params = saved
  assert_same(load_params(path, expected_of(params)), params)
  assert only_files(path.parent) == {'prior.safetensors'}


def test_file_opens_with_the_reference_reader(saved):
  path, params = saved
  with safe_open(path, framework='numpy') as file:
    assert set(file.keys()) == {'embed.table', 'blocks.0.scale', 'blocks.1.scale', 'count'}
    assert file.get_slice('blocks.0.scale').get_dtype() == 'BF16'
    np.testing.assert_array_equal(file.get_tensor('embed.table'), params['embed']['table'])


def test_file_may_be_read_by_whom_the_user_lets(saved):
  path, _ = saved
  (path.parent / 'plain').write_text('')
  assert path.stat().st_mode == (path.parent / 'plain').stat().st_mode


def test_same_parameters_give_the_same_bytes(saved, tmp_path):
  path, params = saved
  save_params(tmp_path / 'again.safetensors', params)
  assert path.read_bytes() == (tmp_path / 'again.safetensors').read_bytes()


def test_dtype_casts_floats_alone(tmp_path):
  params = make_params()
  path = tmp_path / 'half.safetensors'
  save_params(path, params, jnp.bfloat16)
  got = load_params(path, expected_of(params))
  assert got['embed']['table'].dtype == jnp.float32
  assert got['count'].dtype == jnp.int32
  rounded = params['embed']['table'].astype(jnp.bfloat16).astype(jnp.float32)
  np.testing.assert_array_equal(got['embed']['table'], rounded)
  half = load_params(path, expected_of(params), jnp.float16)
  assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {
    jnp.dtype('float16'),
    jnp.dtype('int32'),
  }


def test_arrays_go_where_the_expected_ones_are(saved):
  path, params = saved
  place = params['count'].sharding
  like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), params)
  assert all(a.sharding == place for a in jax.tree.leaves(load_params(path, like)))


def test_a_file_of_a_store_is_sent_whole(saved, monkeypatch):
  path, params = saved
  # No bucket is at hand: a local file is treated as if it were in one.
  monkeypatch.setattr('unclip_jax.weights.safetensors.is_remote', lambda path: True)
  save_params(path.with_name('copy.safetensors'), params)
  assert path.with_name('copy.safetensors').read_bytes() == path.read_bytes()
  assert only_files(path.parent) == {'prior.safetensors', 'copy.safetensors'}


def test_two_parameters_of_one_stored_name_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r'a\.b'):
    save_params(tmp_path / 'x.safetensors', {'a.b': jnp.ones(1), 'a': {'b': jnp.ones(1)}})


# --- A damaged file.


def test_missing_file_is_named(tmp_path):
  with pytest.raises(UnclipError, match=r'no weights file .*nope\.safetensors'):
    load_params(tmp_path / 'nope.safetensors', {})


@pytest.mark.parametrize('part', [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_file_is_named(saved, part):
  path, params = saved
  whole = path.read_bytes()
  path.write_bytes(whole[: int(len(whole) * part)])
  with pytest.raises(UnclipError, match=r'prior\.safetensors is cut short'):
    load_params(path, expected_of(params))


def test_a_pointer_of_git_lfs_is_named(tmp_path):
  path = tmp_path / 'prior.safetensors'
  path.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 12345\n')
  with pytest.raises(UnclipError, match=r'prior\.safetensors is a pointer .*git lfs pull'):
    load_params(path, {})


@pytest.mark.parametrize('content', [b'\x89PNG\r\n\x1a\n' + bytes(64), b'{"a": 1}', b'PK\x03\x04'])
def test_file_of_another_format_is_named(tmp_path, content):
  path = tmp_path / 'prior.safetensors'
  path.write_bytes(content)
  with pytest.raises(UnclipError, match='not a safetensors file'):
    load_params(path, {'a': jax.ShapeDtypeStruct((1,), jnp.float32)})


def test_folder_in_place_of_a_file_is_named(tmp_path):
  (tmp_path / 'prior.safetensors').mkdir()
  with pytest.raises(UnclipError, match=r'prior\.safetensors'):
    load_params(tmp_path / 'prior.safetensors', {})


def test_missing_and_extra_tensors_are_named(saved):
  path, params = saved
  with pytest.raises(UnclipError, match=r'prior\.safetensors lacks head\.bias'):
    load_params(path, expected_of(params | {'head': {'bias': jnp.ones(2)}}))
  with pytest.raises(UnclipError, match=r'has embed\.table, which nothing asks for'):
    load_params(path, expected_of({k: v for k, v in params.items() if k != 'embed'}))


def test_many_missing_tensors_make_one_line(saved):
  path, params = saved
  more = {f'head_{i}': jnp.ones(2) for i in range(20)}
  with pytest.raises(UnclipError, match='and 17 more') as error:
    load_params(path, expected_of(params | more))
  assert '\n' not in str(error.value)


def test_misshapen_tensor_is_named(saved):
  path, params = saved
  params = params | {'embed': {'table': jnp.ones((3, 5))}}
  with pytest.raises(UnclipError, match=r'embed\.table has the shape \[5, 3\], wanted is \[3, 5\]'):
    load_params(path, expected_of(params))


def test_whole_numbers_are_not_read_as_floats(saved):
  path, params = saved
  with pytest.raises(UnclipError, match='count is int32, wanted is float32'):
    load_params(path, expected_of(params | {'count': jnp.float32(7)}))


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_nan_is_named(tmp_path, value, dtype):
  path = tmp_path / 'prior.safetensors'
  bad = np.ones((3, 2), jnp.dtype(dtype))
  bad[1, 1] = value
  reference.save_file({'a.w': np.ones(2, np.float32), 'b.w': bad}, path)
  expected = expected_of({'a': {'w': jnp.ones(2)}, 'b': {'w': jnp.ones((3, 2))}})
  with pytest.raises(UnclipError, match=r'prior\.safetensors: b\.w holds a NaN'):
    load_params(path, expected)


def test_nan_is_not_written(tmp_path):
  with pytest.raises(UnclipError, match=r'a\.w holds a NaN'):
    save_params(tmp_path / 'x.safetensors', {'a': {'w': jnp.array([1.0, jnp.nan])}})
  assert not list(tmp_path.iterdir())


def test_a_value_too_large_for_the_new_type_is_named(tmp_path):
  path = tmp_path / 'x.safetensors'
  save_params(path, {'w': jnp.array([1.0, 1e6])})
  with pytest.raises(UnclipError, match='w holds a NaN or an infinity as float16'):
    load_params(path, expected_of({'w': jnp.ones(2)}), jnp.float16)


# --- Writing.


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / 'sub' / 'x.json'
  write_atomically(path, lambda part: part.write_text('old'))

  def fail(part):
    part.write_text('half')
    raise OSError(28, 'No space left on device')

  with pytest.raises(UnclipError, match='No space left on device'):
    write_atomically(path, fail)
  assert only_files(tmp_path) == {'x.json'}
  assert path.read_text() == 'old'


def test_full_disk_leaves_nothing(tmp_path):
  # A limit on the size of files stands for the full disk; in a process of its own, it stays there.
  script = f"""
import resource, jax.numpy as jnp
from unclip_jax.weights.safetensors import save_params
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
save_params({str(tmp_path / 'x.safetensors')!r}, {{'w': jnp.ones((100, 100))}})
"""
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert 'UnclipError: cannot write' in done.stderr
  assert not list(tmp_path.iterdir())
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 10_000


def test_unwritable_folder_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UnclipError, match=r'cannot write .*x\.safetensors'):
    save_params(tmp_path / 'file' / 'x.safetensors', {'w': jnp.ones(2)})


# --- A folder.


@pytest.fixture
def model(tmp_path):
  (tmp_path / 'vocabulary.json').write_text('{}')
  folder = tmp_path / 'model'
  params = {'prior': make_params(), 'decoder': {'w': jnp.ones((2, 2))}}
  write_model(folder, {'prior': {'width': 3}}, params, tmp_path / 'vocabulary.json')
  return folder, params


def edit(folder: Path, **changes) -> None:
  path = folder / 'unclip.json'
  fields = json.loads(path.read_text())
  fields.update(changes)
  path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def test_folder_round_trip(model):
  folder, params = model
  manifest = read_manifest(folder)
  assert manifest.config == {'prior': {'width': 3}}
  assert set(manifest.stages) == {'prior', 'decoder'}
  assert manifest.tokenizer.read_text() == '{}'
  for name, stage in params.items():
    assert_same(read_stage(folder, name, expected_of(stage)), stage)
  assert only_files(folder) == {
    'unclip.json',
    'tokenizer.json',
    'prior.safetensors',
    'decoder.safetensors',
  }


def test_folder_is_written_over_itself(model):
  folder, params = model
  write_model(folder, {'new': 1}, params, folder / 'tokenizer.json', jnp.bfloat16)
  assert read_manifest(folder).config == {'new': 1}
  assert read_manifest(folder).tokenizer.read_text() == '{}'


def test_a_folder_may_have_a_vocabulary(model):
  folder, params = model
  assert read_manifest(folder).vocabulary is None
  words = {'words': ['crêpe', 'ant']}
  write_model(folder, {}, params, folder / 'tokenizer.json', vocabulary=words)
  path = read_manifest(folder).vocabulary
  assert path == folder / 'vocabulary.json'
  assert json.loads(path.read_text(encoding='utf-8')) == words
  write_model(folder, {}, params, folder / 'tokenizer.json')
  assert read_manifest(folder).vocabulary is None


def test_a_stage_joins_those_that_are_there(model):
  folder, params = model
  more = {'w': jnp.ones(3)}
  write_model(folder, {}, {'upsampler': more}, folder / 'tokenizer.json', keep=('prior', 'decoder'))
  assert set(read_manifest(folder).stages) == {'prior', 'decoder', 'upsampler'}
  assert_same(read_stage(folder, 'upsampler', expected_of(more)), more)
  assert_same(read_stage(folder, 'prior', expected_of(params['prior'])), params['prior'])


def test_folder_of_the_first_format_version_opens():
  # Written by hand from the description of the format: tests/golden/make_format_v1.py.
  manifest = read_manifest(GOLDEN)
  assert manifest.config == {'prior': {'width': 3}, 'decoder': {'channels': [1, 2]}}
  assert json.loads(manifest.tokenizer.read_text())['model']['vocab']['apple'] == 2
  prior = {
    'blocks_0': {
      'attention': {'kernel': jnp.array([[0.5, -1.25, 2.0], [3.5, -0.75, 1.0]], jnp.float32)},
      'norm': {'scale': jnp.array([1.0, 0.5, -1.5], jnp.bfloat16)},
    },
    'statistics': {'count': jnp.int32(7)},
  }
  assert_same(read_stage(GOLDEN, 'prior', expected_of(prior)), prior)
  decoder = {'out': {'bias': jnp.array([0.25, -8.0], jnp.float16)}}
  assert_same(read_stage(GOLDEN, 'decoder', expected_of(decoder)), decoder)


def test_missing_folder_and_missing_manifest_are_named(tmp_path):
  with pytest.raises(UnclipError, match=r'no model folder .*nope'):
    read_manifest(tmp_path / 'nope')
  with pytest.raises(UnclipError, match=r'is not a model: it has no unclip\.json'):
    read_manifest(tmp_path)


def test_broken_manifest_is_named(model):
  folder, _ = model
  text = (folder / 'unclip.json').read_text()
  (folder / 'unclip.json').write_text(text[:-20])
  with pytest.raises(UnclipError, match=r'unclip\.json is not valid JSON'):
    read_manifest(folder)
  (folder / 'unclip.json').write_bytes(b'\xff\xfe\x00')
  with pytest.raises(UnclipError, match=r'unclip\.json is not valid JSON'):
    read_manifest(folder)
  (folder / 'unclip.json').write_text('[]')
  with pytest.raises(UnclipError, match='not a JSON object'):
    read_manifest(folder)


@pytest.mark.parametrize('changes, message', [
  ({'format_version': 2}, 'format version 2.*upgrade'),
  ({'format_version': '1'}, "format_version is '1'"),
  ({'format_version': True}, 'format_version is True'),
  ({'format_version': None}, 'format_version is None'),
  ({'colour': 'red'}, 'unknown keys: colour'),
  ({'stages': None}, 'lacks stages'),
  ({'stages': ['prior']}, 'must be JSON objects'),
  ({'stages': {'prior': 'gone.safetensors'}}, r'names gone\.safetensors, which is not there'),
  ({'vocabulary': 'gone.json'}, r'names gone\.json, which is not there'),
])  # fmt: skip
def test_invalid_manifest_is_named(model, changes, message):
  folder, _ = model
  edit(folder, **changes)
  with pytest.raises(UnclipError, match=message):
    read_manifest(folder)


@pytest.mark.parametrize(
  'name', ['../x', 'a/../../x', '/etc/passwd', '..\\x', 'C:\\x', 'gs://bucket/x', '', 3]
)
def test_path_out_of_the_folder_is_refused(model, name):
  folder, _ = model
  for changes in ({'vocabulary': name}, {'stages': {'prior': name}}):
    edit(folder, **changes)
    with pytest.raises(UnclipError, match='only files inside of the folder'):
      read_manifest(folder)
    edit(folder, vocabulary=None)


def test_unknown_stage_is_named(model):
  folder, _ = model
  with pytest.raises(UnclipError, match="no stage 'painter': it has decoder, prior"):
    read_stage(folder, 'painter', {})


def test_missing_tokenizer_writes_nothing(tmp_path):
  with pytest.raises(UnclipError, match='no tokenizer'):
    write_model(tmp_path / 'm', {}, {'prior': {'w': jnp.ones(1)}}, tmp_path / 'nope.json')
  assert not (tmp_path / 'm').exists()
