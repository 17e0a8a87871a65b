"""The options that the training scripts share."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.emoji.checks import check_contrast, check_lora, check_numbers, check_source
from experiments.emoji.parser import PRESET, add_contrast, add_lora, add_source, make_parser
from experiments.emoji.vocabulary import fit_to_tokenizer
from experiments.source_options import describe_source, pop_source
from unclip_jax import config_json, processes
from unclip_jax.configs import UnclipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.presets import preset
from unclip_jax.systems.checks import check_config
from unclip_jax.systems.formats import open_model
from unclip_jax.systems.loading import find_folder
from unclip_jax.train.presets import Recipe, paper_recipe
from unclip_jax.train.state import OptimizerConfig, make_learning_rate
from unclip_jax.types import UnclipError
from unclip_jax.weights.folder import TOKENIZER_NAME
from unclip_jax.weights.safetensors import write_atomically

TOKENIZER = Path(__file__).parent / 'tokenizer.json'


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A stage's training, as its script's options give it.

  Attributes:
    init: a model whose weights the stage starts from, where it has them; None starts afresh.
    fine_tunes: whether the run is a copy of `init` at first, with its config and its tokenizer.
    lora: the rank of new adapters, which are all that is trained then; None without new ones.
    lora_alpha: over the rank, what new adapters are scaled by; None is the rank.
    init_lora: a file of adapters to start from, in place of new ones.
    run: the model folder that is trained, and below it a folder a stage with its checkpoints.
    config: of all stages.
    tokenizer: of the captions.
    optimizer: of this one.
    steps, batch_size, ema_decay: as they say.
    chunk: updates between two lines of the log.
    save_every: updates between checkpoints.
    keep: how many of the latest checkpoints stay.
    on_bad_loss: 'stop' or 'skip', what becomes of a step whose loss is bad, see `train/guard.py`.
    spike_factor: times the median of the last losses, from where one is bad; None takes any.
    draft_steps: updates of the decoder's draft alone, before the first of the decoder.
    minutes: stop, with a checkpoint, after so long; None trains all steps.
    pool_size: composed examples held in memory, from which batches are drawn.
    styles, groups, labels, scene_fraction, jitter: what is drawn, see `CaptionedEmoji`.
    stage: which of the upsamplers.
    data: folder of a build; None is the one that comes with the repository.
    embeddings: a folder of embed_dataset that is trained on in place of emoji; None takes emoji.
    source: what `open_source` takes, of pictures that are trained on in place of emoji; or None.
    workers: processes that read them.
    distributed: whether this process is one of several that train together.
    seed: of everything random.
    dtype: what the networks compute in.
    fsdp: whether each device holds a part of the training state, and not all of it.
    model_devices: how many devices share one copy of the networks, split by heads and columns.
    accumulate: parts of a batch whose gradients are computed one after the other.
    remat: whether blocks of the networks run again for their gradients.
    sam_rho: the length of SAM's perturbations of CLIP; None trains without.
    sam_group: examples that share one.
    cache_chunk: examples whose activations CLIP's training holds at a time; None holds all.
    loss_chunk: columns of CLIP's logits that are held at a time; None holds all.
  """

  init: str | None
  fine_tunes: bool
  lora: int | None
  lora_alpha: float | None
  init_lora: Path | None
  run: Path
  config: UnclipConfig
  tokenizer: Tokenizer
  optimizer: OptimizerConfig
  steps: int
  batch_size: int
  ema_decay: float
  chunk: int
  save_every: int
  keep: int
  on_bad_loss: str
  spike_factor: float | None
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
  embeddings: Path | None
  source: argparse.Namespace | None
  workers: int
  distributed: bool
  seed: int
  dtype: Any
  fsdp: bool
  model_devices: int
  accumulate: int
  remat: bool
  sam_rho: float | None
  sam_group: int
  cache_chunk: int | None
  loss_chunk: int | None

  @property
  def streams(self) -> bool:
    """Whether examples are read as they are needed, and not drawn from a pool in memory."""
    return self.source is not None or self.embeddings is not None

  @property
  def trains_adapters(self) -> bool:
    """Whether adapters are trained, and the weights of `init` stay as they are."""
    return self.lora is not None or self.init_lora is not None


