"""Measures how much of the noise a model's networks find, which the sampler `analytic` needs.

  python -m experiments.emoji.measure_noise --run runs/emoji_small

Each diffusion stage sees pictures of its training, as without guidance: the prior and the decoder
with captions and true embeddings, an upsampler with the picture made small. What is found then lies
in the model's folder, `eps_power.safetensors`; what is there of other stages stays.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import unclip_jax
from experiments.emoji import common
from experiments.emoji.bench import domain_of, read_options
from experiments.emoji.compose import load_sprites
from experiments.emoji.parser import Parser
from experiments.emoji.pool import Pool, make_pool
from unclip_jax import Unclip
from unclip_jax.configs import DecoderConfig, PriorConfig, UpsamplerConfig
from unclip_jax.data.degradations import area_downsample
from unclip_jax.diffusion.samplers import Sampler, Trajectory
from unclip_jax.stages import decoder, diffusion_prior, noise_power, upsampler
from unclip_jax.systems import pipeline
from unclip_jax.systems.formats import diffusion_stages
from unclip_jax.systems.loading import find_folder
from unclip_jax.types import Array, Params, Step, UnclipError
from unclip_jax.weights.folder import write_eps_power

Pictures = Callable[[int], Pool]  # the same ones at any size


class Subject(NamedTuple):
  """A stage with what it is shown.

  Attributes:
    x_0: [n, ...], as the stage diffuses it.
    given: what it is conditioned on, a pytree of arrays [n, ...].
    sample: (params, given, key_b, plan, sampler, x_start) -> the trajectory.
  """

  x_0: Array
  given: Any
  sample: Callable[[Params, Any, Array, Step, Sampler, Array], Trajectory]


def show(model: Unclip, config: Any, name: str, pictures: Pictures) -> Subject:
  """What a stage is shown.

  Raises:
    UnclipError: the stage is of a kind that is not trained here.
  """
  match config:
    case PriorConfig():
      text, z_i = _encode(model, pictures)
      own = diffusion_prior.Statistics(**model.params['prior']['statistics'])

      def sample(params, given, key_b, plan, sampler, x_start):
        how = (key_b, plan, sampler, None, x_start, True, model.dtype)
        return diffusion_prior.sample(config, params['network'], own, given, given, *how)[1]

      return Subject((z_i - own.mean[None]) / own.std[None], text, sample)
    case DecoderConfig():
      images = pictures(config.image_size).images

      def sample(params, given, key_b, plan, sampler, x_start):
        (text, z_i), how = given, (key_b, plan, sampler, None, x_start, True, model.dtype)
        return decoder.sample(config, params, text, text, z_i, *how)[1]

      return Subject(common.to_float(jnp.asarray(images)), _encode(model, pictures), sample)
    case UpsamplerConfig():
      high = common.to_float(jnp.asarray(pictures(config.image_size).images))

      def sample(params, given, key_b, plan, sampler, x_start):
        how = (key_b, plan, sampler, x_start, True, model.dtype)
        return upsampler.sample(config, params, given, *how)[1]

      low = area_downsample(high, config.image_size // config.low_size)
      return Subject(high, low, sample)
  raise UnclipError(f'the {name} is of another kind than the {name} that is trained here')


def _encode(model: Unclip, pictures: Pictures) -> tuple[Any, Array]:
  """CLIP's features of the captions, and its z_i of the pictures."""
  pool = pictures(model.config.clip.vision.image_size)
  tokens = model.tokenizer.encode(pool.captions)
  text = pipeline.encode_text(model.config, model.params, tokens, model.dtype, model.mesh)
  return text, model.encode_image(pool.images)


def measure(
  config: Any, params: Params, subject: Subject, num_timesteps: int, batch_size: int, seed: int
) -> np.ndarray:
  """The statistics of a stage, float32 [T]."""
  plan = noise_power.make_plan(config.diffusion, num_timesteps)

  @jax.jit
  def squares(params, x_0, given, key_b):
    x_start = noise_power.visit_start(x_0, key_b, plan)
    trajectory = subject.sample(params, given, key_b, plan, noise_power.visit(x_0), x_start)
    return noise_power.squares(x_0, x_start, plan, trajectory)

  n = len(subject.x_0)
  keys = jax.random.split(jax.random.key(seed), n)

  def parts() -> Iterator[Array]:
    for start in range(0, n, batch_size):
      # The last part is filled up to the one shape that is compiled.
      rows = np.minimum(np.arange(start, start + batch_size), n - 1)
      x_0, given = jax.tree.map(lambda x: x[rows], (subject.x_0, subject.given))  # noqa: B023
      yield squares(params, x_0, given, keys[rows])[..., : n - start]

  return noise_power.eps_power(config.diffusion, plan, parts())


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The options.

  Raises:
    UnclipError: one makes no sense; names it.
  """
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--run', required=True, help="the model's folder, which is written to; 'default' is one too")
  add('--data', type=Path, default=None, help='a build as large as the pictures of the stages')
  add('--stages', nargs='+', default=None, help='prior, decoder, upsampler_0 (all)')
  add('--images', type=int, default=128, help='of each stage')
  add('--timesteps', type=int, default=64, help='at which it is measured')
  add('--batch-size', type=int, default=16, help='images of a program')
  add('--seed', type=int, default=0, help='of pictures and noise')
  args = parser.parse_args(argv)
  for name in ('images', 'batch_size'):
    if getattr(args, name) < 1:
      raise UnclipError(f'--{name.replace("_", "-")} {getattr(args, name)}: take 1 or more')
  return args


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  options = read_options(Path(args.run))
  model, folder = unclip_jax.load(args.run), find_folder(args.run)
  stages = {k: v for k, v in diffusion_stages(model.config).items() if k in model.params}
  asked = list(stages) if args.stages is None else args.stages
  for name in asked:
    if name not in stages:
      raise UnclipError(f'--stages {name}: the model has {", ".join(stages)}')
    size, pixels = load_sprites(args.data).size, getattr(stages[name], 'image_size', 0)
    if size < pixels:
      raise UnclipError(
        f'the emoji of --data have {size} px, too few for the {pixels} of the {name}: give --data '
        'a larger build of experiments.emoji.build, or leave it out of --stages'
      )

  def pictures(size: int) -> Pool:
    domain = dict(zip(('styles', 'groups', 'labels'), domain_of(options), strict=True))
    fraction, jitter = options.get('scene_fraction', 0.15), options.get('jitter', 0.04)
    how = {'scene_fraction': fraction, 'jitter': jitter, 'data_dir': args.data, **domain}
    return make_pool(size, args.images, args.seed, **how)

  for name in asked:
    start, config = time.monotonic(), stages[name]
    subject, params = show(model, config, name, pictures), model.params[name]
    power = measure(config, params, subject, args.timesteps, args.batch_size, args.seed)
    write_eps_power(folder, {name: power})
    shown = ', '.join(f'{power[t]:.4f}' for t in np.linspace(0, len(power) - 1, 6).astype(int))
    print(f'{name}: {shown} from x_0 to noise, {time.monotonic() - start:.0f} s', flush=True)


if __name__ == '__main__':
  common.run(main)
