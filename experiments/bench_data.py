"""How many captioned pictures a second the input pipeline gives, alone or against WebDataset.

  pip install -e '.[parity]'
  python -m experiments.bench_data --synthetic shards --peer webdataset --json data.json
  python -m experiments.bench_data --shards 'data/{00000..00009}.tar' --workers 4 8 16 --size 256
  python -m experiments.bench_data --shards data --size 1024 --crop 256 --bsr
  ... --step-seconds 0.8        # of a measured training step with --batch-size examples

`--synthetic` writes tar files of JPEGs of 512x384 and captions at the first run. Pictures are
decoded, reduced by area so that their short side has --size pixels, and cropped. WebDataset reads
the same tar files with as many workers, in turn with ours, once with Pillow's plain decoding and a
resize by area, as its users write it (`webdataset`), once with the decoding of ours
(`webdataset_our_decoding`), so that only reading, order and hand-over differ.

Contenders start their workers anew each round, so that only one at a time has any; what they have
ready is taken before the clock is started. Prints, and writes as JSON: about (date, versions,
cores, files), and for each number of workers examples_per_second and per core, as {median, least,
most, values}, and of peers the ratio of their seconds to ours, a round each. With --step-seconds or
--examples-per-second it says how many cores feed that, and by how much these fail.
"""

import argparse
import datetime
import functools
import importlib.metadata
import io
import json
import math
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from unclip_jax.data.pictures import PictureConfig, make_picture
from unclip_jax.data.pipeline import PictureRows, Pipeline, PipelineConfig
from unclip_jax.data.shards import TarShards, expand
from unclip_jax.measure.timing import Spread, ratios, seconds, spread
from unclip_jax.types import UnclipError

READ_AHEAD = 2  # batches a worker
SYNTHETIC = (4, 128)  # shards, and pictures in each
OURS = 'ours'


class Contender(NamedTuple):
  """An endless iterator of batches, and what ends it."""

  batches: Iterator[Any]
  close: Callable[[], None]


