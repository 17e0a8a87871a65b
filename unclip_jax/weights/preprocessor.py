"""How pictures are prepared for CLIP, as transformers saves it: `preprocessor_config.json`."""

from collections.abc import Mapping
from typing import Any

from unclip_jax.configs import ClipConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights.foreign_config import Fields

PREPROCESSOR_NAME = 'preprocessor_config.json'
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # Pillow's number of it


def read_pixel_statistics(
  values: Mapping[str, Any], where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and std of pixels, from a `preprocessor_config.json`; they have to be three numbers.

  Raises:
    UnclipError: it asks for a preparation of images that ours does not do.
  """
  fields = Fields(values, where)
  mean = fields.take_numbers('image_mean', OPENAI_MEAN)
  std = fields.take_numbers('image_std', OPENAI_STD)
  if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
    raise UnclipError(f'{where}: image_mean {mean} and image_std {std} must be of three channels')
  fields.expect(
    do_resize=True, do_center_crop=True, do_normalize=True, do_rescale=True, do_convert_rgb=True
  )
  fields.expect(resample=BICUBIC, rescale_factor=1 / 255)
  fields.ignore(('size', 'crop_size', 'feature_extractor_type', 'image_processor_type'))
  fields.ignore(('processor_class', 'use_square_size', 'default_to_square'))
  fields.done()
  return tuple(map(float, mean)), tuple(map(float, std))


def write_preprocessor_config(config: ClipConfig) -> dict[str, Any]:
  """A `preprocessor_config.json` for the image tower."""
  size = config.vision.image_size
  return {
    'image_processor_type': 'CLIPImageProcessor',
    'feature_extractor_type': 'CLIPFeatureExtractor',
    'do_resize': True,
    'size': {'shortest_edge': size},
    'do_center_crop': True,
    'crop_size': {'height': size, 'width': size},
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'do_convert_rgb': True,
    'image_mean': list(config.pixel_mean),
    'image_std': list(config.pixel_std),
    'resample': BICUBIC,
  }
