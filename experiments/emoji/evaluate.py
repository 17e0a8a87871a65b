"""Measures a model on captions of pairs that it never saw; prints the tables of docs/emoji.md.

  python -m experiments.emoji.train_judge --run runs/judge
  python -m experiments.emoji.evaluate --run runs/emoji_small --judge runs/judge

The pictures are judged by a CLIP of another make than the one that generates, and by plain measures
of pixels. Intervals are 95% of a bootstrap over captions.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import unclip_jax
from experiments.emoji import common, held_out, measures
from experiments.emoji.compose import CaptionedEmoji, Sprites, in_domain, load_sprites
from experiments.emoji.held_out import Gallery
from unclip_jax import Sampling, Unclip
from unclip_jax.data.degradations import area_downsample
from unclip_jax.evaluate.frechet import MIN_ROWS_A_DIMENSION, frechet_distance
from unclip_jax.evaluate.retrieval import Interval, bootstrap, is_first
from unclip_jax.images import make_grid
from unclip_jax.stages import common as stage_common
from unclip_jax.stages import upsampler
from unclip_jax.types import UnclipError

GUIDANCE_SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
STEPS = (5, 10, 25, 50, 100)
Row = dict[str, Interval | float]  # measures by their names

MIN_JUDGE = 0.8  # R@1 on real pictures, below which a judge's word is worth little


class Bench:
  """A model, its judge, and the captions that it is asked for.

  Attributes:
    model: what generates.
    judge: a model with a CLIP alone.
    sprites: of a build as large as the model's pictures, or the one of the repository.
    gallery: captions of held-out pairs, filled up with others.
    asked: the truths of the held-out pairs, each `num_samples` times.
    labels: of `asked`, the rows of the gallery.
  """

  def __init__(
    self, model: Unclip, judge: Unclip, sprites: Sprites, gallery: Gallery, num_samples: int
  ):
    self.model, self.judge, self.sprites, self.gallery = model, judge, sprites, gallery
    self.num_samples = num_samples
    self.labels = np.repeat(np.arange(gallery.num_asked), num_samples)
    self.asked = [gallery.truths[i] for i in self.labels]
    self.size = model.config.upsamplers[-1].image_size
    elsewhere = [held_out.on_another_background(truth) for truth in gallery.truths]
    self._captions = np.asarray(judge.encode_text(gallery.captions))
    self._elsewhere = self.judge_images(held_out.real_pictures(sprites, elsewhere, self.size))
    self.real = held_out.real_pictures(sprites, self.asked, self.size)

  def judge_images(self, images: np.ndarray) -> np.ndarray:
    """Features [n, d] of pictures, as the judge sees them."""
    parts = [self.judge.encode_image(images[i : i + 64]) for i in range(0, len(images), 64)]
    return np.concatenate([np.asarray(part) for part in parts])

  def draw(self, captions: Sequence[str], num_images: int, **options: Any) -> np.ndarray:
    """Pictures of captions, `num_images` each."""
    return self.model.sample(list(captions), seed=0, num_images=num_images, **options).images

  def row(self, images: np.ndarray) -> Row:
    """All measures of pictures [captions * num_samples] of what was asked for."""
    features, truths, groups = self.judge_images(images), self.asked, self.labels
    to_size = images.shape[1]
    real = self.real
    if to_size != self.size:
      real = held_out.real_pictures(self.sprites, truths, to_size)
    values = {
      'R@1 captions': is_first(features, self._captions, groups),
      'R@1 real, other ground': is_first(features, self._elsewhere, groups),
      'background': measures.has_background(images, truths),
      'silhouette IoU': measures.silhouette_overlap(images, real, truths),
      'colour off by': measures.colour_distance(images, real, truths),
    }
    return {name: bootstrap(value, groups) for name, value in values.items()}

  def diversity(self, images: np.ndarray) -> float:
    """1 - the mean cosine of the judge's features of two samples of a caption."""
    features = self.judge_images(images).reshape(-1, self.num_samples, self._captions.shape[1])
    n = self.num_samples
    within = (features.sum(axis=1) ** 2).sum(axis=-1) - n
    return float(1 - (within / (n * (n - 1))).mean())


def compare_sources(bench: Bench) -> dict[str, Row]:
  """The real pictures, and those decoded from each of what the decoder may be given."""
  asked = [truth.caption for truth in bench.gallery.truths[: bench.gallery.num_asked]]
  model, n = bench.model, bench.num_samples
  clip_size = model.config.clip.vision.image_size
  real = held_out.real_pictures(bench.sprites, bench.asked, clip_size)
  nothing = model.params['decoder']['null_z_i'][None] / model.config.decoder.embed_scale
  # A given z_i is one row a picture.
  pictures = {
    'real': bench.real,
    'true z_i': bench.draw(asked, n, z_i=model.encode_image(real)),
    'prior': bench.draw(asked, n),
    'z_t as z_i': bench.draw(asked, n, z_i=model.encode_text([t.caption for t in bench.asked])),
    'caption alone': bench.draw(asked, n, z_i=nothing),
  }
  rows = {name: bench.row(images) for name, images in pictures.items()}
  for name in ('true z_i', 'prior', 'z_t as z_i', 'caption alone'):
    rows[name]['diversity'] = bench.diversity(pictures[name])
  return rows


