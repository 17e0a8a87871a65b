"""Training on many devices: the losses and parameters of one, whatever is split over them.

Eight virtual CPU devices, hence processes of their own, which call functions of this module.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec
from processes import in_a_process
from tiny_stages import CONFIG, STATISTICS, make_text, normal, random_params

from experiments.emoji import common, train_clip
from experiments.emoji.options import parse_options
from unclip_jax import sharding
from unclip_jax.config_json import override
from unclip_jax.measure.collectives import program_collectives
from unclip_jax.presets import TINY_AR
from unclip_jax.sharding import (
  make_mesh,
  param_spec,
  place_batch,
  place_rows,
  place_state,
  process_rows,
  replicated,
  state_shardings,
)
from unclip_jax.stages import ar_prior, clip, decoder, diffusion_prior, upsampler
from unclip_jax.systems.apart import make_apart
from unclip_jax.systems.fsdp import placed
from unclip_jax.train.sam import make_sam_grad
from unclip_jax.train.state import OptimizerConfig, init_state, make_train_step
from unclip_jax.types import UnclipError
from unclip_jax.weights.checkpoint import Checkpoints

# Programs of few operations: ten are compiled, which is what takes time.
SMALL = override(
  CONFIG,
  [
    'clip.text.depth=1',
    'clip.vision.depth=1',
    # Eight devices do not divide these widths: two axes of a kernel share them.
    'clip.vision.width=20',
    'prior.depth=1',
    'prior.width=36',
    'decoder.unet.multipliers=[1]',
    'decoder.unet.attention_levels=[0]',
    'decoder.unet.head_dim=8',
    'decoder.unet.out_channels=3',
    'decoder.diffusion.learned_variance=false',
    'decoder.text=null',
    'decoder.clip_text_width=24',
    'upsamplers.0.unet.multipliers=[1]',
  ],
)
AR = override(TINY_AR, ['prior.depth=1']).prior
TWO_BLOCKS = override(SMALL, ['prior.depth=2']).prior
NUM_STEPS = 3
BATCH = 8
OPTIMIZER = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.5, momentum=0.9))
# Devices, those that share a copy of the parameters, and whether the rest split it as well.
MESHES = {
  'prior': [(8, 1, True), (8, 2, True), (8, 4, False)],
  'prior, again': [(8, 1, True)],
  'ar prior': [(8, 1, True)],
  'ar prior, in parts': [(8, 2, True), (8, 4, False)],
  'clip': [(8, 2, True)],
  'clip, cached': [(8, 2, True), (8, 4, False)],
  'clip, SAM': [(8, 1, True), (8, 2, True)],
  'decoder': [(8, 2, True), (8, 1, True)],
  'upsampler': [(8, 4, True)],
}

# Of the gradient at the rows of an embedding each device is sent the columns that it has.
MORE_SENT = {'ar prior': {'all-to-all'}}


def make_batch():
  """What the losses of all stages read."""
  image = jnp.tanh(normal(BATCH, 16, 16, 3))
  return {'image': image, 'z_i': normal(BATCH, 16, seed=1) / 4, 'text': make_text(BATCH)}


def clip_loss(params, batch, key):
  text = batch['text']
  return clip.loss(SMALL.clip, params, batch['image'], text.ids, text.mask)


def cached_grad(mesh, fsdp):
  """The script's, of two chunks of four examples: each group of devices has one of a chunk."""
  train = options(fsdp, '--cache-chunk=4', has_contrast=True)
  grad_fn = train_clip.make_grad(dataclasses.replace(train, config=SMALL), mesh)

  def of_pixels(params, batch, key):
    pixels, text = (batch['image'] + 1) * 127.5, batch['text']
    return grad_fn(params, {'image': pixels, 'ids': text.ids, 'mask': text.mask}, key)

  return of_pixels


def options(fsdp, *more, has_contrast=False):
  """Those of a training script."""
  given = ['--preset=tiny', '--chunk=1', *(['--fsdp'] if fsdp else []), *more]
  return parse_options(
    given, '', OptimizerConfig(), NUM_STEPS, BATCH, ema_decay=0.9, has_contrast=has_contrast
  )


