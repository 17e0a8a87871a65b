"""Trains the decoder on captioned emoji, its draft first if it has one; needs the run's CLIP.

python -m experiments.emoji.train_decoder --run runs/emoji_small
python -m experiments.emoji.train_decoder --run runs/mine --shards 'data/{000..099}.tar' --workers 8
... --embeddings z   # of embed_dataset, of the same pictures: CLIP need not see them again
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.emoji import common, origin
from experiments.emoji.bad_steps import make_watch
from experiments.emoji.options import TrainConfig, parse_options, save_options
from experiments.emoji.stored import open_embeddings
from experiments.emoji.stream import open_stream
from experiments.emoji.tuning import begin_tuning, export_tuned
from unclip_jax import processes, sharding
from unclip_jax.data.pictures import PictureConfig
from unclip_jax.images import make_grid
from unclip_jax.stages import common as stage_common
from unclip_jax.stages import decoder
from unclip_jax.train.log import RunLog
from unclip_jax.train.preemption import Preemption
from unclip_jax.train.state import (
  OptimizerConfig,
  gather,
  init_state,
  make_optimizer,
  make_train_step,
)
from unclip_jax.types import Array
from unclip_jax.weights.checkpoint import Checkpoints

NUM_HELD_OUT = 32
DRAFT_OPTIMIZER = OptimizerConfig(learning_rate=3e-3, decay='cosine')
DRAFT_BATCH = 4  # times the decoder's


def load_data(train: TrainConfig, mesh: sharding.Mesh) -> tuple[Any, dict[str, Array]]:
  """What is trained on, for the updates of `common.make_updates`, and what is held out.

  Pictures at the decoder's size, with their captions as tokens and CLIP's view of both.
  """
  image_size, clip_size = train.config.decoder.image_size, train.config.clip.vision.image_size
  names = ['image', 'ids', 'mask', 'z_i']
  if train.config.decoder.text is None:  # else it reads the tokens, not CLIP's states
    names += ['states', 'z_t']

  def compose(num_examples, splits):
    pool = common.compose(train, image_size, num_examples, splits)
    seen = pool
    if clip_size != image_size:
      seen = common.compose(train, clip_size, num_examples, splits)
    rows = common.encode_pool(train, train.tokenizer, pool.captions, seen.images)
    rows['image'] = jnp.asarray(pool.images)
    return {name: rows[name] for name in names}

  def encode(encoder, rows):
    rows = {**rows, **encoder(rows['ids'], rows['mask'], rows['seen'])}
    return {name: rows[name] for name in names}

  if train.source is None:
    pool, held_out = compose(train.pool_size, ('train',)), compose(NUM_HELD_OUT, ('val_pairs',))
    return sharding.place_whole(pool, mesh), held_out
  if train.embeddings is not None:
    names.remove('image')
    picture = PictureConfig(image_size, least_side=image_size)
    return open_embeddings(train, 'decoder', mesh, NUM_HELD_OUT, names, picture)
  size = max(image_size, clip_size)
  kernel = 'area' if size == image_size else 'bicubic'
  picture = PictureConfig(size, kernel=kernel, least_side=image_size)
  stream, held_out = open_stream(
    train,
    'decoder',
    mesh,
    picture,
    NUM_HELD_OUT,
    sizes=(image_size, clip_size),
    prepare=functools.partial(encode, common.make_encoder(train, mesh)),
  )
  return stream, encode(common.make_encoder(train), held_out)


def main(argv: list[str] | None = None) -> None:
  train = parse_options(
    argv,
    __doc__,
    OptimizerConfig(learning_rate=4e-4, warmup_steps=500),
    steps=20000,
    batch_size=64,
    ema_decay=0.9995,
    has_lora=True,
    has_source=True,
    has_embeddings=True,
    recipe='decoder',
    drops_text='decoder',
  )
  origin.begin(train, 'decoder')
  config = train.config.decoder
  mesh = common.make_mesh(train)
  tokenizer = train.tokenizer
  key_init, key_draft, key_run = jax.random.split(jax.random.key(train.seed), 3)
  params = sharding.make_state(lambda: decoder.init(config, key_init), mesh, train.fsdp)
  params = sharding.place_state(origin.start_from(train, params, 'decoder'), mesh, train.fsdp)
  tuning = begin_tuning(train, 'decoder', params, key_init)

  data, held_out = load_data(train, mesh)
  null_text = common.null_text(train, tokenizer)
  if config.text is not None:
    null_text = null_text._replace(states=None, z_t=None)

  def loss_fn(params, batch, key):
    image, text = common.to_float(batch['image']), common.text_features(batch)
    return decoder.loss(
      config, params, image, batch['z_i'], text, null_text, key, train.dtype, train.remat
    )

  def draft_loss_fn(params, batch, key):
    image, text = common.to_float(batch['image']), common.text_features(batch)
    return decoder.draft_loss(
      config, params, image, batch['z_i'], text, null_text, key, train.dtype
    )

  def make_batch(pool, indices, key):
    return sharding.constrain_batch(gather(pool, indices, key), mesh)

  def learn_draft(params, key):
    """The parameters after the updates of the draft alone, which cost little without the U-Net."""
    times = min(DRAFT_BATCH, train.pool_size // train.batch_size) if not train.streams else 1
    ours = dataclasses.replace(
      train,
      batch_size=times * train.batch_size,
      chunk=math.gcd(train.chunk, train.draft_steps),
    )
    optimizer = make_optimizer(DRAFT_OPTIMIZER, train.draft_steps)
    train_step = make_train_step(draft_loss_fn, optimizer, 0.0)
    updates = common.make_updates(ours, train_step, make_batch)
    state = sharding.place_state(init_state(params, optimizer), mesh, train.fsdp)
    folder = train.run / 'draft'
    save_options(ours, folder)
    watch = make_watch(ours, folder, train_step, make_batch)
    with RunLog(folder, train.draft_steps) as log:
      while int(state.step) < train.draft_steps:
        state, metrics = updates(state, data, key)
        metrics = watch(state, metrics, data, key)
        log.write(int(state.step), metrics, num_examples=ours.chunk * ours.batch_size)
      log.write_curves(['draft_mse'])
    return state.params

  optimizer = make_optimizer(train.optimizer, train.steps)
  train_step = common.make_step(train, tuning.loss_of_trained(loss_fn), optimizer)
  updates = common.make_updates(train, train_step, make_batch, tuning.frozen)

  @jax.jit
  def reconstruct(params, rows):
    """Held-out pictures decoded from their true z_i and captions."""
    sampling = config.sampling
    plan = stage_common.make_plan(config.diffusion, sampling)
    sampler = stage_common.make_sampler(sampling.sampler, sampling.variance, sampling.eta)
    text = common.text_features(rows)
    uncond = jax.tree.map(lambda a: jnp.broadcast_to(a, (NUM_HELD_OUT, *a.shape[1:])), null_text)
    key_b = jax.random.split(jax.random.key(0), NUM_HELD_OUT)
    scale = jnp.float32(sampling.guidance_scale)
    return decoder.sample(config, params, text, uncond, rows['z_i'], key_b, plan, sampler, scale)[0]

  folder = train.run / 'decoder'
  watch = make_watch(train, folder, train_step, make_batch, tuning.frozen)
  with Checkpoints(folder / 'checkpoints', train.keep) as checkpoints:
    is_new = checkpoints.latest_step() is None
    time_is_up = common.deadline(train.minutes)
    learns_draft = config.draft_size and train.draft_steps and is_new and not train.trains_adapters
    trained = learn_draft(tuning.trained, key_draft) if learns_draft else tuning.trained
    state = sharding.place_state(init_state(trained, optimizer), mesh, train.fsdp)
    if not is_new:
      state = checkpoints.restore(state)
    elif learns_draft:
      checkpoints.save(0, state)
    save_options(train, folder)  # not where what is there is of another model
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
          images = common.to_uint8(reconstruct(tuning.whole(state.ema_params), held_out))
          pairs = np.stack([held_out['image'], images], axis=1).reshape(-1, *images.shape[1:])
          log.write_image(step, 'real_and_decoded', make_grid(pairs, 16))
          checkpoints.save_async(step, state)
      checkpoints.save(step, state)
      preemption.leave(log.message, step)
      log.write_curves(['loss', 'mse', *(['draft_mse'] if config.draft_size else [])])
  network = tuning.whole(state.ema_params)
  export_tuned(train, 'decoder', tuning, state.ema_params, network)


if __name__ == '__main__':
  common.run(main)
