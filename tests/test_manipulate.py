"""Manipulations on models of random weights: what stays, what moves, what is refused."""

import dataclasses

import numpy as np
import pytest
from made_pictures import pixels
from tiny_decoders import GLIDE
from tiny_model import CONFIG, TEXTS, levels_apart, make_model, without, write_tiny_model

from unclip_jax import UnclipError, load, manipulate
from unclip_jax.config_json import override
from unclip_jax.manipulate import Drawing
from unclip_jax.presets import TINY_AR
from unclip_jax.train import pca as principal

APPLE, ROCKET, _ = TEXTS
# Of the decoder, programs of few operations.
AR = dataclasses.replace(CONFIG, prior=TINY_AR.prior)
SIZE = 16  # of the decoder
ONE, OTHER = pixels(1, 20, 16), pixels(2, 16, 24)
# Few steps, so that one iteration of the inversion does not do.
HOW = Drawing(num_steps=12, iterations=6, size=SIZE)
PAINT = Drawing(num_steps=4, size=SIZE)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return load(write_tiny_model(tmp_path_factory.mktemp('model')))


@pytest.fixture(scope='module')
def latents(model):
  return manipulate.encode(model, [ONE, OTHER], HOW)


def test_pictures_come_back_from_their_latents_as_nearly_as_is_said(model, latents):
  assert latents.z_i.shape == (2, 16)
  assert latents.x_T.shape == (2, SIZE, SIZE, 3)
  drawn = manipulate.decode(model, latents.z_i, latents.x_T, how=HOW).images
  given = np.stack([manipulate.thumbnail(image, SIZE) for image in (ONE, OTHER)])
  error = np.abs(drawn.astype(int) - given).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(latents.error, error, atol=0.05)
  assert (latents.error < 2).all()
  once = manipulate.encode(model, [ONE, OTHER], dataclasses.replace(HOW, iterations=1))
  assert (once.error > 2 * latents.error).all()


def test_a_picture_is_of_its_own_z_i(model, latents):
  """Else x_T alone would say what is seen."""
  swapped = manipulate.decode(model, latents.z_i[::-1], latents.x_T, how=HOW).images
  drawn = manipulate.decode(model, latents.z_i, latents.x_T, how=HOW).images
  assert levels_apart(swapped[0], drawn[0]) > 5


@pytest.mark.parametrize('noise', ['inverted', 'fixed'])
def test_equal_latents_give_equal_pixels_in_every_frame(model, noise):
  """Through both stages, the decoder's and the upsampler's, over two batches."""
  how = dataclasses.replace(HOW, size=None)
  row = manipulate.interpolate(model, ONE, ONE, 5, noise, how)
  assert row.images.shape == (5, 32, 32, 3)
  for image in row.images[1:]:
    np.testing.assert_array_equal(image, row.images[0])


def test_frames_share_the_noise_of_each_step(model, latents):
  """By the model's own ddpm, whose steps draw noise; another seed shows that they do."""
  z_i = latents.z_i[:1].repeat(3, axis=0)
  first, *others = manipulate.decode(model, z_i, how=PAINT).images
  for image in others:
    np.testing.assert_array_equal(image, first)
  another = manipulate.decode(model, z_i[:1], how=dataclasses.replace(PAINT, seed=1)).images
  assert levels_apart(another, first) > 20


def test_an_interpolation_goes_from_one_picture_to_the_other(model, latents):
  row = manipulate.interpolate(model, ONE, OTHER, 5, how=HOW)
  assert row.measured['theta'] == [0, 0.25, 0.5, 0.75, 1]
  drawn = manipulate.decode(model, latents.z_i, latents.x_T, how=HOW).images
  for frame, image in ((0, drawn[0]), (-1, drawn[1])):
    assert levels_apart(row.images[frame], image) <= 2
  np.testing.assert_allclose(np.linalg.norm(row.z_i, axis=1), 1, atol=1e-5)
  steps = np.arccos(np.clip((row.z_i[1:] * row.z_i[:-1]).sum(axis=1), -1, 1))
  np.testing.assert_allclose(steps, steps[0], atol=1e-3)