def parse_options(
  argv: list[str] | None,
  description: str,
  optimizer: OptimizerConfig,
  steps: int,
  batch_size: int,
  ema_decay: float = 0.999,
  pool_size: int = 65536,
  has_lora: bool = False,
  has_contrast: bool = False,
  has_embeddings: bool = False,
  has_source: bool = False,
  recipe: str | None = None,
  drops_text: str | None = None,
  configure: Callable[[UnclipConfig], UnclipConfig] = lambda config: config,
) -> TrainConfig:
  """The options of a training script (of the process if argv is None); defaults as given.

  One of several processes waits for the others here, before JAX is asked for a device.

  Args:
    argv: the options.
    description: of the script.
    optimizer: the default one.
    steps: the default, like the next three.
    batch_size: see steps.
    ema_decay: see steps.
    pool_size: see steps.
    has_lora: whether the script can train adapters.
    has_contrast: whether it trains CLIP, whose loss compares all of a batch.
    has_embeddings: whether it can train on embeddings that are stored.
    has_source: whether it can train on any captioned pictures.
    recipe: which of `paper_recipe` is its own, 'upsampler' those of all upsamplers.
    drops_text: the stage whose captions it drops, 'prior' or 'decoder'.
    configure: what it makes of the config, before `--set` does.

  Raises:
    UnclipError: an option makes no sense; names it.
  """
  parser = make_parser(description)
  parser.set_defaults(steps=steps, batch_size=batch_size, ema_decay=ema_decay)
  parser.set_defaults(pool_size=pool_size, lora=None, lora_alpha=None, init_lora=None)
  parser.set_defaults(embeddings=None, workers=0)
  parser.set_defaults(sam_rho=None, sam_group=64, cache_chunk=None, loss_chunk=None)
  if has_lora:
    add_lora(parser)
  if has_contrast:
    add_contrast(parser)
  if has_source:
    add_source(parser)
  if has_embeddings:
    help_text = "made by experiments.embed_dataset: of the source's pictures"
    if not has_source:
      help_text = 'of any captioned pictures, made by experiments.embed_dataset, in place of emoji'
    parser.add_argument('--embeddings', type=Path, metavar='FOLDER', help=help_text)
  if has_source or has_embeddings:
    parser.add_argument('--workers', type=int, help='processes that read the examples')
  if drops_text is not None:
    text_drop_help = f'captions dropped in training: --set {drops_text}.text_drop'
    parser.add_argument('--text-drop', type=float, metavar='FRACTION', help=text_drop_help)
  args = parser.parse_args(argv)
  if args.recipe is not None:
    paper = _recipe(recipe, args.stage)
    optimizer = paper.optimizer
    parser.set_defaults(
      steps=paper.num_steps, batch_size=paper.batch_size, ema_decay=paper.ema_decay
    )
    if has_contrast:
      parser.set_defaults(sam_rho=paper.sam_rho, sam_group=paper.sam_group)
    args = parser.parse_args(argv)
  given = vars(args)
  given['distributed'] = _join(given)
  on_cpu = jax.default_backend() == 'cpu'
  if args.chunk is None:
    most = 20 if on_cpu else 100
    args.chunk = most if args.recipe is None else math.gcd(most, args.steps)
  if args.dtype is None:
    args.dtype = 'float32' if on_cpu else 'bfloat16'
  given['source'] = pop_source(given) if has_source else None
  check_numbers(args)
  check_lora(args)
  args.sam_rho = args.sam_rho or None  # 0 is none
  if has_contrast:
    check_contrast(args)
  if has_source and args.source is None and args.embeddings is not None:
    raise UnclipError(
      '--embeddings: the pictures that they are of are needed too: give them by --shards, --folder '
      'or --tfds'
    )
  if args.source is not None or args.embeddings is not None:
    check_source(args)
  del given['recipe']
  preset_name, assignments = given.pop('preset'), given.pop('assignments')
  text_drop = given.pop('text_drop', None)
  if text_drop is not None:
    assignments = [*assignments, f'{drops_text}.text_drop={text_drop}']
  ours = [a.removeprefix('optimizer.') for a in assignments if a.startswith('optimizer.')]
  theirs = [a for a in assignments if not a.startswith('optimizer.')]
  config, tokenizer = _choose_model(args.init, preset_name, given.pop('tokenizer'), args.run)
  config = config_json.override(configure(config), theirs)
  if args.stage not in range(max(1, len(config.upsamplers))):
    raise UnclipError(f'--stage {args.stage}: the model has {len(config.upsamplers)} upsamplers')
  check_config(config)
  optimizer = config_json.override(optimizer, ours)
  try:
    make_learning_rate(optimizer, args.steps)
  except UnclipError as error:
    raise UnclipError(f'{error} (--set optimizer.FIELD=VALUE, or --steps)') from error
  train = TrainConfig(
    **given,
    fine_tunes=args.init is not None and preset_name is None,
    config=config,
    tokenizer=tokenizer,
    optimizer=optimizer,
  )
  return dataclasses.replace(
    train,
    styles=tuple(args.styles) if args.styles else None,
    groups=tuple(args.groups) if args.groups else None,
    labels=tuple(args.labels),
    dtype=jnp.dtype(args.dtype),
  )


