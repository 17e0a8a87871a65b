"""XLA's HLO text, parsed as far as counting needs it: `as_text()` of a compiled program."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from unclip_jax.types import UnclipError

_METADATA = re.compile(r',?\s*metadata=\{(?:[^{}"]|"(?:[^"\\]|\\.)*")*\}')
_COMMENT = re.compile(r'/\*.*?\*/')
_HEADER = re.compile(r'^(ENTRY\s+)?%?([\w.\-$]+)\s*(?:\(.*\)\s*->.*)?\{\s*$')
_INSTRUCTION = re.compile(r'^\s+(ROOT\s+)?%?([\w.\-$]+)\s*=\s*(.*)$')
_OPCODE = re.compile(r'\s([a-z][a-z0-9\-]*)\(')
# With its layout, in which S(1) is the memory of a TPU's core; that of the chip is left out.
_SHAPE = re.compile(r'\b([a-z][a-z0-9]*)\[([^\]]*)\](?:\{[^}]*\bS\(([1-9])\))?')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations'
  r'|called_computations|async_execution_computation)=(\{[^{}]*\}|%?[\w.\-$]+)'
)
_TRIP_COUNT = re.compile(r'known_trip_count\W+n\W+(\d+)')


class Shape(NamedTuple):
  """Of an array; `is_near` where it is not in main memory but at hand of a core."""

  dtype: str
  dims: tuple[int, ...]
  is_near: bool = False

  @property
  def elements(self) -> int:
    """How many numbers."""
    return math.prod(self.dims)

  @property
  def size(self) -> float:
    """Bytes that they take, wherever."""
    bits = re.search(r'\d+', self.dtype)
    if bits is None:  # a pred, or a token, which is nothing
      return self.elements if self.dtype == 'pred' else 0
    return self.elements * int(bits[0]) / 8

  @property
  def bytes(self) -> float:
    """What they take of main memory."""
    return 0 if self.is_near else self.size


class Instruction(NamedTuple):
  """One line; the shapes of a tuple are flat, `literal` is what stands in the brackets."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]
  operands: tuple[str, ...]
  literal: str
  attributes: str

  @property
  def elements(self) -> int:
    """How many numbers."""
    return sum(shape.elements for shape in self.shapes)

  @property
  def bytes(self) -> float:
    """What they take of main memory."""
    return sum(shape.bytes for shape in self.shapes)

  @property
  def called(self) -> list[str]:
    """Names of the computations that it runs, or applies to elements."""
    found = _CALLED.findall(self.attributes)
    return [name.strip(' %') for names in found for name in names.strip('{}').split(',')]

  def names(self, attribute: str) -> list[str]:
    """The computations that one attribute names."""
    found = re.search(rf'\b{attribute}=(\{{[^{{}}]*\}}|%?[\w.\-$]+)', self.attributes)
    return [name.strip(' %') for name in found[1].strip('{}').split(',')] if found else []

  def numbers(self, attribute: str) -> list[int]:
    """The numbers of `attribute={1,2}`, or of `"attribute":["1","2"]` as configs write it."""
    found = re.search(rf'\b{attribute}\W*?[={{:\[]+([\d,"\\\s]*)[}}\]]', self.attributes)
    return [int(digits) for digits in re.findall(r'\d+', found[1])] if found else []

  def number(self, attribute: str) -> int:
    """That of `attribute=2`; 1 where it does not stand."""
    found = re.search(rf'\b{attribute}=(\d+)', self.attributes)
    return int(found[1]) if found else 1

  @property
  def target(self) -> str:
    """Of a custom call."""
    found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return found[1] if found else ''


class Computation(NamedTuple):
  """Instructions by their names, in their order; the last one, mostly, is the root."""

  instructions: Mapping[str, Instruction]
  root: Instruction

  def operand(self, instruction: Instruction, index: int) -> Instruction:
    """What an instruction is given."""
    return self.instructions[instruction.operands[index]]

  def shape(self, instruction: Instruction, index: int) -> Shape:
    """Of an operand that is no tuple."""
    return self.operand(instruction, index).shapes[0]

  def users(self, name: str) -> Iterator[tuple[Instruction, int]]:
    """Who uses an instruction, and as which operand; a bitcast is looked through."""
    for user in self.instructions.values():
      for index, operand in enumerate(user.operands):
        if operand == name and user.opcode == 'bitcast':
          yield from self.users(user.name)
        elif operand == name:
          yield user, index


