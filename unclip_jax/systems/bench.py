"""How fast a model samples: each stage on its own, and all of them from caption to picture.

A stage's program is compiled anew, and what that takes is kept apart; its FLOPs and bytes are read
off what the compiler made of it. Text features and the caches that stages make of them are computed
each time.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import UnclipConfig
from unclip_jax.measure.hlo import Cost, program_cost
from unclip_jax.measure.peaks import measure_peaks
from unclip_jax.measure.timing import Spread, alternate, peak_memory, ratios, seconds, spread
from unclip_jax.nn import convolution
from unclip_jax.sharding import Mesh, make_mesh, shard_params
from unclip_jax.systems import bench_figures as figures
from unclip_jax.systems import by_columns, pipeline, requests, settings
from unclip_jax.systems.bench_subject import Options, Subject, make_request
from unclip_jax.systems.samples import Request
from unclip_jax.systems.stage_calls import Call, record
from unclip_jax.types import Params, UnclipError

END_TO_END = 'end_to_end'
OURS = 'unclip_jax'
_SHORT = 'short'
_SUFFIX = 3  # what the prior runs at each step


class PeerStage(Protocol):
  """One stage as another implementation has it, with the same weights."""

  notes: dict[str, str]

  def prepare(self, calls: Sequence[Call], config: Any) -> Mapping[str, Callable[[], Any]]:
    """What is timed, by the contenders' names; each waits for its device."""

  def read(self, result: Any) -> np.ndarray:
    """What a contender gave, as ours gives it."""


class Peer(Protocol):
  """Another implementation."""

  name: str

  def about(self) -> dict[str, Any]:
    """Its versions and settings."""

  def check(self, config: UnclipConfig, request: Request) -> None:
    """Raises UnclipError where it cannot do what is asked."""

  def open(self, config: UnclipConfig, stage: str, params: Params, dtype: str) -> PeerStage:
    """A stage with our parameters."""


def check(subject: Subject, options: Options, peer: Peer | None = None) -> list[str]:
  """The stages that are to be measured, after a look at everything that was asked for.

  Raises:
    UnclipError: a stage, a batch size, a number of devices, of steps or of rounds that cannot be.
  """
  settings.check_dtype(options.dtype)
  for size in options.batch_sizes:
    settings.check_count('the batch size', size)
  asked = {'batch size': options.batch_sizes, 'number of devices': options.devices}
  for name, numbers in asked.items():
    if twice := [n for n in numbers if numbers.count(n) > 1]:
      raise UnclipError(f'the {name} {twice[0]} is asked for twice: give it once')
  if peer is not None and 1 not in options.devices:
    raise UnclipError(f'{peer.name} runs on one device: let 1 be among the numbers of devices')
  settings.check_count('the number of devices that share the parameters', options.model_devices)
  for count in options.devices:
    make_mesh(settings.check_count('the number of devices', count), options.model_devices)
  settings.check_count('the number of rounds', options.rounds)
  request = make_request(subject, options, 1)
  known = requests.stages(subject.config, request)
  if peer is None:
    known.append(END_TO_END)
  for stage in options.stages:
    if stage not in known:
      raise UnclipError(f'there is no stage {stage!r} here: take {", ".join(known)}')
  if peer is not None:
    peer.check(subject.config, request)
  return [stage for stage in known if stage in (options.stages or known)]


