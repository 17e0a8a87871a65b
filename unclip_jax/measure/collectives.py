"""What devices send each other in a compiled program, read off XLA's HLO text: kinds, and bytes.

Bytes are those that a device sends. Of an array of n bytes in a group of d devices they are, for
the algorithms that send least (Thakur et al. 2005, section 4):

- all-gather: (d - 1) times the part that a device has, n / d;
- reduce-scatter and all-to-all: (d - 1) / d of n, which it begins with;
- all-reduce: both of them, 2 (d - 1) / d of n;
- a permutation or a broadcast: n.

What a loop sends counts as often as the loop runs.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from unclip_jax.measure.hlo import collective_kind
from unclip_jax.measure.hlo_text import Computation, Instruction, parse, trip_count
from unclip_jax.types import UnclipError

_CHAINED = re.compile(r'channel_id=(\d+).*frontend_attributes=\{[^}]*\bchain_id=')


class Traffic(NamedTuple):
  """Of one kind of exchange, in one run of a program.

  Attributes:
    count: how often there is one.
    bytes: that each device sends in all of them.
  """

  count: float
  bytes: float


def program_collectives(text: str, num_devices: int) -> dict[str, Traffic]:
  """What each device sends in one run of a program, by kinds in the order of the alphabet.

  Args:
    text: optimised HLO, `compiled.as_text()`.
    num_devices: that run it: the group of an exchange that names none.

  Raises:
    UnclipError: it is no HLO, it has a loop of which the text does not say how often it runs, or an
      exchange whose groups are written in an unknown way.
  """
  module = parse(text)
  chained: set[str] = set()

  @functools.cache
  def total(name: str) -> Mapping[str, Traffic]:
    computation = module.computations[name]
    # TPUs scatter what they reduce in a fusion, of all that is reduced and a slice of it.
    is_scattered = name.startswith('all-reduce-scatter')
    return _sum(of(computation, one, is_scattered) for one in computation.instructions.values())

  def of(computation: Computation, one: Instruction, is_scattered: bool) -> Mapping[str, Traffic]:
    kind = collective_kind(one)
    if kind is not None:
      # TPUs make one in parts, in fusions with other work: each of them names it.
      if (channel := _CHAINED.search(one.attributes)) is not None:
        if channel[1] in chained:
          return {}
        chained.add(channel[1])
      kind = 'reduce-scatter' if is_scattered and kind == 'all-reduce' else kind
      operands = [computation.instructions[name] for name in one.operands]
      size = sum(shape.size for operand in operands for shape in operand.shapes)
      return {kind: Traffic(1, _sent(kind, size, _group_size(one, num_devices)))}
    match one.opcode:
      case 'while':
        n = trip_count(module, one)
        (body,), (condition,) = one.names('body'), one.names('condition')
        return _sum([_times(total(body), n), _times(total(condition), n + 1)])
      case 'conditional':
        return max(map(total, one.called), key=sent_bytes)
      case 'fusion' | 'call' | 'async-start':
        return _sum(map(total, one.called))
    return {}

  return dict(sorted(total(module.entry).items()))


def sent_bytes(collectives: Mapping[str, Traffic]) -> float:
  """Of all kinds together."""
  return sum(traffic.bytes for traffic in collectives.values())


def _sum(parts: Iterable[Mapping[str, Traffic]]) -> dict[str, Traffic]:
  found: dict[str, Traffic] = {}
  for part in parts:
    for kind, (count, num_bytes) in part.items():
      before = found.get(kind, Traffic(0, 0))
      found[kind] = Traffic(before.count + count, before.bytes + num_bytes)
  return found


def _times(traffic: Mapping[str, Traffic], n: int) -> dict[str, Traffic]:
  return {kind: Traffic(n * each.count, n * each.bytes) for kind, each in traffic.items()}


def _sent(kind: str, size: float, group: int) -> float:
  others = group - 1
  match kind:
    case 'all-gather':
      return others * size
    case 'reduce-scatter' | 'all-to-all' | 'ragged-all-to-all':
      return others / group * size
    case 'all-reduce':
      return 2 * others / group * size
  return size


def _group_size(one: Instruction, num_devices: int) -> int:
  """Devices that exchange with each other: of groups that are listed, or told by their number."""
  if listed := re.search(r'replica_groups=\{\{([\d,\s]*)\}', one.attributes):
    return listed[1].count(',') + 1
  if numbered := re.search(r'replica_groups=\[([\d,]+)\]<=', one.attributes):
    dims = [int(n) for n in numbered[1].split(',')]
    return math.prod(dims[1:])
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{}]*\{('[^}]*)\}", one.attributes):
    sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
    # An axis, or of it the part that its size in brackets comes before: 'a':(2)4.
    axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part or sizes[name]) for name, part in axes)
  if 'replica_groups={}' in one.attributes or 'replica_groups=' not in one.attributes:
    return num_devices
  groups = re.search(r'replica_groups=\S*', one.attributes)
  raise UnclipError(f'{one.name}: its groups of devices cannot be read: {groups[0]}')
