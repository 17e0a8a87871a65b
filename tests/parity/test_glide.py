"""GLIDE's networks and its sampling, against torch."""

import dataclasses
import functools

import diffusers
import glide_twin
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins

from unclip_jax.diffusion import samplers
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.glide import GlideNetwork
from unclip_jax.stages import common, glide
from unclip_jax.weights import glide as release
from unclip_jax.weights.foreign_folder import Joined

diffusers.utils.logging.set_verbosity_error()
TOLERANCE = 1e-5
# Random networks make much of their own errors, step by step: 0.3% more noise at the start changes
# what DDIM ends at by a quarter of its deviation.
LOOP_TOLERANCE = 4e-4
# Channels that the first convolution sees, and sizes.
NETWORKS = {
  'base': (3, glide_twin.BASE),
  'upsample': (6, glide_twin.UPSAMPLE),
  'base_inpaint': (7, glide_twin.BASE),
  'upsample_inpaint': (10, glide_twin.UPSAMPLE),
}
PAIRS = {'plain': ('base', 'upsample'), 'inpaint': ('base_inpaint', 'upsample_inpaint')}
LENGTHS = np.array([[9], [4], [0]])  # of captions: the last is empty
LOW, HIGH = (8, 12), (16, 24)  # pixels; the networks are convolutional


@functools.cache
def make_twin(name):
  """A network in float64, its numbers those of float32."""
  return glide_twin.make(*NETWORKS[name], seed=len(name)).double()


@functools.cache
def tensors(name):
  """Of a file, as conversions read them."""
  named = glide_twin.original_tensors(make_twin(name))
  return twins.Tensors({key: x.float().numpy() for key, x in named.items()})


def parts_of(pair):
  return {part: tensors(name) for part, name in zip(('base', 'upsample'), PAIRS[pair], strict=True)}


def stage_of(config, name):
  return config.decoder if name.startswith('base') else config.upsamplers[0]


@functools.cache
def expected_of(stage):
  return jax.eval_shape(functools.partial(glide.init, stage), jax.random.key(0))


@functools.cache
def load(name):
  """Config, rules and parameters of one network; names are those of the file."""
  pair = 'inpaint' if 'inpaint' in name else 'plain'
  part, stage_name = ('base', 'decoder') if 'base' in name else ('upsample', 'upsampler_0')
  config = release.read_config(parts_of(pair), 'twin')
  stage = stage_of(config, name)
  rules = [
    rule._replace(theirs=tuple(key.removeprefix(f'{part}/') for key in rule.theirs))
    for rule in release.rules(config)[stage_name]
  ]
  return stage, rules, twins.convert(tensors(name), rules, expected_of(stage))


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype('f')


def to_torch(image):
  return torch.from_numpy(np.array(image)).movedim(-1, 1)


def from_torch(image):
  return image.movedim(1, -1)


def make_text(seed=0):
  shape = (len(LENGTHS), glide_twin.CONTEXT_LENGTH)
  ids = np.random.default_rng(seed).integers(0, glide_twin.VOCAB_SIZE, shape)
  return TextFeatures(jnp.asarray(ids), jnp.asarray(np.arange(shape[1]) < LENGTHS), None, None)


def empty_text():
  shape = (len(LENGTHS), glide_twin.CONTEXT_LENGTH)
  ids = jnp.full(shape, glide_twin.VOCAB_SIZE - 1)
  return TextFeatures(ids, jnp.zeros(shape, bool), None, None)


def of_torch(text):
  return torch.from_numpy(np.array(text.ids)), torch.from_numpy(np.array(text.mask))


# --- Networks.


def make_inputs(name):
  size = LOW if name.startswith('base') else HIGH
  seen = normal(len(LENGTHS), *size, NETWORKS[name][0])
  # Of larger ones the sinusoids of float32 are further from those of another program.
  return seen, np.array([3, 100, 300])


@pytest.mark.parametrize('name', NETWORKS)
def test_network_is_that_of_the_twin(name):
  seen, t = make_inputs(name)
  stage, _, params = load(name)
  condition = jnp.asarray(seen[..., 3:]) if seen.shape[-1] > 3 else None
  ours = GlideNetwork(stage).apply(
    {'params': params}, seen[..., :3], t, make_text(), condition, True, method='predict'
  )
  expected = make_twin(name)(to_torch(seen).double(), torch.from_numpy(t), *of_torch(make_text()))
  assert twins.deviation(ours, from_torch(expected)) < TOLERANCE


@pytest.mark.parametrize('name', ['base', 'upsample_inpaint'])
def test_each_tensor_matters(name):
  seen, t = make_inputs(name)
  stage, rules, params = load(name)

  @jax.jit
  def predict(params):
    network, condition = GlideNetwork(stage), jnp.asarray(seen[..., 3:])
    given = (seen[..., :3], t, make_text(), condition if condition.size else None, True)
    return network.apply({'params': params}, *given, method='predict')

  def run(changed):
    return [predict(twins.lay_out(changed, rules, params))]

  expected = [torch.from_numpy(np.array(predict(params)))]
  twins.check_each_tensor_matters(tensors(name), run, expected, TOLERANCE)


def test_each_tensor_is_in_one_rule():
  for pair in PAIRS:
    parts = parts_of(pair)
    rules = release.rules(release.read_config(parts, 'twin'))
    used = sorted(name for stage in rules.values() for rule in stage for name in rule.theirs)
    assert used == sorted(Joined(parts).names())
  for name in NETWORKS:  # what is read is written as it was
    load(name)


# --- Conditions.


