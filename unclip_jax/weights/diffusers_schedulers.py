"""Noise schedules and samplers as diffusers saves them: `scheduler_config.json`."""

import warnings
from typing import Any

from etils import epath

from unclip_jax.configs import DiffusionConfig, SamplingConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights import diffusers_solvers as solvers
from unclip_jax.weights.foreign_config import Fields, read_json
from unclip_jax.weights.foreign_folder import SCHEDULER_CONFIG_NAME, read_component_config

_PREDICTIONS = {'epsilon': 'eps', 'sample': 'x_0', 'v_prediction': 'v'}
_PREDICTION_NAMES = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
_UNCLIP_VARIANCES = {'fixed_small_log': False, 'learned_range': True}  # whether it is learned
_VARIANCES = {
  'fixed_small': 'fixed_small',
  'fixed_small_log': 'fixed_small',
  'fixed_large': 'fixed_large',
  'fixed_large_log': 'fixed_large',
  'learned_range': 'learned',
}
_VARIANCE_NAMES = {
  'fixed_small': 'fixed_small',
  'fixed_large': 'fixed_large',
  'learned': 'learned_range',
}
_SCHEDULES = {'linear': 'linear', 'scaled_linear': 'scaled_linear', 'squaredcos_cap_v2': 'cosine'}
_SCHEDULE_NAMES = {ours: theirs for theirs, ours in _SCHEDULES.items()}
_DDPM, _DDIM = 'DDPMScheduler', 'DDIMScheduler'
# 'linspace' is Karlo's spacing. diffusers' DDIM has it too, but steps to noise that is not of the
# next timestep.
_SPACINGS = {
  _DDPM: {'leading': 'leading', 'trailing': 'trailing', 'linspace': 'karlo'},
  _DDIM: {'leading': 'leading', 'trailing': 'trailing'},
}


def read_scheduler(
  folder: epath.Path, num_steps: int, guidance_scale: float
) -> tuple[DiffusionConfig, SamplingConfig]:
  """A scheduler of DDPM, DDIM, PLMS, DPM-Solver++ or UniPC, in so many steps and guided so much.

  Other solvers of the same noise schedule, and those in ways that are not here, are opened as DDIM
  without noise, with a UserWarning. Their own fields have no meaning here. What they space evenly
  from end to end is 'trailing' then: DDIM begins there at the same timestep.

  Two things are not as in diffusers. The last step never adds noise; with `DDPMScheduler` it does
  where the last timestep is above 0 and the variance is not small. And trailing strides lead from
  one timestep to the next also where their number does not divide that of the schedule.

  Args:
    folder: of `scheduler_config.json`.
    num_steps: what the pipeline takes unless it is told otherwise.
    guidance_scale: the same.

  Raises:
    UnclipError: a field asks for what ours does not do.
  """
  path = folder / SCHEDULER_CONFIG_NAME
  values = read_json(path)
  name = values.get('_class_name', _DDIM)
  known = (_DDPM, _DDIM, *solvers.DEFAULTS)
  if name not in known:
    raise UnclipError(f'{path}: _class_name is {name!r}: only {", ".join(known)} can be opened')
  is_ddpm = name == _DDPM
  is_solver = name in solvers.DEFAULTS
  values = {**solvers.DEFAULTS.get(name, {}), **values}
  solver = solvers.find(name, values)
  fields = Fields(values, str(path))
  bounds = _read_bounds(fields, can_clip=not is_solver)
  variance = 'fixed_small'
  if is_ddpm:
    variance = fields.choose('variance_type', _VARIANCES, 'fixed_small')
  diffusion = DiffusionConfig(
    **_read_schedule(fields),
    prediction=fields.choose('prediction_type', _PREDICTIONS, 'epsilon'),
    learned_variance=variance == 'learned',
    **bounds,
    keep_eps=bool(bounds) and not is_ddpm,
  )
  spacings = _SPACINGS[_DDPM if is_ddpm else _DDIM]
  if is_solver:
    spacings = {**spacings, 'linspace': 'trailing'}
  if solver is not None:
    spacings = solvers.SPACINGS[solver]
  spacing = fields.choose('timestep_spacing', spacings, 'leading')
  offset = fields.take('steps_offset', 0)
  to_x_0 = fields.take('set_alpha_to_one', True) if name in (_DDIM, solvers.PNDM) else True
  fields.ignore(solvers.LEFTOVERS)
  if is_solver and solver is None:
    warnings.warn(f'{path}: {name} is not here, ddim without noise takes its place', stacklevel=2)
  else:
    fields.done()
  sampling = SamplingConfig(
    num_steps=num_steps,
    sampler='ddpm' if is_ddpm else solver or 'ddim',
    spacing=spacing,
    variance=variance,
    offset=offset if spacing in ('leading', 'inner') else 0,
    to_x_0=to_x_0,
    guidance_scale=guidance_scale,
  )
  return diffusion, sampling


