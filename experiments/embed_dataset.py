"""Computes CLIP's embeddings of a data set once, for the training of prior and decoder.

  python -m experiments.embed_dataset --model runs/mine --shards 'data/{00000..00099}.tar' --out z
  python -m experiments.embed_dataset --model kakaobrain/karlo-v1-alpha --dtype bfloat16 \
      --folder pictures --with z_t states --workers 16 --out gs://bucket/z
  ... --num-processes 4 --process-id 2     # this process makes every fourth shard, from number 2

Shards are made one after the other, each complete or not there: started again, with any number of
processes, it makes what is missing. `unclip_jax.data.embeddings.EmbeddingRows` reads them. What is
broken is left out, and named in a file beside its shard. Of several captions one is drawn, by the
example's number.
"""

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments.source_options import add_source_options, describe_source, open_source
from unclip_jax import sharding
from unclip_jax.data.embeddings import (
  FORMAT,
  META_NAME,
  read_meta,
  shard_name,
  shard_range,
  write_records,
)
from unclip_jax.data.examples import BrokenExample
from unclip_jax.data.pictures import PictureConfig
from unclip_jax.data.pipeline import PictureRows, in_workers
from unclip_jax.stages import clip
from unclip_jax.systems.formats import Model
from unclip_jax.systems.loading import open_model, read_stages
from unclip_jax.types import Array, Params, UnclipError
from unclip_jax.weights.safetensors import named_leaves, write_atomically

READ_AHEAD = 2  # chunks a worker
WITH = ('z_t', 'tokens', 'states')


class Chunks:
  """Chunks read and decoded, for Grain: arrays of full batches, of which the first rows count."""

  def __init__(self, rows: PictureRows, chunks: list[range], batch_size: int) -> None:
    self._rows, self._chunks, self._batch_size = rows, chunks, batch_size

  def __len__(self) -> int:
    return len(self._chunks)

  def __getitem__(self, index: int) -> dict[str, Any]:
    rows, broken = [], []
    for i in self._chunks[index]:
      try:
        row = self._rows.read(i, np.random.default_rng((0, i)))
        rows.append(row | {'index': np.int64(i)})
      except BrokenExample as error:
        broken.append((error.id, error.reason))
    result: dict[str, Any] = {'broken': broken, 'size': len(rows)}
    for name, value in rows[0].items() if rows else ():
      column = [row[name] for row in rows]
      if not isinstance(value, str):
        # One shape, and so one program, for all: the last row again where there are fewer.
        column = np.stack(column + [column[-1]] * (self._batch_size - len(rows)))
      result[name] = column
    return result