@pytest.mark.parametrize('sides', [(8, 32), (5, 20), (7, 18), (6, 6)])
def test_small_pictures_are_enlarged_as_by_torch(sides):
  low, high = sides
  image = np.random.default_rng(0).uniform(-1, 1, (2, low, low, 3)).astype('f')
  levels = ((to_torch(image) + 1) * 127.5).round() / 127.5 - 1
  expected = torch.nn.functional.interpolate(
    levels, (high, high), mode='bilinear', align_corners=False
  )
  ours = np.asarray(glide.enlarge(jnp.asarray(image), high))
  np.testing.assert_allclose(ours, from_torch(expected), atol=1e-6)
  # The rounding is felt.
  assert np.abs(glide.enlarge(jnp.asarray(image) + 0.004, high) - ours).max() > 0.003


# --- Loops.


def give(name, **fields):
  """A network with another config of its stage."""
  stage, _, params = load(name)
  return dataclasses.replace(stage, **fields), params


def draws(plan, key_b, shape):
  """What our loop draws, one array a step."""
  rows = [type(plan)(*row) for row in zip(*plan, strict=True)]
  return [to_torch(samplers.step_noise(key_b, row, shape)) for row in rows]


def make_known(size, seed):
  known = np.random.default_rng(seed).uniform(-1, 1, (len(LENGTHS), size, size, 3)).astype('f')
  mask = np.zeros((len(LENGTHS), size, size, 1), bool)
  mask[:, : size // 2, : size // 4] = True
  return known, mask


def paste(known, mask):
  known, mask = to_torch(known).double(), to_torch(mask).double()
  return lambda x_0: x_0 * (1 - mask) + known * mask


def channels_of(known, mask):
  mask = to_torch(mask).float()
  return [to_torch(known) * mask, mask]


@pytest.mark.parametrize('name', ['base', 'base_inpaint'])
def test_base_draws_what_the_formulas_do(name):
  size, scale, num_steps = LOW[0], 3.0, 20
  stage, params = give(name, image_size=size)
  sampling = dataclasses.replace(stage.sampling, num_steps=num_steps)
  plan = common.make_plan(stage.diffusion, sampling)
  key_b = jax.random.split(jax.random.key(0), len(LENGTHS))
  known, mask = map(jnp.asarray, make_known(size, 1)) if 'inpaint' in name else (None, None)
  ours, _ = glide.sample_base(
    stage,
    params,
    make_text(),
    empty_text(),
    key_b,
    plan,
    common.make_sampler(sampling.sampler, sampling.variance),
    jnp.float32(scale),
    known=known,
    mask=mask,
  )
  twin, given = make_twin(name), [] if known is None else channels_of(known, mask)

  def evaluate(x, t):
    seen, t = torch.cat([x, *given], dim=1).double(), torch.full((len(LENGTHS),), t)
    cond, uncond = (twin(seen, t, *of_torch(text)) for text in (make_text(), empty_text()))
    eps = uncond[:, :3] + scale * (cond[:, :3] - uncond[:, :3])
    return torch.cat([eps, cond[:, 3:]], dim=1)

  start = to_torch(samplers.start_noise(key_b, (size, size, 3)))
  expected = glide_twin.sample(
    evaluate,
    glide_twin.cosine_betas(),
    np.round(np.linspace(0, 999, num_steps)).astype(int),
    start,
    draws(plan, key_b, (size, size, 3)),
    is_ddim=False,
    edit_x_0=(lambda x_0: x_0) if known is None else paste(known, mask),
  )
  assert twins.deviation(ours, from_torch(expected)) < LOOP_TOLERANCE
  if known is not None:
    np.testing.assert_allclose(ours, np.where(mask, known, ours), atol=1e-6)


@pytest.mark.parametrize('name', ['upsample', 'upsample_inpaint'])
def test_upsampler_draws_what_the_formulas_do(name):
  size = HIGH[0]
  stage, params = give(name, image_size=size, low_size=LOW[0])
  sampling = stage.sampling
  plan = common.make_plan(stage.diffusion, sampling)
  key_b = jax.random.split(jax.random.key(0), len(LENGTHS))
  low, _ = make_known(LOW[0], 2)
  known, mask = map(jnp.asarray, make_known(size, 1)) if 'inpaint' in name else (None, None)
  sampler = common.make_sampler(sampling.sampler, sampling.variance)

  @jax.jit
  def draw(params, x_start):
    given = (jnp.asarray(low), key_b, plan, sampler, x_start, False, jnp.float32, known, mask)
    return glide.sample_upsampler(stage, params, make_text(), *given)[0]

  levels = ((to_torch(low) + 1) * 127.5).round() / 127.5 - 1
  large = torch.nn.functional.interpolate(levels, (size, size), mode='bilinear')
  given = [large] if known is None else [*channels_of(known, mask), large]
  twin = make_twin(name)

  def evaluate(x, t):
    seen = torch.cat([x, *given], dim=1).double()
    return twin(seen, torch.full((len(LENGTHS),), t), *of_torch(make_text()))

  start = samplers.start_noise(key_b, (size, size, 3))
  expected = glide_twin.sample(
    evaluate,
    glide_twin.linear_betas(),
    np.array(glide_twin.FAST27),
    0.997 * to_torch(start),
    draws(plan, key_b, (size, size, 3)),
    is_ddim=known is None,
    edit_x_0=(lambda x_0: x_0) if known is None else paste(known, mask),
  )
  assert twins.deviation(draw(params, start), from_torch(expected)) < LOOP_TOLERANCE
  # The temperature is felt.
  assert twins.deviation(draw(params, start / 0.997), from_torch(expected)) > 10 * LOOP_TOLERANCE
