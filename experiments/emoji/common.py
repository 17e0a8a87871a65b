"""What the training scripts share: the data as arrays, the updates, the export, the end."""

import functools
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unclip_jax
from experiments.emoji.compose import load_sprites
from experiments.emoji.domain import make_vocabulary
from experiments.emoji.options import TrainConfig
from experiments.emoji.pool import make_pool
from unclip_jax import config_json, processes, sharding
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.vocabulary import Vocabulary
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.stages import clip
from unclip_jax.systems.formats import open_model, read_vocabulary
from unclip_jax.systems.fsdp import placed
from unclip_jax.systems.loading import find_folder
from unclip_jax.train.guard import guarded
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


def make_mesh(train: TrainConfig) -> sharding.Mesh:
  """The mesh of all devices, as the options split them.

  Raises:
    UnclipError: the devices do not divide into groups, or a batch not over the groups.
  """
  mesh = sharding.make_mesh(model_devices=train.model_devices, all_processes=train.distributed)
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
) -> Callable[[TrainState, Any, Array], tuple[TrainState, Metrics]]:
  """A function (state, data, key) -> (state, metrics [chunk]) that makes `train.chunk` updates.

  Bad ones are left out as the options say: `bad_steps.make_watch` looks at the metrics.

  The data are a pool of arrays, of which a program draws its batches, or a `Stream` of those of
  pictures. On an accelerator the updates on a pool are one program, else each is its own. The state
  stays split over the devices as the options say: place it by `sharding.place_state(state, mesh,
  train.fsdp)`.

  Args:
    train: the options.
    train_step: of `make_train_step`.
    make_batch: as for `make_multi_step`.
    frozen: parameters that no update changes. With them the step is given (batch, frozen) as its
      batch: an argument of the program, as constants of it they would be compiled in.
  """
  streams, stops, mesh = train.streams, train.on_bad_loss == 'stop', make_mesh(train)
  update = placed(guarded(train_step, stops, train.spike_factor), mesh, train.fsdp)
  at_once = 1 if streams or _on_cpu() else train.chunk

  def multi_step(
    state: TrainState, pool: Any, key: Array, frozen: Params | None
  ) -> tuple[TrainState, Metrics]:
    def step(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, Metrics]:
      return update(state, batch if frozen is None else (batch, frozen), key)

    make = (lambda batch, *_: batch) if streams else make_batch
    return make_multi_step(step, at_once, train.batch_size, make)(state, pool, key)

  program = jax.jit(multi_step, donate_argnums=0)

  def updates(state: TrainState, data: Any, key: Array) -> tuple[TrainState, Metrics]:
    first, rows = int(state.step), []
    for step in range(first, first + train.chunk, at_once):
      pool = data.batch(step) if streams else data
      if streams and stops and int(state.step) < step:  # the step before was bad, and comes again
        break
      state, metrics = program(state, pool, key, frozen)
      rows.append(metrics)
    return state, jax.tree.map(lambda *columns: np.concatenate(columns), *rows)

  return updates


def compose(
  train: TrainConfig,
  size: int,
  num_examples: int,
  splits: tuple[str, ...] = ('train',),
  make: Callable[..., Any] = make_pool,
) -> Any:
  """`make_pool`, or what else takes its arguments, of a run's domain, pictures of `size` pixels."""
  return make(
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
  """Float around [-1, 1] -> uint8, of several processes in each of them."""
  return sharding.fetch(jnp.round((jnp.clip(image, -1, 1) + 1) * 127.5)).astype(np.uint8)


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
  encode = make_encoder(train)
  n, b = len(captions), min(512, len(captions))
  parts = []
  for start in range(0, n, b):
    rows = np.minimum(np.arange(start, start + b), n - 1)
    part = encode(result['ids'][rows], result['mask'][rows], images[rows])
    parts.append(jax.device_get(part))
  # The last part was filled up to the one shape that is compiled.
  features = {name: np.concatenate([part[name] for part in parts])[:n] for name in parts[0]}
  return {**result, **jax.tree.map(jnp.asarray, features)}


def make_encoder(
  train: TrainConfig, mesh: sharding.Mesh | None = None
) -> Callable[..., dict[str, Array]]:
  """A function (ids, mask, images uint8) of a batch -> the run's CLIP's states, z_t and z_i.

  Without images it gives no z_i.

  Args:
    train: the options.
    mesh: over whose devices batches are split; None takes one device.
  """
  config, params = train.config.clip, load_clip(train)
  if mesh is not None:
    params = sharding.place_whole(params, mesh)

  @functools.partial(jax.jit, out_shardings=mesh and sharding.batch_sharding(mesh))
  def encode(
    params: Params, ids: Array, mask: Array, image: Array | None = None
  ) -> dict[str, Array]:
    text = clip.encode_text(config, params, ids, mask)
    result = {'states': text.states.astype(jnp.bfloat16), 'z_t': text.z_t}
    if image is None:
      return result
    return {**result, 'z_i': clip.encode_image(config, params, to_float(image))}

  return functools.partial(encode, params)


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
    params: its parameters, wherever they lie: of several processes the first writes them.
    splits: of the pictures that it was trained on.
    dtype: of the matrices.
  """
  params = sharding.fetch(params)
  if jax.process_index() > 0:
    return
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
      vocabulary and vocabulary.to_json(),
      decoder_tokenizer_file=decoder_tokenizer,
    )


def _vocabulary(train: TrainConfig, splits: tuple[str, ...]) -> Vocabulary | None:
  """The words of the run's captions; none where they are not emoji's, or all were known before."""
  knew_all = train.fine_tunes and open_model(find_folder(train.init)).vocabulary is None
  if knew_all or train.streams:
    return None
  domain = (train.styles, train.groups, train.labels, splits)
  return make_vocabulary(load_sprites(train.data), *domain)


def run(main: Callable[[], None]) -> None:
  """Runs a script; a mistake of its user's is one line and status 1.

  Of several processes none is left to wait for one that ended.
  """
  try:
    main()
  except UnclipError as error:
    processes.end_all(f'error: {error}')
  except OSError as error:
    processes.end_all(f'error: {error.filename or "writing"}: {error.strerror or error}')
  except Exception as error:
    if not jax.distributed.is_initialized():
      raise
    traceback.print_exc()
    # A program that another process has left; where its results are read, that is a ValueError.
    if isinstance(error, jax.errors.JaxRuntimeError | ValueError):
      processes.end_with_others(str(error).splitlines()[0])
    processes.end_all(type(error).__name__)


def deadline(minutes: float | None) -> Callable[[], bool]:
  """A function that says whether the time is up, if only in one of several processes."""
  if minutes is None:
    return lambda: False
  end = time.monotonic() + 60 * minutes
  return lambda: processes.any_process(time.monotonic() >= end)
