"""The figures of a benchmark as JSON holds them: shares of peaks, errors, sums, versions."""

import datetime
import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from unclip_jax.configs import DecoderConfig, PriorConfig, UnclipConfig, UpsamplerConfig
from unclip_jax.measure import analytic
from unclip_jax.measure.peaks import Peaks
from unclip_jax.measure.timing import Spread, ratios, spread
from unclip_jax.systems.bench_subject import Options, Subject, make_request
from unclip_jax.systems.samples import Request
from unclip_jax.systems.settings import StageSettings
from unclip_jax.types import UnclipError


def plain(values: Spread) -> dict[str, Any]:
  """A spread for JSON."""
  return {**values._asdict(), 'values': list(values.values)}


def add_shares(entry: dict[str, Any], peaks: Peaks) -> None:
  """What is reached of the peaks of all devices; a CPU's virtual ones share those of one."""
  count = 1 if jax.devices()[0].platform == 'cpu' else entry['devices']
  took = entry['seconds']['median'] * count
  entry['share_of_matmul_peak'] = entry['matmul_flops'] / took / peaks.flops_per_second
  entry['share_of_copy'] = entry['bytes'] / took / peaks.bytes_per_second
  if 'step' in entry:
    step = entry['step']
    if step['rows'] == peaks.skinny_rows:
      step['share_of_skinny'] = step['weights_bytes_per_second'] / peaks.skinny_bytes_per_second


