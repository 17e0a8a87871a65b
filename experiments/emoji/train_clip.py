"""Trains CLIP on captioned emoji, or on any captioned pictures; the others see its embeddings.

python -m experiments.emoji.train_clip --run runs/emoji_small
python -m experiments.emoji.train_clip --run runs/mine --shards 'data/{000..099}.tar' --workers 8
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.emoji import captions, common, origin
from experiments.emoji.bad_steps import make_watch
from experiments.emoji.compose import load_sprites
from experiments.emoji.options import TrainConfig, parse_options, save_options
from experiments.emoji.stream import open_stream
from unclip_jax import processes, sharding
from unclip_jax.configs import UnclipConfig
from unclip_jax.data.pictures import PictureConfig
from unclip_jax.evaluate.retrieval import is_first
from unclip_jax.evaluate.zero_shot import class_embeddings, fill_templates, zero_shot_accuracy
from unclip_jax.stages import clip
from unclip_jax.systems.apart import make_apart
from unclip_jax.train.gradient_cache import make_cached_grad
from unclip_jax.train.log import RunLog
from unclip_jax.train.preemption import Preemption
from unclip_jax.train.sam import make_sam_grad
from unclip_jax.train.state import GradFn, OptimizerConfig, gather, init_state, make_optimizer
from unclip_jax.types import Params
from unclip_jax.weights.checkpoint import Checkpoints

NUM_RETRIEVAL = 200


def make_grad(train: TrainConfig, mesh: sharding.Mesh) -> GradFn:
  """The gradient of CLIP's loss that the options ask for: (params, batch, key) -> ..."""

  def embed(params, batch, key):
    image = common.to_float(batch['image'])
    rows = image, batch['ids'], batch['mask']
    return clip.embed(train.config.clip, params, *rows, train.dtype, train.remat)

  def loss(params, embeddings):
    return clip.loss_of_embeddings(params, *embeddings, chunk_size=train.loss_chunk)

  # Written out, what else would be a loop takes more memory; a CPU has more, and loops slowly.
  unroll = jax.default_backend() == 'cpu'
  if train.sam_rho is not None:
    return make_sam_grad(
      embed,
      loss,
      rho=train.sam_rho,
      group_size=train.sam_group,
      unroll=unroll,
      apart=make_apart(mesh, train.fsdp),
      dtype=train.dtype,
    )
  if train.cache_chunk is not None:
    return make_cached_grad(embed, loss, train.cache_chunk, unroll)
  return jax.value_and_grad(
    lambda params, batch, key: loss(params, embed(params, batch, key)), has_aux=True
  )


def make_retrieval(
  train: TrainConfig, images: np.ndarray, ids: np.ndarray, mask: np.ndarray
) -> Callable[[Params], tuple[dict[str, float], str]]:
  """A function of parameters that measures them on held-out pairs: metrics, and a line on them.

  A picture is to find its caption among those of all.
  """
  encode_images, encode_texts = make_encoders(train)

  def evaluate(params: Params) -> tuple[dict[str, float], str]:
    z_i, z_t = encode_images(params, images), encode_texts(params, ids, mask)
    r_at_1 = float(is_first(z_i, z_t, np.arange(len(images))).mean())
    return {'val_r_at_1': r_at_1}, f'R@1 among {len(images)} held-out captions is {r_at_1:.3f}'

  return evaluate


def make_evaluation(
  train: TrainConfig, size: int
) -> Callable[[Params], tuple[dict[str, float], str]]:
  """The same for emoji, whose objects are to be found as well among the names of all.

  Each is told by a few templates.
  """
  held_out = common.compose(train, size, NUM_RETRIEVAL * 4, ('val_pairs',))
  _, first_of_each = np.unique(held_out.sprite_index, return_index=True)
  first_of_each = np.sort(first_of_each)[:NUM_RETRIEVAL]
  images = held_out.images[first_of_each]
  things = load_sprites(train.data).label[held_out.sprite_index[first_of_each]]
  classes, labels = np.unique(things, return_inverse=True)
  names = [captions.article(name) + name for name in classes]
  styles = captions.STYLES if train.styles is None else train.styles
  prompts = fill_templates(['{}', *(f'{{}}, {style} style' for style in styles)], names)
  of_captions = train.tokenizer.encode([held_out.captions[i] for i in first_of_each])
  of_prompts = train.tokenizer.encode(prompts)
  encode_images, encode_texts = make_encoders(train)

  def evaluate(params: Params) -> tuple[dict[str, float], str]:
    z_i = encode_images(params, images)
    z_t = encode_texts(params, of_captions.ids, of_captions.mask)
    r_at_1 = float(is_first(z_i, z_t, np.arange(len(images))).mean())
    z_t = encode_texts(params, of_prompts.ids, of_prompts.mask)
    found = zero_shot_accuracy([(z_i, labels)], class_embeddings(z_t, len(classes)))
    line = (
      f'R@1 among {len(images)} captions of val_pairs is {r_at_1:.3f}; zero-shot among '
      f'{len(classes)} objects, top 1 {found["top_1"]:.3f}, top 5 {found["top_5"]:.3f}'
    )
    return {'val_r_at_1': r_at_1, **{f'val_{name}': value for name, value in found.items()}}, line

  return evaluate


