"""The whole system: what it composes, what a seed means, and what compiles when."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from tiny_model import CONFIG, TEXTS, levels_apart, load_tiny, make_params, without

import unclip_jax
from unclip_jax import Sampling, StartNoise, UnclipError
from unclip_jax.diffusion import samplers, schedule
from unclip_jax.stages import clip, common, decoder, diffusion_prior, upsampler
from unclip_jax.systems import settings

ROOT = Path(__file__).parent.parent
APPLE, ROCKET, CATS = TEXTS


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return load_tiny(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def four(model):
  """Two images of each of two captions, the batch that most tests use."""
  return model.sample([APPLE, ROCKET], seed=7, num_images=2)


def test_images_have_their_shape_and_are_not_flat(model, four):
  assert four.images.shape == (4, 32, 32, 3)
  assert four.images.dtype == np.uint8
  inside = (four.images > 0) & (four.images < 255)
  assert inside.mean() > 0.5, 'tests need pixels that are not at the ends of their range'
  assert four.prompts == (APPLE, APPLE, ROCKET, ROCKET)
  assert four.indices.tolist() == [0, 1, 0, 1]
  assert four.z_t.shape == four.z_i.shape == (4, 16)
  assert [x.shape for x in four.stage_images] == [(4, 16, 16, 3), (4, 32, 32, 3)]
  np.testing.assert_allclose(np.linalg.norm(four.z_i, axis=1), 1, atol=1e-5)
  assert four.trajectories is None


def test_generate_gives_the_images_of_sample_bit_for_bit(model, four):
  images = model.generate([APPLE, ROCKET], seed=7, num_images=2)
  np.testing.assert_array_equal(images, four.images)


def test_seeds_captions_and_indices_give_other_images_and_captions_share_noise(model, four):
  other = model.sample([APPLE, CATS], seed=8, num_images=2)
  images = [*four.images, *other.images]
  for i, image in enumerate(images):
    for another in images[:i]:
      assert levels_apart(image, another) > 20
  np.testing.assert_array_equal(four.start_noise.decoder[:2], four.start_noise.decoder[2:])
  assert np.abs(four.start_noise.decoder[0] - four.start_noise.decoder[1]).max() > 1


def test_an_image_is_the_same_on_its_own_and_in_any_batch(model):
  settings = {'num_candidates': 1, 'seed': 7}
  together = model.sample([APPLE, ROCKET], num_images=3, batch_size=4, **settings).images
  alone = model.sample(ROCKET, first_image=2, **settings).images
  assert alone.shape[0] == 1
  assert levels_apart(alone[0], together[5]) <= 1
  in_ones = model.sample([ROCKET, APPLE], num_images=2, batch_size=1, **settings).images
  for i, row in enumerate([3, 4, 0, 1]):
    assert levels_apart(in_ones[i], together[row]) <= 1


def test_the_stages_by_hand_give_the_same(model, four):
  """Composed step by step, on parameters that no file has seen, for one image."""
  params, row = make_params(), 3
  key = jax.random.fold_in(jax.random.key(7), 1)

  @jax.jit
  def encode(tokens):
    return clip.encode_text(CONFIG.clip, params['clip'], *tokens)

  def features(text):
    return encode(tuple(model.tokenizer.encode([text])))

  text, null = features(ROCKET), features('')
  network, statistics = params['prior']['network'], params['prior']['statistics']

  @jax.jit
  def candidate(key):
    return diffusion_prior.sample(
      CONFIG.prior,
      network,
      diffusion_prior.Statistics(**jax.tree.map(jnp.asarray, statistics)),
      text,
      null,
      key[None],
      common.make_plan(CONFIG.prior.diffusion, CONFIG.prior.sampling),
      samplers.ddpm('fixed_small'),
    )[0]

  candidates = [candidate(jax.random.fold_in(jax.random.fold_in(key, 0), i)) for i in range(2)]
  scores = [float((z_i * text.z_t).sum()) for z_i in candidates]
  z_i = candidates[int(np.argmax(scores))]
  assert abs(scores[0] - scores[1]) > 1e-4
  np.testing.assert_allclose(four.z_i[row : row + 1], z_i, atol=1e-5)

  @jax.jit
  def paint(z_i):
    stage, up = CONFIG.decoder, CONFIG.upsamplers[0]
    small, _ = decoder.sample(
      stage,
      params['decoder'],
      text,
      null,
      z_i,
      jax.random.fold_in(key, 1)[None],
      common.make_plan(stage.diffusion, stage.sampling),
      samplers.ddpm('learned'),
      jnp.float32(2.0),
    )
    large, _ = upsampler.sample(
      up,
      params['upsampler_0'],
      small,
      jax.random.fold_in(key, 2)[None],
      common.make_plan(up.diffusion, up.sampling),
      samplers.ddim(0.0),
    )
    return small, large

  small, image = paint(z_i)
  np.testing.assert_allclose(four.stage_images[0][row : row + 1], small, atol=1e-4)
  np.testing.assert_allclose(four.stage_images[1][row : row + 1], image, atol=1e-4)
  pixels = np.round((np.clip(np.asarray(image, np.float64), -1, 1) + 1) * 127.5)
  assert levels_apart(four.images[row], pixels[0]) <= 1


def test_what_a_sample_came_from_brings_it_back_without_prior_or_seed(model, four):
  again = without(model, 'prior').sample(
    [APPLE, ROCKET],
    seed=99,
    num_images=2,
    z_i=four.z_i,
    start_noise=four.start_noise,
    decoder=Sampling(sampler='ddim'),
  )
  once_more = model.sample(
    [APPLE, ROCKET],
    seed=7,
    num_images=2,
    decoder=Sampling(sampler='ddim'),
  )
  np.testing.assert_allclose(again.stage_images[1], once_more.stage_images[1], atol=1e-4)
  np.testing.assert_array_equal(again.z_i, four.z_i)
  assert again.start_noise.prior is None


def test_one_given_row_serves_all_and_z_t_steers_the_prior(model, four):
  z_t = -four.z_t[:1]
  turned = model.sample([APPLE, ROCKET], seed=7, num_images=2, z_t=z_t)
  np.testing.assert_array_equal(turned.z_t, np.repeat(z_t, 4, axis=0))
  assert np.abs(turned.z_i - four.z_i).max() > 0.01
  noise = StartNoise(decoder=four.start_noise.decoder[1:2])
  fixed = model.sample([APPLE, ROCKET], seed=7, num_images=2, start_noise=noise)
  np.testing.assert_array_equal(fixed.start_noise.decoder[0], four.start_noise.decoder[1])
  np.testing.assert_allclose(fixed.stage_images[0][1], four.stage_images[0][1], atol=1e-4)
  assert np.abs(fixed.stage_images[0][0] - four.stage_images[0][0]).max() > 0.1


def test_more_candidates_never_bring_z_i_further_from_the_caption(model, four):
  first = model.sample([APPLE, ROCKET], seed=7, num_images=2, num_candidates=1, size=16)
  near, far = (four.z_i * four.z_t).sum(axis=1), (first.z_i * first.z_t).sum(axis=1)
  assert (near >= far - 1e-5).all()
  assert (near > far + 1e-4).any()
  np.testing.assert_allclose(four.start_noise.prior[:, :1], first.start_noise.prior, atol=0)


def test_a_smaller_size_stops_earlier(model, four):
  small = model.sample([APPLE, ROCKET], seed=7, num_images=2, size=16)
  assert small.images.shape == (4, 16, 16, 3)
  assert len(small.stage_images) == len(small.start_noise.upsamplers) + 1 == 1
  np.testing.assert_array_equal(small.stage_images[0], four.stage_images[0])


def test_trajectories_end_at_the_sample(model, four):
  steps = Sampling(num_steps=2)
  got = model.sample(
    [APPLE, ROCKET], 7, 3, size=16, decoder=steps, batch_size=4, with_trajectories=True
  )
  assert got.trajectories.prior.x_s.shape == (3, 6, 2, 16)
  assert got.trajectories.decoder.x_s.shape == (2, 6, 16, 16, 3)
  np.testing.assert_array_equal(got.trajectories.decoder.x_s[-1], got.stage_images[0])
  assert got.trajectories.upsamplers == ()


def test_negative_prompts_lead_elsewhere_and_the_empty_one_is_none(model, four):
  settings = {'seed': 7, 'num_images': 2}
  none = model.sample([APPLE, ROCKET], negative_prompt='', **settings)
  np.testing.assert_array_equal(none.images, four.images)
  away = model.sample([APPLE, ROCKET], negative_prompt=CATS, **settings)
  np.testing.assert_array_equal(away.z_i, four.z_i)
  assert np.abs(away.stage_images[0] - four.stage_images[0]).max() > 1e-3


def test_batches_are_reported_and_handed_over_as_they_are_complete(model):
  events, batches = [], []
  samples = model.sample(
    [APPLE, CATS], 7, 3, size=16, batch_size=4, progress=events.append, on_batch=batches.append
  )
  assert [len(batch.images) for batch in batches] == [4, 2]
  np.testing.assert_array_equal(np.concatenate([b.images for b in batches]), samples.images)
  assert {event.num_batches for event in events} == {2}
  for batch in (0, 1):
    for stage in ('clip', 'prior', 'decoder'):
      statuses = [e.status for e in events if (e.stage, e.batch) == (stage, batch)]
      assert statuses == ['preparing', 'sampling', 'done']
  painted = [event for event in events if event.images is not None]
  assert [(event.stage, event.status) for event in painted] == [('decoder', 'done')] * 2
  np.testing.assert_array_equal(
    np.concatenate([event.images for event in painted]), samples.stage_images[0]
  )


def test_embeddings_of_texts_and_images(model, four):
  z_t = model.encode_text([APPLE, APPLE, ROCKET, ''])
  np.testing.assert_allclose(z_t[:3], four.z_t[:3], atol=1e-6)
  assert np.abs(z_t[2] - z_t[3]).max() > 0.01
  z_i = model.encode_image(four.images)
  np.testing.assert_allclose(np.linalg.norm(z_i, axis=1), 1, atol=1e-5)
  small = (four.images / 127.5 - 1).reshape(4, 16, 2, 16, 2, 3).mean(axis=(2, 4), dtype=np.float32)
  by_hand = jax.jit(lambda x: clip.encode_image(CONFIG.clip, make_params()['clip'], x))(small)
  np.testing.assert_allclose(model.encode_image(small), by_hand, atol=1e-5)
  assert (np.sum(np.asarray(z_i) * by_hand, axis=1) > 0.95).all()


def test_bfloat16_stays_near_float32(tmp_path, four):
  model = load_tiny(tmp_path, dtype='bfloat16')
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(model.params['decoder'])}
  assert dtypes == {'bfloat16'}
  assert model.params['prior']['statistics']['std'].dtype == np.float32
  z_t = np.asarray(model.encode_text(TEXTS))
  exact = np.asarray(load_tiny(tmp_path).encode_text(TEXTS))
  assert ((z_t * exact).sum(axis=1) > 0.999).all()
  assert z_t.dtype == np.float32


def test_a_nan_on_the_way_names_its_stage(model):
  network = dict(model.params['decoder'], null_z_i=np.full(16, np.nan, np.float32))
  broken = dataclasses.replace(model, params={**model.params, 'decoder': network})
  with pytest.raises(UnclipError, match='the decoder made a NaN'):
    broken.generate([APPLE, ROCKET], 7, 2, size=16)


def test_a_model_of_the_first_version_opens():
  folder = Path(__file__).parent / 'golden' / 'model_v1'
  model = unclip_jax.load(folder)
  assert set(model.params) == {'clip', 'prior', 'decoder', 'upsampler_0'}
  written = json.loads((folder / 'unclip.json').read_text())['config']
  assert model.config.decoder.unet.channels == written['decoder']['unet']['channels'] == 8
  assert model.config.prior.sampling.num_steps == written['prior']['sampling']['num_steps']
  with safe_open(folder / 'prior.safetensors', framework='numpy') as file:
    query = file.get_tensor('network.query')
  np.testing.assert_array_equal(model.params['prior']['network']['query'], query)
  assert model.encode_text('apple').shape == (1, 4)


@pytest.mark.parametrize('call', ['sample', 'generate', 'package', 'encode_text'])
def test_a_long_prompt_is_cut_and_the_warning_shows_what_went_where(model, monkeypatch, call):
  text = APPLE + ' and a very long story about everything else'
  monkeypatch.setattr('unclip_jax.systems.unclip._default', lambda: model)
  calls = {
    'sample': lambda prompts: model.sample(prompts, 7, 2).images,
    'generate': lambda prompts: model.generate(prompts, 7, 2),
    'package': lambda prompts: unclip_jax.generate(prompts, 7, 2),
    'encode_text': lambda prompts: model.encode_text(prompts * 2),
  }
  with pytest.warns(UserWarning, match='cut off.*everything else') as caught:
    made = calls[call]([text, ROCKET])
  assert Path(caught[0].filename) == Path(__file__)
  assert len(made) == 4


def test_another_number_of_steps_than_27_is_strided_and_says_so():
  stage = unclip_jax.preset('emoji').upsamplers[0]
  assert stage.sampling.spacing == 'fast27'
  for asked, spacing, timesteps in (
    (Sampling(), 'fast27', schedule.fast27_timesteps(1000)),
    (Sampling(num_steps=27), 'fast27', schedule.fast27_timesteps(1000)),
    (Sampling(num_steps=10), 'strided', schedule.strided_timesteps(1000, 10)),
    (Sampling(num_steps=9, spacing='karlo'), 'karlo', schedule.karlo_timesteps(1000, 9)),
  ):
    resolved = settings.resolve('upsampler', stage.diffusion, stage.sampling, asked)
    np.testing.assert_array_equal(resolved.plan.t, timesteps)
    assert settings.describe(stage.sampling, asked)['spacing'] == spacing
  with pytest.raises(UnclipError, match='upsampler: fast27 has 27 steps, not 10'):
    asked = Sampling(num_steps=10, spacing='fast27')
    settings.resolve('upsampler', stage.diffusion, stage.sampling, asked)


def test_importing_is_light_and_names_what_is_public():
  script = textwrap.dedent("""
    import sys
    import unclip_jax
    assert 'jax' not in sys.modules
    assert callable(unclip_jax.stages.decoder.sample)
    assert callable(unclip_jax.diffusion.samplers.sample_loop)
    assert unclip_jax.nn.unet and unclip_jax.data.tokenizer and unclip_jax.weights.folder
    for name in dir(unclip_jax):
      getattr(unclip_jax, name)
    assert len(sys.modules) < 1100, len(sys.modules)  # 1,030 by jax 0.10.2, most of them its own
    heavy = {'torch', 'tensorflow', 'transformers', 'orbax', 'tensorflow_datasets', 'optax'}
    assert not heavy & set(sys.modules), heavy & set(sys.modules)
  """)
  env = os.environ | {'PYTHONPATH': str(ROOT)}
  done = subprocess.run([sys.executable, '-c', script], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  with pytest.raises(AttributeError, match='no attribute'):
    unclip_jax.nothing  # noqa: B018
  for package in (unclip_jax.data, unclip_jax.weights):
    with pytest.raises(AttributeError, match='no attribute'):
      package.nothing  # noqa: B018
    for name in package.__all__:
      assert getattr(package, name).__name__ == f'{package.__name__}.{name}'