def errors(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
  """Differences over the standard deviation of what is expected."""
  if ours.shape != theirs.shape:
    raise ValueError(f'the peer made {theirs.shape}, we {ours.shape}')
  apart, scale = np.abs(np.float64(ours) - theirs), float(theirs.std())
  return {
    'largest_error': float(apart.max()) / scale,
    'rms_error': float(np.sqrt((apart**2).mean())) / scale,
  }


def stage_config(config: UnclipConfig, stage: str) -> Any:
  """That of a stage by its name, such as upsampler_0."""
  if stage.startswith('upsampler'):
    return config.upsamplers[int(stage.rpartition('_')[2])]
  return getattr(config, stage)


def analytic_flops(
  config: UnclipConfig, stage: str, request: Request, tiled: analytic.Tiled | None = None
) -> float | None:
  """Matrix products and convolutions of a stage's sampling, by hand; None where nobody has counted.

  Args:
    config: of the model.
    stage: its name.
    request: of one batch.
    tiled: of the module `analytic`.
  """
  rows, own = len(request.captions), stage_config(config, stage)
  if isinstance(own, PriorConfig):
    steps, guided = len(request.prior.plan.t), request.prior.guidance_scale is not None
    return analytic.prior_flops(own, rows, steps, guided, request.num_candidates)
  if stage == 'decoder' and isinstance(own, DecoderConfig):
    steps, guided = len(request.decoder.plan.t), request.decoder.guidance_scale is not None
    length = None if config.clip.text is None else config.clip.text.context_length
    return analytic.decoder_flops(own, rows, steps, guided, length, tiled)
  if isinstance(own, UpsamplerConfig):
    return analytic.upsampler_flops(own, rows, len(_denoising(request)[stage].plan.t), tiled)
  return None


def steps(request: Request) -> dict[str, int]:
  """Of each stage that denoises."""
  return {name: len(stage.plan.t) for name, stage in _denoising(request).items()}


def _denoising(request: Request) -> dict[str, StageSettings]:
  """The settings of the stages that are sampled by denoising."""
  stages = {'prior': request.prior, 'decoder': request.decoder}
  stages |= {f'upsampler_{i}': up for i, up in enumerate(request.upsamplers)}
  return {name: stage for name, stage in stages.items() if isinstance(stage, StageSettings)}


def sums(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """End to end as the sum of stages, where both sides do not fit into memory at once."""
  found = []
  for batch in dict.fromkeys(entry['batch_size'] for entry in entries):
    stages = [e for e in entries if (e['batch_size'], e['devices']) == (batch, 1)]
    ours = [sum(v) for v in zip(*(e['seconds']['values'] for e in stages), strict=True)]
    names = [set(e['peer']['contenders']) for e in stages]
    contenders = {}
    for name in sorted(set.intersection(*names)):
      theirs = [e['peer']['contenders'][name]['seconds']['values'] for e in stages]
      totals = [sum(v) for v in zip(*theirs, strict=True)]
      contenders[name] = {
        'seconds': plain(spread(totals)),
        'ratio': plain(ratios(totals, ours)),
      }
    found.append(
      {
        'batch_size': batch,
        'devices': 1,
        'steps': {e['stage']: e['steps'] for e in stages if e['steps'] is not None},
        'sum_of_stages': True,
        'first_image_seconds': sum(e['compile_seconds'] for e in stages) + spread(ours).median,
        'seconds': plain(spread(ours)),
        'images_per_second': batch / spread(ours).median,
        'peer': {'name': stages[0]['peer']['name'], 'contenders': contenders},
      }
    )
  return found


def merged(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
  """The results of runs that measured different stages, as those of one.

  Shares stay those of each run's own peaks; end to end is the sum of the stages, of the batch sizes
  that all of them were measured at on one device beside a peer.

  Args:
    runs: what `bench.measure` gave, by the names of their files.

  Raises:
    UnclipError: two are of different models, settings or machines, or measured the same.
  """
  first, *_ = runs.values()
  apart = {'date', 'load', 'resumed'}
  stages: list[dict[str, Any]] = []
  dates: dict[str, str] = {}
  for file, run in runs.items():
    if 'peaks' not in run:
      raise UnclipError(f'{file} is of a run that was stopped: finish it with --resume')
    for name in (first['about'].keys() | run['about'].keys()) - apart:
      then, now = first['about'].get(name), run['about'].get(name)
      if then != now:
        raise UnclipError(f'{file} has {name} {now}, another file {then}: take runs of one kind')
    for entry in run['stages']:
      place = _place(entry)
      if place in map(_place, stages):
        raise UnclipError(f'{file}: {place[0]} at batch {place[2]} is in another file: take one')
      stages.append(entry)
      dates[entry['stage']] = run['about']['date']
  results = {**first, 'about': {**first['about'], 'resumed': dates}, 'stages': stages}
  sort_stages(results)
  return {**results, 'end_to_end': sums_of_all(results)}


def sort_stages(results: dict[str, Any]) -> None:
  """Puts the stages of results in the order in which they run."""
  order = ('clip', 'prior', 'decoder_text', 'decoder', *results['about']['steps'], 'autoencoder')
  results['stages'].sort(key=lambda e: (order.index(e['stage']), *_place(e)[1:]))


def sums_of_all(results: Mapping[str, Any]) -> list[dict[str, Any]]:
  """`sums` of the batch sizes that all stages were measured at on one device beside a peer."""
  paired = [e for e in results['stages'] if e['devices'] == 1 and 'peer' in e]
  # A peer has what Karlo has.
  all_of_them = {'clip', 'prior', *results['about']['steps']}
  whole = [
    e
    for e in paired
    if {o['stage'] for o in paired if o['batch_size'] == e['batch_size']} == all_of_them
  ]
  return sums(whole) if whole else []


def joined(before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Entries of two runs, the later ones where both have one."""
  places = [*map(_place, now)]
  return [*(entry for entry in before if _place(entry) not in places), *now]


def _place(entry: Mapping[str, Any]) -> tuple[str, int, int]:
  return entry.get('stage', ''), entry['devices'], entry['batch_size']


def about(subject: Subject, options: Options) -> dict[str, Any]:
  """What is measured, on what, and when."""
  request = make_request(subject, options, 1)
  denoising = _denoising(request)
  guidance = {'prior': request.prior, **denoising}
  return {
    'model': subject.name,
    'dtype': options.dtype,
    'steps': steps(request),
    'samplers': {name: stage.sampler for name, stage in denoising.items()},
    'guided': [
      name
      for name, stage in guidance.items()
      if stage is not None and stage.guidance_scale is not None
    ],
    'rounds': options.rounds,
    'model_devices': options.model_devices,
    **machine(),
  }


def take_over(
  before: Mapping[str, Any], results: dict[str, Any], options: Options, stages: Sequence[str]
) -> list[str]:
  """Puts all that an earlier run has measured into results, with the dates of its stages.

  Returns:
    Which of `stages` are still to be measured, as that run has not all that is asked for.

  Raises:
    UnclipError: that run was of something else, or elsewhere.
  """
  then, now = before['about'], results['about']
  for name in now.keys() - {'date', 'load'}:
    if then.get(name) != now[name]:
      raise UnclipError(
        f'the run before had {name} {then.get(name)}, this one has {now[name]}: measure all anew'
      )
  results['stages'] = [*before['stages']]
  results['end_to_end'] = [*before.get('end_to_end', ())]
  found = [*map(_place, before['stages'])]
  asked = [(d, b) for d in options.devices for b in options.batch_sizes]
  missing = [stage for stage in stages if any((stage, *place) not in found for place in asked)]
  dates = {name: then.get('resumed', {}).get(name, then['date']) for name, *_ in found}
  if kept := {name: date for name, date in dates.items() if name not in missing}:
    now['resumed'] = kept
  return missing


def machine() -> dict[str, Any]:
  """What is measured on, and when."""
  device = jax.devices()[0]
  return {
    'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
    'platform': device.platform,
    'device': device.device_kind,
    'num_devices': len(jax.devices()),
    'machine': f'{platform.system()} {platform.machine()}',
    'threads': num_threads(),
    'load': os.getloadavg()[0] if hasattr(os, 'getloadavg') else None,
    'versions': {
      'python': platform.python_version(),
      **{name: metadata.version(name) for name in ('unclip-jax', 'jax', 'jaxlib')},
    },
  }


def num_threads() -> int:
  """The processors that this process may use."""
  has_affinity = hasattr(os, 'sched_getaffinity')  # Linux has
  return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
