"""`scheduler_config.json` of diffusers: opened, sampled, written again.

Whole runs are compared, with the same noise fed to both. As in `test_schedulers`, diffusers is
given its tables in float64: those of float32 lose three digits near x_0.
"""

import dataclasses
import functools
import json
import re

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from etils import epath

from unclip_jax.diffusion import guidance, samplers
from unclip_jax.presets import preset
from unclip_jax.stages import common
from unclip_jax.systems.checks import check_config
from unclip_jax.types import UnclipError
from unclip_jax.weights import diffusers_schedulers as schedulers

SHAPE = (2, 4, 5, 3)
# Largest difference at the end of a run over the standard deviation of what is there.
TOLERANCE = 5e-5
DDPM, DDIM = diffusers.DDPMScheduler, diffusers.DDIMScheduler
STABLE_DIFFUSION = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012}
COSINE = {'beta_schedule': 'squaredcos_cap_v2'}
CASES = {
  'ddpm': (DDPM, {}),
  "stable unclip's prior": (
    DDPM,
    {
      **COSINE,
      'variance_type': 'fixed_small_log',
      'prediction_type': 'sample',
      'clip_sample_range': 5.0,
    },
  ),
  'ddpm, large variance': (
    DDPM,
    {
      **STABLE_DIFFUSION,
      'variance_type': 'fixed_large',
      'prediction_type': 'v_prediction',
      'clip_sample': False,
      'timestep_spacing': 'linspace',
    },
  ),
  'ddpm, learned variance': (
    DDPM,
    {**COSINE, 'variance_type': 'learned_range', 'timestep_spacing': 'linspace'},
  ),
  'ddpm, offset': (DDPM, {'steps_offset': 1, 'clip_sample_range': 2.0}),
  'ddpm, trailing, threshold': (
    DDPM,
    {
      'timestep_spacing': 'trailing',
      'thresholding': True,
      'dynamic_thresholding_ratio': 0.8,
      'sample_max_value': 1.5,
    },
  ),
  # null is a threshold without a bound, not the default.
  'kandinsky, threshold without a bound': (
    DDPM,
    {
      'beta_start': 0.00085,
      'beta_end': 0.012,
      'variance_type': 'learned_range',
      'clip_sample_range': 2.0,
      'thresholding': True,
      'dynamic_thresholding_ratio': 0.9,
      'sample_max_value': None,
    },
  ),
  'ddim': (DDIM, {}),
  'stable diffusion': (
    DDIM,
    {
      **STABLE_DIFFUSION,
      'prediction_type': 'v_prediction',
      'clip_sample': False,
      'set_alpha_to_one': False,
      'steps_offset': 1,
    },
  ),
  'ddim, threshold of 1': (DDIM, {**COSINE, 'thresholding': True}),
  'ddim, trailing, threshold': (
    DDIM,
    {
      'prediction_type': 'sample',
      'timestep_spacing': 'trailing',
      'set_alpha_to_one': False,
      'thresholding': True,
      'dynamic_thresholding_ratio': 0.7,
      'sample_max_value': 1.3,
    },
  ),
  'ddim, clip of v': (DDIM, {'prediction_type': 'v_prediction', 'clip_sample_range': 0.5}),
  'ddim, 100 timesteps': (
    DDIM,
    {'num_train_timesteps': 100, 'beta_start': 5e-4, 'beta_end': 0.05, 'clip_sample_range': 0.8},
  ),
}
SOLVERS = {
  'PNDMScheduler': {**STABLE_DIFFUSION, 'steps_offset': 1},
  'DEISMultistepScheduler': {},
  'DPMSolverMultistepScheduler': {
    **STABLE_DIFFUSION,
    'timestep_spacing': 'leading',
    'use_karras_sigmas': True,
  },
  'DPMSolverSinglestepScheduler': COSINE,
  'EulerAncestralDiscreteScheduler': {'timestep_spacing': 'trailing'},
  'EulerDiscreteScheduler': {'prediction_type': 'v_prediction', 'use_karras_sigmas': True},
  'HeunDiscreteScheduler': {},
  'KDPM2AncestralDiscreteScheduler': {},
  'KDPM2DiscreteScheduler': {},
  'LMSDiscreteScheduler': STABLE_DIFFUSION,
  'UniPCMultistepScheduler': {'solver_order': 3},
}
ALL_CASES = pytest.mark.parametrize('case', CASES)


