"""What `experiments.sampler_tradeoff` measures of a setting: quality and seconds.

A setting is a line, 'sampler, spacing, steps', with the words of SAMPLERS and `common.SPACINGS`.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.emoji import bench, common, held_out
from unclip_jax import Sampling, Unclip
from unclip_jax.diffusion import guidance
from unclip_jax.diffusion.samplers import Sampler
from unclip_jax.evaluate.frechet import MIN_ROWS_A_DIMENSION, frechet_distance
from unclip_jax.evaluate.retrieval import bootstrap
from unclip_jax.stages import common as stage_common
from unclip_jax.stages import decoder
from unclip_jax.systems import pipeline, settings
from unclip_jax.types import Step

SAMPLERS = {
  'ddpm_learned': Sampling(sampler='ddpm', variance='learned'),
  'ddpm_small': Sampling(sampler='ddpm', variance='fixed_small'),
  'ddpm_large': Sampling(sampler='ddpm', variance='fixed_large'),
  'analytic': Sampling(sampler='analytic', eta=1.0),
  'ddim': Sampling(sampler='ddim', eta=0.0),
  'ddim_1': Sampling(sampler='ddim', eta=1.0),
  'dpmpp_2m': Sampling(sampler='dpmpp_2m'),
  'dpmpp_2m_sde': Sampling(sampler='dpmpp_2m_sde'),
  'unipc': Sampling(sampler='unipc'),
  'plms': Sampling(sampler='plms'),
}
SHOWN = ('R@1 same ground', 'background', 'Fréchet distance')
BATCH = 16
TIMED = 4  # pictures together, as `Unclip.sample` draws them on a CPU
NUM_GROUPS = 12  # of the jackknife


class Subject:
  """The captions with what the decoder is given for them, and its network as one program."""

  def __init__(self, model: Unclip, captions: Sequence[str], seed: int):
    config = model.config.decoder
    self.model = model
    once = Sampling(num_steps=1, spacing='strided')  # only z_i and the noise are kept
    drawn = model.sample(captions, seed, decoder=once, size=config.image_size, batch_size=BATCH)
    self.keys = jax.random.split(jax.random.key(seed), len(captions))

    def encode(texts: Sequence[str]) -> Any:
      tokens = model.tokenizer.encode(texts)
      return pipeline.encode_text(model.config, model.params, tokens, model.dtype, model.mesh)

    self.given = (encode(captions), encode([''] * len(captions)), drawn.z_i)
    self.x_start = drawn.start_noise.decoder
    network, scale = decoder.make_network(config, model.dtype), config.sampling.guidance_scale
    guided = None if scale == 1 else np.float32(scale)

    @jax.jit
    def encode_conditioning(params, text, null_text, z_i):
      has_z_i = jnp.ones(len(z_i), bool)
      given = (text, z_i, has_z_i)
      if guided is not None:
        given = guidance.interleave(given, (null_text, z_i, ~has_z_i))
      return network.apply({'params': params}, *given, method='encode_conditioning')

    @jax.jit
    def denoise(params, conditioning, x_t, step):
      def evaluate(x, emb, given):
        return network.apply({'params': params}, x, emb, given)

      emb = network.apply({'params': params}, step.t[None], method='encode_time')
      given = (conditioning, emb, config.diffusion, guided)
      return stage_common.make_denoise_fn(evaluate, *given)(x_t, step._replace(index=0))

    self.encode_conditioning, self.denoise = encode_conditioning, denoise
    self._samplers: dict[str, Sampler] = {}

  def resolve(self, name: str) -> tuple[Step, Sampler]:
    """Plan and sampler of a setting; what was compiled for one number of steps serves all."""
    plan, sampler = resolve(self.model, name)
    return plan, self._samplers.setdefault(name.partition(',')[0], sampler)

  def draw(self, rows: np.ndarray, plan: Step, sampler: Sampler) -> np.ndarray:
    """The pictures of some captions, uint8."""
    params, keys = self.model.params['decoder'], self.keys[rows]
    given = jax.tree.map(lambda x: x[rows], self.given)
    conditioning = self.encode_conditioning(params, *given)
    x = jnp.asarray(self.x_start[rows])
    state = sampler.init(x)
    for i in range(len(plan.t)):
      step = jax.tree.map(lambda column, i=i: column[i], plan)
      prediction = self.denoise(params, conditioning, x, step)
      x, state = sampler.step(keys, x, prediction, step, state)
    return common.to_uint8(x)


def resolve(model: Unclip, name: str) -> tuple[Step, Sampler]:
  """Plan and sampler of a setting, by its name.

  Raises:
    UnclipError: the model cannot be sampled so.
  """
  sampler, spacing, steps = name.split(', ')
  asked = dataclasses.replace(SAMPLERS[sampler], spacing=spacing, num_steps=int(steps))
  config, power = model.config.decoder, model.eps_power.get('decoder')
  chosen = settings.resolve('decoder', config.diffusion, config.sampling, asked, power)
  how = (chosen.sampler, chosen.variance, float(chosen.eta), config.diffusion.prediction)
  init, step = stage_common.make_sampler(*how)
  return chosen.plan, Sampler(init, jax.jit(step))


def measure(subject: Subject, bench_: bench.Bench, name: str) -> dict[str, Any]:
  """All but the seconds of a setting."""
  (plan, sampler), n = subject.resolve(name), len(subject.keys)
  # The last batch is filled up to the one shape that is compiled.
  batches = [np.arange(i, i + BATCH).clip(max=n - 1) for i in range(0, n, BATCH)]
  images = np.concatenate([subject.draw(rows, plan, sampler) for rows in batches])[:n]
  values = bench_.measure(images)
  hits = ''.join(str(int(hit)) for hit in values['R@1 same ground'])
  measured = {key: list(bootstrap(values[key], bench_.labels)) for key in SHOWN[:2]}
  return measured | {SHOWN[2]: distance(bench_, images), 'evaluations': len(plan.t), 'hits': hits}


def distance(bench_: bench.Bench, images: np.ndarray) -> list[float]:
  """The Fréchet distance to the real pictures, with its interval."""
  real = held_out.real_pictures(bench_.sprites, bench_.asked, images.shape[1])
  real, drawn = bench_.judge_images(real), bench_.judge_images(images)
  kept = len(real) - -(-len(real) // NUM_GROUPS)
  _, _, axes = np.linalg.svd(real - real.mean(axis=0), full_matrices=False)
  axes = axes[: kept // MIN_ROWS_A_DIMENSION].T
  real, drawn, group = real @ axes, drawn @ axes, np.arange(len(real)) % NUM_GROUPS
  whole = frechet_distance(drawn, real)
  parts = [frechet_distance(drawn[group != g], real[group != g]) for g in range(NUM_GROUPS)]
  error = 1.96 * float(np.std(parts)) * (NUM_GROUPS - 1) ** 0.5
  return [whole, max(whole - error, 0.0), whole + error]


def measure_seconds(subject: Subject, names: Sequence[str], rounds: int) -> dict[str, list[float]]:
  """Median, least and most seconds of a picture, by settings that take turns."""
  rows, seconds = np.arange(TIMED), {name: [] for name in names}
  resolved = {name: subject.resolve(name) for name in names}
  for plan, sampler in resolved.values():
    subject.draw(rows, jax.tree.map(lambda column: column[:1], plan), sampler)  # compiles it
  for _ in range(rounds):
    for name, (plan, sampler) in resolved.items():
      start = time.perf_counter()
      subject.draw(rows, plan, sampler)
      seconds[name].append((time.perf_counter() - start) / TIMED)
  return {k: [float(f(v)) for f in (np.median, np.min, np.max)] for k, v in seconds.items()}