def sam_grad(mesh, fsdp):
  """Of groups of one example: each device has one or two."""

  def embed(params, batch, key):
    text = batch['text']
    return clip.embed(SMALL.clip, params, batch['image'], text.ids, text.mask)

  def loss(params, embeddings):
    return clip.loss_of_embeddings(params, *embeddings)

  return make_sam_grad(embed, loss, 0.01, group_size=1, apart=make_apart(mesh, fsdp))


def prior_loss(params, batch, key):
  given = (STATISTICS, batch['z_i'], batch['text'], make_text(1, seed=9), key)
  return diffusion_prior.loss(SMALL.prior, params, *given)


def again_loss(params, batch, key):
  given = (STATISTICS, batch['z_i'], batch['text'], make_text(1, seed=9), key)
  return diffusion_prior.loss(TWO_BLOCKS, params, *given, remat=True)


def quantiser():
  """Of components that are the first dimensions: what they are has no part in a gradient."""
  d, k, n = AR.embed_dim, AR.num_components, AR.num_buckets
  low, high = jnp.full(k, -0.5), jnp.full(k, 0.5)
  dots = jnp.linspace(-2, 2, n)
  return ar_prior.Quantiser(
    jnp.zeros(d), jnp.eye(k, d), low, high, jnp.float32(-2), jnp.float32(2), dots
  )


def ar_loss(params, batch, key):
  given = (quantiser(), batch['z_i'], batch['text'], make_text(1, seed=9), key)
  return ar_prior.loss(AR, params, *given)


def decoder_loss(params, batch, key):
  given = (batch['image'], batch['z_i'], batch['text'], make_text(1, seed=9), key)
  return decoder.loss(SMALL.decoder, params, *given)


def upsampler_loss(params, batch, key):
  low = batch['image'].reshape(BATCH, 8, 2, 8, 2, 3).mean(axis=(2, 4))
  return upsampler.loss(SMALL.upsamplers[0], params, batch['image'], low, key)


STAGES = {
  'clip': (clip, SMALL.clip, clip_loss),
  'clip, cached': (clip, SMALL.clip, None),
  'clip, SAM': (clip, SMALL.clip, None),
  'prior': (diffusion_prior, SMALL.prior, prior_loss),
  'prior, again': (diffusion_prior, TWO_BLOCKS, again_loss),
  'ar prior': (ar_prior, AR, ar_loss),
  'ar prior, in parts': (ar_prior, AR, ar_loss),
  'decoder': (decoder, SMALL.decoder, decoder_loss),
  'upsampler': (upsampler, SMALL.upsamplers[0], upsampler_loss),
}
GRADIENTS = {'clip, cached': cached_grad, 'clip, SAM': sam_grad}


def make_step(stage, mesh, fsdp):
  """By what the scripts make theirs with."""
  train = options(fsdp, *(['--accumulate=2'] if stage.endswith('in parts') else []))
  grad_fn = GRADIENTS[stage](mesh, fsdp) if stage in GRADIENTS else None
  return common.make_step(train, STAGES[stage][2], OPTIMIZER, grad_fn)


def fresh_state(stage):
  module, config, _ = STAGES[stage]
  return init_state(jax.tree.map(jnp.asarray, random_params(module, config)), OPTIMIZER)


class Run:
  """A stage's program on a mesh, and what it needs."""

  def __init__(self, stage, num_devices, model_devices, fsdp):
    self.mesh, self.fsdp = make_mesh(num_devices, model_devices), fsdp
    self.batch = place_batch(make_batch(), self.mesh)
    self.key = jax.device_put(jax.random.key(4), replicated(self.mesh))
    self.start = self.place(fresh_state(stage))
    update = placed(make_step(stage, self.mesh, fsdp), self.mesh, fsdp)
    self.program = jax.jit(update).lower(self.start, self.batch, self.key).compile()

  def place(self, state):
    return place_state(state, self.mesh, self.fsdp)

  def train(self, state, num_steps=NUM_STEPS):
    losses = []
    for _ in range(num_steps):
      state, metrics = self.program(state, self.batch, self.key)
      assert_placed(state, self.mesh, self.fsdp)
      losses.append(float(metrics['loss']))
    return losses, state

  def exchanges(self):
    return program_collectives(self.program.as_text(), self.mesh.size)

  def argument_bytes(self):
    """Of one device."""
    return self.program.memory_analysis().argument_size_in_bytes


