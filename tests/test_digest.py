"""The digest of arrays: it sees a bit, and does not see where arrays lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import in_a_process

from unclip_jax import sharding
from unclip_jax.weights.digest import digest

DRAW = np.random.default_rng(0)
TREE = {
  'w': DRAW.normal(size=(8, 16)).astype(np.float32),
  'half': jnp.asarray(DRAW.normal(size=(8, 2, 3)), jnp.bfloat16),
  'mask': DRAW.random(24) < 0.5,
  'step': np.int32(7),
  'none': np.full(8, np.nan, np.float32),
}


def test_each_bit_counts():
  whole, seen = digest(TREE), set()
  for name, leaf in TREE.items():
    if leaf.dtype == bool:
      continue
    raw = bytearray(np.asarray(leaf).tobytes())
    for place in {0, len(raw) // 2, len(raw) - 1}:
      for bit in (0, 7):
        raw[place] ^= 1 << bit
        changed = np.frombuffer(bytes(raw), leaf.dtype).reshape(leaf.shape)
        seen.add(digest(TREE | {name: changed}))
        raw[place] ^= 1 << bit
  assert whole not in seen and len(seen) == 4 * 6
  assert digest(TREE | {'mask': ~TREE['mask']}) != whole
  assert len(whole) == 16 and whole == digest(jax.tree.map(jnp.array, TREE))


@pytest.mark.parametrize('change', [lambda w: w[::-1], lambda w: np.roll(w, 1), lambda w: -w])
def test_numbers_that_change_places_count(change):
  assert digest({'w': change(TREE['w'])}) != digest({'w': TREE['w']})
  assert digest([TREE['w'], TREE['none']]) != digest([TREE['none'], TREE['w']])


def split_over_devices(wanted: str) -> None:
  mesh = sharding.make_mesh(model_devices=2)
  sharding.FSDP_MIN_SIZE = 8
  placed = sharding.place_state(TREE, mesh, fsdp=True)
  assert not placed['w'].is_fully_replicated
  assert digest(placed) == wanted


def test_arrays_that_are_split_have_the_same():
  in_a_process(split_over_devices, digest(TREE))
