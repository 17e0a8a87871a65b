"""A plan from its options to its text and JSON."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unclip_jax.config_json import override
from unclip_jax.measure import report
from unclip_jax.presets import preset
from unclip_jax.systems import plan, plan_report
from unclip_jax.systems.machines import Machine, described_tpu, pretended_gpus
from unclip_jax.systems.settings import check_count, check_dtype
from unclip_jax.types import UnclipError


def run(
  stage: str,
  name: str,
  *,
  topology: str | None = None,
  gpus: str | None = None,
  devices: int | None = None,
  model_devices: int = 1,
  batch_size: int | None = None,
  dtype: str = 'bfloat16',
  fsdp: bool = False,
  remat: bool = False,
  accumulate: int = 1,
  sample: bool = False,
  assignments: Sequence[str] = (),
  price: float | None = None,
  json: str | Path | None = None,
) -> dict[str, Any]:
  """Plans, and prints the tables to standard output and what is under way to standard error.

  The JSON is written after each stage. `cli/plan.py` describes the arguments.

  Returns:
    What the JSON holds.

  Raises:
    UnclipError: something cannot be as it was asked for; or, after all has been printed, a stage
      does not fit, with what to try.
  """
  config = override(preset(name), assignments)
  stages = plan.stages_to_plan(config, stage, sample)
  for what, value in (('--batch-size', batch_size), ('--accumulate', accumulate)):
    if value is not None:
      check_count(what, value)
  settings = plan.Settings(batch_size, fsdp, remat, accumulate, check_dtype(dtype).name)
  if sample and (fsdp or remat or accumulate > 1):
    raise UnclipError('--fsdp, --remat and --accumulate are of training: leave them or --sample')
  if price is not None and price < 0:
    raise UnclipError(f'--price {price}: take 0 or more')
  out = None if json is None else report.check_writable(json)
  machine: Machine
  if gpus is None:
    machine = described_tpu(topology or '', model_devices, devices)
  else:
    machine = pretended_gpus(gpus, model_devices)
  plans: list[plan.StagePlan] = []
  for each in stages:
    print(f'{each} ...', file=sys.stderr)
    if sample:
      plans.append(plan.plan_sampling(config, name, each, machine, settings))
    else:
      plans.append(plan.plan_training(config, each, machine, settings))
    results = plan_report.to_json(name, machine, settings, plans, price)
    if out is not None:
      report.write_json(out, results)
  print(plan_report.to_text(results))
  if failed := [each for each in plans if not each.fits]:
    raise UnclipError('; '.join(_too_large(each, machine, settings) for each in failed))
  return results


def _too_large(each: plan.StagePlan, machine: Machine, settings: plan.Settings) -> str:
  excess = (each.needed - each.available) / 2**30
  return (
    f'{each.stage} does not fit {machine.slice.name}: a device lacks {excess:.2f} GiB: '
    f'{plan.advice(each, machine, settings)}'
  )