def write_scheduler(
  name: str, diffusion: DiffusionConfig, sampling: SamplingConfig
) -> dict[str, Any]:
  """The inverse of `read_scheduler`, without what pipelines are told at each call.

  Args:
    name: of the stage, for messages.
    diffusion: of the stage.
    sampling: of the stage; number of steps, eta, and what guidance is are not written.

  Raises:
    UnclipError: there is no such scheduler.
  """
  classes = {'ddpm': _DDPM, 'ddim': _DDIM, **solvers.CLASSES}
  theirs = classes.get(sampling.sampler)
  if theirs is None:
    raise UnclipError(
      f'{name}.sampling.sampler is {sampling.sampler}: diffusers has {", ".join(classes)}'
    )
  is_solver = sampling.sampler in solvers.CLASSES
  words = solvers.SPACINGS[sampling.sampler] if is_solver else _SPACINGS[theirs]
  spacings = {ours: word for word, ours in words.items()}
  is_bounded = diffusion.dynamic_threshold is not None or diffusion.clip_x_0 is not None
  is_ddpm = theirs == _DDPM
  needed = {
    f'sampling.spacing is {sampling.spacing}: take one of {", ".join(spacings)}': (
      sampling.spacing in spacings
    ),
    'sampling.to_x_0 is false: only ddim and plms end with noise': (
      sampling.to_x_0 or sampling.sampler in ('ddim', 'plms')
    ),
    'diffusion.learned_variance is true: only ddpm has a use for it': (
      is_ddpm or not diffusion.learned_variance
    ),
    'diffusion.keep_eps is false: there ddim keeps eps where x_0 is bounded': (
      is_ddpm or diffusion.keep_eps or not is_bounded
    ),
    'diffusion bounds x_0: there only ddpm and ddim do': not (is_solver and is_bounded),
  }
  for what, fits in needed.items():
    if not fits:
      raise UnclipError(f'{name}.{what} ({theirs} of diffusers)')
  values = {
    '_class_name': theirs,
    **_write_schedule(f'{name}.diffusion', diffusion),
    'prediction_type': _PREDICTION_NAMES[diffusion.prediction],
    **({} if is_solver else _write_bounds(diffusion)),
    'timestep_spacing': spacings[sampling.spacing],
    'steps_offset': sampling.offset,
  }
  if is_ddpm:
    return values | {'variance_type': _VARIANCE_NAMES[sampling.variance]}
  if sampling.sampler in ('ddim', 'plms'):
    values |= {'set_alpha_to_one': sampling.to_x_0}
  return values | solvers.fields(sampling.sampler)


def read_noising_scheduler(folder: epath.Path) -> DiffusionConfig:
  """A scheduler that only adds noise: its noise schedule, whatever it has for sampling.

  Raises:
    UnclipError: a field asks for what ours does not do.
  """
  # The others scale what they add noise to in ways of their own.
  names = (_DDPM, _DDIM, solvers.PNDM, 'UnCLIPScheduler')
  fields = read_component_config(folder, names, SCHEDULER_CONFIG_NAME)
  return DiffusionConfig(**_read_schedule(fields))


def write_noising_scheduler(name: str, diffusion: DiffusionConfig) -> dict[str, Any]:
  """The inverse of `read_noising_scheduler`; `name` is of the config, for messages.

  Raises:
    UnclipError: there is no such scheduler.
  """
  return {'_class_name': _DDPM, **_write_schedule(name, diffusion)}


def read_unclip_scheduler(folder: epath.Path) -> DiffusionConfig:
  """An `UnCLIPScheduler`, of Karlo and of all priors.

  Raises:
    UnclipError: a field asks for what ours does not do.
  """
  fields = read_component_config(folder, 'UnCLIPScheduler', SCHEDULER_CONFIG_NAME)
  clips = fields.take('clip_sample', True)
  limit = fields.take('clip_sample_range', 1.0)
  fields.expect(beta_schedule='squaredcos_cap_v2')
  predictions = {name: _PREDICTIONS[name] for name in ('epsilon', 'sample')}
  diffusion = DiffusionConfig(
    schedule='cosine',
    num_steps=fields.take('num_train_timesteps', 1000),
    prediction=fields.choose('prediction_type', predictions, 'epsilon'),
    learned_variance=fields.choose('variance_type', _UNCLIP_VARIANCES, 'fixed_small_log'),
    clip_x_0=limit if clips else None,
  )
  fields.done()
  return diffusion


