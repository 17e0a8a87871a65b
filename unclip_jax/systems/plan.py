"""Programs compiled for machines that are not there: whether they fit, and the least they take.

What is compiled is what would run: an update of the training state, placed and donated, or the
programs of sampling. No parameter is allocated: everything is described by shapes.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from unclip_jax.configs import ArPriorConfig, UnclipConfig
from unclip_jax.measure import analytic
from unclip_jax.measure.collectives import Traffic, program_collectives, sent_bytes
from unclip_jax.measure.hlo import Cost, program_cost
from unclip_jax.measure.roofline import Roofline, roofline
from unclip_jax.sharding import (
  DATA_AXIS,
  batch_sharding,
  replicated,
  state_shardings,
)
from unclip_jax.systems import ahead, bench_figures, bench_subject, requests
from unclip_jax.systems.described import bytes_per_device, described
from unclip_jax.systems.fsdp import placed
from unclip_jax.systems.loading import expected_params
from unclip_jax.systems.machines import Machine
from unclip_jax.systems.training import Training, describe_training, make_grad, trained_stages
from unclip_jax.train.presets import Recipe, paper_recipe
from unclip_jax.train.state import init_state, make_optimizer, make_train_step
from unclip_jax.types import UnclipError

# What libtpu says of a program that its chip cannot hold: of all of it, or of temporaries alone.
_TOO_LARGE = re.compile(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm')
_TOO_MANY_TEMPORARIES = re.compile(
  r'temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)'
)
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a stage is to run.

  Attributes:
    batch_size: examples of a step, or images of a batch, of all devices; None takes the paper's
      batch, or an image for each group of devices.
    fsdp: whether the state is split over `data` as well.
    remat: whether activations are computed again.
    accumulate: parts of a batch whose gradients are averaged.
    dtype: of the networks.
  """

  batch_size: int | None = None
  fsdp: bool = False
  remat: bool = False
  accumulate: int = 1
  dtype: str = 'bfloat16'


class Memory(NamedTuple):
  """Bytes of a device, as the compiler planned them; `aliased` are both arguments and outputs."""

  arguments: float
  temporaries: float
  outputs: float
  aliased: float

  @property
  def total(self) -> float:
    """What is in use at most."""
    return self.arguments + self.temporaries + self.outputs - self.aliased


class StagePlan(NamedTuple):
  """Figures of a stage, of each device where not said otherwise.

  Attributes:
    stage: its name.
    batch_size: of a step, or of a batch of images, of all devices.
    parameters: of the network, all devices together.
    num_steps: the paper's iterations; None of sampling.
    arguments: bytes of state and batch, or of the parameters that sample.
    needed: bytes that it takes, of which these are the least.
    available: bytes that there are.
    memory: None where the program was too large to be compiled; else
    cost: of a run,
    collectives: what is sent, by kinds,
    roofline: how long it takes at least,
    compile_seconds: on this machine.
    analytic_flops: of products, by hand, all devices together; None where nobody has counted.
  """

  stage: str
  batch_size: int
  parameters: int
  num_steps: int | None
  arguments: float
  needed: float
  available: float
  memory: Memory | None = None
  cost: Cost | None = None
  collectives: Mapping[str, Traffic] | None = None
  roofline: Roofline | None = None
  compile_seconds: float | None = None
  analytic_flops: float | None = None

  @property
  def fits(self) -> bool:
    """Whether a device holds it."""
    return self.needed <= self.available


def stages_to_plan(config: UnclipConfig, stage: str, sample: bool) -> list[str]:
  """The stages that 'all' or a name stands for.

  Raises:
    UnclipError: the config has no such stage; names those that it has.
  """
  known = list(expected_params(config)) if sample else list(trained_stages(config))
  if stage != 'all' and stage not in known:
    raise UnclipError(f'there is no stage {stage!r} here: take all, {", ".join(known)}')
  return known if stage == 'all' else [stage]


