"""Trains an autoregressive prior in place of a model's diffusion prior.

python -m experiments.emoji.train_ar_prior --init runs/emoji_small --run runs/emoji_ar

The run begins as a copy of the model of --init, whose other stages stay: it draws. Without --init
it needs the run's CLIP, as `train_prior` does; like that it learns from stored embeddings, too.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from experiments.emoji import common, origin
from experiments.emoji.bad_steps import make_watch
from experiments.emoji.options import TrainConfig, parse_options, save_options
from experiments.emoji.stored import open_embeddings, sample_embeddings
from unclip_jax import processes, sharding
from unclip_jax.configs import ArPriorConfig, UnclipConfig
from unclip_jax.nn.layers import l2_normalize
from unclip_jax.presets import EMOJI_SMALL_AR
from unclip_jax.stages import ar_prior
from unclip_jax.stages.ar_prior import Quantiser
from unclip_jax.systems.loading import find_folder
from unclip_jax.train import pca
from unclip_jax.train.log import RunLog
from unclip_jax.train.preemption import Preemption
from unclip_jax.train.state import OptimizerConfig, gather, init_state, make_optimizer
from unclip_jax.types import Array, UnclipError
from unclip_jax.weights.checkpoint import Checkpoints
from unclip_jax.weights.folder import MANIFEST_NAME, read_manifest

NUM_HELD_OUT = 256
STREAMED = 4096  # embeddings at a time


def with_ar_prior(config: UnclipConfig) -> UnclipConfig:
  """A model with the prior of `emoji_small_ar` for its own CLIP, where it has another kind."""
  if isinstance(config.prior, ArPriorConfig) or config.clip is None or config.clip.text is None:
    return config
  d, text = config.clip.embed_dim, config.clip.text
  prior = dataclasses.replace(
    EMOJI_SMALL_AR.prior,
    embed_dim=d,
    context_length=text.context_length,
    num_components=min(EMOJI_SMALL_AR.prior.num_components, d),
    text_width=text.width,
    unit_norm=config.clip.unit_norm,
  )
  return dataclasses.replace(config, prior=prior)


def starts_from_its_like(train: TrainConfig) -> bool:
  """Whether the model of `--init` has an autoregressive prior too."""
  theirs = origin.config_of_init(train)
  return theirs is not None and isinstance(theirs.prior, ArPriorConfig)


def make_quantiser(train: TrainConfig, z_i: Array, z_t: Array) -> tuple[Quantiser, str]:
  """That of the embeddings of a pool, or of `--init` where both have one CLIP; and a line on it."""
  config = train.config.prior
  if starts_from_its_like(train) and origin.has_clip_of_init(train):
    return Quantiser(**origin.read_init(train, 'prior')['quantiser']), 'quantised as --init does'

  def read() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(z_i), STREAMED):
      rows = slice(start, start + STREAMED)
      yield np.asarray(z_i[rows]), np.asarray(z_t[rows])

  found = pca.fit(images for images, _ in read())
  k, left = config.num_components, pca.error_shares(found)
  line = (
    f'{k} of {config.embed_dim} components leave {left[k]:.2%} of the squared error of '
    f'{found.count} embeddings; {pca.num_components(found)} leave less than 1%'
  )
  return ar_prior.fit_quantiser(config, found.mean, found.components, read), line


def check_run(train: TrainConfig) -> None:
  """Raises UnclipError where the run's folder has a diffusion prior that would be lost."""
  if not (train.run / MANIFEST_NAME).exists():
    return
  there = read_manifest(train.run)
  is_own = not train.fine_tunes or train.run.resolve() == Path(find_folder(train.init)).resolve()
  if is_own and 'prior' in there.stages and 'diffusion' in (there.config.get('prior') or {}):
    raise UnclipError(
      f'--run {train.run}: its diffusion prior would be lost: give that folder by --init, and a '
      'new one by --run'
    )