def test_variations_differ_the_more_the_more_noise_is_added(model, latents):
  rows = {eta: manipulate.variations(model, ONE, 3, eta, HOW) for eta in (0.0, 0.5, 1.0)}
  given = manipulate.thumbnail(ONE, SIZE).astype(int)
  off = {eta: np.abs(row.images - given).mean() for eta, row in rows.items()}
  assert off[0.0] < off[0.5] < off[1.0]
  assert levels_apart(rows[0.0].images[0], rows[0.0].images[2]) == 0
  assert levels_apart(rows[1.0].images[0], rows[1.0].images[2]) > 5
  np.testing.assert_allclose(rows[0.0].measured['error_levels'], latents.error[:1], atol=0.05)
  own = model.config.decoder.sampling.guidance_scale
  assert own != 1
  scales = [row.measured['guidance_scale'] for row in rows.values()]
  np.testing.assert_allclose(scales, [1, (1 + own) / 2, own])


def test_a_text_diff_turns_z_i_towards_the_direction(model, latents):
  row = manipulate.text_diff(model, ONE, APPLE, ROCKET, 1.0, 3, how=HOW)
  z_d = manipulate.text_direction(model, APPLE, ROCKET)
  np.testing.assert_allclose(row.z_i[0], latents.z_i[0], atol=1e-5)
  np.testing.assert_allclose(row.z_i[-1], z_d, atol=1e-5)
  assert levels_apart(row.images[0], manipulate.thumbnail(ONE, SIZE)) <= 20
  cosines = row.measured['cosine_of_direction']
  assert cosines[0] < cosines[1] < cosines[2] == 1
  z_t = np.asarray(model.encode_text([APPLE, ROCKET]))
  difference = z_t[1] - z_t[0]
  np.testing.assert_allclose(z_d, difference / np.linalg.norm(difference), atol=1e-5)
  directions = [
    manipulate.text_direction(model, APPLE, ROCKET, name) for name in ('dummy', 'empty')
  ]
  assert abs(directions[0] @ z_d) < 0.999 and abs(directions[0] @ directions[1]) < 0.999


def test_without_a_baseline_a_text_diff_turns_to_the_target_itself_and_needs_no_source(
  model, latents
):
  z_t = np.asarray(model.encode_text([ROCKET]))[0]
  unit = z_t / np.linalg.norm(z_t)
  for source in (None, APPLE):
    z_d = manipulate.text_direction(model, source, ROCKET, 'none')
    np.testing.assert_allclose(z_d, unit, atol=1e-6)
  row = manipulate.text_diff(model, ONE, None, ROCKET, 0.5, 2, 'none', HOW)
  # Half of the way on the great circle.
  half = latents.z_i[0] + unit
  np.testing.assert_allclose(row.z_i[1], half / np.linalg.norm(half), atol=1e-5)


def test_components_bring_an_embedding_back_the_more_of_them_the_nearer(model):
  batches = [np.stack([pixels(seed) for seed in range(start, start + 10)]) for start in (0, 10)]
  pca = manipulate.fit_pca(model, batches)
  row = manipulate.pca_reconstruct(model, [ONE, OTHER], [1, 8, 16], pca, PAINT)
  assert row.images.shape == (6, SIZE, SIZE, 3)
  cosine = np.array(row.measured['cosine']).reshape(2, 3)
  assert (np.diff(cosine, axis=1) >= 0).all() and (cosine[:, 0] < 1).all()
  np.testing.assert_allclose(row.z_i[2], np.asarray(model.encode_image(ONE[None]))[0], atol=1e-5)
  row = manipulate.pca_reconstruct(model, [ONE], pca=pca, how=PAINT)
  assert row.measured['dims'] == [5, 10, 16]
  with pytest.raises(UnclipError, match='embeddings are too few'):
    manipulate.fit_pca(model, batches[:1])
  with pytest.raises(UnclipError, match='number of components is 17: take at most 16'):
    manipulate.pca_reconstruct(model, [ONE], [17], pca)
  with pytest.raises(UnclipError, match='give those of fit_pca'):
    manipulate.pca_reconstruct(model, [ONE], [4])
  with pytest.raises(UnclipError, match='no number of components'):
    manipulate.pca_reconstruct(model, [ONE], [], pca)
  other = principal.Pca(9, np.zeros(8), np.eye(8), np.ones(8))
  with pytest.raises(UnclipError, match='8 dimensions do not go with embeddings of 16'):
    manipulate.pca_reconstruct(model, [ONE], [4], other)


