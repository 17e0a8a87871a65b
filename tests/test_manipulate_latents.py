"""Manipulations by decoders of latents: the latents of a picture are held, not its pixels.

The autoencoders have random weights: what one makes of a picture is another picture, which the
manipulations are compared with.
"""

import dataclasses

import numpy as np
import pytest
from made_pictures import pixels
from tiny_decoders import KANDINSKY, STABLE
from tiny_model import TEXTS, levels_apart, make_model

from unclip_jax import Unclip, manipulate
from unclip_jax.config_json import override
from unclip_jax.manipulate import Drawing
from unclip_jax.manipulate.latents import to_x_0
from unclip_jax.systems import programs

SIZE = 16  # of the pictures, of latents of 8
ONE, HALF = pixels(1, 20, 16), np.zeros((20, 16), bool)
HALF[:, 8:] = True
# Of latents the columns from 4 on, and one more as they know of their neighbours.
FIRST_PAINTED = 3
# Of so many that the inversion converges by either.
HOW = Drawing(num_steps=25, iterations=4, size=SIZE)
CONFIGS = {
  'kandinsky': KANDINSKY,
  'stable_unclip': override(STABLE, ['decoder.sampling.variance=fixed_small']),
}


@pytest.fixture(scope='module', params=CONFIGS)
def model(request):
  return make_model(CONFIGS[request.param])


@pytest.fixture(scope='module')
def known(model):
  """Of the picture its latents, and what the autoencoder makes of them in [-1, 1]."""
  _, x_0 = to_x_0(model, [ONE])
  config, params = model.config.autoencoder, model.params['autoencoder']
  again = programs.decode_latents(params, x_0, config=config, dtype=model.dtype, tile=None)
  return x_0, np.asarray(again)


@pytest.fixture(scope='module')
def latents(model):
  return manipulate.encode(model, [ONE], HOW)


def test_the_latents_of_a_picture_come_back(model, latents, known):
  x_0, again = known
  assert latents.x_T.shape == (1, 8, 8, 4)
  drawn = manipulate.decode(model, latents.z_i, latents.x_T, how=HOW)
  # Off by one of 1000 timesteps, the inversion is off by more than the deviation.
  assert np.abs(drawn.latents - x_0).max() < 0.05 * x_0.std()
  assert levels_apart(drawn.images, programs.to_uint8(again)) <= 5
  # Most of what is measured is the autoencoder's.
  given = manipulate.thumbnail(ONE, SIZE)
  error = np.abs(drawn.images[0].astype(int) - given).mean()
  np.testing.assert_allclose(latents.error, error, atol=0.1)


def test_variations_without_noise_are_the_picture_and_others_are_not(model, latents, known):
  still = manipulate.variations(model, ONE, 1, 0.0, HOW)
  drawn = manipulate.decode(model, latents.z_i, latents.x_T, how=HOW)
  np.testing.assert_array_equal(still.images, drawn.images)
  how = dataclasses.replace(HOW, guidance_scale=1.0)
  noisy = manipulate.variations(model, ONE, 1, 0.5, how)
  assert levels_apart(noisy.images, still.images) > 30


def test_equal_latents_give_equal_pixels(model, latents):
  drawn = manipulate.decode(model, latents.z_i.repeat(2, axis=0), latents.x_T, how=HOW)
  np.testing.assert_array_equal(*drawn.images)
  row = manipulate.interpolate(model, ONE, ONE, 2, how=HOW)
  assert levels_apart(*row.images) <= 1  # inverted side by side they are rounded differently


def test_inpainting_keeps_the_latents_of_what_is_known(model, known, monkeypatch):
  x_0, again = known
  seen, sample = [], Unclip.sample

  def watched(self, *args, **options):
    seen.append(sample(self, *args, **options))
    return seen[-1]

  monkeypatch.setattr(Unclip, 'sample', watched)
  row = manipulate.inpaint(model, ONE, HALF, TEXTS[0], how=Drawing(num_steps=4, size=SIZE))
  (drawn,) = seen
  kept, painted = np.split(np.abs(drawn.latents - x_0)[0], [FIRST_PAINTED], axis=1)
  np.testing.assert_allclose(kept, 0, atol=1e-6)
  assert np.median(painted) > 0.3 * x_0.std()
  # Its pixels are nearer too, though by its norms the autoencoder sees all latents in each of them.
  off = np.abs(drawn.stage_images[0] - again)[0].mean(axis=(0, 2))
  assert off[:4].mean() < 0.75 * off[8:].mean()
  given = manipulate.thumbnail(ONE, SIZE)
  np.testing.assert_array_equal(row.images[0][:, :8], given[:, :8])
  final = np.asarray(programs.to_uint8(drawn.stage_images[0]))[0]
  np.testing.assert_array_equal(row.images[0][:, 8:], final[:, 8:])
