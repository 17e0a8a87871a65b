"""Scaled dot-product attention: the one place that chooses how it is computed."""

import jax
import jax.numpy as jnp

from unclip_jax.types import Array


def attend(q_btnh: Array, k_bsnh: Array, v_bsnh: Array, mask: Array | None = None) -> Array:
  """Softmax attention, scaled by head_dim ** -0.5.

  Args:
    q_btnh: [b, t, heads, head_dim] queries.
    k_bsnh: [b, s, heads, head_dim] keys.
    v_bsnh: [b, s, heads, head_dim] values.
    mask: bool [b or 1, heads or 1, t or 1, s], true where a query may look; None looks everywhere.

  Returns:
    [b, t, heads, head_dim]
  """
  if mask is not None:
    b, t, n, _ = q_btnh.shape
    mask = jnp.broadcast_to(mask, (b, mask.shape[1] if mask.shape[1] == n else 1, t, mask.shape[3]))
  operands = (q_btnh, k_bsnh, v_bsnh, mask)
  if q_btnh.dtype != jnp.float16:
    return _attend(*operands)
  # Logits of float16 are summed in float32 by a product that only GPUs have.
  return jax.lax.platform_dependent(*operands, cuda=_attend, rocm=_attend, default=_in_float32)


def _attend(q_btnh: Array, k_bsnh: Array, v_bsnh: Array, mask: Array | None) -> Array:
  return jax.nn.dot_product_attention(q_btnh, k_bsnh, v_bsnh, mask=mask)


def _in_float32(q_btnh: Array, k_bsnh: Array, v_bsnh: Array, mask: Array | None) -> Array:
  q, k, v = (x.astype(jnp.float32) for x in (q_btnh, k_bsnh, v_bsnh))
  return _attend(q, k, v, mask).astype(q_btnh.dtype)


def causal_mask(t: int, s: int) -> Array:
  """bool [1, 1, t, s]: the last `t` of `s` positions, each seeing itself and what is before it."""
  return jnp.tril(jnp.ones((t, s), bool), k=s - t)[None, None]
