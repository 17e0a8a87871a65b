"""What the four training scripts share: the start of a run, the data as arrays, its export."""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import unclip_jax
from experiments.emoji.compose import load_sprites
from experiments.emoji.domain import make_vocabulary
from experiments.emoji.options import TrainConfig
from experiments.emoji.pool import Pool, make_pool
from unclip_jax import config_json, sharding
from unclip_jax.configs import DecoderConfig, PriorConfig, UnclipConfig, UpsamplerConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.vocabulary import Vocabulary
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.stages import clip
from unclip_jax.stages.diffusion_prior import Statistics, fit_statistics
from unclip_jax.systems.convert import convert
from unclip_jax.systems.formats import Model, open_model, read_vocabulary
from unclip_jax.systems.loading import find_folder, read_stages
from unclip_jax.train.state import (
  GradFn,
  LossFn,
  Metrics,
  TrainState,
  TrainStep,
  gather,
  make_multi_step,
  make_train_step,
)
from unclip_jax.types import Array, Params, UnclipError
from unclip_jax.weights.folder import (
  MANIFEST_NAME,
  TOKENIZER_NAME,
  read_manifest,
  read_stage,
  write_model,
)


def begin(
  train: TrainConfig, stage: str, kinds: Any = PriorConfig | DecoderConfig | UpsamplerConfig
) -> None:
  """Makes the folder of a new fine-tune a copy of the model of `--init`.

  The stages that are not trained stay as they are, so that the run is a whole model at once.

  Args:
    train: the options.
    stage: what is trained.
    kinds: of configs that can be.

  Raises:
    UnclipError: the model has no such stage, one of another kind, or no image tower to learn it by.
  """
  stages = {'prior': train.config.prior, 'decoder': train.config.decoder}
  stages |= {f'upsampler_{i}': config for i, config in enumerate(train.config.upsamplers)}
  if stages.get(stage) is None:
    raise UnclipError(f'--init {train.init}: it has no {stage}')
  if not isinstance(stages[stage], kinds):
    model = 'the preset' if train.init is None else f'--init {train.init}'
    raise UnclipError(
      f'{model}: its {stage} is of another kind than the {stage} that is trained here'
    )
  if train.config.clip.vision is None and not stage.startswith('upsampler'):
    raise UnclipError(
      f'--init {train.init}: it came without the image tower of its CLIP, whose embeddings the '
      f'{stage} is trained on: take a model that has both, such as the original release of Karlo'
    )
  if train.fine_tunes and not (train.run / MANIFEST_NAME).exists():
    convert(train.init, train.run, 'unclip')


def start_from(train: TrainConfig, params: Params, *path: str) -> Params:
  """Fresh parameters, or in a new run those of `--init` where that model has them.

  A prior and a decoder only mean something together with the CLIP that they were trained with.
  Adapters need the parameters of `--init` in a run that continues as well, and all of them.

  Args:
    train: the options.
    params: fresh ones of a stage.
    path: where they lie in a model, such as 'prior', 'network'; first the stage.

  Raises:
    UnclipError: there is no such model, it has no such stage, or a weight of it has another shape.
  """
  continues = any((train.run / path[0] / 'checkpoints').glob('[0-9]*'))
  if train.init is None or (continues and not train.trains_adapters):
    return params
  given: Any = read_init(train, path[0])
  for name in path[1:]:
    given = given[name]
  fresh, given = flatten_dict(params, sep='.'), flatten_dict(given, sep='.')
  for name in fresh.keys() & given.keys():
    if fresh[name].shape != given[name].shape:
      raise UnclipError(
        f'--init {train.init}: {".".join(path)}.{name} is {given[name].shape} there, and '
        f'{fresh[name].shape} here'
      )
  if train.trains_adapters and (missing := sorted(fresh.keys() - given.keys())):
    raise UnclipError(
      f'--init {train.init}: it has no {".".join(path)}.{missing[0]}, which no adapter would '
      'learn: leave out the --set that asks for it'
    )
  return unflatten_dict(fresh | {k: v for k, v in given.items() if k in fresh}, sep='.')


def read_init(train: TrainConfig, stage: str) -> Params:
  """The parameters of a stage of `--init`, float32.

  Raises:
    UnclipError: it has no such stage, or cannot be read.
  """
  opened = _open_init(train)
  if stage not in opened.stages:
    raise UnclipError(f'--init {train.init}: it has no {stage}, only {", ".join(opened.stages)}')
  return read_stages(opened, jnp.float32, [stage])[stage]


def has_clip_of_init(train: TrainConfig) -> bool:
  """Whether the run's CLIP is that of `--init`, to the bit: embeddings mean the same to both."""
  if train.init is None or 'clip' not in _open_init(train).stages:
    return False
  theirs = flatten_dict(read_init(train, 'clip'))
  ours = flatten_dict(load_clip(train))
  return ours.keys() == theirs.keys() and all(
    np.array_equal(ours[name], theirs[name]) for name in ours
  )


def config_of_init(train: TrainConfig) -> UnclipConfig | None:
  """The config of the model of `--init`, without the overrides of the run."""
  return None if train.init is None else _open_init(train).config


