"""A decoder's own text encoder as a stage: Kandinsky 2.1's XLM-R, Stable Diffusion's CLIP text."""

from typing import Any

import jax.numpy as jnp

from unclip_jax.configs import TextConfig, XlmRobertaConfig
from unclip_jax.nn.clip import TextFeatures, TextTower
from unclip_jax.nn.xlm_roberta import XlmRoberta
from unclip_jax.types import Array, Params


def init(config: TextConfig | XlmRobertaConfig, key: Array) -> Params:
  """Fresh parameters."""
  ids = jnp.zeros((1, config.context_length), jnp.int32)
  if isinstance(config, XlmRobertaConfig):
    return XlmRoberta(config).init(key, ids, ids == 0)['params']
  return TextTower(config).init(key, ids)['params']


def encode(
  config: TextConfig | XlmRobertaConfig,
  params: Params,
  ids_bt: Array,
  mask_bt: Array,
  dtype: Any = jnp.float32,
) -> TextFeatures:
  """Features of tokenised captions; without a z_t where the encoder projects to none.

  Args:
    config: of the encoder.
    params: of `init`.
    ids_bt: int32 [b, t].
    mask_bt: bool [b, t], true where there is text.
    dtype: the network's.
  """
  if isinstance(config, XlmRobertaConfig):
    return XlmRoberta(config, dtype).apply({'params': params}, ids_bt, mask_bt)
  states = TextTower(config, dtype).apply({'params': params}, ids_bt)
  return TextFeatures(ids_bt, mask_bt, states, None)
