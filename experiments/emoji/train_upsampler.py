"""Trains an upsampler on crops of emoji; needs no other stage, but pictures as large as its output.

python -m experiments.emoji.build --size 128 --out data/128px
python -m experiments.emoji.train_upsampler --run runs/emoji_small --data data/128px
python -m experiments.emoji.train_upsampler --run runs/mine --folder pictures --workers 8

The second one, whose conditions are degraded (BSR) on the host, once for each crop of a pool:

python -m experiments.emoji.build --size 1024 --out data/1024px
python -m experiments.emoji.train_upsampler --stage 1 --run runs/emoji_small --data data/1024px
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from experiments.emoji import common, origin
from experiments.emoji.bad_steps import make_watch
from experiments.emoji.compose import load_sprites
from experiments.emoji.options import parse_options, save_options
from experiments.emoji.pool import captioned_emoji, make_crops
from experiments.emoji.stream import open_stream
from unclip_jax import processes, sharding
from unclip_jax.data.degradations import area_downsample, gaussian_blur
from unclip_jax.data.pictures import PictureConfig
from unclip_jax.images import make_grid
from unclip_jax.stages import common as stage_common
from unclip_jax.stages import upsampler
from unclip_jax.train.log import RunLog
from unclip_jax.train.preemption import Preemption
from unclip_jax.train.state import OptimizerConfig, init_state, make_optimizer
from unclip_jax.types import UnclipError
from unclip_jax.weights.checkpoint import Checkpoints

NUM_HELD_OUT = 8
NUM_CROPS = 8  # of a picture: to compose a large one takes longer than to degrade a crop of it


def main(argv: list[str] | None = None) -> None:
  train = parse_options(
    argv,
    __doc__,
    OptimizerConfig(learning_rate=5e-4, warmup_steps=200),
    steps=10000,
    batch_size=64,
    pool_size=6144,
    has_source=True,
    recipe='upsampler',
  )
  origin.begin(train, f'upsampler_{train.stage}')
  config = train.config.upsamplers[train.stage]
  mesh = common.make_mesh(train)
  scale = config.image_size // config.low_size
  crop = round(config.image_size * config.crop_fraction)
  low_crop = crop // scale
  name = f'upsampler_{train.stage}'

  is_degraded = config.degradation == 'bsr'
  picture = PictureConfig(
    config.image_size,
    crop,
    random_crop=True,
    least_side=config.image_size,
    bsr_factor=scale if is_degraded else None,
  )

  @jax.jit
  def shrink(images):
    low = area_downsample(common.to_float(images), scale)
    return jnp.round((low + 1) * 127.5).astype(jnp.uint8)

  def load(num_examples, splits, num_pictures):
    """Pictures and the same, small, both uint8 [n, h, w, 3]; their captions.

    Where they are degraded, crops of `num_pictures`: whole ones of 1024 px would fill the memory.
    """
    if is_degraded:
      pictures = common.compose(train, config.image_size, num_pictures, splits, captioned_emoji)
      crops = make_crops(pictures, num_examples, picture, train.seed)
      return {'image': jnp.asarray(crops.images), 'low': jnp.asarray(crops.low)}, crops.captions
    pool = common.compose(train, config.image_size, num_examples, splits)
    images = pool.images
    small = [
      row for i in range(0, len(images), 64) for row in np.asarray(shrink(images[i : i + 64]))
    ]
    return {'image': jnp.asarray(images), 'low': jnp.asarray(np.stack(small))}, pool.captions

  def with_low(batch):
    return batch if 'low' in batch else {**batch, 'low': shrink(batch['image'])}

  if train.source is not None:
    data, held_out = open_stream(
      train, name, mesh, picture, NUM_HELD_OUT, reads_captions=False, prepare=with_low
    )
    held_out, captions = with_low(held_out), None
  elif (size := load_sprites(train.data).size) < config.image_size:
    raise UnclipError(
      f'the emoji of --data have {size} px, too few for pictures of {config.image_size}: first run '
      f'python -m experiments.emoji.build --size {config.image_size} --out DIR, then --data DIR'
    )
  else:
    data, captions = load(train.pool_size, ('train',), -(-train.pool_size // NUM_CROPS))
    held_out, _ = load(NUM_HELD_OUT, ('val_pairs',), NUM_HELD_OUT)
    data = sharding.place_whole(data, mesh)

  def loss_fn(params, batch, key):
    image, low = common.to_float(batch['image']), common.to_float(batch['low'])
    if config.degradation == 'blur':
      key_blur, key = jax.random.split(key)
      is_blurred = jax.random.bernoulli(key_blur, config.blur_fraction, (len(low), 1, 1, 1))
      low = jnp.where(is_blurred, gaussian_blur(low, sigma=config.blur_sigma), low)
    if config.low_noise:
      key_level, key_noise, key = jax.random.split(key, 3)
      level = config.low_noise * jax.random.uniform(key_level, (len(low), 1, 1, 1))
      low = low + level * jax.random.normal(key_noise, low.shape)
    return upsampler.loss(config, params, image, low, key, train.dtype, train.remat)

  def make_batch(pool, indices, key):
    """A random crop of each picture, the same of the large one and of the small one."""
    low_size = pool['low'].shape[1]
    corners = jax.random.randint(key, (len(indices), 2), 0, low_size - low_crop + 1)

    def cut(index, corner):
      y, x = corner
      starts = (index, y * scale, x * scale, 0)
      image = jax.lax.dynamic_slice(pool['image'], starts, (1, crop, crop, 3))[0]
      low = jax.lax.dynamic_slice(pool['low'], (index, y, x, 0), (1, low_crop, low_crop, 3))[0]
      return {'image': image, 'low': low}

    return sharding.constrain_batch(jax.vmap(cut)(indices, corners), mesh)

  optimizer = make_optimizer(train.optimizer, train.steps)
  train_step = common.make_step(train, loss_fn, optimizer)
  updates = common.make_updates(train, train_step, make_batch)
  # Convolutional, it samples pictures of any size: those that are held out.
  low_size, image_size = held_out['low'].shape[1], held_out['image'].shape[1]
  shown = dataclasses.replace(config, low_size=low_size, image_size=image_size)

  @jax.jit
  def upsample(params, low):
    """Held-out small pictures at full size."""
    sampling = config.sampling
    plan = stage_common.make_plan(config.diffusion, sampling)
    sampler = stage_common.make_sampler(sampling.sampler, sampling.variance, sampling.eta)
    key_b = jax.random.split(jax.random.key(0), NUM_HELD_OUT)
    return upsampler.sample(shown, params, common.to_float(low), key_b, plan, sampler)[0]

  key_init, key_run = jax.random.split(jax.random.key(train.seed))
  params = sharding.make_state(lambda: upsampler.init(config, key_init), mesh, train.fsdp)
  state = init_state(origin.start_from(train, params, name), optimizer)
  state = sharding.place_state(state, mesh, train.fsdp)
  folder = train.run / name
  watch = make_watch(train, folder, train_step, make_batch, captions=captions)
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
          high = common.to_uint8(upsample(state.ema_params, held_out['low']))
          smooth = common.to_uint8(upsampler.upscale(common.to_float(held_out['low']), image_size))
          rows = np.concatenate([smooth, high, np.asarray(held_out['image'])])
          log.write_image(step, 'bicubic_ours_real', make_grid(rows, NUM_HELD_OUT))
          checkpoints.save_async(step, state)
      checkpoints.save(step, state)
      preemption.leave(log.message, step)
      log.write_curves(['loss'])
  common.export_stage(train, name, state.ema_params)


if __name__ == '__main__':
  common.run(main)