def make_scheduler(case):
  cls, options = CASES[case]
  return cls(**options)


def read(folder, scheduler):
  scheduler.save_config(folder)
  return schedulers.read_scheduler(epath.Path(folder), 20, 3.0)


def write_json(folder, values):
  (folder / 'scheduler_config.json').write_text(json.dumps(values))
  return epath.Path(folder)


def with_float64_tables(scheduler, alpha_bar):
  np.testing.assert_allclose(scheduler.alphas_cumprod, alpha_bar, rtol=1e-4)
  scheduler.alphas_cumprod = torch.from_numpy(alpha_bar.copy())
  if isinstance(scheduler, DDIM) and not scheduler.config.set_alpha_to_one:
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]


def network(x, t, num_channels, lib):
  """Some function of x [..., 4, 5, 3] and t, another one for each pixel; it overshoots [-1, 1]."""
  pattern = lib.linspace(-3, 3, SHAPE[1] * SHAPE[2] * SHAPE[3]).reshape(SHAPE[1:])[None]
  first = 0.9 * lib.sin(1.3 * x + 0.01 * t + pattern) + 0.4
  return first if num_channels == 1 else lib.concatenate([first, lib.cos(2 * x - t)], -1)


@jax.jit
def noise_of(key_b, plan):
  """The noise [n, b, ...] of all steps of a plan."""
  return jax.lax.map(lambda step: samplers.step_noise(key_b, step, SHAPE[1:]), plan)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run_ours(diffusion, sampling, eta, key_b, x_start):
  plan = common.make_plan(diffusion, sampling)
  channels = 2 if diffusion.learned_variance else 1

  def evaluate(x, t_b, _):
    return network(x, t_b[:, :, None, None], channels, jnp)

  times = jnp.asarray(plan.t, jnp.float32)[:, None]
  denoise_fn = common.make_denoise_fn(evaluate, None, times, diffusion, None)
  sampler = common.make_sampler(sampling.sampler, sampling.variance, eta)
  return samplers.sample_loop(denoise_fn, sampler, plan, x_start, key_b)


def run_theirs(scheduler, plan, x_start, channels, eta, key_b, monkeypatch):
  """The same; the noise of each step is that of the step of ours."""

  def to_torch(x):
    return torch.from_numpy(np.moveaxis(np.asarray(x, np.float64), -1, 1))

  x = to_torch(x_start)
  for t, noise in zip(scheduler.timesteps, noise_of(key_b, plan), strict=True):
    noise = to_torch(noise)
    monkeypatch.setattr(scheduling_ddpm, 'randn_tensor', lambda *a, noise=noise, **k: noise)
    output = network(x.movedim(1, -1), int(t), channels, torch).movedim(-1, 1)
    options = {'eta': eta, 'variance_noise': noise} if isinstance(scheduler, DDIM) else {}
    x = scheduler.step(output, int(t), x, **options).prev_sample
  return x.movedim(1, -1).numpy()


@ALL_CASES
@pytest.mark.parametrize('num_steps', [5, 20])
def test_whole_runs_are_those_of_diffusers(case, num_steps, tmp_path, monkeypatch):
  scheduler = make_scheduler(case)
  scheduler.save_config(tmp_path)
  diffusion, sampling = schedulers.read_scheduler(epath.Path(tmp_path), num_steps, 3.0)
  assert (sampling.num_steps, sampling.guidance_scale, sampling.eta) == (num_steps, 3.0, 0.0)
  with_float64_tables(scheduler, common.make_schedule(diffusion).alpha_bar)
  scheduler.set_timesteps(num_steps)
  plan = common.make_plan(diffusion, sampling)
  assert plan.t.tolist() == scheduler.timesteps.tolist()
  channels = 2 if diffusion.learned_variance else 1
  key_b = jax.random.split(jax.random.key(num_steps), SHAPE[0])
  x_start = np.random.default_rng(num_steps).normal(size=SHAPE).astype('f')
  for eta in (0.0, 0.6) if sampling.sampler == 'ddim' else (0.0,):
    x_end = run_ours(diffusion, sampling, eta, key_b, x_start)
    expected = run_theirs(scheduler, plan, x_start, channels, eta, key_b, monkeypatch)
    worst = np.abs(x_end - expected).max() / expected.std()
    print(f'{case}, {num_steps} steps, eta {eta}: {worst:.1e}')
    assert expected.std() > 0.1 and worst < TOLERANCE


