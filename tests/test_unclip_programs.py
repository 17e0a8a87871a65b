"""The programs of the system: what compiles when, how exact they are, and many devices."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import CONFIG, TEXTS, levels_apart, load_tiny, write_tiny_model

from unclip_jax import Sampling
from unclip_jax.stages import common
from unclip_jax.systems import programs

ROOT = Path(__file__).parent.parent
APPLE, ROCKET, CATS = TEXTS


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return load_tiny(tmp_path_factory.mktemp('model'))


def draw_with_other_values(model) -> None:
  """Draws twice more with other values, and raises if that compiles anything."""
  compiled = []

  def listen(event: str, seconds: float, **_) -> None:
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(seconds)

  def draw(prompts, seed, scale, eta, model=model):
    return model.generate(
      prompts,
      seed,
      2,
      prior=Sampling(guidance_scale=scale),
      decoder=Sampling(sampler='ddim', guidance_scale=scale, eta=eta),
      upsampler=Sampling(eta=eta),
    )

  before = draw([APPLE, ROCKET], 1, 2.0, 0.5)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    jax.jit(lambda x: x + 1.5)(1.0)
    assert compiled, 'the listener hears of compilations'
    compiled.clear()
    after = draw([CATS, 'a dog'], 2, 3.5, 0.1)
    params = jax.device_get(model.params)
    others = dataclasses.replace(
      model, params={**params, 'clip': jax.tree.map(np.negative, params['clip'])}
    )
    draw([CATS, APPLE], 2**32 - 1, 0.5, 1.0, others)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
  assert not compiled
  assert levels_apart(before, after) > 5


def test_another_prompt_seed_scale_eta_or_weight_compiles_nothing(tmp_path):
  # In a process of its own: run after hundreds of other tests, one program was compiled again, as
  # JAX's caches of programs are bounded.
  script = f"""
import sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from test_unclip_programs import draw_with_other_values
from tiny_model import load_tiny
draw_with_other_values(load_tiny(Path({str(tmp_path)!r})))
"""
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_products_of_float32_are_not_rounded_on_any_machine(model, dtype):
  """Every program, as it is handed to the compiler of whatever device there is."""
  params, d = model.params, CONFIG.prior.embed_dim
  tokens = model.tokenizer.encode([APPLE])
  text = programs.encode_text(params['clip'], *tokens, config=CONFIG.clip, dtype=jnp.float32)
  key_b = programs.image_keys(np.uint32(7), np.zeros(1, np.uint32))
  one, two = np.float32(1), np.float32(2)

  def noise(size):
    return np.zeros((1, size, size, 3), np.float32)

  def lowered(program, config, *args, **options):
    if 'with_trajectory' in options:
      sampling = config.sampling
      options |= {'sampler': sampling.sampler, 'variance': sampling.variance}
    with jax.default_matmul_precision('default'):
      return program.lower(*args, config=config, dtype=jnp.dtype(dtype), **options).as_text()

  def plan(config):
    return common.make_plan(config.diffusion, config.sampling)

  up = CONFIG.upsamplers[0]
  start = np.zeros((1, 2, d), np.float32)
  sampled = {'with_trajectory': False}
  texts = [
    lowered(programs.encode_text, CONFIG.clip, params['clip'], *tokens),
    lowered(programs.encode_image, CONFIG.clip, params['clip'], noise(16)),
    lowered(
      programs.sample_prior, CONFIG.prior, params['prior'], text, text,
      programs.candidate_keys(key_b, num_candidates=2), plan(CONFIG.prior), two, one, start,
      **sampled,
    ),
    lowered(
      programs.sample_decoder, CONFIG.decoder, params['decoder'],
      programs.Prompt(text, text, text.z_t), key_b, plan(CONFIG.decoder), two, one, noise(16),
      **sampled,
    ),
    lowered(
      programs.sample_upsampler, up, params['upsampler_0'], noise(16),
      programs.Prompt(None, None, None), key_b, plan(up), one, noise(32), **sampled,
    ),
  ]  # fmt: skip
  for program in texts:
    products = re.findall(r'stablehlo\.(?:dot_general|convolution).*', program)
    assert products
    exact = [line for line in products if 'HIGHEST' in line]
    if dtype == 'float32':
      assert exact == products
    else:
      # Resizing asks for it by itself.
      assert len(exact) < len(products) / 4


SHARDED = """
import sys
import numpy as np
import unclip_jax
model = unclip_jax.load('model', num_devices=4)
assert len(model.params['decoder']['null_z_i'].devices()) == 4
images = model.generate(sys.argv[1:], seed=7, num_images=3, num_candidates=1, size=16)
np.save('images.npy', images)
"""


def test_several_devices_draw_what_one_draws(model, tmp_path):
  write_tiny_model(tmp_path / 'model')
  env = os.environ | {
    'PYTHONPATH': str(ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=4',
  }
  command = [sys.executable, '-c', SHARDED, APPLE, ROCKET]
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  one = model.generate([APPLE, ROCKET], seed=7, num_images=3, num_candidates=1, size=16)
  assert levels_apart(np.load(tmp_path / 'images.npy'), one) <= 1