class Module(NamedTuple):
  """A program; `entry` names where it begins."""

  computations: Mapping[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """The computations of a module by their names.

  Raises:
    UnclipError: the text is no HLO.
  """
  computations: dict[str, Computation] = {}
  entry = name = ''
  instructions: dict[str, Instruction] = {}
  root = None
  for line in text.splitlines():
    if line.startswith('}'):
      if root is not None:
        computations[name] = Computation(instructions, root)
      instructions, root = {}, None
    elif not line[:1].isspace():
      if header := _HEADER.match(line):
        name = header[2]
        entry = name if header[1] else entry
    elif found := _INSTRUCTION.match(_COMMENT.sub('', _METADATA.sub('', line))):
      instruction = _instruction(found[2], found[3])
      if instruction is not None:
        instructions[instruction.name] = instruction
        root = instruction if found[1] or root is None else root
  if entry not in computations:
    raise UnclipError('this is no HLO of a program: give what compiled.as_text() returns')
  return Module(computations, entry)


def _instruction(name: str, line: str) -> Instruction | None:
  opcode = _OPCODE.search(line)
  if opcode is None:
    return None
  depth, end = 1, len(line)
  for bracket in re.finditer(r'[()]', line[opcode.end() :]):
    depth += 1 if bracket[0] == '(' else -1
    if depth == 0:
      end = opcode.end() + bracket.start()
      break
  literal = line[opcode.end() : end]
  operands: tuple[str, ...] = ()
  if opcode[1] not in ('constant', 'parameter', 'iota'):
    # Some texts write an operand's shape before its name, some no % (and no shape).
    named = re.findall(r'%([\w.\-$]+)', literal)
    operands = tuple(named or filter(None, map(str.strip, literal.split(','))))
  shapes = tuple(
    Shape(dtype, tuple(int(d) for d in re.findall(r'\d+', dims)), bool(space))
    for dtype, dims, space in _SHAPE.findall(line[: opcode.start()])
  )
  return Instruction(name, opcode[1], shapes, operands, literal, line[end + 1 :])


def trip_count(module: Module, loop: Instruction) -> int:
  """As the compiler noted it, or else what the condition compares a count from 0 with."""
  if known := _TRIP_COUNT.search(loop.attributes):
    return int(known[1])
  condition = module.computations[loop.names('condition')[0]]
  compare, compared = _plain(module, condition, condition.root)
  if compare.opcode == 'compare':
    direction = re.search(r'direction=(\w+)', compare.attributes)[1]
    for i, directions in enumerate((('LT', 'LE'), ('GT', 'GE'))):
      count, limit = compared[i], compared[1 - i]
      if limit.opcode == 'constant' and direction in directions:
        last = int(limit.literal) + direction.endswith('E')
        return -(-last // _increment(module, loop, count))
  raise UnclipError(
    f'the program has a loop, {loop.name}, of which the compiler does not say how often it runs: '
    'take a scan, or a fori_loop of a fixed length'
  )


def _increment(module: Module, loop: Instruction, count: Instruction) -> int:
  """What a loop adds to its count each time; 1 where its body does not say it plainly."""
  body = module.computations[loop.names('body')[0]]
  if count.opcode == 'get-tuple-element' and body.root.opcode == 'tuple':
    following = body.operand(body.root, count.number('index'))
    add, added = _plain(module, body, following)
    steps = [int(each.literal) for each in added if each.opcode == 'constant']
    if add.opcode == 'add' and len(steps) == 1:
      return steps[0]
  return 1


def _plain(
  module: Module, computation: Computation, instruction: Instruction
) -> tuple[Instruction, list[Instruction]]:
  """An instruction and its operands, those of its root if it is a fusion."""
  if instruction.opcode != 'fusion':
    known = computation.instructions
    return instruction, [known[name] for name in instruction.operands if name in known]
  inner = module.computations[instruction.called[0]]
  operands = (inner.instructions[name] for name in inner.root.operands)
  return inner.root, [
    computation.operand(instruction, int(each.literal)) if each.opcode == 'parameter' else each
    for each in operands
  ]
