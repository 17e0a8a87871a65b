"""Trains the diffusion prior on captioned emoji, or on stored embeddings; needs the run's CLIP.

python -m experiments.emoji.train_prior --run runs/emoji_small
python -m experiments.emoji.train_prior --run runs/mine --embeddings z   # of embed_dataset
"""

import jax

from experiments.emoji import common, origin
from experiments.emoji.bad_steps import make_watch
from experiments.emoji.options import parse_options, save_options
from experiments.emoji.stored import open_embeddings, sample_embeddings
from experiments.emoji.tuning import begin_tuning, export_tuned
from unclip_jax import processes, sharding
from unclip_jax.nn.layers import l2_normalize
from unclip_jax.stages import common as stage_common
from unclip_jax.stages import diffusion_prior
from unclip_jax.train.log import RunLog
from unclip_jax.train.preemption import Preemption
from unclip_jax.train.state import OptimizerConfig, gather, init_state, make_optimizer
from unclip_jax.weights.checkpoint import Checkpoints

NUM_HELD_OUT = 256


def main(argv: list[str] | None = None) -> None:
  # Weight decay, beta2 and eps of Table 3; the learning rate is for a net a thousandth as large.
  train = parse_options(
    argv,
    __doc__,
    OptimizerConfig(learning_rate=5e-4, weight_decay=6e-2, b2=0.96, eps=1e-6, warmup_steps=200),
    steps=6000,
    batch_size=256,
    has_lora=True,
    drops_text='prior',
    has_embeddings=True,
    recipe='prior',
  )
  origin.begin(train, 'prior')
  config = train.config.prior
  mesh = common.make_mesh(train)
  tokenizer = train.tokenizer
  key_init, key_run = jax.random.split(jax.random.key(train.seed))
  params = sharding.make_state(lambda: diffusion_prior.init(config, key_init), mesh, train.fsdp)
  params = origin.start_from(train, params, 'prior', 'network')
  params = sharding.place_state(params, mesh, train.fsdp)
  tuning = begin_tuning(train, 'prior', params, key_init)
  if train.embeddings is not None:
    data, held_out = open_embeddings(train, 'prior', mesh, NUM_HELD_OUT)
    z_i = sample_embeddings(train, NUM_HELD_OUT, ['z_i'])['z_i']
  else:
    size = train.config.clip.vision.image_size
    pool = common.compose(train, size, train.pool_size)
    arrays = common.encode_pool(train, tokenizer, pool.captions, pool.images)
    held_out = common.compose(train, size, NUM_HELD_OUT, ('val_pairs',))
    held_out = common.encode_pool(train, tokenizer, held_out.captions, held_out.images)
    data, z_i = sharding.place_whole(arrays, mesh), arrays['z_i']
  null_text = common.null_text(train, tokenizer)
  statistics = origin.prior_statistics(train, z_i)

  def loss_fn(params, batch, key):
    text = common.text_features(batch)
    return diffusion_prior.loss(
      config, params, statistics, batch['z_i'], text, null_text, key, train.dtype, train.remat
    )

  def make_batch(pool, indices, key):
    return sharding.constrain_batch(gather(pool, indices, key), mesh)

  @jax.jit
  def held_out_cosine(params, rows):
    """Mean cosine of sampled and true embeddings of held-out captions."""
    text = common.text_features(rows)
    sampling = config.sampling
    plan = stage_common.make_plan(config.diffusion, sampling)
    sampler = stage_common.make_sampler(sampling.sampler, sampling.variance, sampling.eta)
    key_b = jax.random.split(jax.random.key(0), NUM_HELD_OUT)
    z_i, _ = diffusion_prior.sample(config, params, statistics, text, text, key_b, plan, sampler)
    return (l2_normalize(z_i) * l2_normalize(rows['z_i'])).sum(axis=-1).mean()

  optimizer = make_optimizer(train.optimizer, train.steps)
  train_step = common.make_step(train, tuning.loss_of_trained(loss_fn), optimizer)
  updates = common.make_updates(train, train_step, make_batch, tuning.frozen)
  state = sharding.place_state(init_state(tuning.trained, optimizer), mesh, train.fsdp)
  folder = train.run / 'prior'
  watch = make_watch(train, folder, train_step, make_batch, tuning.frozen)
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
          cosine = held_out_cosine(tuning.whole(state.ema_params), held_out)
          log.write(step, {'val_cosine': cosine})
          log.message(f'step {step}: cosine of sampled and true z_i is {float(cosine):.3f}')
          checkpoints.save_async(step, state)
      checkpoints.save(step, state)
      preemption.leave(log.message, step)
      log.write_curves(['loss'])
  network = tuning.whole(state.ema_params)
  params = {'network': network, 'statistics': statistics._asdict()}
  export_tuned(train, 'prior', tuning, state.ema_params, params)


if __name__ == '__main__':
  common.run(main)