def write_unclip_scheduler(name: str, diffusion: DiffusionConfig) -> dict[str, Any]:
  """The inverse of `read_unclip_scheduler`; `name` is of the stage, for messages.

  Raises:
    UnclipError: there is no such scheduler.
  """
  if diffusion.prediction not in ('eps', 'x_0'):
    raise UnclipError(
      f'{name}.diffusion.prediction is {diffusion.prediction}: UnCLIPScheduler has eps or x_0'
    )
  if diffusion.schedule != 'cosine':
    raise UnclipError(
      f'{name}.diffusion.schedule is {diffusion.schedule}: UnCLIPScheduler has cosine'
    )
  if diffusion.dynamic_threshold is not None:
    raise UnclipError(f'{name}.diffusion.dynamic_threshold is set: UnCLIPScheduler has clip_x_0')
  return {
    '_class_name': 'UnCLIPScheduler',
    'num_train_timesteps': diffusion.num_steps,
    'variance_type': 'learned_range' if diffusion.learned_variance else 'fixed_small_log',
    'clip_sample': diffusion.clip_x_0 is not None,
    'clip_sample_range': 1.0 if diffusion.clip_x_0 is None else diffusion.clip_x_0,
    'prediction_type': _PREDICTION_NAMES[diffusion.prediction],
    'beta_schedule': 'squaredcos_cap_v2',
  }


def _read_schedule(fields: Fields) -> dict[str, Any]:
  schedule = fields.choose('beta_schedule', _SCHEDULES, 'linear')
  num_steps = fields.take('num_train_timesteps', 1000)
  betas = fields.take('beta_start', 1e-4), fields.take('beta_end', 0.02)
  fields.expect(trained_betas=None, rescale_betas_zero_snr=False, use_flow_sigmas=False)
  if schedule == 'linear':  # our betas are those of 1000 steps
    betas = betas[0] * (num_steps / 1000), betas[1] * (num_steps / 1000)
  return {
    'schedule': schedule,
    'num_steps': num_steps,
    'betas': None if schedule == 'cosine' else betas,
  }


def _write_schedule(name: str, diffusion: DiffusionConfig) -> dict[str, Any]:
  schedule, num_steps = diffusion.schedule, diffusion.num_steps
  if schedule not in _SCHEDULE_NAMES:
    raise UnclipError(f'{name}.schedule is {schedule}: diffusers has {", ".join(_SCHEDULE_NAMES)}')
  values = {'num_train_timesteps': num_steps, 'beta_schedule': _SCHEDULE_NAMES[schedule]}
  if schedule == 'cosine':
    return values
  scale = 1.0
  if schedule == 'linear':
    scale, (first, last) = num_steps / 1000, diffusion.betas or (1e-4, 0.02)
  else:
    first, last = diffusion.betas or (8.5e-4, 0.012)
  return values | {'beta_start': first / scale, 'beta_end': last / scale}


def _read_bounds(fields: Fields, can_clip: bool) -> dict[str, Any]:
  """What bounds x_0, if anything: fields of a `DiffusionConfig`."""
  clips, limit = fields.take('clip_sample', True), fields.take('clip_sample_range', 1.0)
  thresholds, most = (
    fields.take('thresholding', False),
    fields.take_or_none('sample_max_value', 1.0),
  )
  percentile = 100 * fields.take('dynamic_thresholding_ratio', 0.995)
  if thresholds and most == 1:  # divided by 1, whatever the percentile
    return {'clip_x_0': 1.0}
  if thresholds:
    return {'dynamic_threshold': percentile, 'threshold_max': most}
  return {'clip_x_0': limit} if clips and can_clip else {}


def _write_bounds(diffusion: DiffusionConfig) -> dict[str, Any]:
  if diffusion.dynamic_threshold is not None:
    return {
      'clip_sample': False,
      'thresholding': True,
      'dynamic_thresholding_ratio': diffusion.dynamic_threshold / 100,
      'sample_max_value': diffusion.threshold_max,
    }
  clip = diffusion.clip_x_0
  return {'clip_sample': clip is not None, 'clip_sample_range': 1.0 if clip is None else clip}