def test_components_of_an_autoregressive_prior_are_taken():
  model = make_model(AR)
  quantiser = model.params['prior']['quantiser']
  most = len(quantiser['components'])
  with pytest.raises(UnclipError, match=f'take at most {most}'):
    manipulate.pca_reconstruct(model, [ONE], [most + 1])
  row = manipulate.pca_reconstruct(model, [ONE], [most], how=Drawing(2, size=SIZE))
  apart = np.asarray(model.encode_image(ONE[None]))[0] - quantiser['mean']
  kept = quantiser['mean'] + quantiser['components'].T @ (quantiser['components'] @ apart)
  np.testing.assert_allclose(row.z_i[0], kept / np.linalg.norm(kept), atol=1e-5)


HALF = np.zeros((20, 16), bool)
HALF[:, 8:] = True


def test_inpainting_keeps_what_is_known_to_the_pixel(model):
  row = manipulate.inpaint(model, ONE, HALF, ROCKET, 2, 2, 2, how=PAINT)
  given = manipulate.thumbnail(ONE, SIZE)
  np.testing.assert_array_equal(row.images[:, :, :8], given[None, :, :8].repeat(2, axis=0))
  assert levels_apart(row.images[0][:, 8:], given[:, 8:]) > 20
  assert levels_apart(*row.images) > 5
  assert row.measured == {'share_painted': 0.5, 'known_error_levels': 0.0}
  # The prior's z_i of the prompt; without one the picture's own.
  assert np.abs(row.z_i[0] - np.asarray(model.encode_image(ONE[None]))[0]).max() > 0.1
  own = manipulate.inpaint(model, ONE, HALF, n=2, jump=2, times=2, how=PAINT)
  np.testing.assert_allclose(own.z_i[0], np.asarray(model.encode_image(ONE[None]))[0], atol=1e-6)
  assert levels_apart(own.images, row.images) > 5


def test_what_is_known_is_seen_by_what_is_painted(model):
  dark = ONE // 4
  pair = [manipulate.inpaint(model, x, HALF, ROCKET, 2, 2, 2, how=PAINT) for x in (ONE, dark)]
  assert levels_apart(pair[0].images[:, :, 8:], pair[1].images[:, :, 8:]) > 5


def test_edits_paint_on_what_the_ones_before_made(model):
  top = np.zeros((20, 16), bool)
  top[:10] = True
  rows = manipulate.inpaint_in_turn(model, ONE, [(HALF, ROCKET), (top, APPLE)], PAINT)
  first, second = (row.images[0] for row in rows)
  np.testing.assert_array_equal(second[8:], first[8:])
  assert levels_apart(second[:8], first[:8]) > 5
  with pytest.raises(UnclipError, match='there is no edit'):
    manipulate.inpaint_in_turn(model, ONE, [])


def test_a_picture_is_extended_on_all_sides():
  square, is_anew = manipulate.extend(ONE, 0.25)
  assert square.shape == (30, 30, 3) and is_anew.shape == (30, 30)
  np.testing.assert_array_equal(square[5:25, 7:23], ONE)
  assert not is_anew[5:25, 7:23].any()
  assert is_anew.sum() == 900 - 320
  np.testing.assert_array_equal(square[0, 7:23], ONE[0])
  for margin in (0, 2.5, float('nan')):
    with pytest.raises(UnclipError, match='margin'):
      manipulate.extend(ONE, margin)


