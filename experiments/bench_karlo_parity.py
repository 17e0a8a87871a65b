"""Karlo at its full size against diffusers: the same numbers, and how long each side takes.

  pip install -e '.[parity]'
  python -m experiments.bench_karlo_parity            # all networks, one at a time
  python -m experiments.bench_karlo_parity --only prior decoder

Random weights of Karlo's sizes (prior 1,022M, decoder 885M, super-resolution 2 x 692M parameters),
every parameter drawn anew. A network of diffusers is made, its tensors go through the tables that
open public folders, and one guided step (batch 1, so two rows; the super-resolution is unguided)
runs on either side in float32. Prints the table of docs/weights.md. Peak memory is two copies of
the largest network, about 9 GiB.
"""

import argparse
import gc
import resource
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from experiments.karlo_peer import make_module, to_torch
from unclip_jax.configs import UnclipConfig
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.decoder import DecoderNetwork
from unclip_jax.nn.prior import PriorNetwork
from unclip_jax.nn.unet import UNet
from unclip_jax.presets import preset
from unclip_jax.systems.loading import expected_params
from unclip_jax.weights import diffusers_prior, diffusers_unet, karlo
from unclip_jax.weights.rules import Rule, read_params

REPEATS = 3


class Case(NamedTuple):
  """A network on both sides.

  Attributes:
    modules: of diffusers, by the names that the rules put before their tensors'.
    rules: from their tensors to ours.
    expected: our parameters.
    theirs: runs the modules.
    ours: (params) -> the same arrays.
  """

  modules: dict[str, torch.nn.Module]
  rules: list[Rule]
  expected: Any
  theirs: Callable[[], torch.Tensor]
  ours: Callable[[Any], jax.Array]


class Modules:
  """The tensors of modules, as conversions read them."""

  def __init__(self, modules: dict[str, torch.nn.Module]):
    self._tensors = {
      prefix + name: tensor
      for prefix, module in modules.items()
      for name, tensor in module.named_parameters()
    }

  def names(self) -> list[str]:
    """Of all tensors."""
    return list(self._tensors)

  def shape(self, name: str) -> tuple[int, ...]:
    """Of a tensor."""
    return tuple(self._tensors[name].shape)

  def read(self, name: str) -> np.ndarray:
    """A tensor."""
    return self._tensors[name].detach().numpy()


def make_text(config: UnclipConfig, rng: np.random.Generator) -> TextFeatures:
  """Features of a caption of 9 tokens and of the empty one, as CLIP's would be."""
  text = config.clip.text
  ends = np.array([9, 2])
  return TextFeatures(
    ids=np.zeros((2, text.context_length), np.int32),
    mask=np.arange(text.context_length)[None] < ends[:, None],
    states=rng.normal(size=(2, text.context_length, text.width)).astype('f'),
    z_t=rng.normal(size=(2, config.clip.embed_dim)).astype('f'),
  )


def prior_case(config: UnclipConfig, rng: np.random.Generator) -> Case:
  """One guided step, all 81 positions there, three on a cached prefix here."""
  prior, text = config.prior, make_text(config, rng)
  twin = make_module(config, 'prior')
  z_i_t = rng.normal(size=(1, prior.embed_dim)).astype('f').repeat(2, axis=0)
  t = np.array([417, 417])

  def theirs() -> torch.Tensor:
    return twin(
      hidden_states=to_torch(z_i_t),
      timestep=torch.from_numpy(t),
      proj_embedding=to_torch(text.z_t),
      encoder_hidden_states=to_torch(text.states),
      attention_mask=torch.from_numpy(text.mask),
    ).predicted_image_embedding

  network = PriorNetwork(prior)
  encode = jax.jit(lambda params: network.apply({'params': params}, text, method='encode_prefix'))
  step = jax.jit(
    lambda params, prefix: network.apply(
      {'params': params}, z_i_t, network.apply({'params': params}, t, method='encode_time'), prefix
    )
  )
  prefixes: dict[str, Any] = {}

  def ours(params: Any) -> jax.Array:
    params = params['network']
    if 'prefix' not in prefixes:  # once a prompt
      prefixes['prefix'] = jax.block_until_ready(encode(params))
    return step(params, prefixes['prefix'])

  rules = diffusers_prior.rules(prior, 'prior/')
  return Case({'prior/': twin}, rules, expected_params(config)['prior'], theirs, ours)


