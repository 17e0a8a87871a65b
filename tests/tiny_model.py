"""A model folder of the tiny preset with random weights, for the tests of what opens models."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from unclip_jax.config_json import override, to_json
from unclip_jax.configs import ArPriorConfig, UnclipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.presets import preset
from unclip_jax.systems.loading import expected_params
from unclip_jax.systems.unclip import Unclip, load
from unclip_jax.types import Params
from unclip_jax.weights.folder import write_model

TEXTS = ('a red apple, flat style', 'a rocket on a blue background', 'two cats beside a tree')

# Networks that predict v keep the pixels of random weights in the middle of their range, where
# tests can see what changes.
TWO_LEVELS: UnclipConfig = override(
  preset('tiny'),
  [
    'clip.text.depth=1',
    'clip.vision.depth=1',
    'decoder.diffusion.prediction=v',
    'upsamplers.0.diffusion.prediction=v',
  ],
)
# Of everything one, but two heads: most of a test's time is compiling, and what the U-Net does at
# its levels is for the tests of the U-Net, of the stages and of the formats.
CONFIG: UnclipConfig = override(
  TWO_LEVELS,
  [
    'prior.depth=1',
    'decoder.unet.multipliers=[1]',
    'decoder.unet.attention_levels=[0]',
    'decoder.unet.head_dim=8',
    'upsamplers.0.unet.multipliers=[1]',
  ],
)


@functools.cache
def make_params(config: UnclipConfig = CONFIG) -> dict[str, Params]:
  """Random parameters, none of them zero."""
  draw = np.random.default_rng(0)

  def fill(path, leaf):
    name = path[-1].key
    spread = 1.5 * np.prod(leaf.shape[:-1]) ** -0.5 if name == 'kernel' else 0.3
    mean = 1.0 if name == 'scale' else 0.0
    return (mean + spread * draw.normal(size=leaf.shape)).astype(np.float32)

  params = jax.tree_util.tree_map_with_path(fill, expected_params(config))
  if config.prior is None:
    return params
  # Embeddings of unit norm.
  d = config.prior.embed_dim
  if isinstance(config.prior, ArPriorConfig):
    k, n = config.prior.num_components, config.prior.num_buckets
    spread = np.linspace(0.5, 0.1, k, dtype='f')
    params['prior']['quantiser'] = {
      'mean': draw.normal(0, 0.1, d).astype(np.float32),
      'components': np.linalg.qr(draw.normal(size=(d, k)))[0].T.astype(np.float32),
      'low': -spread,
      'high': 1.5 * spread,
      'dot_low': np.float32(-0.2),
      'dot_high': np.float32(0.7),
      'dot_shares': draw.dirichlet(np.ones(n)).astype(np.float32),
    }
    return params
  params['prior']['statistics'] = {
    'mean': draw.normal(0, 0.1, d).astype(np.float32),
    'std': draw.uniform(0.1, 0.3, d).astype(np.float32),
  }
  return params


def make_model(config: UnclipConfig = CONFIG) -> Unclip:
  """The model without a folder, in which decoders' own text encoders read the same tokens."""
  tokenizer = Tokenizer.train(TEXTS * 3, 300, 12)
  return Unclip(config, make_params(config), tokenizer, decoder_tokenizer=tokenizer)


def write_tiny_model(folder: Path, config: UnclipConfig = CONFIG) -> Path:
  """Writes the model and returns its folder."""
  folder.mkdir(parents=True, exist_ok=True)
  text = config.clip.text
  tokenizer = Tokenizer.train(TEXTS * 3, text.vocab_size, text.context_length)
  tokenizer.save(folder / 'tokenizer.json')
  write_model(folder, to_json(config), make_params(config), folder / 'tokenizer.json')
  return folder


def without(model: Unclip, stage: str) -> Unclip:
  """The model without the parameters of a stage."""
  params = {name: value for name, value in model.params.items() if name != stage}
  return dataclasses.replace(model, params=params)


def load_tiny(folder: Path, **options) -> Unclip:
  """Writes and opens the model."""
  return load(write_tiny_model(folder), **options)


def levels_apart(a, b) -> int:
  """The most that two images differ by, in grey levels."""
  return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())