def make_encoders(train: TrainConfig) -> tuple[Callable[..., np.ndarray], ...]:
  """Functions (params, images uint8) -> z_i and (params, ids, mask) -> z_t."""
  config = train.config.clip

  @jax.jit
  def encode_images(params, images):
    return clip.encode_image(config, params, common.to_float(images))

  @jax.jit
  def encode_texts(params, ids, mask):
    return clip.encode_text(config, params, ids, mask).z_t

  return (
    lambda params, images: sharding.fetch(encode_images(params, images)),
    lambda params, ids, mask: sharding.fetch(encode_texts(params, ids, mask)),
  )


def load_data(
  train: TrainConfig, mesh: sharding.Mesh, splits: tuple[str, ...]
) -> tuple[Any, Callable[[Params], tuple[dict[str, float], str]]]:
  """What is trained on, for the updates of `common.make_updates`, and the evaluation."""
  size = train.config.clip.vision.image_size
  if train.source is None:
    pool = common.compose(train, size, train.pool_size, splits)
    tokens = common.encode_pool(train, train.tokenizer, pool.captions, None)
    arrays = {**tokens, 'image': pool.images}
    return sharding.place_whole(arrays, mesh), make_evaluation(train, size)
  picture = PictureConfig(size, kernel='bicubic')  # as CLIP's own preprocessing
  stream, held_out = open_stream(train, 'clip', mesh, picture, NUM_RETRIEVAL)
  return stream, make_retrieval(train, *(held_out[name] for name in ('image', 'ids', 'mask')))


def main(
  argv: list[str] | None = None,
  configure: Callable[[UnclipConfig], UnclipConfig] = lambda config: config,
  splits: tuple[str, ...] = ('train',),
) -> None:
  """Trains the run's CLIP, or configured otherwise and on other splits the judge's."""
  train = parse_options(
    argv,
    __doc__,
    OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, warmup_steps=100, b2=0.98),
    steps=2000,
    batch_size=256,
    ema_decay=0.995,
    has_contrast=True,
    has_source=True,
    recipe='clip',
  )
  train = dataclasses.replace(train, config=configure(train.config))
  mesh = common.make_mesh(train)
  data, evaluate = load_data(train, mesh, splits)

  def make_batch(pool, indices, key):
    return sharding.constrain_batch(gather(pool, indices, key), mesh)

  optimizer = make_optimizer(train.optimizer, train.steps)
  train_step = common.make_step(train, None, optimizer, make_grad(train, mesh))
  updates = common.make_updates(train, train_step, make_batch)
  key_init, key_run = jax.random.split(jax.random.key(train.seed))
  params = sharding.make_state(lambda: clip.init(train.config.clip, key_init), mesh, train.fsdp)
  params = origin.start_from(train, params, 'clip')
  state = sharding.place_state(init_state(params, optimizer), mesh, train.fsdp)
  folder = train.run / 'clip'
  watch = make_watch(train, folder, train_step, make_batch)
  with Checkpoints(folder / 'checkpoints', train.keep) as checkpoints:
    if checkpoints.latest_step() is not None:
      state = checkpoints.restore(state)
    save_options(train, folder)  # not where what is there is of another model
    time_is_up = common.deadline(train.minutes)
    preemption = Preemption(processes.any_process)
    with preemption, RunLog(folder, train.steps, resume_step=int(state.step)) as log:
      step = int(state.step)
      while step < train.steps and not time_is_up() and not preemption.requested():
        state, metrics = updates(state, data, key_run)
        metrics = watch(state, metrics, data, key_run)
        before, step = step, int(state.step)
        log.write(step, metrics, num_examples=train.chunk * train.batch_size)
        checkpoints.check()
        if step // train.save_every > before // train.save_every:
          values, line = evaluate(state.ema_params)
          log.write(step, values)
          log.message(f'step {step}: {line}')
          checkpoints.save_async(step, state)
      checkpoints.save(step, state)
      preemption.leave(log.message, step)
      log.message(f'step {step}: {evaluate(state.ema_params)[1]}')
      log.write_curves(['loss'])
  common.export_stage(train, 'clip', state.ema_params, splits)


if __name__ == '__main__':
  common.run(main)