def assert_placed(state, mesh, fsdp):
  def check(leaf, wanted):
    assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.shape, leaf.sharding, wanted)

  jax.tree.map(check, state, state_shardings(state, mesh, fsdp))


def assert_close(state, wanted, rtol=1e-4):
  def check(path, a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.array_equal(np.isnan(a), np.isnan(b)), path  # losses that there are none of yet
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    scale = max(np.abs(b).max(), 1e-3)
    assert np.abs(a - b).max() <= rtol * scale, (path, np.abs(a - b).max(), scale)

  jax.tree_util.tree_map_with_path(check, state, wanted)


def train_on_every_mesh(folder):
  sharding.FSDP_MIN_SIZE = 64  # nothing is large here
  runs = {}
  for stage, meshes in MESHES.items():
    one = Run(stage, 1, 1, False)
    wanted_losses, wanted = one.train(one.start)
    assert len({round(loss, 3) for loss in wanted_losses}) == NUM_STEPS, wanted_losses
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), wanted.params, one.start.params)
    assert all(change > 1e-6 for change in jax.tree.leaves(moved)), moved
    for mesh in meshes:
      run = Run(stage, *mesh)
      losses, state = run.train(run.start)
      np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5, err_msg=f'{stage} {mesh}')
      assert_close(state, wanted)
      if mesh[1:] == (1, True):  # weights and gradients move, and nothing else
        sent = {'all-gather', 'all-reduce', 'reduce-scatter'} | MORE_SENT.get(stage, set())
        assert set(run.exchanges()) <= sent, stage
      if mesh[2]:
        assert run.argument_bytes() < 0.35 * one.argument_bytes(), (stage, mesh)
      runs[stage, mesh] = run
    runs[stage, (1, 1, False)] = one
  open_on_other_devices(runs, folder)


def open_on_other_devices(runs, folder):
  """Saved by eight devices with a part each, opened by groups of four, and by one."""
  eight = runs['prior', (8, 1, True)]
  _, state = eight.train(eight.start, 1)
  wanted, _ = eight.train(state, 2)
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(1, state)
    for mesh in ((8, 4, False), (1, 1, False)):
      run = runs['prior', mesh]
      opened = checkpoints.restore(run.place(fresh_state('prior')))
      assert_placed(opened, run.mesh, run.fsdp)
      jax.tree.map(np.testing.assert_array_equal, opened, state)
      losses, _ = run.train(opened, 2)
      np.testing.assert_allclose(losses, wanted, rtol=1e-5, err_msg=str(mesh))


def test_every_mesh_gives_the_losses_and_parameters_of_one_device(tmp_path):
  in_a_process(train_on_every_mesh, tmp_path)


def look_for_rows_that_move():
  """Of micro-batches, split as they are and as the obvious way would, which exchanges rows."""
  mesh, rows = make_mesh(8), np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)

  def loss_fn(params, batch, key):
    return jnp.mean((batch @ params['w'] - batch) ** 2), {}

  def moved(split_by_hand):
    step = make_train_step(loss_fn, OPTIMIZER, 0.9, accumulate=1 if split_by_hand else 4)

    def update(state, batch, key):
      if split_by_hand:
        batch = jnp.moveaxis(batch.reshape(4, 8, 16), 0, 1).reshape(32, 16)
        batch = sharding.constrain_batch(batch, mesh)
      return step(state, batch, key)

    state = place_state(init_state({'w': jnp.ones((16, 16))}, OPTIMIZER), mesh)
    given = state, place_batch(rows, mesh), jax.device_put(jax.random.key(0), replicated(mesh))
    program = jax.jit(update).lower(*given).compile()
    text = program.as_text()
    names = ('all-gather', 'all-to-all', 'collective-permute')
    return [name for name in names if f'{name}(' in text or f'{name}-start(' in text], program(
      *given
    )

  (found, (state, metrics)), (by_hand, (other, same)) = moved(False), moved(True)
  assert found == [] and by_hand, (found, by_hand)
  np.testing.assert_allclose(metrics['loss'], same['loss'], rtol=1e-5)
  assert_close(state, other)