def decoder_case(config: UnclipConfig, rng: np.random.Generator) -> Case:
  """One guided step at 64 px; the projections of the context are part of it there."""
  decoder, text = config.decoder, make_text(config, rng)
  parts = {f'{name}/': make_module(config, name) for name in ('text_proj', 'decoder')}
  text_proj, twin = parts.values()
  size = decoder.image_size
  x_t = rng.normal(size=(1, size, size, 3)).astype('f').repeat(2, axis=0)
  z_i = rng.normal(size=(1, decoder.embed_dim)).astype('f')
  t = np.array([417, 417])
  # diffusers puts the unconditional half first, and takes the null embedding for it.
  context, emb = None, None

  def theirs() -> torch.Tensor:
    nonlocal context, emb
    if context is None:  # once a prompt, there too
      context, emb = text_proj(
        image_embeddings=to_torch(z_i),
        prompt_embeds=to_torch(text.z_t[::-1].copy()),
        text_encoder_hidden_states=to_torch(text.states[::-1].copy()),
        do_classifier_free_guidance=True,
      )
    mask = torch.from_numpy(text.mask[::-1].copy())
    mask = torch.nn.functional.pad(mask, (decoder.num_image_tokens, 0), value=True)
    output = twin(
      to_torch(x_t), torch.from_numpy(t), context, class_labels=emb, attention_mask=mask
    )
    return output.sample.movedim(1, -1).flip(0)

  network = DecoderNetwork(decoder)
  has_z_i = np.array([True, False])
  encode = jax.jit(
    lambda params: network.apply(
      {'params': params}, text, z_i.repeat(2, axis=0), has_z_i, method='encode_conditioning'
    )
  )
  step = jax.jit(
    lambda params, conditioning: network.apply(
      {'params': params},
      x_t,
      network.apply({'params': params}, t, method='encode_time'),
      conditioning,
    )
  )
  prompts: dict[str, Any] = {}

  def ours(params: Any) -> jax.Array:
    if 'conditioning' not in prompts:
      prompts['conditioning'] = jax.block_until_ready(encode(params))
    return step(params, prompts['conditioning'])

  rules = karlo.decoder_rules(decoder)
  return Case(parts, rules, expected_params(config)['decoder'], theirs, ours)


def upsampler_case(config: UnclipConfig, rng: np.random.Generator) -> Case:
  """One step of super_res_first at 256 px; super_res_last is the same network."""
  up = config.upsamplers[0]
  twin = make_module(config, 'super_res_first')
  x_t, low = rng.normal(size=(2, 1, up.image_size, up.image_size, 3)).astype('f')
  t = np.array([500])

  def theirs() -> torch.Tensor:
    x = to_torch(np.concatenate([x_t, low], axis=-1))
    return twin(x, torch.from_numpy(t)).sample.movedim(1, -1)

  network = UNet(up.unet)

  @jax.jit
  def ours(params: Any) -> jax.Array:
    variables = {'params': params}
    emb = network.apply(variables, t, method='encode_time')
    condition = network.apply(variables, low, method='encode_condition')
    return network.apply(variables, x_t, emb, condition=condition)

  expected = expected_params(config)['upsampler_0']['unet']
  return Case({'': twin}, diffusers_unet.rules(up.unet, ''), expected, theirs, ours)


CASES = {'prior': prior_case, 'decoder': decoder_case, 'super_res': upsampler_case}


def randomise(modules: dict[str, torch.nn.Module]) -> int:
  """Draws every parameter anew, outputs of the order of 1; returns how many there are."""
  generator, count = torch.Generator().manual_seed(0), 0
  with torch.no_grad():
    for module in modules.values():
      module.eval().requires_grad_(False)
      for name, p in module.named_parameters():
        count += p.numel()
        is_norm = 'norm' in name and p.ndim == 1
        if is_norm and name.endswith('weight'):
          p.normal_(1, 0.1, generator=generator)
        elif p.ndim > 1:
          p.normal_(0, p[0].numel() ** -0.5, generator=generator)
        else:
          p.normal_(0, 0.1, generator=generator)
  return count


def seconds(run: Callable[[], Any]) -> tuple[Any, float]:
  """The result of a call, and the least time that one of several takes after the first."""
  result, best = run(), float('inf')
  for _ in range(REPEATS):
    start = time.perf_counter()
    result = run()
    best = min(best, time.perf_counter() - start)
  return result, best


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', nargs='+', choices=CASES, default=list(CASES))
  args = parser.parse_args()
  config = preset('karlo')
  print(
    f'Karlo at full size, float32, jax {jax.__version__} and torch {torch.__version__} '
    f'(diffusers {diffusers.__version__}) on {jax.devices()[0].device_kind}, '
    f'{torch.get_num_threads()} threads; seconds are the least of {REPEATS}.\n'
  )
  print(
    '| network | parameters | largest error / std | diffusers | unclip_jax | ratio | conversion |'
  )
  print('|---|---|---|---|---|---|---|')
  for name in args.only:
    rng = np.random.default_rng(0)
    with torch.no_grad():
      case = CASES[name](config, rng)
      count = randomise(case.modules)
      expected, theirs = seconds(case.theirs)
    start = time.perf_counter()
    params = read_params(Modules(case.modules), case.rules, case.expected, name)
    converted = time.perf_counter() - start
    case.modules.clear()
    with jax.default_matmul_precision('highest'):
      actual, ours = seconds(lambda c=case, p=params: jax.block_until_ready(c.ours(p)))
    expected = expected.numpy()
    deviation = np.abs(np.asarray(actual) - expected).max() / expected.std()
    print(
      f'| {name} | {count / 1e6:,.0f}M | {deviation:.1e} | {theirs:.2f} s | {ours:.2f} s | '
      f'{theirs / ours:.2f} | {converted:.1f} s |',
      flush=True,
    )
    del case, params, expected, actual
    gc.collect()
    jnp.zeros(()).block_until_ready()
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(f'\nPeak memory of the process {peak:.1f} GiB.', file=sys.stdout)


if __name__ == '__main__':
  main()