def test_the_more_a_picture_is_noised_the_less_is_left_of_it(model):
  how = dataclasses.replace(PAINT, num_steps=8)
  change = {}
  for strength in (0.2, 0.6, 1.0):
    row = manipulate.image_to_image(model, ONE, ROCKET, strength, 2, how=how)
    assert levels_apart(*row.images) > 0
    change[strength] = row.measured['mean_change_levels']
  assert row.measured['num_steps'] == 8
  assert change[0.2] < change[0.6] < change[1.0]
  with pytest.raises(UnclipError, match='leaves no step to take, of 1 in all'):
    manipulate.image_to_image(model, ONE, ROCKET, 0.2, how=dataclasses.replace(PAINT, num_steps=1))


@pytest.mark.parametrize('channels', [0, 4], ids=['by resampling', 'as it was trained'])
def test_glide_inpaints_and_knows_no_z_i(channels):
  config = override(GLIDE, [f'decoder.unet.condition_channels={channels}'])
  model = make_model(dataclasses.replace(config, upsamplers=()))
  how = Drawing(num_steps=2)
  row = manipulate.inpaint(model, ONE, HALF, ROCKET, jump=1, how=how)
  np.testing.assert_array_equal(row.images[0][:, :4], manipulate.thumbnail(ONE[2:18], 8)[:, :4])
  assert row.z_i is None
  with pytest.raises(UnclipError, match='no clip'):
    manipulate.reconstruct(model, [ONE], how)
  with pytest.raises(UnclipError, match='the prompt is empty'):
    manipulate.inpaint(model, ONE, HALF, how=how)
  if channels:
    with pytest.raises(UnclipError, match='times is without effect'):
      manipulate.inpaint(model, ONE, HALF, ROCKET, times=2, how=how)


