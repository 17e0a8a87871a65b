"""Whole runs of the multistep solvers against diffusers' schedulers, the same noise fed to both.

A smooth function stands for the network, so that each step depends on all before it. diffusers'
tables are replaced by float64 ones, as in test_schedulers.
"""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep
from etils import epath

from unclip_jax.diffusion import gaussian, samplers
from unclip_jax.stages import common
from unclip_jax.weights import diffusers_schedulers as schedulers

# How diffusers makes arrays of its tensors.
pytestmark = pytest.mark.filterwarnings('ignore:__array__ implementation')
SHAPE = (2, 4, 5, 3)
NAMES = {'epsilon': 'eps', 'sample': 'x_0', 'v_prediction': 'v'}
SOLVERS = {
  'dpmpp_2m': (diffusers.DPMSolverMultistepScheduler, {'algorithm_type': 'dpmsolver++'}),
  'dpmpp_2m_sde': (diffusers.DPMSolverMultistepScheduler, {'algorithm_type': 'sde-dpmsolver++'}),
  'unipc': (diffusers.UniPCMultistepScheduler, {}),
  'plms': (diffusers.PNDMScheduler, {'skip_prk_steps': True, 'steps_offset': 1}),
}
# PNDM has no 'sample'.
RUNS = [(name, kind) for name in SOLVERS for kind in NAMES if (name, kind) != ('plms', 'sample')]


def network(x, t, xp):
  """Outputs of deviation near 0.6 that depend on x and t."""
  return 0.8 * xp.sin(1.3 * x + 0.01 * t) + 0.2 * x


def ours(name, diffusion, sampling):
  plan = common.make_plan(diffusion, sampling)
  sampler = common.make_sampler(name, 'fixed_small', 0.0, diffusion.prediction)
  key_b = jax.random.split(jax.random.key(0), SHAPE[0])
  x_T = samplers.start_noise(key_b, SHAPE[1:])
  noises = [
    samplers.step_noise(
      key_b, jax.tree.map(lambda column, i=i: jnp.asarray(column[i]), plan), SHAPE[1:]
    )
    for i in range(len(plan.t))
  ]

  def denoise_fn(x_t, step):
    output = network(x_t, step.t.astype(jnp.float32), jnp)
    return gaussian.predict(output, x_t, step, diffusion.prediction)

  _, trajectory = samplers.sample_loop(denoise_fn, sampler, plan, x_T, key_b, True)
  return plan, x_T, noises, trajectory.x_s


@pytest.mark.parametrize(
  ('schedule', 'spacing'),
  [('scaled_linear', 'leading'), ('linear', 'linspace'), ('squaredcos_cap_v2', 'trailing')],
)
@pytest.mark.parametrize('n', [1, 2, 9])
@pytest.mark.parametrize(('name', 'prediction'), RUNS)
def test_whole_runs_are_those_of_a_saved_scheduler(
  monkeypatch, tmp_path, name, n, prediction, schedule, spacing
):
  if name == 'plms':
    spacing = 'leading'  # its steps are T // n long whatever its timesteps are
  kind, options = SOLVERS[name]
  scheduler = kind(
    beta_schedule=schedule, prediction_type=prediction, timestep_spacing=spacing, **options
  )
  scheduler.save_config(tmp_path)
  diffusion, sampling = schedulers.read_scheduler(epath.Path(tmp_path), n, 3.0)
  assert (sampling.sampler, diffusion.prediction) == (name, NAMES[prediction])
  with open(tmp_path / 'scheduler_config.json', 'w') as file:
    json.dump(schedulers.write_scheduler('decoder', diffusion, sampling), file)
  assert schedulers.read_scheduler(epath.Path(tmp_path), n, 3.0) == (diffusion, sampling)
  again = kind.from_pretrained(tmp_path)
  again.set_timesteps(n)
  scheduler.alphas_cumprod = torch.from_numpy(common.make_schedule(diffusion).alpha_bar.copy())
  if name == 'plms':
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
  scheduler.set_timesteps(n)
  timesteps = scheduler.timesteps.numpy()
  assert again.timesteps.numpy().tolist() == timesteps.tolist()
  plan, x_T, noises, x_s = ours(name, diffusion, sampling)
  assert plan.t.tolist() == timesteps.tolist()
  x = torch.from_numpy(np.asarray(x_T, np.float64))
  for i, t in enumerate(scheduler.timesteps):
    noise = torch.from_numpy(np.asarray(noises[i], np.float64))
    monkeypatch.setattr(
      scheduling_dpmsolver_multistep, 'randn_tensor', lambda *shape, noise=noise, **options: noise
    )
    x = scheduler.step(network(x, float(t), torch), t, x).prev_sample
    expected = x.numpy()
    error = np.abs(np.asarray(x_s[i]) - expected).max() / expected.std()
    assert error < 2e-5, (i, error)