@ALL_CASES
def test_what_is_written_is_what_was_read(case, tmp_path):
  scheduler = make_scheduler(case)
  diffusion, sampling = read(tmp_path, scheduler)
  written = schedulers.write_scheduler('decoder', diffusion, sampling)
  again = schedulers.read_scheduler(write_json(tmp_path, written), 20, 3.0)
  assert again == (diffusion, sampling)
  opened = type(scheduler).from_pretrained(tmp_path)
  theirs, ours = dict(scheduler.config), dict(opened.config)
  if theirs['thresholding']:  # clip_sample has no effect beside it; and from 1 to 1 it is a clip
    is_clip = theirs['sample_max_value'] == 1
    theirs |= {'clip_sample': is_clip, 'thresholding': not is_clip}
  if theirs.get('variance_type') == 'fixed_small_log':
    theirs['variance_type'] = 'fixed_small'
  if not theirs['clip_sample']:
    theirs['clip_sample_range'] = 1.0
  assert {k: v for k, v in ours.items() if k[0] != '_'} == pytest.approx(
    {k: v for k, v in theirs.items() if k[0] != '_'}
  )


@pytest.mark.parametrize('name', SOLVERS)
@pytest.mark.filterwarnings('ignore:__array')  # what diffusers does beside NumPy 2
def test_other_solvers_are_opened_as_ddim(name, tmp_path):
  scheduler = getattr(diffusers, name)(**SOLVERS[name])
  with pytest.warns(UserWarning, match=f'{name} is not here'):
    diffusion, sampling = read(tmp_path, scheduler)
  assert (sampling.sampler, sampling.eta) == ('ddim', 0.0)
  assert diffusion.clip_x_0 is None and diffusion.dynamic_threshold is None
  assert diffusion.prediction == ('v' if name == 'EulerDiscreteScheduler' else 'eps')
  alpha_bar = common.make_schedule(diffusion).alpha_bar
  np.testing.assert_allclose(scheduler.alphas_cumprod, alpha_bar, rtol=1e-4)
  first = common.make_plan(diffusion, sampling).t[0]
  spacing = scheduler.config.get('timestep_spacing', 'linspace')  # all but one tell
  assert first == (950 + scheduler.config.get('steps_offset', 0) if spacing == 'leading' else 999)
  assert sampling.to_x_0 == (name != 'PNDMScheduler')
  # As another program than diffusers may have written it: without what has its default.
  bare = {'_class_name': name, **SOLVERS[name]}
  with pytest.warns(UserWarning, match=name):
    again = schedulers.read_scheduler(write_json(tmp_path, bare), 20, 3.0)
  assert again == (diffusion, sampling)


def test_a_solver_keeps_its_threshold(tmp_path):
  scheduler = diffusers.UniPCMultistepScheduler(thresholding=True, sample_max_value=2.5)
  with pytest.warns(UserWarning, match='UniPC'):
    diffusion, _ = read(tmp_path, scheduler)
  assert (diffusion.dynamic_threshold, diffusion.threshold_max) == (99.5, 2.5)


def test_what_another_scheduler_left_in_a_file_says_nothing(tmp_path):
  expected = read(tmp_path, DDIM())
  leftovers = {'skip_prk_steps': True, 'variance_type': 'learned', 'solver_order': 2}
  values = {'_class_name': 'DDIMScheduler', **leftovers}
  assert schedulers.read_scheduler(write_json(tmp_path, values), 20, 3.0) == expected
  expected = read(tmp_path, DDPM())
  values = {'_class_name': 'DDPMScheduler', 'set_alpha_to_one': False, 'lower_order_final': True}
  assert schedulers.read_scheduler(write_json(tmp_path, values), 20, 3.0) == expected