def parse(arguments: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add_source_options(parser)
  parser.add_argument('--model', default='default', help="a folder, or a hub's owner/name")
  parser.add_argument('--out', required=True, help='a folder; gs:// works')
  parser.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
  parser.add_argument('--with', nargs='*', dest='extras', choices=WITH, default=[*WITH])
  parser.add_argument('--batch-size', type=int, default=256)
  parser.add_argument('--examples-per-shard', type=int, default=8192)
  parser.add_argument('--workers', type=int, default=0, help='processes that decode')
  parser.add_argument('--num-processes', type=int, default=1)
  parser.add_argument('--process-id', type=int, default=0)
  args = parser.parse_args(arguments)
  if args.batch_size < 1 or args.examples_per_shard < 1 or args.workers < 0:
    raise UnclipError('--batch-size and --examples-per-shard are 1 or more, --workers 0 or more')
  if not 0 <= args.process_id < args.num_processes:
    raise UnclipError(
      f'--process-id {args.process_id} of {args.num_processes}: number the processes from 0'
    )
  return args


def make_encoder(model: Model, params: Params, dtype: Any, extras: list[str]) -> Any:
  """A function (params, batch) -> dict of arrays [b, ...], over all devices of this process."""
  config = model.config.clip

  def encode(params: Params, batch: dict[str, Array]) -> dict[str, Array]:
    image = batch['image'].astype(jnp.float32) / 127.5 - 1
    result = {'z_i': clip.encode_image(config, params, image, dtype)}
    if {'z_t', 'states'} & {*extras}:
      text = clip.encode_text(config, params, batch['ids'], batch['mask'], dtype)
      if 'z_t' in extras:
        result['z_t'] = text.z_t
      if 'states' in extras:
        result['states'] = text.states.astype(dtype)
    return result

  return sharding.sharded(encode, sharding.make_mesh())


def digest(params: Params) -> str:
  """What tells the parameters of a CLIP, float32, from others."""
  sha = hashlib.sha256()
  for name, leaf in sorted(named_leaves(params).items()):
    sha.update(name.encode() + np.asarray(leaf).tobytes())
  return sha.hexdigest()


def agree(folder: epath.Path, meta: dict[str, Any]) -> None:
  """Writes embeddings.json, or sees that the shards that are there are of the same job."""
  if not (folder / META_NAME).exists():
    text = json.dumps(meta, indent=2) + '\n'
    write_atomically(folder / META_NAME, lambda part: part.write_text(text, encoding='utf-8'))
    return
  there = read_meta(folder)
  for name, value in meta.items():
    if name != 'model' and there.get(name) != value:  # whose parameters tell it apart
      raise UnclipError(
        f'{folder} has embeddings of {name} {there.get(name)!r}, wanted is {value!r}: choose '
        'another --out'
      )


def records(
  batches: Iterator[dict[str, Any]],
  num_chunks: int,
  encode: Any,
  params: Params,
  with_tokens: bool,
  broken: list[tuple[str, str]],
) -> Iterator[dict[str, Any]]:
  """The records of a shard, as the next chunks are encoded."""
  for batch in itertools.islice(batches, num_chunks):
    broken += batch['broken']
    if not batch['size']:
      continue
    arrays = {name: batch[name] for name in ('image', 'ids', 'mask') if name in batch}
    encoded = jax.device_get(encode(params, arrays))
    if with_tokens:
      encoded |= {'ids': batch['ids'], 'mask': batch['mask']}
    for i in range(batch['size']):
      row = {name: np.array(array[i]) for name, array in encoded.items()}
      if not np.isfinite(row['z_i']).all():
        raise UnclipError(f'the embedding of {batch["id"][i]} is not finite: take --dtype float32')
      yield row | {name: batch[name][i] for name in ('caption', 'id', 'index')}


def main(arguments: list[str] | None = None) -> None:
  args = parse(arguments)
  out = epath.Path(args.out)
  source = open_source(args)
  if not len(source):
    raise UnclipError('the source has no examples')
  model = open_model(args.model)
  if model.config.clip is None or model.config.clip.vision is None:
    raise UnclipError(f'{args.model} has no image tower of a CLIP: take a model that has')
  reads_text = bool(args.extras)
  if reads_text and (model.config.clip.text is None or model.tokenizer is None):
    raise UnclipError(f'{args.model} has no text tower of a CLIP: leave out --with')
  dtype = jnp.dtype(args.dtype)
  params = read_stages(model, jnp.float32, ['clip'])['clip']
  parameters = digest(params)
  params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
  num_shards = min(len(source), -(-len(source) // args.examples_per_shard))
  meta = {
    'format': FORMAT,
    'model': str(args.model),
    'dtype': args.dtype,
    'with': sorted(args.extras),
    'source': describe_source(args),
    'num_examples': len(source),
    'num_shards': num_shards,
    'image_size': model.config.clip.vision.image_size,
    'embed_dim': model.config.clip.embed_dim,
    'parameters': parameters,
  }
  agree(out, meta)
  own = range(args.process_id, num_shards, args.num_processes)
  pending = [i for i in own if not (out / shard_name(i, num_shards)).exists()]
  print(f'{len(own) - len(pending)} of {len(own)} shards are there', file=sys.stderr)
  if not pending:
    return
  chunks = {
    shard: [
      examples[first : first + args.batch_size]
      for first in range(0, len(examples), args.batch_size)
    ]
    for shard, examples in ((i, shard_range(i, num_shards, len(source))) for i in pending)
  }
  # CLIP's own preprocessing is bicubic, too.
  picture = PictureConfig(model.config.clip.vision.image_size, kernel='bicubic')
  rows = PictureRows(source, picture, model.tokenizer if reads_text else None, reads_text)
  flat = list(itertools.chain.from_iterable(chunks.values()))
  dataset = grain.MapDataset.source(Chunks(rows, flat, args.batch_size))
  dataset = dataset.to_iter_dataset(grain.ReadOptions(1, 1))
  batches = iter(in_workers(dataset, args.workers, READ_AHEAD))
  encode = make_encoder(model, params, dtype, args.extras)
  try:
    for shard in pending:
      name, broken = shard_name(shard, num_shards), []
      for part in out.glob(f'.{name}.*.part') if '://' not in str(out) else ():
        part.unlink()  # of a process that was killed
      shard_records = records(
        batches, len(chunks[shard]), encode, params, 'tokens' in args.extras, broken
      )

      def write(part: Path, shard_records=shard_records, broken=broken, name=name) -> None:
        write_records(part, shard_records)
        if broken:
          # Before the shard, which is whole once it is there.
          lines = ''.join(json.dumps({'id': i, 'reason': why}) + '\n' for i, why in broken)
          write_atomically(out / f'{name}.broken.jsonl', lambda path: path.write_text(lines))

      write_atomically(out / name, write)
      left_out = f', {len(broken)} examples left out' if broken else ''
      print(f'{name}{left_out}', file=sys.stderr, flush=True)
  finally:
    batches.close()


if __name__ == '__main__':
  try:
    main()
  except UnclipError as error:
    sys.exit(f'embed_dataset: error: {error}')
