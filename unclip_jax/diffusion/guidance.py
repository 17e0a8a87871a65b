"""Classifier-free guidance (Ho & Salimans 2022), and bounds on the predicted x_0.

One convention: uncond + scale * (cond - uncond); 1.0 is conditional only. A negative prompt is
the `uncond` of its own. Pairs are interleaved along the batch, cond, uncond, cond, uncond, ...:
concatenated halves would make devices exchange data when the batch is sharded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.diffusion.gaussian import per_sample
from unclip_jax.types import Array, UnclipError


class Guidance(NamedTuple):
  """How a sampling loop is guided.

  Attributes:
    scale: a scalar or [b]; 1.0 is conditional only.
    rescale: a scalar, the share of the conditional half's contrast that is given back; None: 0.
    is_on: bool [n], the rows of the plan that are guided, the rest being conditional at half the
      cost (Kynkäänniemi et al. 2024, arXiv 2404.07724); None: all.
  """

  scale: Array
  rescale: Array | None = None
  is_on: Array | None = None


def interleave(cond: Any, uncond: Any) -> Any:
  """Two pytrees of arrays [b, ...] as one of [2 b, ...]: cond, uncond, cond, uncond, ...

  `interleave(x, x)` doubles what both halves share.

  Raises:
    ValueError: the trees or their shapes differ.
  """

  def pair(a, b):
    if jnp.shape(a) != jnp.shape(b):
      raise ValueError(f'conditional {jnp.shape(a)} and unconditional {jnp.shape(b)} differ')
    return jnp.stack([a, b], axis=1).reshape(2 * a.shape[0], *a.shape[1:])

  return jax.tree.map(pair, cond, uncond)


def guide(
  output_2b: Array,
  scale: Array | float,
  learned_variance: bool = False,
  rescale: Array | float | None = None,
) -> Array:
  """uncond + scale * (cond - uncond) on the prediction channels; the variance is cond's.

  Args:
    output_2b: [2 b, ..., c] or, with learned_variance, [2 b, ..., 2 c]: the network on an
      interleaved batch, any float type.
    scale: guidance scale, a number or [b], traced or not; 1.0 is conditional only.
    learned_variance: whether the second half of the channels is a variance.
    rescale: phi of Lin et al. 2024 (arXiv 2305.08891, eq. 15 and 16): the share of a guided sample
      that has the standard deviation of the conditional one; None is 0.

  Returns:
    float32 [b, ..., c or 2 c].
  """
  pairs = output_2b.astype(jnp.float32).reshape(-1, 2, *output_2b.shape[1:])
  cond, uncond = pairs[:, 0], pairs[:, 1]
  variance = None
  if learned_variance:
    cond, variance = jnp.split(cond, 2, axis=-1)
    uncond, _ = jnp.split(uncond, 2, axis=-1)
  guided = uncond + per_sample(scale, cond) * (cond - uncond)
  if rescale is not None:
    axes = tuple(range(1, cond.ndim))
    factor = cond.std(axis=axes) / guided.std(axis=axes)
    guided = guided * per_sample(1 + rescale * (factor - 1), guided)
  return guided if variance is None else jnp.concatenate([guided, variance], axis=-1)


def clip_x_0(limit: float | Array = 1.0) -> Callable[[Array], Array]:
  """A bound for `predict`: x_0 clipped to [-limit, limit]. Pixels take 1, Karlo's prior 10."""
  return lambda x_0: jnp.clip(x_0, -limit, limit)


def dynamic_threshold(
  percentile: float = 99.5, most: float | None = None
) -> Callable[[Array], Array]:
  """A bound for `predict`: dynamic thresholding (Imagen, Saharia et al. 2022, section 2.3).

  s is the given percentile of |x_0| of each sample, from 1 to `most`; x_0 is clipped to [-s, s] and
  divided by s, so that it lies in [-1, 1].

  Raises:
    UnclipError: percentile is not within 50..100 (a fraction, such as 0.995, is a mistake), or most
      is below 1.
  """
  if not 50 <= percentile <= 100:
    raise UnclipError(f'dynamic threshold: percentile {percentile} is not within 50..100')
  if most is not None and not most >= 1:
    raise UnclipError(f'dynamic threshold: {most:g} is the most to divide by, take 1 or more')

  def limit_x_0(x_0: Array) -> Array:
    s = jnp.percentile(jnp.abs(x_0).reshape(x_0.shape[0], -1), percentile, axis=1)
    s = per_sample(jnp.clip(s, 1.0, most), x_0)
    return jnp.clip(x_0, -s, s) / s

  return limit_x_0