def save_options(train: TrainConfig, folder: Path) -> None:
  """Writes what a stage is trained with to `options.json` in its folder; the first process does.

  Raises:
    UnclipError: a run that continues was trained on something else.
  """
  path = folder / 'options.json'
  given = _examples(train.source and describe_source(train.source), train.embeddings)
  if path.exists() and any(x.name.isdecimal() for x in (folder / 'checkpoints').glob('*')):
    there = None
    with contextlib.suppress(ValueError, OSError):  # damaged, it says nothing
      there = json.loads(path.read_text())
    before = there and _examples(there.get('source'), there.get('embeddings'))
    if before and before != given:
      raise UnclipError(
        f'{folder} was trained on {before}, and is given {given} now: give what it had, or take '
        'a new --run'
      )
  if jax.process_index() > 0:
    return
  apart = ('config', 'tokenizer', 'optimizer', 'styles', 'groups', 'labels', 'source')
  options = {
    name: value if isinstance(value, int | float | None) else str(value)
    for name, value in vars(train).items()
    if name not in apart
  }
  options |= {'styles': train.styles, 'groups': train.groups, 'labels': train.labels}
  options |= {'config': config_json.to_json(train.config), 'optimizer': vars(train.optimizer)}
  options['source'] = train.source and describe_source(train.source)
  folder.mkdir(parents=True, exist_ok=True)
  text = json.dumps(options, indent=2) + '\n'
  write_atomically(path, lambda part: part.write_text(text))


def _examples(source: str | None, embeddings: object) -> str:
  """What a run learns from, in words."""
  told = ([f'embeddings {embeddings}'] if embeddings else []) + ([source] if source else [])
  return ' of '.join(told) or 'emoji'


def _recipe(name: str | None, upsampler: int) -> Recipe:
  if name is None:
    raise UnclipError('--recipe paper: the paper trains no such stage')
  return paper_recipe(f'{name}_{upsampler}' if name == 'upsampler' else name)


def _join(given: dict[str, Any]) -> bool:
  """Waits for the other processes where the options say so; whether they do."""
  names = ('coordinator', 'num_processes', 'process_id', 'heartbeat_seconds')
  *by_hand, seconds = (given.pop(name) for name in names)
  if not given['distributed'] and by_hand == [None] * 3:
    return False
  print(
    f'waiting for the other processes, {processes.START_SECONDS} s at most; should one die, JAX '
    f'ends the others within about {seconds} s and gives its number (process 0 is the leader). '
    'Start all again then: they continue from the last checkpoint',
    file=sys.stderr,
    flush=True,
  )
  index, count = processes.start_processes(*by_hand, seconds)
  host, pid = socket.gethostname(), os.getpid()
  print(f'process {index} of {count} is {pid} on {host}', file=sys.stderr, flush=True)
  return True


def _choose_model(
  init: str | None, preset_name: str | None, tokenizer_name: str | None, run: Path
) -> tuple[UnclipConfig, Tokenizer]:
  """The config before its overrides, and the tokenizer: of a preset, or of `--init`."""
  opened = None if init is None else open_model(find_folder(init))
  if opened is not None and preset_name is None:
    if tokenizer_name is not None:
      raise UnclipError(f'--tokenizer: --init {init} has its own: leave it out, or give a --preset')
    return opened.config, opened.tokenizer
  if tokenizer_name == 'clip':
    tokenizer = Tokenizer.clip()
  else:
    own = run / TOKENIZER_NAME
    tokenizer = Tokenizer.load(tokenizer_name or (own if own.exists() else TOKENIZER))
  return fit_to_tokenizer(preset(preset_name or PRESET), tokenizer), tokenizer
