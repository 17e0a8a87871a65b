"""How a run starts: as a copy of the model of `--init`, from its weights, or afresh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.emoji import common
from experiments.emoji.options import TrainConfig
from unclip_jax import processes
from unclip_jax.configs import DecoderConfig, PriorConfig, UnclipConfig, UpsamplerConfig
from unclip_jax.stages.diffusion_prior import Statistics, fit_statistics
from unclip_jax.systems.convert import convert
from unclip_jax.systems.formats import Model, open_model
from unclip_jax.systems.loading import find_folder, read_stages
from unclip_jax.types import Array, Params, UnclipError
from unclip_jax.weights.folder import MANIFEST_NAME


def begin(
  train: TrainConfig, stage: str, kinds: Any = PriorConfig | DecoderConfig | UpsamplerConfig
) -> None:
  """Makes the folder of a new fine-tune a copy of the model of `--init`.

  The stages that are not trained stay as they are, so that the run is a whole model at once.

  Args:
    train: the options.
    stage: what is trained.
    kinds: of configs that can be.

  Raises:
    UnclipError: the model has no such stage, one of another kind, or no image tower to learn it by.
  """
  stages = {'prior': train.config.prior, 'decoder': train.config.decoder}
  stages |= {f'upsampler_{i}': config for i, config in enumerate(train.config.upsamplers)}
  if stages.get(stage) is None:
    raise UnclipError(f'--init {train.init}: it has no {stage}')
  if not isinstance(stages[stage], kinds):
    model = 'the preset' if train.init is None else f'--init {train.init}'
    raise UnclipError(
      f'{model}: its {stage} is of another kind than the {stage} that is trained here'
    )
  if train.config.clip.vision is None and not stage.startswith('upsampler'):
    raise UnclipError(
      f'--init {train.init}: it came without the image tower of its CLIP, whose embeddings the '
      f'{stage} is trained on: take a model that has both, such as the original release of Karlo'
    )
  manifest = train.run / MANIFEST_NAME
  if train.fine_tunes and not manifest.exists():
    if jax.process_index() == 0:
      convert(train.init, train.run, 'unclip')
    processes.wait_until(manifest.exists)


def start_from(train: TrainConfig, params: Params, *path: str) -> Params:
  """Fresh parameters, or in a new run those of `--init` where that model has them.

  A prior and a decoder only mean something together with the CLIP that they were trained with.
  Adapters need the parameters of `--init` in a run that continues as well, and all of them.

  Args:
    train: the options.
    params: fresh ones of a stage.
    path: where they lie in a model, such as 'prior', 'network'; first the stage.

  Raises:
    UnclipError: there is no such model, it has no such stage, or a weight of it has another shape.
  """
  there = (train.run / path[0] / 'checkpoints').glob('*')
  continues = any(folder.name.isdecimal() for folder in there)  # not what a killed write has left
  if train.init is None or (continues and not train.trains_adapters):
    return params
  given: Any = read_init(train, path[0])
  for name in path[1:]:
    given = given[name]
  fresh, given = flatten_dict(params, sep='.'), flatten_dict(given, sep='.')
  for name in fresh.keys() & given.keys():
    if fresh[name].shape != given[name].shape:
      raise UnclipError(
        f'--init {train.init}: {".".join(path)}.{name} is {given[name].shape} there, and '
        f'{fresh[name].shape} here'
      )
  if train.trains_adapters and (missing := sorted(fresh.keys() - given.keys())):
    raise UnclipError(
      f'--init {train.init}: it has no {".".join(path)}.{missing[0]}, which no adapter would '
      'learn: leave out the --set that asks for it'
    )
  return unflatten_dict(fresh | {k: v for k, v in given.items() if k in fresh}, sep='.')


def read_init(train: TrainConfig, stage: str) -> Params:
  """The parameters of a stage of `--init`, float32.

  Raises:
    UnclipError: it has no such stage, or cannot be read.
  """
  opened = _open_init(train)
  if stage not in opened.stages:
    raise UnclipError(f'--init {train.init}: it has no {stage}, only {", ".join(opened.stages)}')
  return read_stages(opened, jnp.float32, [stage])[stage]


def has_clip_of_init(train: TrainConfig) -> bool:
  """Whether the run's CLIP is that of `--init`, to the bit: embeddings mean the same to both."""
  if train.init is None or 'clip' not in _open_init(train).stages:
    return False
  theirs = flatten_dict(read_init(train, 'clip'))
  ours = flatten_dict(common.load_clip(train))
  return ours.keys() == theirs.keys() and all(
    np.array_equal(ours[name], theirs[name]) for name in ours
  )


def config_of_init(train: TrainConfig) -> UnclipConfig | None:
  """The config of the model of `--init`, without the overrides of the run."""
  return None if train.init is None else _open_init(train).config


def prior_statistics(train: TrainConfig, z_i: Array) -> Statistics:
  """Those that the prior of `--init` was trained with, where its CLIP is the run's; else of z_i."""
  if has_clip_of_init(train) and 'prior' in _open_init(train).stages:
    given = read_init(train, 'prior')['statistics']
    return Statistics(given['mean'], given['std'])
  return fit_statistics(z_i)


def _open_init(train: TrainConfig) -> Model:
  return open_model(find_folder(train.init))
