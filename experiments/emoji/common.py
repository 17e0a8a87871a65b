"""What the four training scripts share: their options, the data as arrays, CLIP's features."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import unclip_jax
from experiments.emoji.compose import load_sprites
from experiments.emoji.domain import make_vocabulary
from experiments.emoji.pool import Pool, make_pool
from experiments.emoji.vocabulary import fit_to_tokenizer
from unclip_jax import config_json, configs
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.presets import preset
from unclip_jax.stages import clip
from unclip_jax.systems.checks import check_config
from unclip_jax.systems.formats import open_model, read_vocabulary
from unclip_jax.systems.loading import find_folder
from unclip_jax.train.state import (
  Metrics,
  OptimizerConfig,
  TrainState,
  TrainStep,
  gather,
  make_learning_rate,
  make_multi_step,
)
from unclip_jax.types import Array, Params, UnclipError
from unclip_jax.weights.folder import MANIFEST_NAME, read_manifest, read_stage, write_model

TOKENIZER = Path(__file__).parent / 'tokenizer.json'


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A stage's training, as its script's options give it.

  Attributes:
    init: a model whose weights the stage starts from, where it has them; None starts afresh.
    run: the model folder that is trained, and below it a folder a stage with its checkpoints.
    config: of all stages.
    optimizer: of this one.
    steps, batch_size, ema_decay: as they say.
    chunk: updates between two lines of the log.
    save_every: updates between checkpoints.
    draft_steps: updates of the decoder's draft alone, before the first of the decoder.
    minutes: stop, with a checkpoint, after so long; None trains all steps.
    pool_size: composed examples held in memory, from which batches are drawn.
    styles, groups, labels, scene_fraction, jitter: what is drawn, see `CaptionedEmoji`.
    stage: which of the upsamplers.
    data: folder of a build; None is the one that comes with the repository.
    seed: of everything random.
    dtype: what the networks compute in.
  """

  init: str | None
  run: Path
  config: configs.UnclipConfig
  optimizer: OptimizerConfig
  steps: int
  batch_size: int
  ema_decay: float
  chunk: int
  save_every: int
  draft_steps: int
  minutes: float | None
  pool_size: int
  styles: tuple[str, ...] | None
  groups: tuple[str, ...] | None
  labels: tuple[str, ...]
  scene_fraction: float
  jitter: float
  stage: int
  data: Path | None
  seed: int
  dtype: Any


class Parser(argparse.ArgumentParser):
  """Says what is wrong with options in one line, through `run`."""

  def error(self, message: str) -> NoReturn:
    """Raises UnclipError in place of printing the usage and leaving."""
    raise UnclipError(f'{message} (see --help)')


