"""The options that name a source of captioned pictures, shared by the scripts that read one."""

import argparse
import os
from typing import Any

from unclip_jax.data.examples import Source
from unclip_jax.data.folder_source import PictureFolder
from unclip_jax.data.shards import TarShards
from unclip_jax.data.sources import TfdsExamples

_NAMES = ('shards', 'folder', 'tfds', 'index_folder', 'split', 'image_feature', 'caption_feature')


def add_source_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
  what = parser.add_mutually_exclusive_group(required=required)
  what.add_argument(
    '--shards',
    nargs='+',
    metavar='PATTERN',
    help="tar files of img2dataset or WebDataset: a folder, 'data/{00000..00099}.tar', gs://...",
  )
  what.add_argument('--folder', help='pictures beside their .txt, or with metadata.jsonl or .csv')
  what.add_argument('--tfds', metavar='FOLDER', help='a data set of TFDS, stored as ArrayRecord')
  parser.add_argument('--index-folder', help='of --shards: where the indices are kept')
  parser.add_argument('--split', default='train', help='of --tfds')
  parser.add_argument('--image-feature', default='image', help='of --tfds')
  parser.add_argument('--caption-feature', default='caption', help='of --tfds: captions/text, ...')


def pop_source(options: dict[str, Any]) -> argparse.Namespace | None:
  """Takes the options of `add_source_options` out of others; None where they name no source."""
  source = argparse.Namespace(**{name: options.pop(name) for name in _NAMES})
  return source if source.shards or source.folder or source.tfds else None


def open_source(args: argparse.Namespace) -> Source:
  if args.shards:
    return TarShards(args.shards, args.index_folder)
  if args.folder:
    return PictureFolder(args.folder)
  return TfdsExamples(args.tfds, args.split, args.image_feature, args.caption_feature)


def describe_source(args: argparse.Namespace) -> str:
  """What tells a source from others, for the files that are made of it."""
  if args.shards:
    return f'shards {" ".join(map(_absolute, args.shards))}'
  if args.folder:
    return f'folder {_absolute(args.folder)}'
  return f'tfds {_absolute(args.tfds)} {args.split} {args.image_feature} {args.caption_feature}'


def _absolute(path: str) -> str:
  """The same wherever a command is started."""
  return path if '://' in path else os.path.abspath(path)
