"""What is known of machines that are not there, and the least time that work takes on them."""

import math

import pytest

from unclip_jax.measure.chips import CHIPS, gpu_slice, tpu_slice
from unclip_jax.measure.roofline import Roofline, roofline
from unclip_jax.types import UnclipError


@pytest.mark.parametrize(
  ('topology', 'num_chips', 'gigabytes'),
  [
    ('v5e:16x16', 256, 200),  # rings along both dimensions
    ('v5e:8x16', 128, 150),  # a line and a ring
    ('v5e:2x2', 4, 100),
    ('v6e:1x4', 4, 100),  # a line alone
    ('v5p:4x4x8', 128, 600),
    ('v5p:2x2x4', 16, 300),  # no whole cube, hence no ring
    ('v4:2x2x1', 4, 100),
    ('v7x:4x4x4', 64, 600),
  ],
)
def test_links_of_a_topology(topology, num_chips, gigabytes):
  found = tpu_slice(topology)
  assert (found.num_chips, found.sent_per_second) == (num_chips, pytest.approx(gigabytes * 1e9))


def test_between_nodes_a_gpu_has_its_part_of_their_ports():
  assert gpu_slice('h100:1').sent_per_second == 0
  assert gpu_slice('h100:8').sent_per_second == 450e9
  assert gpu_slice('h100:16').sent_per_second == 8 * 50e9
  assert gpu_slice('h100:16').num_chips == 16


@pytest.mark.parametrize(
  ('make', 'name', 'message'),
  [
    (tpu_slice, 'v9:2x2', "no TPU 'v9': take one of v4, v5e, v5p, v6e, tpu7x"),
    (tpu_slice, 'h100:2x2', "no TPU 'h100'"),
    (tpu_slice, 'v5e', 'a v5e has 2 dimensions: write v5e:4x4'),
    (tpu_slice, 'v5p:4x4', 'write v5p:4x4x4'),
    (tpu_slice, 'v5e:0x4', 'write v5e:4x4'),
    (gpu_slice, 'v5e:8', "no GPU 'v5e': take one of a100, h100, h200"),
    (gpu_slice, 'h100', 'how many there are, as in h100:8'),
    (gpu_slice, 'h100:0', 'how many there are'),
  ],
)
def test_what_is_not_known_is_a_line(make, name, message):
  with pytest.raises(UnclipError, match=message):
    make(name)


def test_products_in_float32_are_slower():
  for chip in CHIPS.values():
    assert chip.product_speed('bfloat16') > 5 * chip.product_speed('float32')


@pytest.mark.parametrize(
  ('work', 'expected', 'bound'),
  [
    ((100, 10, 10), (10, 0.5, 2), 'products'),
    ((10, 100, 10), (1, 5, 2), 'memory'),
    ((10, 10, 100), (1, 0.5, 20), 'links'),
  ],
)
def test_the_slowest_part_is_the_bound(work, expected, bound):
  found = roofline(*work, 10, 20, 5)
  assert found == Roofline(*expected)
  assert (found.seconds, found.bound) == (max(expected), bound)


def test_without_links_nothing_can_be_sent():
  assert roofline(1, 1, 0, 1, 1, 0).links == 0
  assert math.isinf(roofline(1, 1, 1, 1, 1, 0).seconds)
