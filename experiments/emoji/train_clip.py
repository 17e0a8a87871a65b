"""Trains CLIP on captioned emoji, the first stage: the others see its embeddings.

python -m experiments.emoji.train_clip --run runs/emoji_small
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from experiments.emoji import common
from experiments.emoji.options import parse_options, save_options
from unclip_jax import sharding
from unclip_jax.configs import UnclipConfig
from unclip_jax.stages import clip
from unclip_jax.train.log import RunLog
from unclip_jax.train.state import (
  OptimizerConfig,
  check_finite,
  gather,
  init_state,
  make_optimizer,
  make_train_step,
)
from unclip_jax.weights.checkpoint import Checkpoints

NUM_RETRIEVAL = 200


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
  )
  train = dataclasses.replace(train, config=configure(train.config))
  config = train.config.clip
  mesh = sharding.make_mesh()
  tokenizer = train.tokenizer
  pool = common.compose(train, config.vision.image_size, train.pool_size, splits)
  arrays = {'image': jnp.asarray(pool.images)}
  arrays |= common.encode_pool(train, tokenizer, pool.captions, None)
  held_out = common.compose(train, config.vision.image_size, NUM_RETRIEVAL * 4, ('val_pairs',))
  _, first_of_each = np.unique(held_out.sprite_index, return_index=True)
  first_of_each = np.sort(first_of_each)[:NUM_RETRIEVAL]
  captions = [held_out.captions[i] for i in first_of_each]
  held_out_images = held_out.images[first_of_each]

  def loss_fn(params, batch, key):
    image = common.to_float(batch['image'])
    return clip.loss(config, params, image, batch['ids'], batch['mask'], dtype=train.dtype)

  def make_batch(pool, indices, key):
    return sharding.constrain_batch(gather(pool, indices, key), mesh)

  optimizer = make_optimizer(train.optimizer, train.steps)
  train_step = make_train_step(loss_fn, optimizer, train.ema_decay)
  updates = common.make_updates(train, train_step, make_batch)

  @jax.jit
  def retrieval(params, image, ids, mask):
    """The share of held-out images whose own caption comes first among them all."""
    z_i = clip.encode_image(config, params, common.to_float(image))
    z_t = clip.encode_text(config, params, ids, mask).z_t
    return ((z_i @ z_t.T).argmax(axis=1) == jnp.arange(len(image))).mean()

  key_init, key_run = jax.random.split(jax.random.key(train.seed))
  state = init_state(common.start_from(train, clip.init(config, key_init), 'clip'), optimizer)
  state = jax.device_put(state, sharding.replicated(mesh))
  arrays = jax.device_put(arrays, sharding.replicated(mesh))
  tokens = tokenizer.encode(captions)
  folder = train.run / 'clip'
  save_options(train, folder)
  with Checkpoints(folder / 'checkpoints') as checkpoints:
    if checkpoints.latest_step() is not None:
      state = checkpoints.restore(state)
    time_is_up = common.deadline(train.minutes)
    with RunLog(folder, train.steps, resume_step=int(state.step)) as log:
      step = int(state.step)
      while step < train.steps and not time_is_up():
        state, metrics = updates(state, arrays, key_run)
        check_finite(metrics, step)
        before, step = step, int(state.step)
        log.write(step, metrics, num_examples=train.chunk * train.batch_size)
        if step // train.save_every > before // train.save_every:
          checkpoints.save(step, state)
          r_at_1 = retrieval(state.ema_params, held_out_images, tokens.ids, tokens.mask)
          log.write(step, {'val_r_at_1': r_at_1})
          log.message(
            f'step {step}: R@1 among {len(captions)} captions of val_pairs is {float(r_at_1):.3f}'
          )
      checkpoints.save(step, state)
      r_at_1 = retrieval(state.ema_params, held_out_images, tokens.ids, tokens.mask)
      log.message(
        f'step {step}: R@1 among {len(captions)} captions of val_pairs is {float(r_at_1):.3f}'
      )
      log.write_curves(['loss'])
  common.export_stage(train, 'clip', state.ema_params, splits)


if __name__ == '__main__':
  common.run(main)
