"""Pictures from files into arrays of one size: any mode to RGB, resized antialiased, cropped.

Nothing is stretched: the short side is brought to a size, and the long one cropped. What is random
comes from a generator that is given.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unclip_jax.data import degradations
from unclip_jax.data.examples import BrokenExample
from unclip_jax.types import UnclipError

# Of a JPEG at least so many times the wanted pixels are decoded along a side, as Pillow's
# thumbnails have it: the rest of the reduction, by the kernel, hides how the first was made.
_DRAFT_GAP = 2

_KERNELS = {
  'area': Image.Resampling.BOX,
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
  'lanczos': Image.Resampling.LANCZOS,
}


@dataclasses.dataclass(frozen=True)
class PictureConfig:
  """How pictures become arrays.

  Attributes:
    size: the short side is resized to it, in pixels.
    crop: side of the square that is cut out then; None is all of the short side. The paper trains
      upsamplers on crops of a quarter (table 3).
    random_crop: where it is cut out: anywhere, else in the middle.
    kernel: of a reduction: 'area' (the mean of what a pixel covers), 'bilinear', 'bicubic',
      'lanczos', all antialiased. Pictures are enlarged bicubically.
    least_side: a picture whose short side has fewer pixels is left out as broken, at most `size`: a
      target that was enlarged teaches an upsampler blur.
    bsr_factor: gives `low` as well, the BSR degradation, so many times smaller; None gives none.

  Raises:
    UnclipError: a value is out of range.
  """

  size: int
  crop: int | None = None
  random_crop: bool = False
  kernel: str = 'area'
  least_side: int = 1
  bsr_factor: int | None = None

  def __post_init__(self):
    if self.size < 1:
      raise UnclipError(f'size {self.size}: pictures have 1 pixel or more')
    if self.crop is not None and not 1 <= self.crop <= self.size:
      raise UnclipError(f'crop {self.crop}: choose 1 to {self.size}, the size of the short side')
    if not 1 <= self.least_side <= self.size:
      raise UnclipError(f'least_side {self.least_side}: choose 1 to {self.size}, the size')
    if self.kernel not in _KERNELS:
      raise UnclipError(f'kernel {self.kernel!r}: choose one of {", ".join(_KERNELS)}')
    if self.bsr_factor is not None and (self.bsr_factor < 1 or self.side % self.bsr_factor):
      raise UnclipError(
        f'bsr_factor {self.bsr_factor}: choose one that divides pictures of {self.side} pixels'
      )

  @property
  def side(self) -> int:
    """Of the arrays, in pixels."""
    return self.size if self.crop is None else self.crop


class Picture(NamedTuple):
  """A picture for training.

  Attributes:
    image: uint8 [side, side, 3].
    low: uint8 [side / bsr_factor, side / bsr_factor, 3], the same degraded, or None.
  """

  image: np.ndarray
  low: np.ndarray | None = None


def make_picture(
  content: bytes | np.ndarray, name: str, config: PictureConfig, rng: np.random.Generator
) -> Picture:
  """Decodes, resizes and crops a picture, and degrades it where the config says so.

  Args:
    content: of a picture file, or uint8 [h, w, 1 or 3].
    name: of the picture, for the error.
    config: what becomes of it.
    rng: draws the crop and the degradation.

  Raises:
    BrokenExample: it cannot be decoded, has more pixels than Pillow takes for safe, or too few.
  """
  try:
    image = _from_array(content) if isinstance(content, np.ndarray) else None
    if image is None:
      image = open_rgb(io.BytesIO(content), config.size)
  except Exception as error:  # of as many types as there are formats
    reason = (str(error).strip().splitlines() or [''])[0]
    if isinstance(error, UnidentifiedImageError):  # whose text has an address of memory in it
      reason = 'of no known format'
    raise BrokenExample(name, f'not a picture that can be read: {reason}') from error
  if min(image.size) < config.least_side:
    raise BrokenExample(name, f'{image.width}x{image.height} pixels, too few')
  pixels = _resize_and_crop(image, config, rng)
  if config.bsr_factor is None:
    return Picture(pixels)
  seed = int(rng.integers(2**63))
  return Picture(pixels, degradations.bsr_degrade(pixels, config.bsr_factor, seed))


def open_rgb(
  file: IO[bytes],
  short_side: int | None = None,
  formats: Sequence[str] | None = None,
  ground: str = 'white',
) -> Image.Image:
  """A picture of any mode as RGB: turned as its EXIF says, transparency on `ground`.

  Args:
    file: an open picture file.
    short_side: what it will be reduced to. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where
      this leaves twice as many pixels or more, which takes a fraction of the time.
    formats: of Pillow's, which the file is read as one of; None for any.
    ground: a colour of Pillow's.

  Raises:
    Image.DecompressionBombError: it has more pixels than Pillow takes for safe.
    Exception: of many types, where the file is damaged or no picture.
  """
  image = Image.open(file, formats=formats)
  if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
    # Pillow itself only warns, up to twice as many.
    raise Image.DecompressionBombError(
      f'{image.width}x{image.height} pixels, more than Pillow takes for safe'
    )
  if short_side is not None:
    scale = _DRAFT_GAP * short_side / min(image.size)
    image.draft(None, (round(image.width * scale), round(image.height * scale)))
  ImageOps.exif_transpose(image, in_place=True)
  if image.mode.startswith(('I', 'F')):  # 16 bits or more a pixel
    levels = np.nan_to_num(np.asarray(image, np.float64))
    # Mode 'I' does not say of how many bits its file was.
    largest = 65535 if image.mode.startswith('I;16') or levels.max() > 255 else 255
    if image.mode == 'F' and levels.max() <= 1:
      largest = 1
    image = Image.fromarray(np.uint8(np.clip(levels / largest, 0, 1) * 255 + 0.5))
  if image.has_transparency_data:
    image = image.convert('RGBA')
    image = Image.alpha_composite(Image.new('RGBA', image.size, ground), image)
  image.load()  # which finds what is damaged
  return image if image.mode == 'RGB' else image.convert('RGB')


def _from_array(pixels: np.ndarray) -> Image.Image:
  if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
    raise ValueError(f'{pixels.dtype}{list(pixels.shape)} is not uint8 [h, w, 1 or 3]')
  return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).convert('RGB')


def _resize_and_crop(
  image: Image.Image, config: PictureConfig, rng: np.random.Generator
) -> np.ndarray:
  """uint8 [side, side, 3]: only what is cut out is resized, from wherever it lies."""
  width, height = image.size
  scale, side = config.size / min(width, height), config.side
  # Whole pixels of the resized picture, so that a picture of the right size is not resampled.
  free = [int(length * scale + 1e-6) - side for length in (width, height)]
  if config.random_crop:
    left, top = (int(rng.integers(pixels + 1)) for pixels in free)
  else:
    left, top = (pixels // 2 for pixels in free)
  box = (left / scale, top / scale, (left + side) / scale, (top + side) / scale)
  # Rounding may lead out of the picture by a trifle, which Pillow refuses.
  box = (box[0], box[1], min(box[2], width), min(box[3], height))
  kernel = _KERNELS[config.kernel] if scale < 1 else Image.Resampling.BICUBIC
  return np.asarray(image.resize((side, side), kernel, box=box))
