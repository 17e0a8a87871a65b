"""Activations that are computed again: the gradients are the same, and less is kept for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_stages import CONFIG, STATISTICS, make_text, normal, random_params

from unclip_jax.config_json import override
from unclip_jax.configs import ResNetConfig
from unclip_jax.stages import clip, decoder, diffusion_prior, upsampler

# Blocks enough for what they keep to be most of it.
DEEP = override(CONFIG, ['clip.text.depth=4', 'clip.vision.depth=4', 'prior.depth=4'])
SHALLOW = override(CONFIG, ['prior.depth=1', 'upsamplers.0.unet.multipliers=[1]'])
RESNET = dataclasses.replace(DEEP.clip, vision=ResNetConfig(16, 8, (2, 2), 2))
BATCH = 16


def clip_loss(config, params, key, remat):
  text = make_text(BATCH)
  image = jnp.tanh(normal(BATCH, 16, 16, 3))
  return clip.loss(config, params, image, text.ids, text.mask, remat=remat)


def prior_loss(config, params, key, remat):
  given = (STATISTICS, normal(BATCH, 16) / 4, make_text(BATCH), make_text(1, seed=9), key)
  return diffusion_prior.loss(config, params, *given, remat=remat)


def decoder_loss(config, params, key, remat):
  image, z_i = jnp.tanh(normal(BATCH, 16, 16, 3)), normal(BATCH, 16)
  given = (image, z_i, make_text(BATCH), make_text(1, seed=9), key)
  return decoder.loss(config, params, *given, remat=remat)


def upsampler_loss(config, params, key, remat):
  image = jnp.tanh(normal(BATCH, 16, 16, 3))
  low = image.reshape(BATCH, 8, 2, 8, 2, 3).mean(axis=(2, 4))
  return upsampler.loss(config, params, image, low, key, remat=remat)


CASES = {
  'clip': (clip, DEEP.clip, clip_loss),
  'resnet': (clip, RESNET, clip_loss),
  'prior': (diffusion_prior, DEEP.prior, prior_loss),
  'decoder': (decoder, DEEP.decoder, decoder_loss),
  'upsampler': (upsampler, DEEP.upsamplers[0], upsampler_loss),
}


@pytest.mark.parametrize('case', CASES)
def test_less_is_kept_for_the_gradients(case):
  """What goes from the loss to its gradients, and products that are made twice.

  Not of compiled programs: XLA for CPUs joins what is computed twice.
  """
  stage, config, loss_fn = CASES[case]
  params, key = random_params(stage, config), jax.random.key(1)

  def look(remat):
    fn = functools.partial(loss_fn, config, key=key, remat=remat)
    kept = jax.eval_shape(lambda p: jax.vjp(fn, p, has_aux=True)[1], params)
    text = jax.jit(jax.grad(fn, has_aux=True)).lower(params).as_text()
    products = text.count('stablehlo.dot_general') + text.count('stablehlo.convolution')
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)), products

  (kept, once), (less, twice) = look(False), look(True)
  own = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert less - own < 0.6 * (kept - own), (less - own, kept - own)
  assert 1.1 * once < twice < 2 * once, (once, twice)


@pytest.mark.parametrize('case', ['prior', 'upsampler'])
def test_gradients_are_the_same(case):
  stage, _, loss_fn = CASES[case]
  config = {'prior': SHALLOW.prior, 'upsampler': SHALLOW.upsamplers[0]}[case]
  given = random_params(stage, config), jax.random.key(1)

  def run(remat):
    fn = functools.partial(loss_fn, config, remat=remat)
    return jax.jit(jax.value_and_grad(fn, has_aux=True))(*given)

  ((loss, _), grads), ((same, _), again) = run(False), run(True)
  np.testing.assert_allclose(same, loss, rtol=1e-5)

  def check(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())))

  jax.tree.map(check, again, grads)
