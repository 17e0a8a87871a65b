"""Noise schedules and samplers as diffusers saves them: `scheduler_config.json`."""

from typing import Any

from etils import epath

from unclip_jax.configs import DiffusionConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights.foreign_folder import SCHEDULER_CONFIG_NAME, read_component_config

_PREDICTIONS = {'epsilon': 'eps', 'sample': 'x_0', 'v_prediction': 'v'}
_PREDICTION_NAMES = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
_VARIANCES = {'fixed_small_log': False, 'learned_range': True}  # whether it is learned


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
    learned_variance=fields.choose('variance_type', _VARIANCES, 'fixed_small_log'),
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