def plan_training(
  config: UnclipConfig, stage: str, machine: Machine, settings: Settings
) -> StagePlan:
  """The plan of a stage's training by the paper's recipe.

  Raises:
    UnclipError: the paper trains no such stage, or the batch cannot be split as asked.
  """
  recipe = _recipe(config, stage)
  b = recipe.batch_size if settings.batch_size is None else settings.batch_size
  training = describe_training(config, stage, b, settings.dtype, settings.remat)
  _check_batch(training, b, machine, settings)
  step = _Step(training, recipe, machine, settings)
  plan = StagePlan(
    stage,
    b,
    sum(leaf.size for leaf in jax.tree.leaves(training.params)),
    recipe.num_steps,
    step.argument_bytes,
    step.argument_bytes,
    machine.memory_bytes,
    analytic_flops=analytic.training_flops(
      training.config, b, _text_length(config), _passes(settings.remat, recipe.sam_rho is not None)
    ),
  )
  if not plan.fits:
    return plan
  return _compiled(plan, machine, settings.dtype, lambda look: look(step.compile()))


def plan_sampling(
  config: UnclipConfig, name: str, stage: str, machine: Machine, settings: Settings
) -> StagePlan:
  """The plan of sampling a batch by one stage's programs, with the settings of its config.

  Args:
    config: of the model.
    name: of the model.
    stage: of `stages_to_plan`.
    machine: that is planned for.
    settings: of which only batch and dtype count.

  Raises:
    UnclipError: the batch cannot be split as asked.
  """
  groups = machine.mesh.shape[DATA_AXIS]
  b = groups if settings.batch_size is None else settings.batch_size
  _check_divides(f'a batch of {b}', b, groups, '')
  subject = bench_subject.of_preset(name, config)
  request = bench_subject.make_request(subject, bench_subject.Options(dtype=settings.dtype), b)
  if stage not in requests.stages(subject.config, request):
    raise UnclipError(f'{stage} is not part of drawing pictures')
  params = expected_params(subject.config, settings.dtype)[stage]
  num_bytes = bytes_per_device(params, state_shardings(params, machine.mesh))
  plan = StagePlan(
    stage,
    b,
    sum(leaf.size for leaf in jax.tree.leaves(params)),
    None,
    num_bytes,
    num_bytes,
    machine.memory_bytes,
    analytic_flops=bench_figures.analytic_flops(subject.config, stage, request),
  )
  if not plan.fits:
    return plan

  def compile_all(look: Callable[[Any], None]) -> None:
    ahead.compile_stages(
      subject.config,
      request,
      np.dtype(settings.dtype),
      machine.mesh,
      wanted=stage,
      platforms=(machine.platform,),
      look=lambda _, program: look(program),
    )

  return _compiled(plan, machine, settings.dtype, compile_all)


def advice(plan: StagePlan, machine: Machine, settings: Settings) -> str:
  """What could make a plan fit that does not."""
  if plan.num_steps is None:
    return 'try a smaller --batch-size, more --model-devices, or chips of more memory'
  groups, tries = machine.mesh.shape[DATA_AXIS], []
  if not settings.fsdp and groups > 1:
    tries.append('--fsdp')
  if plan.arguments <= plan.available:  # else it is the state that is too large
    if not settings.remat:
      tries.append('--remat')
    rows, parts = plan.batch_size // groups, settings.accumulate
    more = [n for n in range(parts + 1, rows + 1) if rows % n == 0]
    if more and plan.stage != 'clip':
      tries.append(f'--accumulate {more[0]}')
  return f'try {", ".join([*tries, "a larger topology"])}'


class _Step:
  """An update of a stage's state on a machine."""

  def __init__(self, training: Training, recipe: Recipe, machine: Machine, settings: Settings):
    self._machine, mesh = machine, machine.mesh
    self._precision = 'highest' if np.dtype(settings.dtype) == np.float32 else 'default'
    optimizer = make_optimizer(recipe.optimizer, recipe.num_steps)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), training.params)
    self._state = described(state, state_shardings(state, mesh, settings.fsdp))
    self._batch = described(training.batch, batch_sharding(mesh))
    key = jax.eval_shape(lambda: jax.random.key(0))
    self._constants, self._key = described((training.constants, key), replicated(mesh))

    def update(state: Any, constants: Any, batch: Any, key: Any) -> Any:
      grad_fn = make_grad(training, recipe, constants, mesh, settings.fsdp)
      step = make_train_step(
        None, optimizer, recipe.ema_decay, settings.accumulate, grad_fn=grad_fn
      )
      return placed(step, mesh, settings.fsdp)(state, batch, key)

    self._update = jax.jit(update, donate_argnums=0)

  @property
  def argument_bytes(self) -> int:
    """Of state and batch, which a device holds throughout."""
    given = self._state, self._batch, self._constants
    return bytes_per_device(given, jax.tree.map(lambda leaf: leaf.sharding, given))

  def compile(self) -> Any:
    """The program."""
    with jax.default_matmul_precision(self._precision):
      traced = self._update.trace(self._state, self._constants, self._batch, self._key)
    return traced.lower(lowering_platforms=(self._machine.platform,)).compile()


