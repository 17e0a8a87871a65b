"""What a compiled program costs, and whether its loops make devices wait: read off XLA's HLO text.

XLA's own analysis takes the body of a loop once. Here it counts as often as it runs. Else the
conventions are XLA's (`HloCostAnalysis`), but that the branch of a conditional that costs most
stands for all, and that an exponential, a sine and the like count as one operation among the rest:

- a product of matrices, [m, k] by [k, n], has 2 m k n operations; a convolution two for each pair
  of a weight and a number that it meets, so that neither padding nor the holes of a dilation count;
- an elementwise operation has one an element;
- memory is read and written by the instructions outside of fusions, a fusion's operands and results
  once; a slice touches what it takes, and an update in place what it writes.

It is the text of `jax.stages.Compiled.as_text()`, of CPUs, GPUs (cuBLAS and cuDNN included) and
TPUs.
"""

import dataclasses
import functools
import math
import re

from unclip_jax.measure.hlo_text import Computation, Instruction, parse, trip_count

_ELEMENTWISE = re.compile(
  r"""abs|acos|acosh|add|and|asin|asinh|atan2|atanh|cbrt|ceil|clamp|compare|complex|convert|cosh|cosine
  |count-leading-zeros|divide|erf|exponential|exponential-minus-one|floor|imag|is-finite|log
  |log-plus-one|logistic|maximum|minimum|multiply|negate|not|or|popcnt|power|real|reduce-precision
  |remainder|round-nearest-afz|round-nearest-even|rsqrt|select|shift-left|shift-right-arithmetic
  |shift-right-logical|sign|sine|sinh|sqrt|stochastic-convert|subtract|tan|tanh|xor""",
  re.VERBOSE,
)
# What gives memory another name, and what only waits for an instruction that has been counted.
_NO_MEMORY = re.compile(
  r"""add-dependency|after-all|bitcast|constant|domain|get-dimension-size|get-tuple-element
  |opt(imization)?-barrier|parameter|partition-id|replica-id|tuple|.*-done|.*-update""",
  re.VERBOSE,
)
_COLLECTIVE = re.compile(
  r"""(all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all
  |recv|reduce-scatter|send)(-start)?""",
  re.VERBOSE,
)
_SLICES = ('dynamic-slice', 'gather', 'slice')
_ATTENTION = '__cudnn$fmha'  # a forward pass; those of a backward pass go on with 'Backward'


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a program does in one run, on each device.

  Attributes:
    flops: floating-point and other arithmetic operations, a multiply-add as two.
    bytes: read from memory and written to it.
    matmul_flops: those of `flops` that are of matrix products and convolutions.
  """

  flops: float = 0.0
  bytes: float = 0.0
  matmul_flops: float = 0.0

  def __add__(self, other: 'Cost') -> 'Cost':
    return Cost(
      self.flops + other.flops, self.bytes + other.bytes, self.matmul_flops + other.matmul_flops
    )

  def times(self, n: float) -> 'Cost':
    """That of n runs."""
    return Cost(n * self.flops, n * self.bytes, n * self.matmul_flops)


def program_cost(text: str) -> Cost:
  """What one run of a program costs on each device.

  Args:
    text: optimised HLO, `compiled.as_text()`.

  Raises:
    UnclipError: it is no HLO, or it has a loop of which the text does not say how often it runs.
  """
  module = parse(text)

  @functools.cache
  def total(name: str) -> Cost:
    computation = module.computations[name]
    costs = (of(computation, one) for one in computation.instructions.values())
    return sum(costs, start=Cost())

  def of(computation: Computation, one: Instruction) -> Cost:
    match one.opcode:
      case 'fusion':
        inside = total(one.called[0])
        moved = _fusion_bytes(computation, one, module.computations[one.called[0]])
        return dataclasses.replace(inside, bytes=moved)
      case 'while':
        (body,), (condition,) = one.names('body'), one.names('condition')
        n = trip_count(module, one)
        return total(body).times(n) + total(condition).times(n + 1)
      case 'conditional':
        return max(map(total, one.called), key=lambda cost: (cost.flops, cost.bytes))
      case 'call' | 'async-start':
        return sum(map(total, one.called), start=Cost())
    matmul = _matmul_flops(computation, one)
    return Cost(matmul + _other_flops(computation, one, total), _bytes(computation, one), matmul)

  return total(module.entry)


def loop_collectives(text: str) -> list[str]:
  """Names of the instructions within loops for which devices wait for each other.

  Args:
    text: optimised HLO, `compiled.as_text()`.

  Returns:
    Collectives, sends and receives that the body or the condition of a loop reaches, in the order
    of the text; an asynchronous one by its start.

  Raises:
    UnclipError: it is no HLO.
  """
  module = parse(text)
  instructions = [i for c in module.computations.values() for i in c.instructions.values()]
  reached: set[str] = set()
  new = [name for i in instructions if i.opcode == 'while' for name in i.called]
  while new:
    name = new.pop()
    if name not in reached:
      reached.add(name)
      for instruction in module.computations[name].instructions.values():
        new.extend(instruction.called)
  return [
    instruction.name
    for name, computation in module.computations.items()
    if name in reached
    for instruction in computation.instructions.values()
    if collective_kind(instruction) is not None
  ]


def collective_kind(one: Instruction) -> str | None:
  """As what devices exchange something: all-gather, send, ...; None where they do not.

  An asynchronous one counts by its start.
  """
  found = _COLLECTIVE.fullmatch(one.opcode)
  return found[1] if found else None


def _matmul_flops(computation: Computation, one: Instruction) -> float:
  """Of a matrix product or a convolution, also where a library of the device makes it."""
  target = one.target
  if one.opcode == 'dot':
    return _dot_flops(computation, one, 'lhs_contracting_dims')
  if one.opcode == 'convolution' or target.startswith('__cudnn$conv'):
    shapes = [computation.shape(one, 0), computation.shape(one, 1), one.shapes[0]]
    # Input, kernel and output of the forward convolution, which the labels are of.
    if target.endswith('BackwardInput'):
      shapes = [shapes[2], shapes[1], shapes[0]]
    elif target.endswith('BackwardFilter'):
      shapes = [shapes[0], shapes[2], shapes[1]]
    return _convolution_flops(one, *(shape.dims for shape in shapes))
  if target.startswith('__cublas$'):
    return _dot_flops(computation, one, 'lhs_contracting_dimensions')
  if target == '__onednn$matmul':
    return 2.0 * one.shapes[0].elements * computation.shape(one, 0).dims[-1]
  if target.startswith(_ATTENTION) and 'Backward' not in target:
    # bmm1 is of queries and keys, bmm2 of their softmax and the values: as many operations.
    q, k = computation.shape(one, 0), computation.shape(one, 1)
    paired = one.numbers('rhs_batch_dimensions') + one.numbers('rhs_contracting_dimensions')
    num_keys = math.prod(d for i, d in enumerate(k.dims) if i not in paired)
    return 2.0 * (q.elements + one.shapes[0].elements) * num_keys
  return 0.0


def _dot_flops(computation: Computation, one: Instruction, contracting: str) -> float:
  lhs = computation.shape(one, 0)
  summed = math.prod(lhs.dims[i] for i in one.numbers(contracting))
  return 2.0 * one.shapes[0].elements * summed


def _convolution_flops(
  one: Instruction, image: tuple[int, ...], kernel: tuple[int, ...], out: tuple[int, ...]
) -> float:
  labels = re.search(r'dim_labels=([^_]+)_([^-]+)->(\w+)', one.attributes)
  window = re.search(r'window=\{([^}]*)\}', one.attributes)
  fields = dict(field.split('=') for field in window[1].split()) if window else {}
  taps = 1
  for i in range(len(out) - 2):

    def along(name: str, default: str, i: int = i) -> str:
      return fields[name].split('x')[i] if name in fields else default

    low, _ = along('pad', '0_0').split('_')
    taps *= _taps(
      image[labels[1].index(str(i))],
      kernel[labels[2].index(str(i))],
      out[labels[3].index(str(i))],
      int(along('stride', '1')),
      int(low),
      int(along('lhs_dilate', '1')),
      int(along('rhs_dilate', '1')),
    )
  batch = image[labels[1].index('b')] // one.number('batch_group_count')
  channels = kernel[labels[2].index('i')] * out[labels[3].index('f')]
  return 2.0 * batch * channels * taps


@functools.lru_cache(4096)
def _taps(
  image: int, kernel: int, out: int, stride: int, low: int, image_dilation: int, dilation: int
) -> int:
  """How many pairs of an output and a weight meet a number of the image, along one axis."""
  meets = 0
  for k in range(kernel):
    for o in range(out):
      where, hole = divmod(o * stride - low + k * dilation, image_dilation)
      meets += hole == 0 and 0 <= where < image
  return meets


def _other_flops(computation: Computation, one: Instruction, total) -> float:
  """Of what is no matrix product."""
  if _ELEMENTWISE.fullmatch(one.opcode):
    return one.elements
  if one.opcode in ('reduce', 'reduce-window', 'map', 'scatter', 'select-and-scatter'):
    each = sum(total(name).flops for name in one.called)
    match one.opcode:
      case 'reduce':
        inputs = one.operands[: len(one.operands) // 2]
        n = sum(computation.instructions[name].elements for name in inputs) - one.elements
        n /= len(inputs)
      case 'reduce-window':
        window = re.search(r'size=([\dx]+)', one.attributes)
        size = math.prod(map(int, window[1].split('x'))) if window else 1
        n = one.shapes[0].elements * (size - 1)
      case 'map':
        n = one.elements
      case _:
        n = computation.operand(one, len(one.operands) - 1).elements
    return n * each
  if one.opcode == 'sort':
    n = computation.shape(one, 0).elements
    return n * math.ceil(math.log2(max(n, 2)))
  return 0.0


def _bytes(computation: Computation, one: Instruction) -> float:
  """What an instruction outside of a fusion reads and writes."""
  if _NO_MEMORY.fullmatch(one.opcode):
    return 0.0
  operands = [computation.instructions[name] for name in one.operands]
  if one.opcode.endswith('-start'):  # gives back its operands and what it keeps, too
    return 2.0 * sum(operand.bytes for operand in operands)
  if one.opcode in _SLICES:
    return 2.0 * one.bytes + sum(operand.bytes for operand in operands[1:])
  if one.opcode == 'dynamic-update-slice':
    return 2.0 * operands[1].bytes
  # What a library is lent to work in is not counted.
  is_library = one.target.startswith(('__cu', '__onednn'))
  written = sum(shape.bytes for shape in one.shapes[: 1 if is_library else None])
  return written + sum(operand.bytes for operand in operands)


def _fusion_bytes(computation: Computation, one: Instruction, inner: Computation) -> float:
  """A fusion's operands as far as they are looked at, and its results as far as they change."""
  moved = 0.0
  for parameter in inner.instructions.values():
    if parameter.opcode == 'parameter':
      whole = computation.operand(one, int(parameter.literal)).bytes
      parts = [_read_part(inner, *use) for use in inner.users(parameter.name)]
      moved += whole if None in parts else min(whole, sum(parts))
  results = [inner.root]
  if inner.root.opcode == 'tuple':
    results = [inner.instructions[name] for name in inner.root.operands]
  for result in results:
    while result.opcode == 'bitcast':
      result = inner.operand(result, 0)
    in_place = result.opcode == 'dynamic-update-slice'
    moved += inner.operand(result, 1).bytes if in_place else result.bytes
  return moved


def _read_part(inner: Computation, user: Instruction, index: int) -> float | None:
  """What a fused instruction reads of its operand; None for all."""
  if index == 0 and user.opcode in _SLICES:
    return user.bytes
  if index == 0 and user.opcode == 'dynamic-update-slice':
    return 0.0  # the rest of it is there already
  return None
