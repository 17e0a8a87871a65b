"""Models whose parameters wait in the host's memory."""

import gc

import jax
import numpy as np
from tiny_model import TEXTS, write_tiny_model

import unclip_jax


def test_an_offloaded_model_draws_the_same_and_holds_one_stage_at_a_time(tmp_path):
  folder = write_tiny_model(tmp_path)
  resident = unclip_jax.load(folder)
  sizes = {
    name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    for name, tree in resident.params.items()
  }
  expected = resident.sample(TEXTS, seed=7)
  del resident
  model = unclip_jax.load(folder, offload=True)
  assert set(model.params) == set(sizes) and len(model.params) == len(sizes)
  assert 'prior' in model.params and 'painter' not in model.params
  gc.collect()
  # On a CPU the host's memory is the device's as well: what waits there is of no account. The list
  # is held on to, so that no id of its arrays is given to another one.
  before = jax.live_arrays()
  known, held = set(map(id, before)), {}

  def look(event):
    gc.collect()
    if event.status != 'done':
      ours = [x.nbytes for x in jax.live_arrays() if id(x) not in known]
      held[event.stage, event.status] = sum(ours)

  samples = model.sample(TEXTS, seed=7, progress=look)
  np.testing.assert_array_equal(samples.images, expected.images)
  assert len(held) == 8
  # As a stage begins, those before it are gone, but for what they made.
  for (stage, status), size in held.items():
    if status == 'preparing':
      assert size < min(sizes['decoder'], sizes['upsampler_0']) / 4, (stage, size)
