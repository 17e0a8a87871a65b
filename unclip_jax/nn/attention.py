"""Scaled dot-product attention: the one place that chooses how it is computed."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from unclip_jax.types import Array

# On NVIDIA's GPUs cuDNN's kernel, which keeps no logits in memory, is taken from so many on.
_LEAST_LOGITS = 2**16
# And so few queries, as each step of a prior has, are no work for a product of matrices: what is
# before and after it would be kernels of their own, which cost more.
_FEW_QUERIES = 4
_NOT_SEEN = -1e38  # infinities alone in a row would be no numbers
_CUDNN_HEAD_DIMS = range(8, 129, 8)
_CUDNN_GENERATION = 8.0  # compute capability
_CUDNN_UNIT = 8  # queries and keys are filled up to a multiple


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
  on_cuda = _choose_on_cuda(q_btnh, k_bsnh) if _has_cuda() else _attend
  # Logits of float16 are summed in float32 by a product that only GPUs have.
  elsewhere = _in_float32 if q_btnh.dtype == jnp.float16 else _attend
  if on_cuda is elsewhere:
    return _attend(*operands)
  return jax.lax.platform_dependent(*operands, cuda=on_cuda, rocm=_attend, default=elsewhere)


def _attend(q_btnh: Array, k_bsnh: Array, v_bsnh: Array, mask: Array | None) -> Array:
  return jax.nn.dot_product_attention(q_btnh, k_bsnh, v_bsnh, mask=mask)


def _in_float32(q_btnh: Array, k_bsnh: Array, v_bsnh: Array, mask: Array | None) -> Array:
  q, k, v = (x.astype(jnp.float32) for x in (q_btnh, k_bsnh, v_bsnh))
  return _attend(q, k, v, mask).astype(q_btnh.dtype)


def _cudnn(q_btnh: Array, k_bsnh: Array, v_bsnh: Array, mask: Array | None) -> Array:
  # Its gradients take no odd numbers of queries and keys.
  t, s = q_btnh.shape[1], k_bsnh.shape[1]
  more_t, more_s = -t % _CUDNN_UNIT, -s % _CUDNN_UNIT
  if more_s and mask is None:
    mask = jnp.ones((1, 1, t, s), bool)  # of no batch, which devices would share out
  if mask is not None:
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, more_t), (0, 0)), constant_values=True)
    mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, more_s)))
  q, k, v = (
    jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
    for x, more in ((q_btnh, more_t), (k_bsnh, more_s), (v_bsnh, more_s))
  )
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='cudnn')[:, :t]


def _by_sums(q_btnh: Array, k_bsnh: Array, v_bsnh: Array, mask: Array | None) -> Array:
  """Without products of matrices: sums that a compiler joins with what is around them."""
  q, k, v = (x.astype(jnp.float32) for x in (q_btnh, k_bsnh, v_bsnh))
  logits_btsn = (q[:, :, None] * k[:, None]).sum(-1) * q.shape[-1] ** -0.5
  if mask is not None:
    logits_btsn = jnp.where(mask.transpose(0, 2, 3, 1), logits_btsn, _NOT_SEEN)
  weights = jax.nn.softmax(logits_btsn, axis=2)
  return (weights[..., None] * v[:, None]).sum(2).astype(q_btnh.dtype)


def _choose_on_cuda(q_btnh: Array, k_bsnh: Array) -> Callable[..., Array]:
  if q_btnh.shape[1] <= _FEW_QUERIES:
    return _by_sums
  return _cudnn if _suits_cudnn(q_btnh, k_bsnh) else _attend


def _has_cuda() -> bool:
  """Whether this process runs on NVIDIA's GPUs: else JAX cannot even trace a call of cuDNN."""
  return jax.default_backend() == 'gpu' and 'cuda' in jax.devices()[0].client.platform_version


def _suits_cudnn(q_btnh: Array, k_bsnh: Array) -> bool:
  is_half = q_btnh.dtype in (jnp.bfloat16, jnp.float16)
  is_large = q_btnh.shape[1] * k_bsnh.shape[1] >= _LEAST_LOGITS
  if not (is_half and is_large and q_btnh.shape[3] in _CUDNN_HEAD_DIMS):
    return False
  # Its kernels are for Ampere's and later ones.
  return float(jax.devices()[0].compute_capability) >= _CUDNN_GENERATION


def causal_mask(t: int, s: int) -> Array:
  """bool [1, 1, t, s]: the last `t` of `s` positions, each seeing itself and what is before it."""
  return jnp.tril(jnp.ones((t, s), bool), k=s - t)[None, None]