def prior_statistics(train: TrainConfig, z_i: Array) -> Statistics:
  """Those that the prior of `--init` was trained with, where its CLIP is the run's; else of z_i."""
  if has_clip_of_init(train) and 'prior' in _open_init(train).stages:
    given = read_init(train, 'prior')['statistics']
    return Statistics(given['mean'], given['std'])
  return fit_statistics(z_i)


def _open_init(train: TrainConfig) -> Model:
  return open_model(find_folder(train.init))


def make_mesh(train: TrainConfig) -> sharding.Mesh:
  """The mesh of all devices, as the options split them.

  Raises:
    UnclipError: the devices do not divide into groups, or a batch not over the groups.
  """
  mesh = sharding.make_mesh(model_devices=train.model_devices)
  unit = mesh.shape[sharding.DATA_AXIS] * train.accumulate
  if train.batch_size % unit:
    raise UnclipError(
      f'--batch-size {train.batch_size}: take a multiple of {unit}, to split it over '
      f'{unit // train.accumulate} devices (or groups of --model-devices) and --accumulate '
      f'{train.accumulate}'
    )
  return mesh


def make_step(
  train: TrainConfig,
  loss_fn: LossFn | None,
  optimizer: optax.GradientTransformation,
  grad_fn: GradFn | None = None,
) -> TrainStep:
  """`make_train_step` with the average and the accumulation of the options."""
  return make_train_step(
    loss_fn, optimizer, train.ema_decay, train.accumulate, grad_fn, unroll=_on_cpu()
  )


def _on_cpu() -> bool:
  """Where XLA runs the gradients of convolutions inside of a loop tens of times slower."""
  return jax.default_backend() == 'cpu'


def make_updates(
  train: TrainConfig,
  train_step: TrainStep,
  make_batch: Callable[[Any, Array, Array], Any] = gather,
  frozen: Params | None = None,
) -> TrainStep:
  """A function (state, pool, key) -> (state, metrics [chunk]) that makes `train.chunk` updates.

  On an accelerator they are one program. On a CPU each is its own. The state stays split over the
  devices as the options say: place it by `sharding.place_state(state, mesh, train.fsdp)`.

  Args:
    train: the options.
    train_step: of `make_train_step`.
    make_batch: as for `make_multi_step`.
    frozen: parameters that no update changes. With them the step is given (batch, frozen) as its
      batch: an argument of the program, as constants of it they would be compiled in.
  """
  on_cpu, mesh = _on_cpu(), make_mesh(train)

  def multi_step(
    state: TrainState, pool: Any, key: Array, frozen: Params | None
  ) -> tuple[TrainState, Metrics]:
    def step(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, Metrics]:
      state, metrics = train_step(state, batch if frozen is None else (batch, frozen), key)
      return sharding.constrain_state(state, mesh, train.fsdp), metrics

    chunk = 1 if on_cpu else train.chunk
    return make_multi_step(step, chunk, train.batch_size, make_batch)(state, pool, key)

  program = jax.jit(multi_step, donate_argnums=0)

  def updates(state: TrainState, pool: Any, key: Array) -> tuple[TrainState, Metrics]:
    rows = []
    for _ in range(train.chunk if on_cpu else 1):
      state, metrics = program(state, pool, key, frozen)
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
  train: TrainConfig,
  name: str,
  params: Params,
  splits: tuple[str, ...] = ('train',),
  dtype: Any = jnp.bfloat16,
) -> None:
  """Writes a stage's parameters into the run's folder, which is a model folder.

  The stages that are there already keep the configs that they were trained with. The vocabulary is
  that of the last stage that read captions.

  Args:
    train: the options.
    name: of the stage.
    params: its parameters.
    splits: of the pictures that it was trained on.
    dtype: of the matrices.
  """
  config, stages, vocabulary = config_json.to_json(train.config), (), None
  decoder_tokenizer = None
  if (train.run / MANIFEST_NAME).exists():
    there, vocabulary = read_manifest(train.run), read_vocabulary(train.run)
    stages, decoder_tokenizer = tuple(there.stages), there.decoder_tokenizer
    for other in set(stages) - {name}:
      if other.startswith('upsampler_'):
        index = int(other.removeprefix('upsampler_'))
        config['upsamplers'][index] = there.config['upsamplers'][index]
      else:
        config[other] = there.config[other]
  if not name.startswith('upsampler'):
    vocabulary = _vocabulary(train, splits)
  written_by = f'unclip_jax {unclip_jax.__version__}'
  words = vocabulary and vocabulary.to_json()
  with tempfile.TemporaryDirectory() as folder:
    tokenizer = Path(folder) / TOKENIZER_NAME
    train.tokenizer.save(tokenizer)
    write_model(
      train.run,
      config,
      {name: params},
      tokenizer,
      dtype,
      written_by,
      stages,
      words,
      decoder_tokenizer_file=decoder_tokenizer,
    )


def _vocabulary(train: TrainConfig, splits: tuple[str, ...]) -> Vocabulary | None:
  """The words of the run's captions; none where they are not emoji's, or all were known before."""
  knew_all = train.fine_tunes and _open_init(train).vocabulary is None
  if knew_all or train.embeddings is not None:
    return None
  domain = (train.styles, train.groups, train.labels, splits)
  return make_vocabulary(load_sprites(train.data), *domain)


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
