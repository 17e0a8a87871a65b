"""Device memory of Karlo at its full size, figured from the compiled programs of its stages.

  python -m experiments.karlo_memory                     # batch 1, bfloat16, for this machine
  pip install libtpu
  python -m experiments.karlo_memory --topology v5e:2x2  # for one chip of a TPU that is not there

No weights are needed: the programs are compiled from shapes. A stage takes its parameters and
arguments, its results, and what its program allocates in between. With `--offload` the largest
stage is what a device has to hold; without, all parameters and the largest of the rest.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.nn.clip import TextFeatures
from unclip_jax.presets import preset
from unclip_jax.sharding import described_device
from unclip_jax.systems import programs, settings
from unclip_jax.systems.loading import expected_params

GIB = 2**30


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--preset', default='karlo')
  parser.add_argument('--batch-size', type=int, default=1)
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--topology', default=None, help='of a TPU that is only described')
  args = parser.parse_args()
  config, b, dtype = preset(args.preset), args.batch_size, jnp.dtype(args.dtype)
  place = None if args.topology is None else described_device(args.topology)
  params, clip = expected_params(config, dtype), config.clip

  def array(*shape: int, kind: type = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, kind, sharding=place)

  def placed(tree: Any) -> Any:
    return jax.tree.map(lambda x: array(*x.shape, kind=x.dtype), tree)

  t = clip.text.context_length
  text = TextFeatures(
    array(b, t, kind=jnp.int32),
    array(b, t, kind=bool),
    array(b, t, clip.text.width, kind=dtype),
    array(b, clip.embed_dim),
  )
  params = placed(params)
  keys = jax.eval_shape(lambda: programs.image_keys(np.uint32(0), np.zeros(b, np.uint32)))
  keys = placed(keys)
  asked = settings.Sampling()
  stages = {'prior': config.prior, 'decoder': config.decoder}
  stages |= {f'upsampler_{i}': up for i, up in enumerate(config.upsamplers)}
  ready = {k: settings.resolve(k, s.diffusion, s.sampling, asked) for k, s in stages.items()}

  def options(name: str) -> dict:
    return {
      'config': stages[name],
      'sampler': ready[name].sampler,
      'variance': ready[name].variance,
      'with_trajectory': False,
      'dtype': dtype,
    }

  def schedule(name: str) -> tuple:
    return ready[name].plan, ready[name].guidance_scale, ready[name].eta

  n, z_i = config.prior.num_candidates, array(b, clip.embed_dim)
  many_keys = jax.eval_shape(lambda k: programs.candidate_keys(k, num_candidates=n), keys)
  many_keys = placed(many_keys)
  size = config.decoder.image_size
  image = array(b, size, size, 3)
  traced = {
    'clip': programs.encode_text.trace(
      params['clip'], text.ids, text.mask, config=clip, dtype=dtype
    ),
    'prior': programs.sample_prior.trace(
      params['prior'], text, text, many_keys, *schedule('prior'), array(b, n, clip.embed_dim),
      **options('prior'),
    ),
    'decoder': programs.sample_decoder.trace(
      params['decoder'], programs.Prompt(text, text, z_i), keys, *schedule('decoder'),
      image, **options('decoder'),
    ),
  }  # fmt: skip
  for i, up in enumerate(config.upsamplers):
    name = f'upsampler_{i}'
    plan, _, eta = schedule(name)
    large = array(b, up.image_size, up.image_size, 3)
    nothing = programs.Prompt(None, None, None)
    traced[name] = programs.sample_upsampler.trace(
      params[name], image, nothing, keys, plan, eta, large, **options(name)
    )
    image = large
  device = jax.devices()[0].device_kind if place is None else f'a chip of {args.topology}'
  print(f'{args.preset}, batch {b}, {dtype}, jax {jax.__version__}, compiled for {device}\n')
  print('| stage | parameters and arguments | between | results | GiB |')
  print('|---|---|---|---|---|')
  totals, arguments, others = [], 0.0, []
  for name, stage in traced.items():
    platforms = None if place is None else ('tpu',)
    memory = stage.lower(lowering_platforms=platforms).compile().memory_analysis()
    parts = [
      part / GIB
      for part in (
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
      )
    ]
    totals.append(sum(parts))
    arguments += parts[0]
    others.append(parts[1] + parts[2])
    print(f'| {name} | {" | ".join(f"{p:.2f}" for p in parts)} | {sum(parts):.2f} |', flush=True)
  print(
    f'\nOne stage at a time (--offload): {max(totals):.2f} GiB; all at once: '
    f'{arguments + max(others):.2f} GiB.'
  )


if __name__ == '__main__':
  main()
