"""The statistics of Analytic-DPM: measured, kept in the model's folder, and sampled with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_model import CONFIG, TEXTS, make_params, write_tiny_model
from tiny_stages import CONFIG as STAGES
from tiny_stages import keys, make_text, normal, random_params

from experiments.emoji import measure_noise
from unclip_jax import Sampling, load
from unclip_jax.cli import main
from unclip_jax.config_json import to_json
from unclip_jax.configs import DiffusionConfig
from unclip_jax.diffusion import gaussian, schedule
from unclip_jax.diffusion.samplers import sample_loop
from unclip_jax.stages import common, decoder, noise_power
from unclip_jax.systems.convert import convert
from unclip_jax.types import UnclipError
from unclip_jax.weights.folder import read_eps_power, write_eps_power, write_model

VAR = 0.3  # of Gaussian data, whose best denoiser is known
T = CONFIG.decoder.diffusion.num_steps
ANALYTIC = Sampling(num_steps=3, sampler='analytic', eta=1.0)


def best_denoiser(x_t, step):
  """E[x_0 | x_t] of data N(0, VAR)."""
  total = step.alpha_bar * VAR + step.noise_var
  x_0 = jnp.sqrt(step.alpha_bar) * VAR / total * x_t
  return gaussian.predict(x_0, x_t, step, 'x_0')


def measure_gaussian(num_timesteps, batches=3, denoise=best_denoiser):
  diffusion = DiffusionConfig()
  plan = noise_power.make_plan(diffusion, num_timesteps)

  def parts():
    for seed in range(batches):
      x_0, key_b = VAR**0.5 * normal(16, 1000, seed=seed), keys(16, seed)
      start = noise_power.visit_start(x_0, key_b, plan)
      visit = noise_power.visit(x_0)
      _, trajectory = sample_loop(denoise, visit, plan, start, key_b, True)
      yield noise_power.squares(x_0, start, plan, trajectory)

  return noise_power.eps_power(diffusion, plan, parts())


def test_the_best_denoiser_of_gaussian_data_finds_what_the_algebra_says():
  alpha_bar = schedule.cosine_schedule(1000).alpha_bar
  # eps_pred = sqrt(noise) x_t / (alpha_bar VAR + noise).
  true = (1 - alpha_bar) / (alpha_bar * VAR + 1 - alpha_bar)
  found = measure_gaussian(256)
  assert found.dtype == np.float32 and found.shape == (1000,)
  # Five standard errors of 48,000 numbers: without the control variate they would be ten times as
  # many where there is much noise, and with the whole of it where there is little.
  allowed = 10 * np.sqrt(true * (1 - true) / 48_000) * np.minimum(1, true**0.5) + 1e-3 * (1 - true)
  assert (np.abs(found - true) <= allowed + 1e-6).all()
  coarse = measure_gaussian(24, 1)
  np.testing.assert_allclose(coarse, true, atol=0.06)


def test_a_network_that_finds_more_noise_than_there_is_counts_as_one():
  def loud(x_t, step):
    return gaussian.predict(3.0 * x_t, x_t, step, 'eps')

  found = measure_gaussian(16, 1, loud)
  assert found[-1] == 1 and found.max() == 1 and found.min() >= 0


def test_a_stage_is_looked_at_on_the_paths_of_its_data():
  """Each x_t is its own x_0 with the noise of its row, and the network is given its conditions."""
  config, x_0, key_b = STAGES.decoder, normal(3, 16, 16, 3), keys(3)
  params, z_i, text = random_params(decoder, config), normal(3, config.embed_dim), make_text(3)
  plan = noise_power.make_plan(config.diffusion, 3)
  start = noise_power.visit_start(x_0, key_b, plan)

  @jax.jit
  def sample(z_i):
    how = (key_b, plan, noise_power.visit(x_0), None, start, True)
    return decoder.sample(config, params, text, text, z_i, *how)[1]

  @jax.jit
  def predict(x_t, t_b):
    given = (text, z_i, jnp.ones(3, bool), True)
    network = decoder.make_network(config)
    return network.apply({'params': params}, x_t, t_b, *given, method='predict')[0]

  trajectory = sample(z_i)
  np.testing.assert_array_equal(trajectory.x_s[-1], x_0)
  x_t = [start, *trajectory.x_s[:-1]]
  for i, t in enumerate(plan.t):
    row = jax.tree.map(lambda column, i=i: column[i], plan)
    eps = gaussian.eps_from_x_0(x_t[i], x_0, row)
    assert abs(float(eps.mean())) < 0.1 and abs(float(eps.std()) - 1) < 0.1
    output = predict(x_t[i], jnp.full(3, t))
    limit = common.guidance.clip_x_0(config.diffusion.clip_x_0)
    kind, learned = config.diffusion.prediction, config.diffusion.learned_variance
    seen = gaussian.predict(output, x_t[i], row, kind, learned, limit)
    wanted = [x.mean(axis=(1, 2, 3)) for x in (seen.eps**2 - eps**2, eps**2)]
    found = noise_power.squares(x_0, start, plan, trajectory)[:, i]
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4)
  assert np.abs(sample(-z_i).x_0 - trajectory.x_0).max() > 1e-3


def test_nothing_to_measure_on_and_a_nan_are_errors():
  plan = noise_power.make_plan(DiffusionConfig(), 4)
  with pytest.raises(UnclipError, match='no images'):
    noise_power.eps_power(DiffusionConfig(), plan, [])
  with pytest.raises(UnclipError, match='NaN'):
    noise_power.eps_power(DiffusionConfig(), plan, [np.full((2, 4, 2), np.nan)])
  for n in (1, 1001):
    with pytest.raises(UnclipError, match=f'{n} '):
      noise_power.make_plan(DiffusionConfig(), n)


@pytest.fixture(scope='module')
def powers():
  draw = np.random.default_rng(0)
  return {name: draw.uniform(0.2, 0.9, T).astype('f') for name in ('prior', 'decoder')}


@pytest.fixture
def folder(tmp_path, powers):
  write_eps_power(write_tiny_model(tmp_path / 'model'), powers)
  return tmp_path / 'model'


def test_a_model_is_sampled_with_its_statistics_and_says_where_it_has_none(folder, powers):
  model = load(folder)
  assert {name: power.tolist() for name, power in model.eps_power.items()} == {
    name: power.tolist() for name, power in powers.items()
  }
  given = {'size': 16, 'z_i': np.ones((1, CONFIG.prior.embed_dim), 'f')}
  drawn = model.sample(TEXTS[:1], decoder=ANALYTIC, **given)
  # All that is unknown is added as noise: other statistics are another picture.
  none = {name: np.ones_like(power) for name, power in powers.items()}
  sure = dataclasses.replace(model, eps_power=none)
  certain = sure.sample(TEXTS[:1], decoder=ANALYTIC, **given)
  plain = Sampling(num_steps=3, sampler='ddim', eta=1.0)
  ddim = sure.sample(TEXTS[:1], decoder=plain, **given)
  np.testing.assert_allclose(certain.stage_images[0], ddim.stage_images[0], atol=1e-5)
  assert np.abs(drawn.stage_images[0] - ddim.stage_images[0]).max() > 0.01
  with pytest.raises(UnclipError, match='upsampler 0: analytic needs statistics'):
    model.sample(TEXTS[:1], upsampler=ANALYTIC)
  write_tiny_model(folder.parent / 'without')
  with pytest.raises(UnclipError, match=r'decoder: analytic needs .*measure_noise'):
    load(folder.parent / 'without').sample(TEXTS[:1], decoder=ANALYTIC)


@pytest.mark.parametrize('to', ['unclip', 'orbax'])
def test_converting_keeps_statistics_and_training_a_stage_again_drops_its_own(folder, powers, to):
  out = folder.parent / 'out'
  convert(folder, out, to)
  np.testing.assert_array_equal(load(out).eps_power['prior'], powers['prior'])
  tokenizer, config = out / 'tokenizer.json', to_json(CONFIG)
  trained = {'prior': make_params()['prior']}
  rest = ('clip', 'decoder', 'upsampler_0')
  ending = '.orbax' if to == 'orbax' else '.safetensors'
  write_model(out, config, trained, tokenizer, keep=rest, ending=ending)
  assert read_eps_power(out).keys() == {'decoder'}
  write_model(out, config, make_params(), tokenizer, ending=ending)
  assert not load(out).eps_power and not (out / 'eps_power.safetensors').exists()


def nan(power):
  power['decoder'][3] = np.nan


def too_large(power):
  power['decoder'][3] = 1.5


def too_short(power):
  power['decoder'] = power['decoder'][:-1]


def no_vector(power):
  power['decoder'] = power['decoder'][None]


def whole_numbers(power):
  power['decoder'] = power['decoder'].astype(np.int32)


def unknown(power):
  power['upsampler_7'] = power.pop('decoder')


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (nan, 'decoder holds a NaN'),
    (too_large, 'decoder are not within 0..1'),
    (too_short, f'decoder are of {T - 1} timesteps, and its schedule has {T}'),
    (no_vector, 'decoder has the shape .* wanted is a vector'),
    (whole_numbers, 'decoder is int32'),
    (unknown, 'upsampler_7, which samples nothing'),
  ],
)
def test_damaged_statistics_are_one_line_that_names_the_file(folder, damage, message):
  file = folder / 'eps_power.safetensors'
  power = {name: array.copy() for name, array in load_file(file).items()}
  damage(power)
  save_file(power, file)
  with pytest.raises(UnclipError, match=f'eps_power.safetensors.*{message}') as error:
    load(folder)
  assert '\n' not in str(error.value)


def test_statistics_that_are_cut_short_are_an_error(folder):
  file = folder / 'eps_power.safetensors'
  file.write_bytes(file.read_bytes()[:-7])
  with pytest.raises(UnclipError, match=r'eps_power\.safetensors is cut short'):
    load(folder)


def test_info_says_for_which_stages_there_are_statistics(folder, capsys):
  with pytest.raises(SystemExit) as stop:
    main(['info', '--model', str(folder)])
  assert not stop.value.code
  assert 'analytic  for decoder, prior' in capsys.readouterr().out


OPTIONS = '{"styles": ["flat"], "groups": ["food-drink"], "labels": [], "jitter": 0.0}'
JOB = ['--images=5', '--batch-size=2', '--timesteps=4']


def test_the_job_measures_stages_and_keeps_what_it_does_not_measure(tmp_path, capsys):
  folder = write_tiny_model(tmp_path / 'model')
  (folder / 'options.json').write_text(OPTIONS)
  measure_noise.main([f'--run={folder}', '--stages', 'decoder', 'upsampler_0', *JOB])
  first = load(folder).eps_power
  assert first.keys() == {'decoder', 'upsampler_0'}
  assert all(power.max() > power.min() for power in first.values())
  measure_noise.main([f'--run={folder}', '--stages', 'prior', *JOB])
  second = load(folder).eps_power
  assert second.keys() == {'prior', 'decoder', 'upsampler_0'}
  assert all(np.array_equal(first[name], second[name]) for name in first)
  assert 'from x_0 to noise' in capsys.readouterr().out
  for wrong, message in (
    (['--stages', 'clip'], '--stages clip: the model has prior, decoder'),
    (['--images=0'], '--images 0: take 1'),
    (['--timesteps=1'], '1 timesteps are too few'),
  ):
    with pytest.raises(UnclipError, match=message):
      measure_noise.main([f'--run={folder}', *JOB, *wrong])