def main(argv: list[str] | None = None) -> None:
  # Weight decay, beta2 and eps of Table 3; the learning rate is for a net a thousandth as large.
  train = parse_options(
    argv,
    __doc__,
    OptimizerConfig(learning_rate=5e-4, weight_decay=4e-2, b2=0.91, eps=1e-10, warmup_steps=200),
    steps=6000,
    batch_size=256,
    drops_text='prior',
    has_embeddings=True,
    recipe='ar_prior',
    configure=with_ar_prior,
  )
  check_run(train)
  origin.begin(train, 'prior', ArPriorConfig)
  config = train.config.prior
  mesh = common.make_mesh(train)
  tokenizer = train.tokenizer
  key_init, key_run = jax.random.split(jax.random.key(train.seed))
  params = sharding.make_state(lambda: ar_prior.init(config, key_init), mesh, train.fsdp)
  if starts_from_its_like(train):
    params = origin.start_from(train, params, 'prior', 'network')
  if train.embeddings is not None:
    data, held_out = open_embeddings(train, 'prior', mesh, NUM_HELD_OUT)
    sample = sample_embeddings(train, NUM_HELD_OUT, ['z_i', 'z_t'])
  else:
    size = train.config.clip.vision.image_size
    pool = common.compose(train, size, train.pool_size)
    arrays = common.encode_pool(train, tokenizer, pool.captions, pool.images)
    held_out = common.compose(train, size, NUM_HELD_OUT, ('val_pairs',))
    held_out = common.encode_pool(train, tokenizer, held_out.captions, held_out.images)
    data, sample = sharding.place_whole(arrays, mesh), arrays
  null_text = common.null_text(train, tokenizer)
  quantiser, about_quantiser = make_quantiser(train, sample['z_i'], sample['z_t'])

  def loss_fn(params, batch, key):
    text = common.text_features(batch)
    given = (params, quantiser, batch['z_i'], text, null_text, key)
    return ar_prior.loss(config, *given, train.dtype, train.remat)

  def make_batch(pool, indices, key):
    return sharding.constrain_batch(gather(pool, indices, key), mesh)

  @jax.jit
  def of_held_out(params, rows):
    """Of held-out captions: bits a component, and the mean cosine of sampled and true z_i."""
    text, key = common.text_features(rows), jax.random.key(0)
    keeps_text = dataclasses.replace(config, text_drop=0.0)
    given = (params, quantiser, rows['z_i'], text, null_text, key)
    _, metrics = ar_prior.loss(keeps_text, *given)
    key_b = jax.random.split(key, NUM_HELD_OUT)
    z_i = ar_prior.sample(config, params, quantiser, text, text, key_b)
    cosine = (l2_normalize(z_i) * l2_normalize(rows['z_i'])).sum(axis=-1).mean()
    return {'val_bits': metrics['bits'], 'val_cosine': cosine}

  optimizer = make_optimizer(train.optimizer, train.steps)
  train_step = common.make_step(train, loss_fn, optimizer)
  updates = common.make_updates(train, train_step, make_batch)
  state = sharding.place_state(init_state(params, optimizer), mesh, train.fsdp)
  folder = train.run / 'prior'
  watch = make_watch(train, folder, train_step, make_batch)
  with Checkpoints(folder / 'checkpoints', train.keep) as checkpoints:
    if checkpoints.latest_step() is not None:
      state = checkpoints.restore(state)
    save_options(train, folder)  # not where what is there is of another model
    time_is_up = common.deadline(train.minutes)
    preemption = Preemption(processes.any_process)
    with preemption, RunLog(folder, train.steps, resume_step=int(state.step)) as log:
      log.message(about_quantiser)
      step = int(state.step)
      while step < train.steps and not time_is_up() and not preemption.requested():
        state, metrics = updates(state, data, key_run)
        metrics = watch(state, metrics, data, key_run)
        before, step = step, int(state.step)
        log.write(step, metrics, num_examples=train.chunk * train.batch_size)
        checkpoints.check()
        if step // train.save_every > before // train.save_every:
          measured = of_held_out(state.ema_params, held_out)
          log.write(step, measured)
          log.message(
            f'step {step}: {float(measured["val_bits"]):.3f} bits a component of held-out z_i, '
            f'the cosine of sampled and true ones is {float(measured["val_cosine"]):.3f}'
          )
          checkpoints.save_async(step, state)
      checkpoints.save(step, state)
      preemption.leave(log.message, step)
      log.write_curves(['loss'])
  params = {'network': state.ema_params, 'quantiser': quantiser._asdict()}
  common.export_stage(train, 'prior', params)


if __name__ == '__main__':
  common.run(main)