def test_a_decoder_of_ours_that_knows_masks_is_given_them_or_resamples():
  model = make_model(override(CONFIG, ['decoder.inpaints=true']))
  given = manipulate.thumbnail(ONE, SIZE)
  own = manipulate.inpaint(model, ONE, HALF, ROCKET, 2, how=PAINT)
  np.testing.assert_array_equal(own.images[:, :, :8], given[None, :, :8].repeat(2, axis=0))
  dark = manipulate.inpaint(model, ONE // 4, HALF, ROCKET, 2, how=PAINT)
  assert levels_apart(dark.images[:, :, 8:], own.images[:, :, 8:]) > 1
  # Asked to resample, it is a decoder that knows no masks.
  resampled = manipulate.inpaint(model, ONE, HALF, ROCKET, 2, 2, 2, how=PAINT)
  params = {**model.params, 'decoder': {**model.params['decoder']}}
  del params['decoder']['conv_known']
  plain = dataclasses.replace(model, config=CONFIG, params=params)
  theirs = manipulate.inpaint(plain, ONE, HALF, ROCKET, 2, 2, 2, how=PAINT)
  np.testing.assert_array_equal(resampled.images, theirs.images)
  assert levels_apart(resampled.images, own.images) > 1


def test_slerp():
  one, other = np.array([3.0, 0.0]), np.array([0.0, 4.0])
  between = manipulate.slerp(one, other, [0, 0.5, 1])
  np.testing.assert_allclose(between, [[3, 0], [3 * 0.5**0.5, 4 * 0.5**0.5], [0, 4]], atol=1e-6)
  np.testing.assert_array_equal(manipulate.slerp(one, one, [0.3])[0], one)
  assert manipulate.slerp(np.ones((2, 3)), np.eye(2, 3), [0.5]).shape == (1, 2, 3)
  with pytest.raises(UnclipError, match='zeros'):
    manipulate.slerp(one, 0 * one, [0.5])
  with pytest.raises(UnclipError, match='opposite'):
    manipulate.slerp(one, -one, [0.5])


GREY, TOO_BRIGHT = np.zeros((4, 4), np.uint8), np.full((4, 4, 3), 200.0)


@pytest.mark.parametrize(
  ('call', 'match'),
  [
    (lambda m: manipulate.variations(m, ONE, eta=1.5), 'eta is 1.5: take 0 to 1'),
    (lambda m: manipulate.variations(m, ONE, eta='1'), "eta must be a number, not '1'"),
    (lambda m: manipulate.variations(m, ONE, 0), 'number of variations is 0'),
    (lambda m: manipulate.variations(m, GREY), r'image must be an array \[h, w, 3\]'),
    (lambda m: manipulate.variations(m, TOO_BRIGHT), 'image must be uint8, or float'),
    (lambda m: manipulate.variations(m, TOO_BRIGHT * np.nan), 'without a NaN'),
    (lambda m: manipulate.variations(m, np.zeros((0, 4, 3), np.uint8)), r'not \[0, 4, 3\]'),
    (lambda m: manipulate.variations(m, ONE, how=Drawing(size=17)), 'there is no size 17'),
    (lambda m: manipulate.variations(m, ONE, how=Drawing(iterations=0)), 'iterations is 0'),
    (lambda m: manipulate.variations(m, ONE, how=Drawing(num_steps=1001)), '1001 is too many'),
    (lambda m: manipulate.encode(m, []), 'there is no image'),
    (lambda m: manipulate.encode(m, [ONE, GREY]), 'image 2 must be an array'),
    (lambda m: manipulate.encode(without(m, 'clip'), [ONE]), 'no clip'),
    (lambda m: manipulate.interpolate(m, ONE, OTHER, 1), 'number of frames is 1: take 2'),
    (lambda m: manipulate.interpolate(m, ONE, OTHER, 10**9), 'is 1000000000: take at most 10000'),
    (lambda m: manipulate.interpolate(m, ONE, OTHER, noise='new'), "there is no noise 'new'"),
    (lambda m: manipulate.text_diff(m, ONE, APPLE, ROCKET, 0), 'theta is 0'),
    (lambda m: manipulate.text_diff(m, ONE, APPLE, ROCKET, -0.1), r'theta is -0.1: take 0 to 1'),
    (lambda m: manipulate.text_diff(m, ONE, APPLE, APPLE), 'the same to CLIP: there is no dir'),
    (lambda m: manipulate.text_diff(m, ONE, '', APPLE), 'the source caption is empty'),
    (lambda m: manipulate.text_diff(m, ONE, None, APPLE), 'the source caption must be text'),
    (lambda m: manipulate.text_direction(m, None, '', 'none'), 'the target caption is empty'),
    (lambda m: manipulate.text_diff(m, ONE, APPLE, ''), 'the target caption is empty'),
    (lambda m: manipulate.text_direction(m, '', APPLE, 'any'), "there is no baseline 'any'"),
    (lambda m: manipulate.inpaint(m, ONE, HALF.T, APPLE), 'they must be of one size'),
    (lambda m: manipulate.inpaint(m, ONE, HALF * 1.0, APPLE), 'mask must be of booleans'),
    (lambda m: manipulate.inpaint(m, ONE, ~HALF & HALF, APPLE), 'nothing to be painted'),
    (lambda m: manipulate.inpaint(m, ONE, HALF, APPLE, jump=0), 'jump is 0'),
    (lambda m: manipulate.inpaint(m, ONE, HALF, APPLE, 0), 'number of pictures is 0'),
    (lambda m: manipulate.inpaint(m, ONE, HALF, 5), 'the prompt must be text'),
    (lambda m: manipulate.image_to_image(m, ONE, APPLE, 0), 'strength is 0: take more'),
    (lambda m: manipulate.image_to_image(m, ONE, APPLE, 1.1), 'strength is 1.1: take more'),
  ],
)
def test_what_cannot_be_is_refused_in_a_line(model, call, match):
  with pytest.raises(UnclipError, match=match):
    call(model)


def test_a_picture_of_one_pixel_is_a_picture(model):
  row = manipulate.reconstruct(model, [pixels(3, 1, 1)], HOW)
  assert row.images.shape == (1, SIZE, SIZE, 3)
  assert np.isfinite(row.measured['error_levels']).all()