def write_synthetic(folder: Path) -> None:
  """Tar files of JPEGs like photographs in size and detail, with captions."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(0)
  num_shards, num_pictures = SYNTHETIC
  for shard in range(num_shards):
    path = folder / f'{shard:05d}.tar'
    if path.exists():
      continue
    part = path.with_suffix('.part')
    with tarfile.open(part, 'w') as tar:
      for i in range(num_pictures):
        # Structure at several scales, and a little noise, compress about as a photograph does.
        pixels = np.zeros((384, 512, 3))
        for cells, weight in ((4, 60), (16, 40), (64, 20), (256, 8)):
          coarse = rng.normal(size=(cells * 3 // 4, cells, 3)) * weight
          layers = [
            Image.fromarray(coarse[..., c].astype(np.float32)).resize((512, 384)) for c in range(3)
          ]
          pixels += np.stack([np.asarray(layer) for layer in layers], axis=-1)
        buffer = io.BytesIO()
        image = Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8))
        image.save(buffer, 'JPEG', quality=90)
        key = f'{shard:05d}{i:04d}'
        caption = f'picture {i} of shard {shard}'.encode()
        for suffix, content in (('jpg', buffer.getvalue()), ('txt', caption)):
          member = tarfile.TarInfo(f'{key}.{suffix}')
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))
    part.replace(path)


def ours(args: argparse.Namespace, picture: PictureConfig, num_workers: int) -> Contender:
  rows = PictureRows(TarShards(args.shards, args.index_folder), picture, needs_caption=False)
  pipeline = Pipeline(
    rows, PipelineConfig(args.batch_size), num_workers=num_workers, read_ahead=READ_AHEAD
  )
  return Contender(pipeline, pipeline.close)


def plain_decoding(picture: PictureConfig, sample: dict[str, Any]) -> tuple[np.ndarray, str]:
  """Pillow as most scripts use it: decode all, reduce by area, crop the middle."""
  image = Image.open(io.BytesIO(_content(sample))).convert('RGB')
  scale = picture.size / min(image.size)
  size = (round(image.width * scale), round(image.height * scale))
  image = image.resize(size, Image.Resampling.BOX)
  left, top = (size[0] - picture.side) // 2, (size[1] - picture.side) // 2
  image = image.crop((left, top, left + picture.side, top + picture.side))
  return np.asarray(image), sample.get('txt', b'').decode()


def our_decoding(picture: PictureConfig, sample: dict[str, Any]) -> tuple[np.ndarray, str]:
  rng = np.random.default_rng(0)
  made = make_picture(_content(sample), sample['__key__'], picture, rng)
  return made.image, sample.get('txt', b'').decode()


def _content(sample: dict[str, Any]) -> bytes:
  return next(sample[name] for name in ('jpg', 'jpeg', 'png', 'webp') if name in sample)


def webdataset_peer(
  args: argparse.Namespace,
  picture: PictureConfig,
  num_workers: int,
  decoding: Callable[[PictureConfig, dict[str, Any]], tuple[np.ndarray, str]],
) -> Contender:
  try:
    import webdataset
  except ImportError as error:
    raise UnclipError("--peer needs webdataset: pip install 'unclip-jax[parity]'") from error
  urls = [str(path) for pattern in args.shards for path in expand(pattern)]
  # Its shards are drawn anew without end, and shuffled within a buffer.
  dataset = webdataset.WebDataset(urls, resampled=True, shardshuffle=False, seed=0)
  dataset = dataset.shuffle(1000, initial=100).map(functools.partial(decoding, picture))
  dataset = dataset.batched(args.batch_size, collation_fn=_collate)
  ahead = {'prefetch_factor': READ_AHEAD} if num_workers else {}
  loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=num_workers, **ahead)
  iterator = iter(loader)
  return Contender(iterator, getattr(iterator, 'close', lambda: None))


def _collate(samples: list[tuple[np.ndarray, str]]) -> tuple[np.ndarray, list[str]]:
  images, captions = zip(*samples, strict=True)
  return np.stack(images), list(captions)


def measure(
  contenders: dict[str, Callable[[], Contender]], args: argparse.Namespace, num_workers: int
) -> dict[str, list[float]]:
  """Seconds of args.batches batches, args.rounds times each, in turn."""

  def take(contender: Contender, count: int) -> None:
    for _ in range(count):
      next(contender.batches)

  ready = 1 + max(1, num_workers) * (READ_AHEAD + 2)
  times: dict[str, list[float]] = {name: [] for name in contenders}
  for round_ in range(args.rounds + 1):
    for name, start in contenders.items():
      contender = start()
      try:
        take(contender, ready)
        _, took = seconds(functools.partial(take, contender, args.batches))
      finally:
        contender.close()
      if round_:  # the first warms the page cache
        times[name].append(took)
  return times


def report(name: str, rate: Spread, num_workers: int, ratio: Spread | None) -> str:
  line = (
    f'{num_workers} workers  {name:24s} {rate.median:8.1f} examples/s '
    f'({rate.least:.1f} to {rate.most:.1f}), {rate.median / max(1, num_workers):.1f} per core'
  )
  if ratio is not None:
    line += f'; ours is {ratio.median:.2f} times as fast ({ratio.least:.2f} to {ratio.most:.2f})'
  return line


def feeding(needed: float, rates: dict[int, float]) -> list[str]:
  """What it takes to keep a step of so many examples a second fed."""
  lines = []
  per_core = max(rate / max(1, workers) for workers, rate in rates.items())
  cores = math.ceil(needed / per_core)
  lines.append(f'{needed:.1f} examples/s are needed: {cores} cores at {per_core:.1f} each')
  for workers, rate in rates.items():
    share = rate / needed
    verdict = 'fed' if share >= 1 else f'falls short, the step waits {1 - share:.0%} of the time'
    lines.append(f'  {workers} workers give {share:.2f} of it: {verdict}')
  return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument('--shards', nargs='+', metavar='PATTERN', help='tar files')
  what.add_argument('--synthetic', type=Path, metavar='FOLDER', help='made at the first run')
  parser.add_argument('--index-folder')
  parser.add_argument('--peer', choices=['webdataset'])
  parser.add_argument('--workers', nargs='+', type=int, default=[1, max(1, os.cpu_count() or 1)])
  parser.add_argument('--batch-size', type=int, default=64)
  parser.add_argument('--batches', type=int, default=16, help='that are timed in a round')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--size', type=int, default=64)
  parser.add_argument('--crop', type=int)
  parser.add_argument('--bsr', action='store_true', help="the second upsampler's degradation")
  parser.add_argument('--step-seconds', type=float, help='of a training step on --batch-size')
  parser.add_argument('--examples-per-second', type=float, help='that a training step takes')
  parser.add_argument('--json', type=Path)
  args = parser.parse_args(arguments)
  if min(args.batch_size, args.batches, args.rounds) < 1 or min(args.workers) < 0:
    raise UnclipError('--batch-size, --batches and --rounds are 1 or more, --workers 0 or more')
  if args.bsr and args.peer:
    raise UnclipError('--bsr has no peer: leave one of the two out')
  for name in ('step_seconds', 'examples_per_second'):
    if getattr(args, name) is not None and not getattr(args, name) > 0:
      raise UnclipError(f'--{name.replace("_", "-")} is more than 0')
  if args.synthetic is not None:
    write_synthetic(args.synthetic)
    args.shards = [str(args.synthetic)]
  return args


def main(arguments: list[str] | None = None) -> None:
  args = parse(arguments)
  picture = PictureConfig(args.size, args.crop, bsr_factor=4 if args.bsr else None)
  results, rates = [], {}
  for num_workers in args.workers:
    contenders = {OURS: functools.partial(ours, args, picture, num_workers)}
    if args.peer:
      peer = functools.partial(webdataset_peer, args, picture, num_workers)
      contenders['webdataset'] = functools.partial(peer, plain_decoding)
      contenders['webdataset_our_decoding'] = functools.partial(peer, our_decoding)
    times = measure(contenders, args, num_workers)
    entry: dict[str, Any] = {'workers': num_workers}
    for name, values in times.items():
      rate = spread(args.batches * args.batch_size / value for value in values)
      ratio = None if name == OURS else ratios(values, times[OURS])
      print(report(name, rate, num_workers, ratio), flush=True)
      entry[name] = {'examples_per_second': rate._asdict()}
      entry[name]['per_core'] = rate.median / max(1, num_workers)
      if ratio is not None:
        entry[name]['ratio'] = ratio._asdict()
      if name == OURS:
        rates[num_workers] = rate.median
    results.append(entry)
  needed = args.examples_per_second
  if args.step_seconds is not None:
    needed = args.batch_size / args.step_seconds
  if needed is not None:
    print('\n'.join(feeding(needed, rates)))
  if args.json is not None:
    packages = ['grain', 'pillow', 'numpy', *(['webdataset', 'torch'] if args.peer else [])]
    about = {
      'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'cores': os.cpu_count(),
      'versions': {name: importlib.metadata.version(name) for name in packages},
      'num_examples': len(TarShards(args.shards, args.index_folder)),
      'batch_size': args.batch_size,
      'size': args.size,
      'crop': args.crop,
      'bsr': args.bsr,
      'needed': needed,
    }
    args.json.write_text(json.dumps({'about': about, 'results': results}, indent=2) + '\n')


if __name__ == '__main__':
  try:
    main()
  except UnclipError as error:
    sys.exit(f'bench_data: error: {error}')
