"""What a caller may ask of the autoregressive prior: of all settings of a stage, guidance alone."""

import dataclasses
from typing import NamedTuple

import numpy as np

from unclip_jax.configs import ArSamplingConfig
from unclip_jax.systems.settings import Sampling, check_number
from unclip_jax.types import UnclipError


class ArSettings(NamedTuple):
  """Settings of the autoregressive prior, ready for its program.

  Attributes:
    guidance_scale: float32 scalar, None where there is no guidance.
  """

  guidance_scale: np.float32 | None


def resolve(name: str, default: ArSamplingConfig, asked: Sampling) -> ArSettings:
  """The settings asked for, the model's own for the rest.

  Args:
    name: of the stage, for messages.
    default: the model's own.
    asked: what the caller wants otherwise.

  Raises:
    UnclipError: a setting would be without effect, or is out of range.
  """
  if not isinstance(asked, Sampling):
    raise UnclipError(f'{name}: give a Sampling, not {type(asked).__name__}')
  for field, value in dataclasses.asdict(asked).items():
    if value is not None and field != 'guidance_scale':
      raise UnclipError(
        f'{name}: {field} is without effect on an autoregressive prior, which denoises nothing: '
        'leave it out, only guidance_scale has one'
      )
  scale = default.guidance_scale if asked.guidance_scale is None else asked.guidance_scale
  scale = check_number(f'{name}: guidance scale', scale)
  if scale < 0:
    raise UnclipError(f'{name}: guidance scale {scale:g} is negative: take 0 or more')
  return ArSettings(None if scale == 1 else np.float32(scale))
