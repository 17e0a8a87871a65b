"""What devices send, read off programs: those of a CPU, and what only other compilers write."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec
from processes import in_a_process

from unclip_jax.measure.collectives import Traffic, program_collectives, sent_bytes
from unclip_jax.sharding import DATA_AXIS, make_mesh
from unclip_jax.types import UnclipError

ROWS, WIDTH, TURNS = 64, 24, 3
LOCAL = ROWS // 8 * WIDTH * 4  # bytes of a device


def check_exchanges():
  mesh, split = make_mesh(), PartitionSpec(DATA_AXIS)
  turn = [(i, (i + 1) % 8) for i in range(8)]

  def turned(x):
    return lax.scan(lambda c, _: (lax.ppermute(c, DATA_AXIS, turn), None), x, None, TURNS)[0]

  cases = {
    'all-reduce': (lambda x: lax.psum(x, DATA_AXIS), 1, 2 * 7 / 8 * LOCAL),
    'all-gather': (lambda x: lax.all_gather(x, DATA_AXIS).sum(axis=0), 1, 7 * LOCAL),
    'reduce-scatter': (
      lambda x: lax.psum_scatter(x, DATA_AXIS, tiled=True), 1, 7 / 8 * LOCAL
    ),
    'all-to-all': (lambda x: lax.all_to_all(x, DATA_AXIS, 0, 0, tiled=True), 1, 7 / 8 * LOCAL),
    'collective-permute': (turned, TURNS, TURNS * LOCAL),
  }  # fmt: skip
  x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)
  for kind, (fn, count, num_bytes) in cases.items():
    mapped = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=split, out_specs=split))
    found = program_collectives(mapped.lower(x).compile().as_text(), 8)
    assert found == {kind: Traffic(count, num_bytes)}, (kind, found)


def test_what_is_sent_is_what_the_program_exchanges():
  in_a_process(check_exchanges)


# Asynchronous, in groups, in fusions: in the notation of the compilers for GPUs and TPUs.
TEXT = """HloModule jit_f, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: bf16[64,16]) -> bf16[16,16] {
  %p = bf16[64,16]{1,0:T(8,128)S(1)} parameter(0)
  %r = bf16[64,16]{1,0} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %d = bf16[16,16]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={16,16}
}

%piece.1 (p.3: f32[8]) -> f32[16] {
  %p.3 = f32[8]{0} parameter(0)
  ROOT %g.1 = f32[16]{0} all-gather(%p.3), channel_id=7, replica_groups=mesh['a'=4,'b'=4] {'b':(2)2}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%piece.2 (p.4: f32[8]) -> f32[16] {
  %p.4 = f32[8]{0} parameter(0)
  ROOT %g.2 = f32[16]{0} all-gather(%p.4), channel_id=7, replica_groups=mesh['a'=4,'b'=4] {'b':(2)2}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%cheap (p.1: f32[8]) -> f32[8] {
  ROOT %p.1 = f32[8]{0} parameter(0)
}

%dear (p.2: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %moved = f32[8]{0} collective-permute(%p.2), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (x: bf16[64,16], y: f32[8], i: s32[]) -> f32[8] {
  %x = bf16[64,16]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %i = s32[] parameter(2)
  %start = (bf16[64,16]{1,0}, bf16[128,16]{1,0}) all-gather-start(%x), replica_groups=[4,2]<=[8], dimensions={0}
  %done = bf16[128,16]{1,0} all-gather-done(%start)
  %part = bf16[16,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %moved.1 = f32[8]{0} all-to-all(%y), channel_id=8, replica_groups=mesh['a'=4,'b'=2] {'a','b'}, dimensions={0}
  %first = f32[16]{0} fusion(%y), kind=kCustom, calls=%piece.1
  %second = f32[16]{0} fusion(%y), kind=kCustom, calls=%piece.2
  %sums = (f32[8]{0}, bf16[64,16]{1,0}) all-reduce(%y, %x), replica_groups={}, to_apply=%add
  ROOT %out = f32[8]{0} conditional(%i, %y, %y), branch_computations={%cheap, %dear}
}
"""  # noqa: E501


def test_groups_fusions_and_branches():
  found = program_collectives(TEXT, 8)
  x, y = 64 * 16 * 2, 8 * 4
  assert found == {
    'all-gather': Traffic(2, x + y),  # one of them made in two parts
    'all-reduce': Traffic(1, 2 * 7 / 8 * (x + y)),
    'all-to-all': Traffic(1, 7 / 8 * y),
    'collective-permute': Traffic(1, y),
    'reduce-scatter': Traffic(1, 3 / 4 * x),
  }
  assert sent_bytes(found) == sum(traffic.bytes for traffic in found.values())


def test_groups_in_another_notation_are_an_error():
  with pytest.raises(UnclipError, match='start: its groups of devices cannot be read'):
    program_collectives(TEXT.replace('[4,2]<=[8]', '@mesh'), 8)


def test_one_device_sends_nothing():
  twice = functools.partial(jnp.multiply, 2.0)
  assert program_collectives(jax.jit(twice).lower(jnp.ones(3)).compile().as_text(), 1) == {}
