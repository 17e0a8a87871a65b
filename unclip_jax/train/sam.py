"""Sharpness-aware minimisation in groups (Foret et al. 2021; unCLIP, appendix C).

The gradient is taken at w + rho g / |g|, near the worst point within rho of the parameters w (Foret
et al., equation 3). The paper trains CLIP with rho = 0.1, each replica of 64 examples perturbing
its parameters on its own: as in the authors' code for SAM (google-research/sam), whose replicas by
default do not average g. Here a replica is a group of examples, whatever the devices (Foret et al.,
section 4.1: m-sharpness).

A contrastive loss has no value for a group alone. What replicas do that gather their embeddings is
taken for the definition: with L the loss over the whole batch and z_1, ..., z_n the groups'
embeddings,

  g_k = (dz_k / dw)^T dL/dz_k (z_1, ..., z_n)     the share of group k in the gradient of L
  w_k = w + rho g_k / |g_k|
  z'_k = embeddings of group k at w_k
  gradient = sum_k (dz_k / dw (w_k))^T dL/dz_k (z'_1, ..., z'_n)

Where L is a mean over examples this is the mean over groups of SAM's gradients of each. What L
takes of the parameters itself (the temperature) belongs to no group and is not perturbed.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unclip_jax.train.gradient_cache import (
  Embeddings,
  EmbeddingsLossFn,
  EmbedFn,
  chunk_keys,
  map_chunks,
  num_parts,
  sum_chunks,
)
from unclip_jax.train.state import Batch, GradFn, Metrics
from unclip_jax.types import Array, Params, UnclipError

# Where groups run: (fn(parts, params, groups), sums) -> (params, groups) -> what fn returns, as
# `systems.apart` describes it.
Apart = Callable[..., Callable[[Params, Any], Any]]

SMALLEST_NORM = 1e-30  # with less, a group is at a stationary point and has no direction to go


class Parts(NamedTuple):
  """What a function does with trees like the parameters, of which a device may have a part.

  Attributes:
    whole: of the parts that devices have, all.
    scattered: of what each device has whole, its part of their sum. What is not split stays as it
      is.
  """

  whole: Callable[[Params], Params] = lambda tree: tree
  scattered: Callable[[Params], Params] = lambda tree: tree


def _one_by_one(fn: Callable[[Parts, Params, Any], Any], sums: bool) -> Any:
  del sums
  return functools.partial(fn, Parts())


def make_sam_grad(
  embed_fn: EmbedFn,
  loss_fn: EmbeddingsLossFn,
  rho: float = 0.1,
  group_size: int = 64,
  unroll: bool = False,
  apart: Apart | None = None,
  dtype: Any = jnp.float32,
) -> GradFn:
  """Returns the gradient of SAM of `loss_fn(params, embed_fn(params, batch, key))`.

  Activations and a perturbation are held of one group at a time: as gradient caching does, it takes
  no more memory for a larger batch. A perturbation is computed twice, once for the embeddings and
  once for the gradient: five passes forward and three backward in all, where SAM on a batch that
  fits into memory takes two of each.

  Args:
    embed_fn: (params, examples, key) -> embeddings, a pytree of arrays [group_size, ...]. Row i
      depends on example i alone. For a loss that is a mean over examples they are its values. Each
      group has a key of its own, the same in all passes.
    loss_fn: (params, embeddings of the whole batch) -> (loss [], metrics of scalars).
    rho: length of the perturbation of a group; with 0 the gradient is the plain one.
    group_size: m, the examples that share a perturbation, neighbours in the batch; a divisor of it.
    unroll: whether the groups are written out rather than looped over, see `make_cached_grad`.
    apart: where the groups run. None takes one after the other, on all devices;
      `systems.apart.make_apart` lets each device take its own, if they divide over the devices.
      Either gives the same gradient, to float error.
    dtype: in which a group's parameters and their gradient are kept, that of the network. They are
      perturbed in float32 and rounded then: in bfloat16 most of them move by less than a unit in
      the last place, and what a perturbation does is right on average only.

  Returns:
    (params, batch, key) -> ((loss, metrics), gradient). Loss and metrics are those of `params`,
    not of the perturbed ones. It raises UnclipError for groups that do not divide the batch.

  Raises:
    UnclipError: rho is negative.
  """
  if not rho >= 0:
    raise UnclipError(f'SAM: a perturbation of length {rho}: take 0 or more')
  run = _one_by_one if apart is None else apart

  def cast(params: Params) -> Params:
    # Small ones, of norms say, take no memory, and networks compute with them in float32.
    return jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)

  def perturbed(
    parts: Parts, params: Params, rows: Batch, key: Array, cotangent: Embeddings
  ) -> Params:
    """All parameters of a group, from those that the device has."""
    share = jax.vjp(lambda p: embed_fn(p, rows, key), parts.whole(cast(params)))[1](cotangent)[0]
    share = jax.tree.map(lambda g: g.astype(jnp.float32), share)
    step = rho / jnp.maximum(optax.tree.norm(share), SMALLEST_NORM)
    return cast(jax.tree.map(lambda p, g: p + step * g, parts.whole(params), share))

  def grad_fn(params: Params, batch: Batch, key: Array) -> tuple[tuple[Array, Metrics], Params]:
    groups = _split(batch, group_size)
    keys = chunk_keys(key, groups)
    grad_of_loss = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)

    def embed(parts: Parts, params: Params, given: Any) -> Embeddings:
      whole = parts.whole(cast(params))
      return map_chunks(lambda rows, key: embed_fn(whole, rows, key), given, unroll)

    embeddings = run(embed, sums=False)(params, (groups, keys))
    aux, (_, at_params) = grad_of_loss(params, _join(embeddings))
    at_params = _split(at_params, group_size)

    def embed_perturbed(parts: Parts, params: Params, given: Any) -> Embeddings:
      def of_group(rows: Batch, key: Array, cotangent: Embeddings) -> Embeddings:
        return embed_fn(perturbed(parts, params, rows, key, cotangent), rows, key)

      return map_chunks(of_group, given, unroll)

    embeddings = run(embed_perturbed, sums=False)(params, (groups, keys, at_params))
    _, (direct, at_perturbed) = grad_of_loss(params, _join(embeddings))
    at_perturbed = _split(at_perturbed, group_size)

    def gradient(parts: Parts, params: Params, given: Any) -> Params:
      def of_group(
        rows: Batch, key: Array, at_params: Embeddings, at_perturbed: Embeddings
      ) -> Params:
        there = perturbed(parts, params, rows, key, at_params)
        whole = jax.vjp(lambda p: embed_fn(p, rows, key), there)[1](at_perturbed)[0]
        return parts.scattered(jax.tree.map(lambda g: g.astype(jnp.float32), whole))

      return sum_chunks(of_group, given, jax.tree.map(jnp.zeros_like, params), unroll)

    given = (groups, keys, at_params, at_perturbed)
    return aux, jax.tree.map(jnp.add, direct, run(gradient, sums=True)(params, given))

  return grad_fn


def _split(batch: Batch, size: int) -> Batch:
  """Arrays [b, ...] as groups of neighbours [b / size, size, ...]."""
  n = num_parts(batch, size, 'SAM')
  return jax.tree.map(lambda a: a.reshape(n, size, *a.shape[1:]), batch)


def _join(groups: Batch) -> Batch:
  """The inverse of `_split`."""
  return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), groups)