def parse_options(
  argv: list[str] | None,
  description: str,
  optimizer: OptimizerConfig,
  steps: int,
  batch_size: int,
  ema_decay: float = 0.999,
  pool_size: int = 65536,
) -> TrainConfig:
  """The options of a training script (of the process if argv is None); defaults as given."""
  on_accelerator = jax.default_backend() != 'cpu'
  parser = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
  add = parser.add_argument
  add('--run', type=Path, default=Path('runs/emoji_small'), help='folder of the run')
  add('--init', default=None, help="a model whose weights to start from, such as 'default'")
  add('--preset', default='emoji_small', help='tiny, emoji_small, emoji, paper or karlo')
  add(
    '--set',
    dest='assignments',
    action='append',
    default=[],
    metavar='FIELD=VALUE',
    help='overrides of the preset (decoder.width=96) or of the optimiser (optimizer.FIELD of: '
    + ', '.join(f'{field.name}' for field in dataclasses.fields(OptimizerConfig))
    + ')',
  )
  add('--steps', type=int, default=steps, help='updates in all, those of earlier starts included')
  add('--batch-size', type=int, default=batch_size, help='examples of an update')
  add('--ema-decay', type=float, default=ema_decay, help='of the average that is exported')
  add('--chunk', type=int, default=100 if on_accelerator else 20, help='updates between log lines')
  add('--save-every', type=int, default=1000, help='updates between checkpoints')
  add(
    '--draft-steps', type=int, default=2500, help="of the decoder's draft first; 0 keeps --init's"
  )
  add('--minutes', type=float, default=None, help='stop with a checkpoint after so long')
  add('--pool-size', type=int, default=pool_size, help='composed examples held in memory')
  add('--styles', nargs='+', default=None, help='of flat 3d noto twemoji (all)')
  add('--groups', nargs='+', default=None, help="emojibase's, such as food-drink (all)")
  add('--labels', nargs='+', default=(), help='objects beside those of --groups, such as rocket')
  add('--scene-fraction', type=float, default=0.15, help='pictures of two objects')
  add('--jitter', type=float, default=0.04, help='largest change of scale and of place')
  add('--stage', type=int, default=0, help='which of the upsamplers, by train_upsampler')
  add('--data', type=Path, default=None, help='a build of experiments.emoji.build')
  add('--seed', type=int, default=0, help='of everything random')
  add('--dtype', default='bfloat16' if on_accelerator else 'float32', help='of the networks')
  args = parser.parse_args(argv)
  ours = [a.removeprefix('optimizer.') for a in args.assignments if a.startswith('optimizer.')]
  theirs = [a for a in args.assignments if not a.startswith('optimizer.')]
  chosen = preset(args.preset)
  for name in ('steps', 'batch_size', 'chunk', 'save_every'):
    if getattr(args, name) < 1:
      raise UnclipError(f'--{name.replace("_", "-")} {getattr(args, name)}: take 1 or more')
  if args.steps % args.chunk:
    raise UnclipError(f'--steps {args.steps}: take a multiple of --chunk {args.chunk}')
  if args.draft_steps < 0:
    raise UnclipError(f'--draft-steps {args.draft_steps}: take 0 or more')
  if args.pool_size < args.batch_size:
    raise UnclipError(
      f'--pool-size {args.pool_size}: take at least the {args.batch_size} of --batch-size'
    )
  if args.init is not None:
    open_model(find_folder(args.init))
  for name, most in (('scene_fraction', 1), ('ema_decay', 1), ('jitter', 0.5)):
    value = getattr(args, name)
    if not 0 <= value <= most:
      raise UnclipError(f'--{name.replace("_", "-")} {value:g}: take a fraction from 0 to {most:g}')
  if args.dtype not in ('float32', 'bfloat16'):
    raise UnclipError(f'--dtype {args.dtype}: take float32 or bfloat16')
  config = config_json.override(fit_to_tokenizer(chosen, Tokenizer.load(TOKENIZER)), theirs)
  if args.stage not in range(len(config.upsamplers)):
    raise UnclipError(f'--stage {args.stage}: the preset has {len(config.upsamplers)} upsamplers')
  check_config(config)
  optimizer = config_json.override(optimizer, ours)
  try:
    make_learning_rate(optimizer, args.steps)
  except UnclipError as error:
    raise UnclipError(f'{error} (--set optimizer.FIELD=VALUE, or --steps)') from error
  return TrainConfig(
    init=args.init,
    run=args.run,
    config=config,
    optimizer=optimizer,
    steps=args.steps,
    batch_size=args.batch_size,
    ema_decay=args.ema_decay,
    chunk=args.chunk,
    save_every=args.save_every,
    draft_steps=args.draft_steps,
    minutes=args.minutes,
    pool_size=args.pool_size,
    styles=tuple(args.styles) if args.styles else None,
    groups=tuple(args.groups) if args.groups else None,
    labels=tuple(args.labels),
    scene_fraction=args.scene_fraction,
    jitter=args.jitter,
    stage=args.stage,
    data=args.data,
    seed=args.seed,
    dtype=jnp.dtype(args.dtype),
  )


