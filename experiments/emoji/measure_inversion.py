"""How near a model gives pictures back from their latents (z_i, x_T); prints a table in Markdown.

  python -m experiments.emoji.measure_inversion --run default --steps 100 250 --iterations 1 2

Pictures of held-out pairs, inverted by so many steps of DDIM, each iterated so often, and drawn
again from what that came to: mean absolute errors in grey levels of 255 at the decoder's size.
"""

import dataclasses
from pathlib import Path

import numpy as np

import unclip_jax
from experiments.emoji import common, held_out
from experiments.emoji.bench import domain_of, read_options
from experiments.emoji.compose import load_sprites
from experiments.emoji.parser import Parser
from unclip_jax.manipulate import Drawing, encode
from unclip_jax.types import UnclipError

PERCENTILE = 90


def main(argv: list[str] | None = None) -> None:
  parser = Parser(description=__doc__)
  parser.add_argument('--run', default='default', help='a run of the training scripts, or a model')
  parser.add_argument('--pictures', type=int, default=50, help='at most so many')
  parser.add_argument('--steps', type=int, nargs='+', default=[100, 250])
  parser.add_argument('--iterations', type=int, nargs='+', default=[1, 2], help='of each step')
  args = parser.parse_args(argv)
  if args.pictures < 1:
    raise UnclipError(f'--pictures {args.pictures}: take 1 or more')
  sprites = load_sprites(None)
  gallery = held_out.make_gallery(sprites, *domain_of(read_options(Path(args.run))))
  truths = gallery.truths[: gallery.num_asked][: args.pictures]
  model = dataclasses.replace(unclip_jax.load(args.run), vocabulary=None)
  seen = held_out.real_pictures(sprites, truths, model.config.clip.vision.image_size)
  print(f'{len(truths)} pictures of held-out pairs, {model.config.decoder.image_size} px.\n')
  print(f'| steps | iterations | mean error, levels | {PERCENTILE}% below | largest |')
  print('|---|---|---|---|---|')
  for steps in args.steps:
    for iterations in args.iterations:
      error = encode(model, list(seen), Drawing(num_steps=steps, iterations=iterations)).error
      figures = error.mean(), np.percentile(error, PERCENTILE), error.max()
      print(f'| {steps} | {iterations} |', *(f'{figure:.3f} |' for figure in figures), flush=True)


if __name__ == '__main__':
  common.run(main)
