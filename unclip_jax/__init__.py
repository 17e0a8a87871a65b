"""unCLIP (DALL-E 2) in JAX: from a caption through CLIP, prior, decoder and upsampler to a picture.

    import unclip_jax
    model = unclip_jax.load()
    images = model.generate('a red apple, flat style', seed=7)  # uint8 [1, h, w, 3]

The stages are modules of pure functions (`init`, `loss`, `sample`): `clip`, `diffusion_prior`,
`ar_prior`, `decoder`, `upsampler`. Names, packages among them, are imported when they are first
used, so that the command line can answer before JAX is loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from unclip_jax import configs, data, diffusion, manipulate, nn, presets, stages, weights
  from unclip_jax.configs import UnclipConfig
  from unclip_jax.presets import preset
  from unclip_jax.stages import ar_prior, clip, decoder, diffusion_prior, upsampler
  from unclip_jax.systems.exported import load_exported, write_exported
  from unclip_jax.systems.fused import Fused, fuse
  from unclip_jax.systems.samples import Progress, Samples, StartNoise, Trajectories
  from unclip_jax.systems.settings import Sampling
  from unclip_jax.systems.unclip import Unclip, generate, load
  from unclip_jax.types import UnclipError

__all__ = [
  'Fused',
  'Progress',
  'Samples',
  'Sampling',
  'StartNoise',
  'Trajectories',
  'Unclip',
  'UnclipConfig',
  'UnclipError',
  'ar_prior',
  'clip',
  'configs',
  'data',
  'decoder',
  'diffusion',
  'diffusion_prior',
  'fuse',
  'generate',
  'load',
  'load_exported',
  'manipulate',
  'nn',
  'preset',
  'presets',
  'stages',
  'upsampler',
  'weights',
  'write_exported',
]

# A name that is a module itself is not looked up in one.
_HOMES = {
  'Fused': 'systems.fused',
  'Progress': 'systems.samples',
  'Samples': 'systems.samples',
  'Sampling': 'systems.settings',
  'StartNoise': 'systems.samples',
  'Trajectories': 'systems.samples',
  'Unclip': 'systems.unclip',
  'UnclipConfig': 'configs',
  'UnclipError': 'types',
  'ar_prior': 'stages.ar_prior',
  'clip': 'stages.clip',
  'configs': 'configs',
  'data': 'data',
  'decoder': 'stages.decoder',
  'diffusion': 'diffusion',
  'diffusion_prior': 'stages.diffusion_prior',
  'fuse': 'systems.fused',
  'generate': 'systems.unclip',
  'load': 'systems.unclip',
  'load_exported': 'systems.exported',
  'manipulate': 'manipulate',
  'nn': 'nn',
  'preset': 'presets',
  'presets': 'presets',
  'stages': 'stages',
  'upsampler': 'stages.upsampler',
  'weights': 'weights',
  'write_exported': 'systems.exported',
}


def __getattr__(name: str) -> Any:
  if name == '__version__':
    return _version()
  if name not in _HOMES:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  home = _HOMES[name]
  module = importlib.import_module(f'{__name__}.{home}')
  return module if home.rpartition('.')[2] == name else getattr(module, name)


def _version() -> str:
  metadata = importlib.import_module('importlib.metadata')
  try:
    return metadata.version('unclip-jax')
  except metadata.PackageNotFoundError:  # Run from a tree that is not installed.
    return 'unknown'


def __dir__() -> list[str]:
  return [*__all__, '__version__']
