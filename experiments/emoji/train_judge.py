"""Trains the judge: a CLIP that measures generated emoji, and that nothing is generated with.

python -m experiments.emoji.train_judge --run runs/judge --seed 1

It has another architecture than the CLIP of the presets and looks at larger pictures, begins from
another seed, and is trained on all splits: of a picture of a held-out pair, only a judge that knows
the pair can say whether it is right.
"""

import dataclasses
import sys

from experiments.emoji import common, train_clip
from experiments.emoji.concepts import SPLITS
from unclip_jax.configs import ClipConfig, ConvTowerConfig, UnclipConfig


def configure(config: UnclipConfig) -> UnclipConfig:
  """A preset with the judge in place of its CLIP."""
  text = dataclasses.replace(config.clip.text, width=192, depth=3, num_heads=6)
  vision = ConvTowerConfig(image_size=64, widths=(32, 64, 128, 192), depth=1)
  judge = ClipConfig(text=text, vision=vision, embed_dim=64)
  d = judge.embed_dim
  return dataclasses.replace(
    config,
    clip=judge,
    prior=dataclasses.replace(config.prior, embed_dim=d, text_width=text.width),
    decoder=dataclasses.replace(config.decoder, embed_dim=d),
  )


def main(argv: list[str] | None = None) -> None:
  argv = sys.argv[1:] if argv is None else argv
  if not any(option.startswith('--seed') for option in argv):
    argv = [*argv, '--seed', '1']
  train_clip.main(argv, configure, SPLITS)


if __name__ == '__main__':
  common.run(main)
