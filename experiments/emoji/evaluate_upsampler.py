"""Measures an upsampler on emoji that it never saw, and shows what it makes of a model's samples.

  python -m experiments.emoji.build --size 1024 --out data/1024px
  python -m experiments.emoji.evaluate_upsampler --run runs/emoji_small --data data/1024px

Prints a table of docs/emoji.md: PSNR of held-out pictures that were made small, clean (the mean of
what a pixel covers) or degraded (BSR), and enlarged again, against bicubic. Writes a sheet of what
has most detail, a crop of each: bicubic, the upsampler's, the true picture, and of the samples of a
caption, bicubic and the upsampler's.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image

import unclip_jax
from experiments.emoji import common
from experiments.emoji.compose import load_sprites
from experiments.emoji.enlarge import psnr, upscale
from experiments.emoji.parser import Parser
from experiments.emoji.pool import make_pool
from unclip_jax import Unclip
from unclip_jax.data.degradations import area_downsample, bsr_degrade
from unclip_jax.evaluate.retrieval import bootstrap
from unclip_jax.images import make_grid
from unclip_jax.stages import upsampler
from unclip_jax.types import UnclipError

SPLITS = ('val_pairs', 'val_concepts')
SHOWN = 4  # rows of the sheet
PROMPTS = (
  'a red apple, flat style',
  'a 3d owl',
  'a rocket on a blue background',
  'a flat cat',
)


def make_small(high: np.ndarray, factor: int, seed: int) -> dict[str, np.ndarray]:
  """uint8 [n, h, w, 3] pictures made small, uint8: clean and degraded."""
  clean = [area_downsample(common.to_float(row[None]), factor)[0] for row in high]
  degraded = [bsr_degrade(row, factor, (seed, i)) for i, row in enumerate(high)]
  return {'clean': common.to_uint8(np.stack(clean)), 'degraded': np.stack(degraded)}


def in_dB(images: np.ndarray, real: np.ndarray) -> np.ndarray:
  """The PSNR of each picture, [n]."""
  return np.array([psnr(*pair) for pair in zip(images, real, strict=True)])


def most_detailed(image: np.ndarray, side: int) -> tuple[slice, slice]:
  """Where a crop of `side` pixels varies most, of those that half overlap."""
  starts = range(0, len(image) - side + 1, max(1, side // 2))
  places = [(slice(y, y + side), slice(x, x + side)) for y in starts for x in starts]
  return max(
    places, key=lambda place: float(image[place].astype(np.float32).var(axis=(0, 1)).sum())
  )


def of_samples(model: Unclip, stage: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """What the model draws of captions: bicubic and by its upsampler, uint8 [h, w, 3] each."""
  config = model.config.upsamplers[stage]
  for prompt in PROMPTS[:SHOWN]:
    drawn = model.sample(prompt, size=config.image_size)
    low = np.asarray(drawn.stage_images[stage])
    yield common.to_uint8(upsampler.upscale(low, config.image_size))[0], drawn.images[0]


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The options.

  Raises:
    UnclipError: one makes no sense; names it.
  """
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--run', default='default', help='the model that is measured')
  add('--stage', type=int, default=1, help='which of its upsamplers')
  add('--data', type=Path, required=True, help='a build as large as its pictures')
  add('--styles', nargs='+', default=None, help='of flat 3d noto twemoji (all)')
  add('--groups', nargs='+', default=None, help="emojibase's, such as food-drink (all)")
  add('--pictures', type=int, default=24, help='of each split')
  add('--images', type=Path, default=Path('docs/images'), help='folder of the sheet')
  args = parser.parse_args(argv)
  if args.pictures < SHOWN:
    raise UnclipError(f'--pictures {args.pictures}: take {SHOWN} or more')
  return args


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  model = unclip_jax.load(args.run)
  name = f'upsampler_{args.stage}'
  if name not in model.params:
    raise UnclipError(f'--stage {args.stage}: the model has {", ".join(model.params)}')
  config = model.config.upsamplers[args.stage]
  size, factor = config.image_size, config.image_size // config.low_size
  if (there := load_sprites(args.data).size) < size:
    raise UnclipError(f'the emoji of --data have {there} px, too few for the {size} of the {name}')
  print(
    f'{args.pictures} pictures of each split, {config.low_size} -> {size} px, PSNR in dB. '
    f'jax {jax.__version__} on {jax.devices()[0].device_kind}.\n'
  )
  print('| pictures | made small | bicubic | upsampler | gain |\n|---|---|---|---|---|')
  columns = []
  for split in SPLITS:
    how = {'styles': args.styles, 'groups': args.groups, 'data_dir': args.data}
    pool = make_pool(size, args.pictures, 1, (split,), scene_fraction=0.0, jitter=0.0, **how)
    for kind, low in make_small(pool.images, factor, seed=1).items():
      ours, bicubic = upscale(model, np.asarray(common.to_float(low)), args.stage)
      figures = in_dB(bicubic, pool.images), in_dB(ours, pool.images)
      means = ' | '.join(f'{values.mean():.2f}' for values in figures)
      print(f'| {split} | {kind} | {means} | {bootstrap(figures[1] - figures[0])} |', flush=True)
      if split == SPLITS[0] and kind == 'degraded':
        columns = list(zip(bicubic, ours, pool.images, strict=True))[:SHOWN]
  side, crops = min(256, size), []
  for shown, drawn in zip(columns, of_samples(model, args.stage), strict=True):
    crops += [image[most_detailed(shown[-1], side)] for image in shown]
    crops += [image[most_detailed(drawn[-1], side)] for image in drawn]
  args.images.mkdir(parents=True, exist_ok=True)
  Image.fromarray(make_grid(np.stack(crops), 5)).save(args.images / 'upsampled.webp', quality=80)
  print(f'\n![Crops of enlarged pictures]({args.images.name}/upsampled.webp)')


if __name__ == '__main__':
  common.run(main)