def find_the_weakest(bench: Bench, rows: dict[str, Row]) -> dict[str, str]:
  """One figure a stage."""
  model, gallery = bench.model, bench.gallery
  truths = gallery.truths[: gallery.num_asked]
  clip_size, up = model.config.clip.vision.image_size, model.config.upsamplers[0]
  z_i = np.asarray(
    model.encode_image(held_out.real_pictures(bench.sprites, gallery.truths, clip_size))
  )
  labels = np.arange(len(truths))
  found = is_first(z_i[labels], model.encode_text(gallery.captions), labels)
  drawn = np.asarray(model.sample([t.caption for t in truths], 0, size=up.low_size).z_i)
  drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
  scores = drawn @ z_i.T
  own, others = bootstrap(scores[labels, labels]), np.ones(scores.shape, bool)
  others[labels, labels] = False
  high = held_out.real_pictures(bench.sprites, truths, up.image_size)
  scale = up.image_size // up.low_size
  low = np.asarray(area_downsample(common.to_float(jnp.asarray(high)), scale))
  enlarged, bicubic = upscale(model, low)
  return {
    'CLIP': f'R@1 of real pictures among {len(gallery.truths)} captions {bootstrap(found)}',
    'prior': f'cosine to the true z_i {own}, to those of others {scores[others].mean():.3f}',
    'decoder': f'R@1 from the true z_i {rows["true z_i"]["R@1 captions"]}',
    'upsampler': (
      f'PSNR from the true {up.low_size} px {psnr(enlarged, high):.2f} dB, '
      f'bicubic {psnr(bicubic, high):.2f} dB'
    ),
  }


def upscale(model: Unclip, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Small pictures (float in [-1, 1]) by the first upsampler and bicubic, uint8."""
  config = model.config.upsamplers[0]
  plan = stage_common.make_plan(config.diffusion, config.sampling)
  sampling = config.sampling
  sampler = stage_common.make_sampler(sampling.sampler, sampling.variance, sampling.eta)

  @jax.jit
  def enlarge(params, low, key_b):
    return upsampler.sample(config, params, low, key_b, plan, sampler)[0]

  keys = jax.random.split(jax.random.key(0), len(low))
  params = model.params['upsampler_0']
  parts = [enlarge(params, low[i : i + 1], keys[i : i + 1]) for i in range(len(low))]
  return common.to_uint8(jnp.concatenate(parts)), common.to_uint8(
    upsampler.upscale(jnp.asarray(low), config.image_size)
  )


def psnr(images: np.ndarray, real: np.ndarray) -> float:
  """Peak signal-to-noise ratio of uint8 pictures in dB, over all of them."""
  error = np.mean((images.astype(np.float64) - real) ** 2)
  return float(10 * np.log10(255**2 / max(error, 1e-12)))


def measure_scenes(bench: Bench, num: int) -> dict[str, Row]:
  """Whether two objects are where the caption says, by the judge and by pixels."""
  scenes = held_out.scenes(bench.sprites, bench.gallery, num)
  asked = [places[0] for places in scenes]
  real = held_out.real_pictures(bench.sprites, asked, bench.size)
  drawn = bench.draw([truth.caption for truth in asked], 1)
  places = np.asarray(bench.judge.encode_text([t.caption for four in scenes for t in four]))
  places = places.reshape(num, len(scenes[0]), -1)
  result = {}
  for name, images in (('real', real), ('generated', drawn)):
    scores = np.einsum('nd,npd->np', bench.judge_images(images), places)
    bound, distinct = measures.is_bound(images, real, asked)
    result[name] = {
      'right place of four': bootstrap(scores.argmax(axis=1) == 0),
      'background': bootstrap(measures.has_background(images, asked)),
    }
    if distinct.any():
      result[name]['colours in their places'] = bootstrap(bound[distinct])
  return result


def measure_distance(bench: Bench, options: dict, num: int) -> float:
  """The Fréchet distance of generated pictures from real ones, on captions of the training set."""
  source = CaptionedEmoji(
    bench.sprites,
    bench.size,
    num,
    seed=2,
    styles=options['styles'],
    groups=options['groups'],
    labels=options['labels'],
    scene_fraction=0.0,
    jitter=options.get('jitter', 0.04),
  )
  examples = [source[i] for i in range(num)]
  drawn = bench.draw([example.caption for example in examples], 1)
  real = np.stack([example.image for example in examples])
  return frechet_distance(bench.judge_images(drawn), bench.judge_images(real))


def sweep(bench: Bench, image_file: Path) -> None:
  """Plots quality against guidance and against steps, on the decoder's own size."""
  size = bench.model.config.decoder.image_size
  asked = [truth.caption for truth in bench.gallery.truths[: bench.gallery.num_asked]]
  sampling = bench.model.config.decoder.sampling
  figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout='constrained')
  for panel, name, values in (
    (panels[0], 'guidance scale', GUIDANCE_SCALES),
    (panels[1], 'steps of the decoder', STEPS),
  ):
    for sampler in ('ddpm', 'ddim'):
      rows = []
      for value in values:
        steps, scale = sampling.num_steps, sampling.guidance_scale
        steps, scale = (steps, value) if name == 'guidance scale' else (value, scale)
        decoder = Sampling(num_steps=steps, guidance_scale=scale, sampler=sampler)
        images = bench.draw(asked, bench.num_samples, decoder=decoder, size=size)
        rows.append(bench.row(images)['R@1 captions'])
      means = [row.mean for row in rows]
      errors = [[row.mean - row.low for row in rows], [row.high - row.mean for row in rows]]
      panel.errorbar(values, means, errors, marker='o', capsize=3, label=sampler)
    panel.set(xlabel=name, ylabel='R@1 of the judge', ylim=(0, 1))
    panel.legend()
  panels[1].set_xscale('log')
  figure.savefig(image_file, dpi=100)
  plt.close(figure)


