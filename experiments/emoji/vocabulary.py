"""Learns the captions' tokenizer: `python -m experiments.emoji.vocabulary --out FILE`."""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

from experiments.emoji import captions
from experiments.emoji.compose import CaptionedEmoji, Sprites, load_sprites
from experiments.emoji.concepts import SPLITS
from unclip_jax.configs import ArPriorConfig, UnclipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.types import UnclipError

VOCAB_SIZE = 2048
CONTEXT_LENGTH = 32
NUM_CAPTIONS = 40_000


def corpus(sprites: Sprites, num_captions: int = NUM_CAPTIONS) -> list[str]:
  """Returns captions as training sees them, every label and keyword, and the templates' words."""
  source = CaptionedEmoji(sprites, 8, num_captions, seed=0, splits=SPLITS)
  words = {word for keywords in sprites.keywords for word in keywords}
  sampled = [source.truth(index).caption for index in range(num_captions)]
  return [*sampled, *np.unique(sprites.label).tolist(), *sorted(words), *captions.all_wordings()]


def fit_to_tokenizer(config: UnclipConfig, tokenizer: Tokenizer) -> UnclipConfig:
  """A preset with the vocabulary and the context length of a tokenizer."""
  sizes = {'vocab_size': tokenizer.vocab_size, 'context_length': tokenizer.context_length}
  text = dataclasses.replace(config.clip.text, **sizes)
  own_text = config.decoder.text and dataclasses.replace(config.decoder.text, **sizes)
  prior = dataclasses.replace(config.prior, context_length=tokenizer.context_length)
  if isinstance(prior, ArPriorConfig) and prior.text is not None:
    prior = dataclasses.replace(prior, text=dataclasses.replace(prior.text, **sizes))
  return dataclasses.replace(
    config,
    clip=dataclasses.replace(config.clip, text=text),
    prior=prior,
    decoder=dataclasses.replace(config.decoder, text=own_text),
  )


def main(argv: list[str] | None = None) -> int:
  """Runs the command and returns its exit status."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=Path, required=True, metavar='FILE')
  parser.add_argument('--vocab-size', type=int, default=VOCAB_SIZE)
  parser.add_argument('--context-length', type=int, default=CONTEXT_LENGTH)
  parser.add_argument('--data', type=Path, metavar='DIR', help='a build (default: the shipped one)')
  args = parser.parse_args(argv)
  try:
    texts = corpus(load_sprites(args.data))
    tokenizer = Tokenizer.train(texts, args.vocab_size, args.context_length)
    tokenizer.save(args.out)
  except UnclipError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  lengths = tokenizer.encode(texts).mask.sum(axis=1)
  print(f'{args.out}: {tokenizer.vocab_size} entries')
  for percent in (50, 99, 99.9, 100):
    print(f'{percent}% of the captions have up to {np.percentile(lengths, percent):.0f} tokens')
  return 0


if __name__ == '__main__':
  sys.exit(main())