@pytest.mark.parametrize(
  ('name', 'field', 'value'),
  [
    ('DDIMScheduler', 'trained_betas', [0.1, 0.2]),
    ('DDIMScheduler', 'rescale_betas_zero_snr', True),
    ('DDIMScheduler', 'beta_schedule', 'sigmoid'),
    ('DDIMScheduler', 'timestep_spacing', 'linspace'),
    ('DDIMScheduler', 'prediction_type', 'flow'),
    ('DDIMScheduler', 'steps_offset', 0.5),
    ('DDIMScheduler', 'what_comes_next', 3),
    ('DDPMScheduler', 'variance_type', 'learned'),
    ('DDPMScheduler', 'beta_start', 'small'),
    ('PNDMScheduler', 'trained_betas', [0.1, 0.2]),
    ('EulerDiscreteScheduler', 'rescale_betas_zero_snr', True),
    ('UniPCMultistepScheduler', 'use_flow_sigmas', True),
    ('UniPCMultistepScheduler', 'what_comes_next', 3),
    ('DPMSolverMultistepScheduler', 'what_comes_next', 3),
    ('FlowMatchEulerDiscreteScheduler', '_class_name', 'FlowMatchEulerDiscreteScheduler'),
  ],
)
@pytest.mark.filterwarnings('ignore:.*is not here')
def test_bad_fields_are_named(name, field, value, tmp_path):
  folder = write_json(tmp_path, {'_class_name': name, field: value})
  with pytest.raises(UnclipError, match=field) as caught:
    schedulers.read_scheduler(folder, 20, 3.0)
  assert '\n' not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
  ('case', 'part', 'changes', 'message'),
  [
    ('ddim', 0, {'keep_eps': False}, 'decoder.diffusion.keep_eps'),
    ('ddim', 0, {'learned_variance': True}, 'decoder.diffusion.learned_variance'),
    ('ddim', 0, {'schedule': 'laplace'}, 'decoder.diffusion.schedule'),
    ('ddim', 1, {'spacing': 'karlo'}, 'decoder.sampling.spacing'),
    ('ddim', 1, {'sampler': 'euler'}, 'decoder.sampling.sampler'),
    ('ddpm', 1, {'spacing': 'strided'}, 'decoder.sampling.spacing'),
    ('ddpm', 1, {'to_x_0': False}, 'decoder.sampling.to_x_0'),
  ],
)
def test_what_diffusers_does_not_have_is_not_written(case, part, changes, message, tmp_path):
  configs = list(read(tmp_path, make_scheduler(case)))
  configs[part] = dataclasses.replace(configs[part], **changes)
  with pytest.raises(UnclipError, match=re.escape(message)):
    schedulers.write_scheduler('decoder', *configs)


@pytest.mark.parametrize('fields', [{'threshold_max': 0.5}, {'dynamic_threshold': None}])
def test_a_threshold_has_to_be_one(fields, tmp_path):
  diffusion, _ = read(tmp_path, make_scheduler('ddim, trailing, threshold'))
  prior = dataclasses.replace(preset('tiny').prior, diffusion=diffusion)
  check_config(dataclasses.replace(preset('tiny'), prior=prior))
  bad = dataclasses.replace(prior, diffusion=dataclasses.replace(diffusion, **fields))
  with pytest.raises(UnclipError, match=r'prior\.diffusion\.threshold_max is'):
    check_config(dataclasses.replace(preset('tiny'), prior=bad))
  with pytest.raises(UnclipError, match='the most to divide by'):
    guidance.dynamic_threshold(99.0, 0.5)


@pytest.mark.parametrize('schedule', [{}, STABLE_DIFFUSION, COSINE])
@pytest.mark.parametrize('cls', [DDPM, DDIM, diffusers.PNDMScheduler, diffusers.UnCLIPScheduler])
def test_noise_schedules_of_what_only_adds_noise(cls, schedule, tmp_path):
  if cls is diffusers.UnCLIPScheduler:
    schedule = COSINE
  scheduler = cls(num_train_timesteps=700, **schedule)
  scheduler.save_config(tmp_path)
  config = schedulers.read_noising_scheduler(epath.Path(tmp_path))
  alpha_bar = common.make_schedule(config).alpha_bar
  np.testing.assert_allclose(scheduler.alphas_cumprod, alpha_bar, rtol=1e-4)
  written = schedulers.write_noising_scheduler('decoder.z_i_diffusion', config)
  assert schedulers.read_noising_scheduler(write_json(tmp_path, written)) == config
  np.testing.assert_array_equal(DDPM.from_pretrained(tmp_path).betas, scheduler.betas)
