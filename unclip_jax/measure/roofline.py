"""The least time that a program can take on a chip, and what it is bound by (Williams et al. 2009).

Products, memory and links are taken to work at once and each at its peak: what is measured takes
longer.
"""

import math
from typing import NamedTuple


class Roofline(NamedTuple):
  """Seconds that each of a chip's parts works, at its peak.

  Attributes:
    products: on matrix products and convolutions.
    memory: on reading and writing its memory.
    links: on sending to other chips.
  """

  products: float
  memory: float
  links: float

  @property
  def seconds(self) -> float:
    """The most of them: the least that all can take."""
    return max(self)

  @property
  def bound(self) -> str:
    """Which of them that is."""
    return max(self._fields, key=lambda name: getattr(self, name))


def roofline(
  matmul_flops: float,
  num_bytes: float,
  sent_bytes: float,
  flops_per_second: float,
  bytes_per_second: float,
  sent_per_second: float,
) -> Roofline:
  """That of one run of a program on each chip; of a chip without links that sends nothing too."""
  seconds_a_byte = 1 / sent_per_second if sent_per_second else math.inf
  links = sent_bytes * seconds_a_byte if sent_bytes else 0.0
  return Roofline(matmul_flops / flops_per_second, num_bytes / bytes_per_second, links)
