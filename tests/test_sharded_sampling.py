"""Sampling on many devices, the batch or the parameters split: one device's images, and no waiting.

Eight virtual CPU devices, hence processes of their own, which call functions of this module.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from processes import in_a_process
from tiny_model import CONFIG, TEXTS, levels_apart, make_params, write_tiny_model

import unclip_jax
from unclip_jax import Sampling
from unclip_jax.cli import main
from unclip_jax.config_json import override
from unclip_jax.diffusion import guidance, samplers
from unclip_jax.measure.hlo import loop_collectives
from unclip_jax.sharding import make_mesh, param_spec, pmapped, shard_params, sharded
from unclip_jax.stages import clip, common, decoder, diffusion_prior, upsampler
from unclip_jax.systems import programs
from unclip_jax.types import UnclipError

# Programs of few operations: a dozen are compiled.
SMALL = override(
  CONFIG,
  [
    'prior.sampling.num_steps=2',
    'decoder.sampling.num_steps=2',
    'upsamplers.0.sampling.num_steps=2',
  ],
)
STAGES = ('sample_prior', 'sample_decoder', 'sample_upsampler')
PROMPTS = [f'{text} {i}' for text in TEXTS for i in range(4)][:11]
GUIDED = {'prior': Sampling(guidance_scale=2.0), 'num_candidates': 1}


def bytes_of_a_device(params):
  """On the first device, and of all parameters."""
  leaves, first = jax.tree.leaves(params), jax.devices()[0]
  here = [s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == first]
  return sum(here), sum(x.nbytes for x in leaves)


def draw(params, batch):
  """All stages of `SMALL` for a batch of captions, uint8 [b, 32, 32, 3]."""
  (ids, mask), (null_ids, null_mask), key_b = batch
  config, scale = SMALL, jnp.float32(2)
  text = clip.encode_text(config.clip, params['clip'], ids, mask)
  null_text = clip.encode_text(config.clip, params['clip'], null_ids, null_mask)

  def how(stage, sampler):
    key_of_stage = jax.vmap(lambda key: jax.random.fold_in(key, len(stage.sampling.variance)))
    return key_of_stage(key_b), common.make_plan(stage.diffusion, stage.sampling), sampler

  network = params['prior']['network']
  statistics = diffusion_prior.Statistics(**params['prior']['statistics'])
  given = (statistics, text, null_text, *how(config.prior, samplers.ddpm()), scale)
  z_i, _ = diffusion_prior.sample(config.prior, network, *given)
  given = (text, null_text, z_i, *how(config.decoder, samplers.ddpm('learned')), scale)
  image, _ = decoder.sample(config.decoder, params['decoder'], *given)
  large = config.upsamplers[0]
  given = (image, *how(large, samplers.ddim(0.0)))
  image, _ = upsampler.sample(large, params['upsampler_0'], *given)
  return programs.to_uint8(image)


def draw_on_every_mesh():
  rng, n = np.random.default_rng(0), 11
  mask = np.arange(12)[None] < rng.integers(1, 13, (n, 1))
  tokens, null_tokens = ((rng.integers(0, 300, (n, 12)), mask) for _ in range(2))
  batch = jax.tree.map(jnp.asarray, (tokens, null_tokens, jax.random.split(jax.random.key(0), n)))
  params = make_params(SMALL)
  wanted = np.asarray(sharded(draw, make_mesh(1))(params, batch))
  assert wanted.shape == (n, 32, 32, 3) and wanted.std() > 30
  assert levels_apart(wanted[0], wanted[1]) > 30
  for num_devices, model_devices in ((2, 1), (8, 1), (8, 2), (8, 8)):
    mesh = make_mesh(num_devices, model_devices)
    assert dict(mesh.shape) == {'data': num_devices // model_devices, 'model': model_devices}
    placed = shard_params(params, mesh)
    here, whole = bytes_of_a_device(placed)
    assert here == whole if model_devices == 1 else 1 / model_devices < here / whole < 0.6
    got = sharded(draw, mesh)(placed, batch)
    assert levels_apart(got, wanted) <= 1, (num_devices, model_devices)
  for num_devices in (4, 8):
    got = pmapped(draw, make_mesh(num_devices))(params, batch)
    assert levels_apart(got, wanted) <= 1, num_devices
  try:
    pmapped(draw, make_mesh(8, 2))
  except UnclipError as error:
    assert 'take model_devices 1, not 2' in str(error)
  else:
    raise SystemExit('pmap took a mesh with a model axis')


def test_every_mesh_draws_what_one_device_draws():
  in_a_process(draw_on_every_mesh)


def draw_with_loaded_parts(folder):
  one = unclip_jax.load(folder).generate(PROMPTS[:3], 7)
  model = unclip_jax.load(folder, num_devices=8, model_devices=4)
  for name in ('prior', 'decoder', 'upsampler_0'):
    here, whole = bytes_of_a_device(model.params[name])
    assert 1 / 4 < here / whole < 0.4, (name, here, whole)
  assert levels_apart(model.generate(PROMPTS[:3], 7), one) <= 1
  del model
  waiting = unclip_jax.load(folder, num_devices=8, model_devices=8, offload=True)
  here, whole = bytes_of_a_device(waiting.params['decoder'])
  assert 1 / 8 < here / whole < 0.3
  assert levels_apart(waiting.generate(PROMPTS[:3], 7), one) <= 1


def test_a_model_is_loaded_in_parts(tmp_path):
  in_a_process(draw_with_loaded_parts, str(write_tiny_model(tmp_path / 'model', SMALL)))


def compiled_stages(model, prompts, how=None):
  """Pictures, and the collectives in the loops of the programs that the stages compiled."""
  found, jitted = {}, {name: getattr(programs, name) for name in STAGES}

  def spy(name):
    def run(*args, **static):
      found[name] = loop_collectives(jitted[name].lower(*args, **static).compile().as_text())
      return jitted[name](*args, **static)

    return run

  for name in STAGES:
    setattr(programs, name, spy(name))
  images = model.generate(prompts, 7, **(GUIDED if how is None else how))
  for name, program in jitted.items():
    setattr(programs, name, program)
  return images, found


def look_for_collectives(folder):
  one = unclip_jax.load(folder).generate(PROMPTS[:3], 7, **GUIDED)
  model = unclip_jax.load(folder, num_devices=4)
  # Three are filled up to four, one a device.
  images, found = compiled_stages(model, PROMPTS[:3])
  assert levels_apart(images, one) <= 1
  assert found == {name: [] for name in STAGES}
  # Nor where guidance is limited to an interval, a condition in the loop.
  within = Sampling(guidance_scale=3.0, guidance_interval=(0.3, 1.0))
  _, found = compiled_stages(
    model, PROMPTS[:3], {'prior': within, 'decoder': within, 'num_candidates': 1}
  )
  assert found == {name: [] for name in STAGES}

  # The same pictures, but with the two halves of guidance one after the other.
  interleave, guide = guidance.interleave, guidance.guide

  def concatenate(cond, uncond):
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, uncond)

  def guide_halves(output, *how):
    return guide(interleave(*jnp.split(output, 2)), *how)

  guidance.interleave, guidance.guide = concatenate, guide_halves
  jax.clear_caches()
  images, found = compiled_stages(model, PROMPTS[:3])
  assert levels_apart(images, one) <= 1
  assert found['sample_prior'] and found['sample_decoder'] and not found['sample_upsampler']


def test_no_device_waits_for_another_in_a_sampling_loop(tmp_path):
  folder = write_tiny_model(tmp_path / 'model', SMALL)
  in_a_process(look_for_collectives, str(folder), num_devices=4)


@pytest.mark.parametrize(
  ('path', 'shape', 'axis'),
  [
    ('prior/network/blocks/block_0/qkv/kernel', (32, 3, 4, 16), 2),
    ('prior/network/blocks/block_0/attention_out/kernel', (4, 16, 32), 0),
    ('prior/network/blocks/block_0/mlp_in/kernel', (32, 128), 1),
    ('prior/network/blocks/block_0/mlp_out/kernel', (128, 32), 0),
    ('decoder/unet/middle_attention/context_kv/kernel', (24, 2, 4, 16), 2),
    ('decoder/unet/middle_attention/out_proj/kernel', (4, 16, 32), 0),
    ('decoder/unet/conv_in/kernel', (3, 3, 12, 16), 3),
    ('clip/text/tokens/embedding', (300, 24), 1),
    # Where the axis that comes first does not divide, the largest that does, the last of equals.
    ('prior/network/blocks/block_0/qkv/kernel', (32, 3, 3, 16), 0),
    ('decoder/unet/conv_out/kernel', (3, 3, 16, 6), 2),
    ('prior/network/out_proj/kernel', (32, 32), 1),
    ('decoder/z_i_to_tokens/kernel', (16, 2, 24), 2),
    # Whole on each device: small ones, and what does not divide.
    ('prior/network/blocks/block_0/qkv/bias', (3, 4, 16), None),
    ('prior/network/positions', (16, 32), None),
    ('prior/network/norm/norm/scale', (32,), None),
    ('decoder/null_z_i', (16,), None),
    ('decoder/z_i_to_emb/kernel', (15, 25), None),
  ],
)
def test_which_axis_is_split(path, shape, axis):
  split = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, 'model')
  assert param_spec(path, shape, 4) == split
  assert param_spec(path, shape, 1) == PartitionSpec()


@pytest.mark.parametrize(
  ('num_devices', 'model_devices', 'message'),
  [
    (1, 2, '1 devices do not divide into groups of 2'),
    (1, 0, 'into groups of 0'),
    (4096, 2, '4096 devices were asked for'),
  ],
)
def test_meshes_that_cannot_be(num_devices, model_devices, message):
  with pytest.raises(UnclipError, match=message):
    make_mesh(num_devices, model_devices)


def test_loading_onto_devices_that_do_not_divide_is_an_error(tmp_path):
  folder = write_tiny_model(tmp_path / 'model', SMALL)
  with pytest.raises(UnclipError, match='take model_devices that divides 1'):
    unclip_jax.load(folder, model_devices=2)
  with pytest.raises(UnclipError, match='model_devices'):
    unclip_jax.load(folder, model_devices=0)


def test_the_command_line_says_so_in_a_line(tmp_path, capsys):
  model, out = write_tiny_model(tmp_path / 'model', SMALL), tmp_path / 'out'
  command = ['generate', TEXTS[0], '--model', str(model), '--out', str(out), '--no-cache']
  enabled = jax.config.jax_enable_compilation_cache
  try:
    with pytest.raises(SystemExit) as stop:
      main([*command, '--model-devices', '2'])
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
  assert stop.value.code == 1
  said = ' '.join(capsys.readouterr().err.split())
  assert '1 devices do not divide into groups of 2' in said and 'Traceback' not in said