def _compiled(
  plan: StagePlan,
  machine: Machine,
  dtype: str,
  compile_all: Callable[[Callable[[Any], None]], None],
) -> StagePlan:
  """A plan with the figures of its programs, which run one after the other."""
  n = machine.num_devices
  costs: list[Cost] = []
  memories: list[Memory] = []
  traffic: dict[str, Traffic] = {}

  def look(program: Any) -> None:
    text = program.as_text()
    costs.append(program_cost(text))
    memories.append(_memory(program))
    for kind, (count, num_bytes) in program_collectives(text, n).items():
      before = traffic.get(kind, Traffic(0, 0))
      traffic[kind] = Traffic(before.count + count, before.bytes + num_bytes)

  started = time.perf_counter()
  try:
    compile_all(look)
  except jax.errors.JaxRuntimeError as error:
    too_large = _TOO_LARGE.search(str(error))
    found = too_large or _TOO_MANY_TEMPORARIES.search(str(error))
    if 'RESOURCE_EXHAUSTED' not in str(error) or found is None:
      raise
    used, used_unit, limit, limit_unit = found.groups()
    return plan._replace(
      needed=float(used) * _UNITS[used_unit] + (0 if too_large else plan.arguments),
      available=float(limit) * _UNITS[limit_unit],
    )
  took = time.perf_counter() - started
  memory = max(memories, key=lambda one: one.total)
  cost = sum(costs, start=Cost())
  if not machine.is_real:
    cost = _estimated(cost, memories, plan.analytic_flops, n)
  chip, parts = machine.chip, machine.chip.devices
  limits = roofline(
    cost.matmul_flops,
    cost.bytes,
    sent_bytes(traffic),
    chip.product_speed(dtype) / parts,
    chip.bytes_per_second / parts,
    machine.slice.sent_per_second / parts,
  )
  return plan._replace(
    needed=memory.total,
    memory=memory,
    cost=cost,
    collectives=dict(sorted(traffic.items())),
    roofline=limits,
    compile_seconds=took,
  )


def _estimated(
  cost: Cost, memories: list[Memory], analytic_flops: float | None, num_devices: int
) -> Cost:
  """What another compiler's program tells of theirs: products, and memory read or written once."""
  flops = cost.matmul_flops if analytic_flops is None else analytic_flops / num_devices
  num_bytes = sum(one.arguments + one.outputs for one in memories)
  return Cost(flops, num_bytes, flops)


def _memory(program: Any) -> Memory:
  planned = program.memory_analysis()
  return Memory(
    planned.argument_size_in_bytes,
    planned.temp_size_in_bytes,
    planned.output_size_in_bytes,
    planned.alias_size_in_bytes,
  )


def _recipe(config: UnclipConfig, stage: str) -> Recipe:
  is_ar = stage == 'prior' and isinstance(config.prior, ArPriorConfig)
  return paper_recipe('ar_prior' if is_ar else stage)


def _text_length(config: UnclipConfig) -> int | None:
  """Of captions as CLIP reads them."""
  text = None if config.clip is None else config.clip.text
  return None if text is None else text.context_length


def _passes(remat: bool, sam: bool) -> int:
  """Evaluations that an update takes the time of; a gradient takes two, three with `remat`."""
  gradient = 3 if remat else 2
  return 5 + 3 * gradient if sam else 1 + gradient


def _check_batch(training: Training, b: int, machine: Machine, settings: Settings) -> None:
  if settings.accumulate > 1 and training.embed_fn is not None:
    raise UnclipError(
      f'{training.stage}: --accumulate is for losses that are means over examples, and this one '
      'compares them: leave it out'
    )
  groups = machine.mesh.shape[DATA_AXIS]
  parts = '' if settings.accumulate == 1 else f' in {settings.accumulate} parts'
  _check_divides(f'{training.stage}: a batch of {b}', b, groups * settings.accumulate, parts)


def _check_divides(what: str, b: int, unit: int, parts: str) -> None:
  if b % unit or b < 1:
    raise UnclipError(
      f'{what} cannot be split over the devices{parts}: take a --batch-size that is a multiple of '
      f'{unit}, or other devices'
    )