def test_micro_batches_leave_rows_where_they_are():
  in_a_process(look_for_rows_that_move)


@pytest.mark.parametrize(
  ('path', 'shape', 'model_devices', 'axes'),
  [
    # The largest axis that `model` leaves, and that divides by 4.
    ('blocks/block_0/qkv/kernel', (256, 3, 8, 32), 1, ['data']),
    ('blocks/block_0/qkv/kernel', (256, 3, 8, 32), 2, ['data', None, 'model']),
    ('blocks/block_0/mlp_out/kernel', (512, 128), 2, ['model', 'data']),
    ('unet/conv_in/kernel', (3, 3, 130, 160), 2, [None, None, None, ('model', 'data')]),
    ('unet/conv_in/kernel', (3, 3, 132, 160), 2, [None, None, 'data', 'model']),
    ('text/tokens/embedding', (511, 128), 1, [None, 'data']),
    ('positions', (256, 128), 2, []),
    # Small, or nothing that divides, or what no layer is given.
    ('blocks/block_0/mlp_out/bias', (2048,), 1, []),
    ('blocks/block_0/mlp_in/kernel', (64, 128), 2, [None, 'model']),
    ('z_i_to_emb/kernel', (255, 257), 2, []),
    ('scale', (), 2, []),
    # None that divides by 4: two do by 2, or one.
    ('unet/conv_in/kernel', (3, 3, 130, 162), 1, [None, None, 'rest', 'data']),
    ('unet/conv_in/kernel', (3, 3, 130, 164), 2, [None, None, 'data', ('model', 'rest')]),
    ('z_i_to_emb/kernel', (255, 258), 1, [None, 'data']),
  ],
)
def test_which_axis_is_split_over_data(path, shape, model_devices, axes):
  assert param_spec(path, shape, model_devices, 4) == PartitionSpec(*axes)


def test_moments_and_average_lie_where_their_parameters_do():
  params = {'mlp_in': {'kernel': jnp.zeros((128, 256)), 'bias': jnp.zeros(256)}}
  state = jax.eval_shape(lambda: init_state(params, optax.adamw(1e-3)))
  placed = state_shardings(state, AbstractMesh((4, 2), ('data', 'model')), fsdp=True)
  specs = {'kernel': [], 'bias': []}
  for path, place in jax.tree_util.tree_leaves_with_path(placed):
    specs.setdefault(getattr(path[-1], 'key', 'other'), []).append(place.spec)
  # Parameters, average, and Adam's two moments.
  assert specs['kernel'] == [PartitionSpec('data', 'model')] * 4
  assert specs['bias'] == [PartitionSpec()] * 4
  assert set(specs['other']) == {PartitionSpec()}


def test_one_process_reads_all_rows_and_a_batch_must_divide():
  mesh = make_mesh(1)
  np.testing.assert_array_equal(process_rows(5, mesh), np.arange(5))
  batch = place_rows({'x': np.arange(10.0, dtype=np.float32).reshape(5, 2)}, 5, mesh)
  np.testing.assert_array_equal(batch['x'], np.arange(10.0).reshape(5, 2))
  with pytest.raises(UnclipError, match='a batch of 5 cannot be split over 4 groups of devices'):
    process_rows(5, AbstractMesh((4, 2), ('data', 'model')))


def test_the_mesh_of_all_processes_is_that_of_the_only_one():
  assert make_mesh(all_processes=True) == make_mesh()
  with pytest.raises(UnclipError, match='4097 devices were asked for'):
    make_mesh(4097, all_processes=True)