def nearest_of_training(bench: Bench, options: dict, num: int = 16) -> np.ndarray:
  """Samples of held-out captions above the training pictures that the judge finds nearest."""
  sprites = bench.sprites
  domain = in_domain(sprites, options['styles'], options['groups'], options['labels'])
  candidates = np.flatnonzero(domain & (sprites.split == 'train'))
  truths = bench.asked[:: bench.num_samples][:num]
  drawn = bench.draw([truth.caption for truth in truths], 1)
  features, nearest = bench.judge_images(drawn), []
  for truth, query in zip(truths, features, strict=True):
    # The whole training set on the background that was asked for: the object is what is compared.
    there = [truth._replace(sprite_index=i, second_index=i) for i in candidates]
    gallery = bench.judge_images(held_out.real_pictures(sprites, there, 64))
    best = there[int((gallery @ query).argmax())]
    nearest.append(held_out.real_pictures(sprites, [best], bench.size)[0])
  return np.concatenate([drawn, np.stack(nearest)])


def table(rows: dict[str, Row]) -> str:
  """Rows of measures in Markdown."""
  names = list(dict.fromkeys(name for row in rows.values() for name in row))
  lines = ['| | ' + ' | '.join(names) + ' |', '|---' * (len(names) + 1) + '|']
  for label, row in rows.items():
    cells = [row.get(name, '') for name in names]
    cells = [f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in cells]
    lines.append(f'| {label} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def main(argv: list[str] | None = None) -> None:
  parser = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--run', type=Path, default=Path('runs/emoji_small'))
  parser.add_argument('--judge', type=Path, default=Path('runs/judge'))
  parser.add_argument('--images', type=Path, default=Path('docs/images'))
  parser.add_argument('--data', type=Path, default=None, help='a build as large as the pictures')
  parser.add_argument('--captions', type=int, default=200, help='of the gallery')
  parser.add_argument('--samples', type=int, default=4, help='of each held-out caption')
  parser.add_argument('--scenes', type=int, default=64, help='of two objects')
  parser.add_argument('--no-sweep', action='store_true', help='leave out steps and guidance')
  args = parser.parse_args(argv)
  if args.samples < 2 or args.scenes < 1 or args.captions < 2:
    raise UnclipError('take at least 2 samples, 2 captions and 1 scene')
  args.images.mkdir(parents=True, exist_ok=True)
  options = json.loads((args.run / 'decoder' / 'options.json').read_text())
  sprites = load_sprites(args.data)
  domain = (options['styles'], options['groups'], options['labels'])
  gallery = held_out.make_gallery(sprites, *domain, args.captions)
  model, judge = unclip_jax.load(args.run), unclip_jax.load(args.judge)
  bench = Bench(model, judge, sprites, gallery, args.samples)
  print(
    f'{gallery.num_asked} captions of held-out pairs, {args.samples} samples each, among '
    f'{len(gallery.truths)} captions of the domain.\n'
  )
  rows = compare_sources(bench)
  print(table(rows) + '\n')
  if rows['real']['R@1 captions'].mean < MIN_JUDGE:
    print(f'The judge finds fewer than {MIN_JUDGE:.0%} of the real pictures: train it longer.\n')
  for stage, figure in find_the_weakest(bench, rows).items():
    print(f'- {stage}: {figure}')
  print('\n' + table(measure_scenes(bench, args.scenes)) + '\n')
  num = MIN_ROWS_A_DIMENSION * judge.config.clip.embed_dim
  distance = measure_distance(bench, options, num)
  print(f'Fréchet distance on the features of the judge, {num} pictures: {distance:.4f}\n')
  grid = make_grid(nearest_of_training(bench, options), 16)
  Image.fromarray(grid).save(args.images / 'nearest.webp', quality=85)
  print(f'![Samples above the nearest training pictures]({args.images.name}/nearest.webp)')
  if not args.no_sweep:
    sweep(bench, args.images / 'sweep.png')
    print(f'\n![Quality against guidance and steps]({args.images.name}/sweep.png)')


if __name__ == '__main__':
  common.run(main)