def save_options(train: TrainConfig, folder: Path) -> None:
  """Writes what a stage is trained with to `options.json` in its folder."""
  options = {
    name: value if isinstance(value, int | float | None) else str(value)
    for name, value in vars(train).items()
    if name not in ('config', 'optimizer', 'styles', 'groups', 'labels')
  }
  options |= {'styles': train.styles, 'groups': train.groups, 'labels': train.labels}
  options |= {'config': config_json.to_json(train.config), 'optimizer': vars(train.optimizer)}
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'options.json').write_text(json.dumps(options, indent=2) + '\n')


def start_from(train: TrainConfig, params: Params, *path: str) -> Params:
  """Fresh parameters, or in a new run those of `--init` where that model has them.

  A prior and a decoder only mean something together with the CLIP that they were trained with; a
  prior's statistics are those of the run's data.

  Args:
    train: the options.
    params: fresh ones of a stage.
    path: where they lie in a model, such as 'prior', 'network'; first the stage.

  Raises:
    UnclipError: there is no such model, it has no such stage, or a weight of it has another shape.
  """
  if train.init is None or any((train.run / path[0] / 'checkpoints').glob('[0-9]*')):
    return params
  given: Any = unclip_jax.load(train.init).params
  if path[0] not in given:
    raise UnclipError(f'--init {train.init}: it has no {path[0]}, only {", ".join(given)}')
  for name in path:
    given = given[name]
  fresh, given = flatten_dict(params, sep='.'), flatten_dict(given, sep='.')
  for name in fresh.keys() & given.keys():
    if fresh[name].shape != given[name].shape:
      raise UnclipError(
        f'--init {train.init}: {".".join(path)}.{name} is {given[name].shape} there, and '
        f'{fresh[name].shape} here'
      )
  return unflatten_dict(fresh | {k: v for k, v in given.items() if k in fresh}, sep='.')


def make_updates(
  train: TrainConfig, train_step: TrainStep, make_batch: Callable[[Any, Array, Array], Any] = gather
) -> TrainStep:
  """A function (state, pool, key) -> (state, metrics [chunk]) that makes `train.chunk` updates.

  On an accelerator they are one program. On a CPU each is its own: XLA runs the gradients of
  convolutions inside of a loop tens of times slower than outside of one.
  """
  on_cpu = jax.default_backend() == 'cpu'
  multi_step = make_multi_step(
    train_step, 1 if on_cpu else train.chunk, train.batch_size, make_batch
  )
  program = jax.jit(multi_step, donate_argnums=0)

  def updates(state: TrainState, pool: Any, key: Array) -> tuple[TrainState, Metrics]:
    rows = []
    for _ in range(train.chunk if on_cpu else 1):
      state, metrics = program(state, pool, key)
      rows.append(metrics)
    return state, jax.tree.map(lambda *columns: jnp.concatenate(columns), *rows)

  return updates


def compose(
  train: TrainConfig, size: int, num_examples: int, splits: tuple[str, ...] = ('train',)
) -> Pool:
  """Composed examples of a run's domain, pictures of `size` pixels."""
  return make_pool(
    size,
    num_examples,
    seed=train.seed if 'train' in splits else train.seed + 1,
    splits=splits,
    styles=train.styles,
    groups=train.groups,
    labels=train.labels,
    scene_fraction=train.scene_fraction if 'train' in splits else 0.0,
    jitter=train.jitter,
    data_dir=train.data,
  )


def to_float(image: Array) -> Array:
  """uint8 -> float32 in [-1, 1]."""
  return image.astype(jnp.float32) / 127.5 - 1


def to_uint8(image: Array) -> np.ndarray:
  """Float around [-1, 1] -> uint8."""
  return np.asarray(jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5)).astype(np.uint8)


