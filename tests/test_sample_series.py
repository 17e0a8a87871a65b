"""Series of pictures from Python: a seed and an index for each prompt, a batch at a time."""

import itertools

import jax
import numpy as np
import pytest
from tiny_model import TEXTS, levels_apart, make_params, write_tiny_model

import unclip_jax
from unclip_jax.systems import programs
from unclip_jax.systems.series import Item, fingerprint, sample_series
from unclip_jax.types import UnclipError

APPLE, ROCKET, _ = TEXTS
# Apart enough to tell pictures by, near enough to be the same ones but for rounding.
SAME, ANOTHER = 1, 30


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return unclip_jax.load(write_tiny_model(tmp_path_factory.mktemp('model')))


def test_each_prompt_may_have_its_seed_and_first_image(model):
  how = {'size': 16, 'batch_size': 2}
  several = model.sample([APPLE, ROCKET], [7, 8], 2, first_image=[0, 5], **how)
  assert several.indices.tolist() == [0, 1, 5, 6]
  for prompt, seed, first, rows in ((APPLE, 7, 0, slice(2)), (ROCKET, 8, 5, slice(2, 4))):
    alone = model.sample(prompt, seed, 2, first_image=first, **how)
    assert levels_apart(several.images[rows], alone.images) <= SAME
    another = model.sample(prompt, seed + 1, 2, first_image=first, **how)
    assert levels_apart(several.images[rows], another.images) > ANOTHER


def test_keys_of_several_seeds_are_those_of_each():
  indices = np.array([0, 3, 3], np.uint32)
  keys = programs.image_keys(np.array([1, 1, 2**32 - 1], np.uint32), indices)
  for i, seed in enumerate((1, 1, 2**32 - 1)):
    wanted = jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), indices[i])
    assert jax.random.key_data(keys)[i].tolist() == jax.random.key_data(wanted).tolist()


@pytest.mark.parametrize(
  ('options', 'match'),
  [
    ({'seed': [1, 2, 3]}, 'there are 3 of the seed and 2 prompts'),
    ({'seed': [1, -2]}, 'seed is -2'),
    ({'first_image': [1]}, 'there are 1 of the index'),
    ({'first_image': [0, 2**32 - 1], 'num_images': 2}, 'last image is 4294967296'),
  ],
)
def test_seeds_that_cannot_be(model, options, match):
  with pytest.raises(UnclipError, match=match):
    model.sample([APPLE, ROCKET], **options)


def test_a_series_without_end_is_drawn_a_batch_at_a_time(model):
  taken = itertools.count()

  def items():
    for prompt in itertools.cycle([APPLE, ROCKET]):
      yield Item(prompt, seed=3, index=next(taken))

  series = sample_series(model, items(), size=16, batch_size=2)
  for first in (0, 2, 4):
    drawn, samples = next(series)
    assert [item.index for item in drawn] == samples.indices.tolist() == [first, first + 1]
    assert samples.images.shape == (2, 16, 16, 3)
  assert next(taken) == 6
  alone = model.sample(ROCKET, 3, 2, first_image=5, size=16, batch_size=2)
  assert levels_apart(samples.images[1], alone.images[0]) <= SAME


def test_one_program_serves_a_series(model):
  wanted = [Item(prompt, index=index) for prompt in TEXTS for index in range(3)]
  list(sample_series(model, wanted[:1], size=16, batch_size=2))
  before = programs.sample_decoder._cache_size()
  sizes = [len(batch) for batch, _ in sample_series(model, wanted, size=16, batch_size=2)]
  assert sizes == [2, 2, 2, 2, 1]
  assert programs.sample_decoder._cache_size() == before


def test_nothing_is_compiled_to_tell_a_model(model):
  assert any(leaf.size > 4096 for leaf in jax.tree.leaves(model.params))
  compiled = []

  def listen(event, **_):
    if event == '/jax/compilation_cache/compile_requests_use_cache':
      compiled.append(event)

  jax.clear_caches()
  jax.monitoring.register_event_listener(listen)
  try:
    fingerprint(model)
    assert not compiled
    jax.numpy.ones(5).reshape(-1)[::2]
    assert compiled
  finally:
    jax.monitoring.unregister_event_listener(listen)


def test_a_model_is_told_from_another(model, tmp_path):
  assert fingerprint(model) == fingerprint(unclip_jax.load(write_tiny_model(tmp_path / 'same')))
  for change in (change_a_bias, change_a_kernel):
    params = jax.tree.map(np.array, make_params()['prior'])
    change(params['network'])
    other = type(model)(model.config, {**model.params, 'prior': params}, model.tokenizer)
    assert fingerprint(other) != fingerprint(model)


def change_a_bias(network):
  network['query'] += np.float32(1e-6)


def change_a_kernel(network):
  """As adapters do: of many numbers, and of nothing else."""
  kernel = network['blocks']['block_0']['mlp_in']['kernel']
  assert kernel.size >= 4096
  kernel += np.float32(1e-3)
