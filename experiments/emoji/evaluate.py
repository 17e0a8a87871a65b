"""Measures a model on captions of pairs that it never saw; prints the tables of docs/emoji.md.

  python -m experiments.emoji.train_judge --run runs/judge
  python -m experiments.emoji.evaluate --run runs/emoji_small --judge runs/judge

The pictures are judged by a CLIP of another make than the one that generates, and by plain measures
of pixels. Intervals are 95% of a bootstrap over captions.

With --ar-prior RUN, of `train_ar_prior` for the same CLIP, the prior of that run is measured beside
the model's own: through the same decoder, for the same captions and seeds, the best of as many
candidates.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import unclip_jax
from experiments.emoji import common, held_out, measures
from experiments.emoji.bench import (
  Bench,
  Row,
  Values,
  domain_of,
  make_parser,
  open_bench,
  table,
)
from experiments.emoji.compose import CaptionedEmoji, in_domain
from experiments.emoji.enlarge import psnr, upscale
from unclip_jax import Unclip
from unclip_jax.configs import ArPriorConfig
from unclip_jax.data.degradations import area_downsample
from unclip_jax.evaluate.frechet import MIN_ROWS_A_DIMENSION, frechet_distance
from unclip_jax.evaluate.retrieval import bootstrap, is_first
from unclip_jax.images import make_grid
from unclip_jax.types import UnclipError

MIN_JUDGE = 0.8  # R@1 on real pictures, below which a judge's word is worth little


def with_prior_of(model: Unclip, other: str) -> Unclip:
  """The model with the prior of another one, which draws as many candidates as its own.

  Raises:
    UnclipError: there is none such, or it was trained for another CLIP.
  """
  theirs = unclip_jax.load(other)
  if not isinstance(theirs.config.prior, ArPriorConfig) or not is_same(model, theirs):
    raise UnclipError(
      f'--ar-prior {other}: it has no autoregressive prior for the CLIP of --run: train one to the '
      'end by train_ar_prior --init RUN'
    )
  num_candidates = model.config.prior.num_candidates
  prior = dataclasses.replace(theirs.config.prior, num_candidates=num_candidates)
  config = dataclasses.replace(model.config, prior=prior)
  params = {**model.params, 'prior': theirs.params['prior']}
  return dataclasses.replace(model, config=config, params=params)


def compare_sources(bench: Bench, rival: Unclip | None) -> tuple[dict[str, Row], dict[str, Values]]:
  """The real pictures, those decoded from each of what the decoder may be given, and two bounds.

  The bounds: training pictures of the same objects in another style, which a model that recalls
  and does not combine would draw, and pictures of other objects. `rival` is the model with another
  prior.
  """
  truths = bench.gallery.truths[: bench.gallery.num_asked]
  asked = [truth.caption for truth in truths]
  model, n = bench.model, bench.num_samples
  clip_size = model.config.clip.vision.image_size
  real = held_out.real_pictures(bench.sprites, bench.asked, clip_size)
  nothing = model.params['decoder']['null_z_i'][None] / model.config.decoder.embed_scale
  small, *_, large = model.sample(asked, bench.seed, n).stage_images
  # A given z_i is one row a picture.
  pictures = {
    'real': bench.real,
    'true z_i': bench.draw(asked, n, z_i=model.encode_image(real)),
    'prior': common.to_uint8(large),
    'prior, not enlarged': common.to_uint8(small),
    **({} if rival is None else {'AR prior': rival.sample(asked, bench.seed, n).images}),
    'z_t as z_i': bench.draw(asked, n, z_i=model.encode_text([t.caption for t in bench.asked])),
    'caption alone': bench.draw(asked, n, z_i=nothing),
  }
  objects = [truth.sprite_index for truth in truths]
  others = [
    truth._replace(sprite_index=other, second_index=other)
    for truth, other in zip(truths, [*objects[1:], objects[0]], strict=True)
  ]
  recalled = list(others)
  for truth, i in zip(
    *held_out.in_another_style(bench.sprites, truths, bench.options['styles']), strict=True
  ):
    recalled[i] = truth
  for name, bound in (('recall, other style', recalled), ('another object', others)):
    shown = held_out.real_pictures(bench.sprites, bound, bench.size)
    pictures[name] = shown.repeat(n, axis=0)
  values = {name: bench.measure(images) for name, images in pictures.items()}
  rows = {name: bench.row(value) for name, value in values.items()}
  for name in rows.keys() & {'true z_i', 'prior', 'AR prior', 'z_t as z_i', 'caption alone'}:
    rows[name]['diversity'] = bench.diversity(pictures[name])
  return rows, values


def find_the_weakest(bench: Bench, rows: dict[str, Row], rival: Unclip | None) -> dict[str, str]:
  """One figure a stage."""
  model, gallery = bench.model, bench.gallery
  truths = gallery.truths[: gallery.num_asked]
  clip_size, up = model.config.clip.vision.image_size, model.config.upsamplers[0]
  z_i = np.asarray(
    model.encode_image(held_out.real_pictures(bench.sprites, gallery.truths, clip_size))
  )
  labels = np.arange(len(truths))
  found = is_first(z_i[labels], model.encode_text(gallery.captions), labels)
  asked = [truth.caption for truth in truths]
  moved = np.asarray(model.encode_image(held_out.moved(bench.sprites, truths, clip_size)))
  spread = {'moved by 4%': (moved * z_i[labels]).sum(axis=1).mean()}
  restyled, ours = held_out.in_another_style(bench.sprites, truths, bench.options['styles'])
  if ours:
    sisters = model.encode_image(held_out.real_pictures(bench.sprites, restyled, clip_size))
    spread['in another style'] = (sisters * z_i[ours]).sum(axis=1).mean()
  high = held_out.real_pictures(bench.sprites, truths, up.image_size)
  scale = up.image_size // up.low_size
  low = np.asarray(area_downsample(common.to_float(jnp.asarray(high)), scale))
  enlarged, bicubic = upscale(model, low)
  return {
    'CLIP': f'R@1 of real pictures among {len(gallery.truths)} captions {bootstrap(found)}',
    'prior': (
      f'{cosines(model, asked, z_i)}; of the true z_i to those of the same picture '
      + ', '.join(f'{name} {value:.3f}' for name, value in spread.items())
    ),
    **({} if rival is None else {'AR prior': cosines(rival, asked, z_i)}),
    'decoder': (
      f'R@1 same ground from the true z_i {rows["true z_i"]["R@1 same ground"]}, '
      f"from the prior's {rows['prior']['R@1 same ground']}"
    ),
    'upsampler': (
      f'R@1 same ground before it {rows["prior, not enlarged"]["R@1 same ground"]}, '
      f'PSNR from the true {up.low_size} px {psnr(enlarged, high):.2f} dB, '
      f'bicubic {psnr(bicubic, high):.2f} dB'
    ),
  }


def cosines(model: Unclip, captions: list[str], z_i: np.ndarray) -> str:
  """How near what a prior draws comes to z_i, of which the first are those of the captions."""
  size, labels = model.config.decoder.image_size, np.arange(len(captions))
  drawn = np.asarray(model.sample(captions, 0, size=size).z_i)
  drawn = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
  scores = drawn @ z_i.T
  own, others = bootstrap(scores[labels, labels]), np.ones(scores.shape, bool)
  others[labels, labels] = False
  return f'cosine to the true z_i {own}, to those of others {scores[others].mean():.3f}'


def measure_scenes(bench: Bench, num: int) -> dict[str, Row]:
  """Whether two objects are where the caption says, by the judge and by pixels."""
  scenes = held_out.scenes(bench.sprites, *domain_of(bench.options), num)
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


def measure_distance(bench: Bench, num: int) -> tuple[float, float]:
  """Fréchet distances from real pictures of training captions: of generated ones, of other real."""
  options = bench.options
  examples, others = (
    [source[i] for i in range(num)]
    for source in (
      CaptionedEmoji(
        bench.sprites,
        bench.size,
        num,
        seed,
        styles=options['styles'],
        groups=options['groups'],
        labels=options['labels'],
        scene_fraction=0.0,
        jitter=options.get('jitter', 0.04),
      )
      for seed in (2, 3)
    )
  )
  drawn = bench.draw([example.caption for example in examples], 1)
  real, others, drawn = (
    bench.judge_images(images)
    for images in (
      np.stack([example.image for example in examples]),
      np.stack([example.image for example in others]),
      drawn,
    )
  )
  return frechet_distance(drawn, real), frechet_distance(others, real)


def nearest_of_training(bench: Bench, num: int = 16) -> np.ndarray:
  """Samples of held-out captions above the training pictures that the judge finds nearest."""
  sprites = bench.sprites
  domain = in_domain(sprites, *domain_of(bench.options))
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


def is_same(model: Unclip, judge: Unclip) -> bool:
  """Whether a judge is what generates."""
  ours, theirs = (jax.tree.leaves(m.params['clip']) for m in (model, judge))
  return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


def main(argv: list[str] | None = None) -> None:
  parser = make_parser(__doc__, samples=4)
  parser.add_argument('--scenes', type=int, default=64, help='of two objects')
  parser.add_argument('--ar-prior', default=None, help='run of train_ar_prior')
  args = parser.parse_args(argv)
  if args.scenes < 1:
    raise UnclipError(f'--scenes {args.scenes}: take 1 or more')
  bench = open_bench(args, seed=1)
  rival = None if args.ar_prior is None else with_prior_of(bench.model, args.ar_prior)
  gallery = bench.gallery
  print('## Measured by a judge that it never saw\n')
  print(
    f'{gallery.num_asked} captions of held-out pairs, {args.samples} samples each, among '
    f'{len(gallery.truths)} captions of the domain. {bench.num_unseen()} of them name a concept '
    'that training showed in no other style either. "Same ground" is harder: the captions of all '
    'these objects in the style and on the background that were asked for. '
    f'jax {jax.__version__} on {jax.devices()[0].device_kind}.\n'
  )
  if bench.sprites.size < bench.size:
    print(f'The real pictures are enlarged from {bench.sprites.size} px: give --data.\n')
  if is_same(bench.model, bench.judge):
    print('The judge is the CLIP of the model itself: nothing here is evidence.\n')
  rows, values = compare_sources(bench, rival)
  print(table(rows) + '\n')
  if rows['real']['R@1 captions'].mean < MIN_JUDGE:
    print(f'The judge finds fewer than {MIN_JUDGE:.0%} of the real pictures: train it longer.\n')
  for name in ('R@1 captions', 'R@1 same ground', 'R@1 real, other ground'):
    share = rows['prior'][name].mean / max(rows['real'][name].mean, 1e-9)
    print(f'- {name}: generated pictures reach {share:.2f} of the real ones.')
  for other in ('z_t as z_i', 'caption alone', *(() if rival is None else ('AR prior',))):
    gains = {
      name: bootstrap(values['prior'][name] * 1.0 - values[other][name], bench.labels)
      for name in (
        'R@1 same ground',
        'R@1 real, other ground',
        'silhouette IoU',
        'colour off by',
      )
    }
    print(f'- The prior less {other}: ' + ', '.join(f'{k} {v}' for k, v in gains.items()))
  for stage, figure in find_the_weakest(bench, rows, rival).items():
    print(f'- {stage}: {figure}')
  print(
    '\nTwo objects of the training set (by chance the place is right in 0.25, the colours are in '
    'less):\n\n' + table(measure_scenes(bench, args.scenes)) + '\n'
  )
  num = MIN_ROWS_A_DIMENSION * bench.judge.config.clip.embed_dim
  distance, floor = measure_distance(bench, num)
  print(
    f'Fréchet distance on the features of the judge, {num} pictures of training captions: '
    f'{distance:.4f}; of other real pictures {floor:.4f}\n'
  )
  grid = make_grid(nearest_of_training(bench), 16)
  Image.fromarray(grid).save(args.images / 'nearest.webp', quality=85)
  print(f'![Samples above the nearest training pictures]({args.images.name}/nearest.webp)')


if __name__ == '__main__':
  common.run(main)