def encode_pool(
  train: TrainConfig, tokenizer: Tokenizer, captions: list[str], images: np.ndarray | None
) -> dict[str, Array]:
  """Tokens, and where images are given CLIP's features, of a whole pool.

  Returns:
    ids int32 [n, t], mask bool [n, t]; with images (uint8, CLIP's size) also states [n, t, width]
    (bfloat16, to halve the memory), z_t and z_i [n, embed_dim].
  """
  tokens = tokenizer.encode(captions)
  result = {'ids': jnp.asarray(tokens.ids), 'mask': jnp.asarray(tokens.mask)}
  if images is None:
    return result
  config = train.config.clip
  params = load_clip(train)

  @jax.jit
  def encode(params: Params, ids: Array, mask: Array, image: Array) -> dict[str, Array]:
    text = clip.encode_text(config, params, ids, mask)
    z_i = clip.encode_image(config, params, to_float(image))
    return {'states': text.states.astype(jnp.bfloat16), 'z_t': text.z_t, 'z_i': z_i}

  n, b = len(captions), min(512, len(captions))
  parts = []
  for start in range(0, n, b):
    rows = np.minimum(np.arange(start, start + b), n - 1)
    part = encode(params, result['ids'][rows], result['mask'][rows], images[rows])
    parts.append(jax.device_get(part))
  # The last part was filled up to the one shape that is compiled.
  features = {name: np.concatenate([part[name] for part in parts])[:n] for name in parts[0]}
  return {**result, **jax.tree.map(jnp.asarray, features)}


def text_features(rows: dict[str, Array]) -> TextFeatures:
  """A batch's `encode_pool` rows as the features that the stages take."""
  states = rows.get('states')
  states = None if states is None else states.astype(jnp.float32)
  return TextFeatures(rows['ids'], rows['mask'], states, rows.get('z_t'))


def null_text(train: TrainConfig, tokenizer: Tokenizer) -> TextFeatures:
  """Features [1] of the empty caption."""
  tokens = tokenizer.encode([''])
  ids, mask = jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)
  return clip.encode_text(train.config.clip, load_clip(train), ids, mask)


def load_clip(train: TrainConfig) -> Params:
  """The CLIP that `train_clip` left in the run's folder.

  Raises:
    UnclipError: it is not there, or of another architecture than `train.config`.
  """
  if not (train.run / 'clip.safetensors').exists():
    raise UnclipError(
      f'{train.run} has no CLIP yet, whose embeddings this stage is trained on: first run '
      f'python -m experiments.emoji.train_clip --run {train.run}'
    )
  expected = jax.eval_shape(lambda: clip.init(train.config.clip, jax.random.key(0)))
  return jax.tree.map(jnp.asarray, read_stage(train.run, 'clip', expected, jnp.float32))


def export_stage(
  train: TrainConfig, name: str, params: Params, splits: tuple[str, ...] = ('train',)
) -> None:
  """Writes a stage's parameters into the run's folder, which is a model folder, in bfloat16.

  The stages that are there already keep the configs that they were trained with. The vocabulary is
  that of the last stage that read captions.
  """
  config, stages, vocabulary = config_json.to_json(train.config), (), None
  if (train.run / MANIFEST_NAME).exists():
    there, vocabulary = read_manifest(train.run), read_vocabulary(train.run)
    stages = tuple(there.stages)
    for other in set(stages) - {name}:
      field, _, index = other.partition('_')
      if index:
        config['upsamplers'][int(index)] = there.config['upsamplers'][int(index)]
      else:
        config[field] = there.config[field]
  if not name.startswith('upsampler'):
    domain = (train.styles, train.groups, train.labels, splits)
    vocabulary = make_vocabulary(load_sprites(train.data), *domain)
  written_by = f'unclip_jax {unclip_jax.__version__}'
  words = vocabulary and vocabulary.to_json()
  write_model(train.run, config, {name: params}, TOKENIZER, jnp.bfloat16, written_by, stages, words)


def run(main: Callable[[], None]) -> None:
  """Runs a script; a mistake of its user's is one line and status 1."""
  try:
    main()
  except UnclipError as error:
    sys.exit(f'error: {error}')
  except OSError as error:
    sys.exit(f'error: {error.filename or "writing"}: {error.strerror or error}')


def deadline(minutes: float | None) -> Callable[[], bool]:
  """A function that says whether the time is up."""
  end = None if minutes is None else time.monotonic() + 60 * minutes
  return lambda: end is not None and time.monotonic() >= end
