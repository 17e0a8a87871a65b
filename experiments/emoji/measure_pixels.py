"""Measures a model without a judge, by the pixels of its pictures; prints a table in Markdown.

  python -m experiments.emoji.measure_pixels --run runs/emoji_small --against default

Captions of held-out pairs, drawn from their true z_i and from their captions, at the decoder's size
and at its settings, as `evaluate` has them. With --against the same of another model for the same
captions (of --run's domain) and seeds, and the differences. Intervals are 95% of a bootstrap over
captions.
"""

import dataclasses
from pathlib import Path

import numpy as np

import unclip_jax
from experiments.emoji import common, held_out, measures
from experiments.emoji.bench import Row, Values, domain_of, read_options, table
from experiments.emoji.compose import Sprites, load_sprites
from experiments.emoji.parser import Parser
from unclip_jax.evaluate.retrieval import bootstrap
from unclip_jax.types import UnclipError

SEED = 5


def draw_and_measure(
  run: str, sprites: Sprites, truths: list[held_out.Truth], num_samples: int
) -> dict[str, Values]:
  """Measures of each picture, by what it was drawn from."""
  model = dataclasses.replace(unclip_jax.load(run), vocabulary=None)
  captions, size = [truth.caption for truth in truths], model.config.decoder.image_size
  asked = [truth for truth in truths for _ in range(num_samples)]
  real = held_out.real_pictures(sprites, asked, size)
  seen = held_out.real_pictures(sprites, asked, model.config.clip.vision.image_size)
  drawn = {
    'true z_i': model.sample(captions, SEED, num_samples, size=size, z_i=model.encode_image(seen)),
    'prior': model.sample(captions, SEED, num_samples, size=size),
  }
  return {
    name: measure(common.to_uint8(samples.stage_images[0]), real, asked)
    for name, samples in drawn.items()
  }


def measure(images: np.ndarray, real: np.ndarray, truths: list[held_out.Truth]) -> Values:
  """Measures of pictures uint8 [n, h, w, 3], each [n]."""
  error = ((images.astype(np.float64) - real) ** 2).mean(axis=(1, 2, 3))
  return {
    'PSNR, dB': 10 * np.log10(255**2 / np.maximum(error, 1e-9)),
    'background': measures.has_background(images, truths).astype(np.float64),
    'silhouette IoU': measures.silhouette_overlap(images, real, truths),
    'colour off by': measures.colour_distance(images, real, truths),
  }


def main(argv: list[str] | None = None) -> None:
  parser = Parser(description=__doc__)
  parser.add_argument('--run', default='default', help='a run of the training scripts, or a model')
  parser.add_argument('--against', help='another')
  parser.add_argument('--samples', type=int, default=4, help='of each caption')
  args = parser.parse_args(argv)
  if args.samples < 1:
    raise UnclipError(f'--samples {args.samples}: take 1 or more')
  sprites = load_sprites(None)
  gallery = held_out.make_gallery(sprites, *domain_of(read_options(Path(args.run))))
  truths = gallery.truths[: gallery.num_asked]
  found = {
    run: draw_and_measure(run, sprites, truths, args.samples)
    for run in (args.run, args.against)
    if run
  }
  rows: dict[str, Row] = {}
  for run, sources in found.items():
    for source, values in sources.items():
      rows[f'{run}, {source}'] = to_row(values, args.samples)
  if args.against:
    ours, theirs = found[args.run], found[args.against]
    for source in ours:
      apart = {name: ours[source][name] - theirs[source][name] for name in ours[source]}
      rows[f'difference, {source}'] = to_row(apart, args.samples)
  print(table(rows))


def to_row(values: Values, num_samples: int) -> Row:
  """Means with their intervals."""
  num = len(next(iter(values.values()))) // num_samples
  labels = np.repeat(np.arange(num), num_samples)
  return {name: bootstrap(value, labels) for name, value in values.items()}


if __name__ == '__main__':
  common.run(main)
