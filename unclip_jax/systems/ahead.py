"""The programs of a batch compiled before there are weights, prompts, or time to wait for them.

JAX keeps what is compiled in its persistent cache, where one is set up.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from unclip_jax.configs import UnclipConfig
from unclip_jax.sharding import Mesh, batch_sharding, param_shardings
from unclip_jax.systems import by_columns, pipeline, requests
from unclip_jax.systems.described import described
from unclip_jax.systems.loading import expected_params
from unclip_jax.systems.samples import OF_ROWS, Request

_HIT = '/jax/compilation_cache/cache_hits'


class Prepared(NamedTuple):
  """The programs of a stage for one batch.

  Attributes:
    stage: its name.
    num_programs: how many there are.
    num_cached: how many of them were in the cache already.
    seconds: to trace and compile them.
    argument_bytes: of the parameters and inputs of the largest, on each device.
    temp_bytes: that the largest needs beside its arguments and results, on each device.
  """

  stage: str
  num_programs: int
  num_cached: int
  seconds: float
  argument_bytes: int
  temp_bytes: int


def compile_stages(
  config: UnclipConfig,
  request: Request,
  dtype: Any,
  mesh: Mesh | None = None,
  report: Callable[[str], None] = lambda _: None,
  wanted: str | None = None,
  platforms: tuple[str, ...] | None = None,
  look: Callable[[str, Any], None] = lambda *_: None,
) -> list[Prepared]:
  """Compiles what `Unclip.sample` runs for a request; reads no weights and runs nothing.

  Args:
    config: of the model.
    request: of one batch, whose arrays count by their shapes alone.
    dtype: of the networks.
    mesh: the devices that the batch is spread over, None for the default one.
    report: told of each stage as it begins.
    wanted: the one stage whose programs are compiled, the others being traced; None for all.
    platforms: that programs are lowered for; None for those of the devices.
    look: given the stage and each of its programs.

  Returns:
    What was compiled, in the order of the stages.
  """
  params = expected_params(config, dtype)
  rows = {name: getattr(request, name) for name in OF_ROWS}
  if mesh is not None:
    params = described(params, param_shardings(params, mesh))
    rows = described(rows, batch_sharding(mesh))
  elif 'prior' in params:
    params['prior'] = by_columns.lay_out(params['prior'])
  prepared: dict[str, Prepared] = {}
  results: dict[Any, Any] = {}
  stage, hits = requests.stages(config, request)[0], []

  def enter(name: str, status: str) -> None:
    nonlocal stage
    if status == 'preparing':
      stage = name
      report(name)

  def listen(event: str, **_: Any) -> None:
    if event == _HIT:
      hits.append(event)

  def prepare(program: Any, *args: Any, **static: Any) -> Any:
    leaves, structure = jax.tree.flatten(jax.tree.map(jax.typeof, args))
    asked = (program, structure, *leaves, *static.items())
    if asked in results:
      return results[asked]
    started, hits_before = time.perf_counter(), len(hits)
    traced = program.trace(*args, **static)
    if wanted not in (None, stage):
      made = traced.out_info
      results[asked] = made if mesh is None else described(made, batch_sharding(mesh))
      return results[asked]
    lowered = traced.lower(lowering_platforms=platforms)
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    look(stage, compiled)
    memory = compiled.memory_analysis()
    before = prepared.get(stage, Prepared(stage, 0, 0, 0.0, 0, 0))
    prepared[stage] = Prepared(
      stage,
      before.num_programs + 1,
      before.num_cached + len(hits) - hits_before,
      before.seconds + seconds,
      max(before.argument_bytes, memory.argument_size_in_bytes),
      max(before.temp_bytes, memory.temp_size_in_bytes),
    )
    results[asked] = lowered.out_info
    if mesh is not None:
      results[asked] = described(lowered.out_info, compiled.output_shardings)
    return results[asked]

  jax.monitoring.register_event_listener(listen)
  try:
    pipeline.draw_batch(config, params, request._replace(**rows), dtype, enter, prepare)
  finally:
    jax.monitoring.unregister_event_listener(listen)
  return list(prepared.values())
