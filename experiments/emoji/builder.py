"""The TFDS builder of the captioned emoji: RGBA sprites and their words, without backgrounds.

Written as ArrayRecord without TensorFlow. The sprites are lossless WebP in a plain bytes feature
(TFDS's `Image` refuses WebP). Captions, backgrounds and scenes are composed when the data is read;
see compose.py.
"""

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import resvg_py
import tensorflow_datasets as tfds
from PIL import Image

from experiments.emoji import concepts, packages
from unclip_jax.types import UnclipError

RENDERED_SIZE = 256  # of the 3D set, which has no vector graphics
FAST = {'quality': 10, 'method': 1}


@dataclasses.dataclass(frozen=True)
class RenderedIcon:
  """An icon, its split and its pixels as lossless WebP."""

  icon: packages.Icon
  split: str
  webp: bytes


def render(icon: packages.Icon, size: int) -> Image.Image:
  """Returns an icon as an RGBA image of `size` by `size` pixels.

  Vector graphics are rendered at that size; 3D renderings are reduced (premultiplied, antialiased).
  """
  if icon.svg is not None:
    png = resvg_py.svg_to_bytes(
      svg_string=icon.svg, width=size, height=size, skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(png))).convert('RGBA')
  else:
    image = Image.open(io.BytesIO(icon.webp)).convert('RGBA')
  if image.size != (size, size):
    image = image.resize((size, size), Image.Resampling.LANCZOS)
  return image


def round_colours(image: Image.Image, bits: int) -> Image.Image:
  """Returns an image with `bits` bits a channel: smaller as WebP, 7 are at most one level off."""
  levels = 2**bits - 1
  table = [round(round(value / 255 * levels) / levels * 255) for value in range(256)]
  return image.point(table * len(image.getbands()))


def encode(image: Image.Image) -> bytes:
  """Returns an RGBA image as lossless WebP; what fully transparent pixels hide is dropped."""
  buffer = io.BytesIO()
  # A large one takes seconds at the highest effort.
  effort = {'quality': 90, 'method': 6} if image.width <= RENDERED_SIZE else FAST
  image.save(buffer, 'WEBP', lossless=True, **effort)
  return buffer.getvalue()


def render_all(
  icons: list[packages.Icon],
  size: int,
  styles: Sequence[str],
  colour_bits: int,
  progress: Callable[[int, int], None],
  groups: Sequence[str] | None = None,
) -> Iterator[RenderedIcon]:
  """Yields every icon of `styles` that has a true image of `size` pixels, with its split.

  Args:
    icons: of all styles, as the splits depend on which styles a concept has.
    size: in pixels. Above 256 the 3D renderings are left out.
    styles: which styles to render.
    colour_bits: bits a channel, up to 8.
    progress: called with the number of icons done and their total.
    groups: restricts emojibase's groups; None is all.

  Raises:
    UnclipError: there is no such group.
  """
  splits = concepts.assign_splits((icon.emoji.concept, icon.style) for icon in icons)
  known = sorted({icon.emoji.group for icon in icons})
  if unknown := sorted(set(groups or ()) - set(known)):
    raise UnclipError(f'unknown group {unknown[0]!r}: choose from {", ".join(known)}')
  chosen = [icon for icon in icons if icon.style in styles and (icon.svg or size <= RENDERED_SIZE)]
  chosen = [icon for icon in chosen if groups is None or icon.emoji.group in groups]
  for done, icon in enumerate(chosen, start=1):
    image = round_colours(render(icon, size), colour_bits)
    # An icon without a visible pixel would be a caption without a picture.
    if np.asarray(image)[..., 3].max() > 0:
      yield RenderedIcon(icon, splits[icon.emoji.concept, icon.style], encode(image))
    progress(done, len(chosen))


class Emoji(tfds.core.GeneratorBasedBuilder):
  """Sprites of emoji in several styles, with labels, keywords and splits."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES: ClassVar[dict[str, str]] = {'1.0.0': 'First version.'}

  def __init__(self, rendered: list[RenderedIcon], size: int, data_dir: Path):
    """Prepares a builder that writes `rendered`, sprites of `size` pixels, under `data_dir`."""
    self._rendered = rendered
    self._size = size
    super().__init__(data_dir=data_dir, file_format='array_record')

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
      builder=self,
      description=f'Emoji of several styles as RGBA sprites of {self._size} pixels.',
      features=tfds.features.FeaturesDict(
        {
          'sprite': tfds.features.Tensor(shape=(), dtype=np.object_),
          'name': text(),
          'style': text(),
          'code_points': text(),
          'concept': text(),
          'label': text(),
          'keywords': tfds.features.Sequence(text()),
          'group': text(),
        }
      ),
      homepage='https://github.com/microsoft/fluentui-emoji',
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    return {split: self._generate_examples(split) for split in concepts.SPLITS}

  def _generate_examples(self, split: str):
    for rendered in self._rendered:
      if rendered.split == split:
        emoji, style = rendered.icon.emoji, rendered.icon.style
        yield (
          f'{style}/{emoji.code_points}',
          {
            'sprite': rendered.webp,
            'name': emoji.label.replace(' ', '-'),
            'style': style,
            'code_points': emoji.code_points,
            'concept': emoji.concept,
            'label': emoji.label,
            'keywords': list(emoji.keywords),
            'group': emoji.group,
          },
        )


def build(
  size: int,
  out_dir: Path,
  cache_dir: Path,
  styles: Sequence[str],
  colour_bits: int,
  progress: Callable[[int, int], None],
  groups: Sequence[str] | None = None,
) -> dict[str, int]:
  """Builds the sprites at `size` pixels into `out_dir` and returns the number of sprites per split.

  The folder appears only once it is complete.

  Raises:
    UnclipError: the size is out of range, nothing is left to draw, the folder is not empty, a
      package cannot be had, there is no such group.
  """
  if not 16 <= size <= 2048:
    raise UnclipError(f'--size {size}: choose 16 to 2048 pixels')
  if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
    raise UnclipError(f'{out_dir} is not an empty folder: choose another one with --out')
  if size > RENDERED_SIZE and set(styles) == {'3d'}:
    raise UnclipError(f'--size {size}: the 3d style has {RENDERED_SIZE} pixels at most')
  icons = packages.read_icons(packages.fetch_packages(cache_dir))
  rendered = list(render_all(icons, size, styles, colour_bits, progress, groups))
  partial_dir = out_dir.with_name(out_dir.name + '.partial')
  shutil.rmtree(partial_dir, ignore_errors=True)
  try:
    tfds.disable_progress_bar()
    builder = Emoji(rendered, size, partial_dir)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS speaks of downloads; there are none
      builder.download_and_prepare()
    if out_dir.exists():
      out_dir.rmdir()
    shutil.move(builder.data_path, out_dir)
  finally:
    shutil.rmtree(partial_dir, ignore_errors=True)
  return {split: sum(item.split == split for item in rendered) for split in concepts.SPLITS}