def measure(
  subject: Subject,
  options: Options,
  peer: Peer | None = None,
  tell: Callable[[str], None] = lambda line: None,
  save: Callable[[dict[str, Any]], None] = lambda results: None,
  before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Measures, and gives all figures as what JSON can hold.

  Args:
    subject: the model.
    options: what, and how.
    peer: what it is held against, on one device.
    tell: told of what comes next.
    save: given what there is after each stage: all but the peaks, the shares of them, and sums.
    before: what an earlier run like this one has saved: none of it is measured again or lost.

  Returns:
    'about', 'peaks', 'stages' and 'end_to_end'; `experiments/bench_sampling.py` lists the fields.

  Raises:
    UnclipError: as `check`, or the run before was not like this one.
  """
  wanted = check(subject, options, peer)
  rows = _rows_of_prior(make_request(subject, options, 1)) * min(options.batch_sizes)
  results: dict[str, Any] = {
    'about': figures.about(subject, options),
    'stages': [],
    END_TO_END: [],
  }
  if peer is not None:
    results['about']['peer'] = peer.about()
  missing = [stage for stage in wanted if stage != END_TO_END]
  if before is not None:
    missing = figures.take_over(before, results, options, missing)
  bench = _Bench(subject, options, peer, tell)
  with _compiling_anew():
    if END_TO_END in wanted:
      results[END_TO_END] = figures.joined(results[END_TO_END], bench.whole())
    jax.clear_caches()
    for stage in missing:
      results['stages'] = figures.joined(results['stages'], bench.stage(stage))
      save(results)
  figures.sort_stages(results)
  if peer is not None:
    results[END_TO_END] = figures.sums_of_all(results)
  # Last, as their arrays would count as the memory of the first stage.
  tell('peaks of the device')
  peaks = measure_peaks(options.dtype, rows)
  for entry in results['stages']:
    if 'share_of_copy' not in entry:  # else it has those of the run that it is of
      figures.add_shares(entry, peaks)
  return {**results, 'peaks': peaks._asdict()}


class _Bench:
  def __init__(
    self,
    subject: Subject,
    options: Options,
    peer: Peer | None,
    tell: Callable[[str], None],
  ):
    self.subject, self.options, self.peer = subject, options, peer
    self.tell, self.dtype = tell, jnp.dtype(options.dtype)

  def places(self) -> Iterator[tuple[int, Mesh | None]]:
    for count in self.options.devices:
      yield count, None if count == 1 else make_mesh(count, self.options.model_devices)

  def groups(self, devices: int) -> int:
    """Copies of the parameters, over which a batch is spread."""
    return devices // self.options.model_devices

  def request(self, batch: int, devices: int) -> Request:
    groups = self.groups(devices)
    return make_request(self.subject, self.options, -(-batch // groups) * groups)

  def whole(self) -> list[dict[str, Any]]:
    """From captions to pictures, by all devices and batch sizes."""
    return [entry for devices, mesh in self.places() for entry in self.whole_on(devices, mesh)]

  def whole_on(self, devices: int, mesh: Mesh | None) -> list[dict[str, Any]]:
    """The same on so many devices, which hold the parameters of all stages."""
    config, found = self.subject.config, []
    names = requests.stages(config, self.request(1, devices))
    params = {name: _placed(self.subject.read(name, self.dtype), mesh) for name in names}
    for batch in self.options.batch_sizes:
      self.tell(f'end to end, {_on(batch, devices)}')
      request = self.request(batch, devices)

      def run(request: Request = request) -> Any:
        return pipeline.sample_batch(config, params, request, self.dtype, mesh, lambda *_: None)

      jax.clear_caches()
      _, first = seconds(run)
      times = spread(seconds(run)[1] for _ in range(self.options.rounds))
      found.append(
        {
          'batch_size': batch,
          'devices': devices,
          'steps': figures.steps(request),
          'first_image_seconds': first,
          'seconds': figures.plain(times),
          'images_per_second': batch / times.median,
          'peak_bytes': peak_memory(jax.devices()[0]),
        }
      )
    return found

  def stage(self, stage: str) -> list[dict[str, Any]]:
    """One stage, by all devices and batch sizes."""
    found = []
    params = self.subject.read(stage, self.dtype)
    twin = None
    if self.peer is not None:
      self.tell(f'{stage}: the networks of {self.peer.name}')
      twin = self.peer.open(self.subject.config, stage, params, self.options.dtype)
    for devices, mesh in self.places():
      placed = by_columns.view(_placed(params, mesh))
      for batch in self.options.batch_sizes:
        self.tell(f'{stage}, {_on(batch, devices)}')
        entry = self.one(stage, placed, batch, devices, mesh, twin if devices == 1 else None)
        found.append(entry)
        self.tell(f'  {entry["seconds"]["median"]:.4g} s{_against(entry.get("peer"))}')
    return found

  def one(
    self,
    stage: str,
    params: Params,
    batch: int,
    devices: int,
    mesh: Mesh | None,
    twin: PeerStage | None,
  ) -> dict[str, Any]:
    config, request = self.subject.config, self.request(batch, devices)
    calls = record(config, request, self.dtype, mesh)[stage]
    programs, compile_seconds = compile_calls(calls, params)
    contenders = {OURS: _runner(programs, calls, params)}
    steps = figures.steps(request).get(stage)
    if stage == 'prior' and steps is not None and steps > 1:
      short = [_with_steps(call, steps // 2) for call in calls]
      contenders[_SHORT] = _runner(compile_calls(short, params)[0], short, params)
    if twin is not None:
      contenders |= twin.prepare(calls, figures.stage_config(config, stage))
    results, times = alternate(contenders, self.options.rounds)
    if self.options.profile is not None:
      with jax.profiler.trace(os.path.join(self.options.profile, f'{stage}_{batch}x{devices}')):
        contenders[OURS]()
    cost = Cost()
    for program in programs:
      cost = cost + program_cost(program.as_text())
    took = spread(times[OURS])
    memory = programs[0].memory_analysis()
    is_tiled = jax.default_backend() == 'cpu' and jnp.dtype(self.dtype) == jnp.float32
    tiled = convolution.tile_size if is_tiled else None
    expected = figures.analytic_flops(config, stage, request, tiled)
    entry: dict[str, Any] = {
      'stage': stage,
      'batch_size': batch,
      'devices': devices,
      'steps': steps,
      'compile_seconds': compile_seconds,
      'seconds': figures.plain(took),
      'images_per_second': batch / took.median,
      'flops': cost.flops * devices,
      'matmul_flops': cost.matmul_flops * devices,
      'analytic_flops': expected,
      'bytes': cost.bytes * devices,
      'program_bytes': memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      + memory.temp_size_in_bytes,
      'peak_bytes': peak_memory(jax.devices()[0]),
    }
    if _SHORT in times:
      each = ratios(
        (a - b for a, b in zip(times[OURS], times.pop(_SHORT), strict=True)),
        [steps - steps // 2] * self.options.rounds,
      )
      if each.median > 0:  # else it is less than what runs differ by
        rows = _rows_of_prior(request) * batch // self.groups(devices)
        entry['step'] = {'rows': rows, **self.step_of_prior(each)}
    if twin is not None:
      ours = _result(results[OURS])
      entry['peer'] = {
        'name': self.peer.name,
        'notes': dict(twin.notes),
        'contenders': {
          name: {
            'seconds': figures.plain(spread(times[name])),
            'ratio': figures.plain(ratios(times[name], times[OURS])),
            **figures.errors(ours, twin.read(results[name])),
          }
          for name in times
          if name != OURS
        },
      }
    return entry

  def step_of_prior(self, each: Spread) -> dict[str, Any]:
    """A step, and how fast a device reads its weights."""
    config = self.subject.config.prior
    weights = 12 * config.depth * config.width**2 + 2 * config.embed_dim * config.width
    read = weights * self.dtype.itemsize / self.options.model_devices
    return {'seconds': figures.plain(each), 'weights_bytes_per_second': read / each.median}


def _rows_of_prior(request: Request) -> int:
  """Rows of the prior's products at each step, of one picture."""
  if request.prior is None:
    return _SUFFIX
  pair = 1 if request.prior.guidance_scale is None else 2
  return _SUFFIX * pair * request.num_candidates


def compile_calls(calls: Sequence[Call], params: Params) -> tuple[list[jax.stages.Compiled], float]:
  """The program of each call, one for those that can share it, and the seconds that they took."""
  programs: list[jax.stages.Compiled] = []
  total = 0.0
  for i, call in enumerate(calls):
    same = next((j for j in range(i) if call.is_compiled_by(calls[j])), None)
    if same is None:
      program, took = seconds(lambda call=call: call.lower(params).compile())
      programs.append(program)
      total += took
    else:
      programs.append(programs[same])
  return programs, total


def _runner(
  programs: Sequence[jax.stages.Compiled], calls: Sequence[Call], params: Params
) -> Callable[[], Any]:
  def run() -> Any:
    made = [
      program(params, *call.args.values()) for program, call in zip(programs, calls, strict=True)
    ]
    return jax.block_until_ready(made)

  return run


def _with_steps(call: Call, n: int) -> Call:
  plan = jax.tree.map(lambda row: row[:n], call.args['plan'])
  return call._replace(args={**call.args, 'plan': plan})


def _result(made: Any) -> np.ndarray:
  """The array that a stage hands on: z_t, z_i, an image or a latent, of its first call."""
  first = made[0]
  for name in ('x_0', 'z_t'):
    first = getattr(first, name, first)
  return np.asarray(first, np.float32)


def _placed(params: Params, mesh: Mesh | None) -> Params:
  return params if mesh is None else shard_params(params, mesh)


def _against(peer: Mapping[str, Any] | None) -> str:
  """The peer's seconds, and their ratio to ours."""
  contenders = {} if peer is None else peer['contenders']
  return ''.join(
    f'; {name} {each["seconds"]["median"]:.4g} s, ratio {each["ratio"]["median"]:.2f} '
    f'[{each["ratio"]["least"]:.2f}, {each["ratio"]["most"]:.2f}]'
    for name, each in contenders.items()
  )


def _on(batch: int, devices: int) -> str:
  return f'batch {batch}' + ('' if devices == 1 else f' on {devices} devices')


@contextlib.contextmanager
def _compiling_anew() -> Iterator[None]:
  """No program comes from the persistent cache: what compiling takes is measured."""
  enabled = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
