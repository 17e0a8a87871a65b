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

import jax
import jax.numpy as jnp
import optax

from unclip_jax.train.gradient_cache import (
  Embeddings,
  EmbeddingsLossFn,
  EmbedFn,
  chunk_keys,
  join_batch,
  map_chunks,
  split_batch,
  sum_chunks,
)
from unclip_jax.train.state import Batch, GradFn, Metrics
from unclip_jax.types import Array, Params, UnclipError

SMALLEST_NORM = 1e-30  # with less, a group is at a stationary point and has no direction to go


def make_sam_grad(
  embed_fn: EmbedFn,
  loss_fn: EmbeddingsLossFn,
  rho: float = 0.1,
  group_size: int = 64,
  unroll: bool = False,
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
    group_size: m, the examples that share a perturbation; a divisor of the batch. Of n groups each
      takes every nth example, wherever it lies, so that the result does not depend on the devices.
      A group is spread over them: up to `group_size` of them are of use.
    unroll: whether the groups are written out rather than looped over, see `make_cached_grad`.

  Returns:
    (params, batch, key) -> ((loss, metrics), gradient). Loss and metrics are those of `params`,
    not of the perturbed ones. It raises UnclipError for groups that do not divide the batch.

  Raises:
    UnclipError: rho is negative.
  """
  if not rho >= 0:
    raise UnclipError(f'SAM: a perturbation of length {rho}: take 0 or more')

  def perturbed(params: Params, rows: Batch, key: Array, cotangent: Embeddings) -> Params:
    share = jax.vjp(lambda p: embed_fn(p, rows, key), params)[1](cotangent)[0]
    norm = jnp.maximum(optax.tree.norm(share), SMALLEST_NORM)
    return jax.tree.map(lambda p, g: p + (rho / norm * g).astype(p.dtype), params, share)

  def grad_fn(params: Params, batch: Batch, key: Array) -> tuple[tuple[Array, Metrics], Params]:
    groups = split_batch(batch, group_size, 'SAM')
    keys = chunk_keys(key, groups)
    grad_of_loss = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)
    embeddings = map_chunks(lambda rows, key: embed_fn(params, rows, key), (groups, keys), unroll)
    aux, (_, at_params) = grad_of_loss(params, join_batch(embeddings))
    at_params = split_batch(at_params, group_size, 'SAM')

    def embed_perturbed(rows: Batch, key: Array, cotangent: Embeddings) -> Embeddings:
      return embed_fn(perturbed(params, rows, key, cotangent), rows, key)

    embeddings = map_chunks(embed_perturbed, (groups, keys, at_params), unroll)
    _, (direct, at_perturbed) = grad_of_loss(params, join_batch(embeddings))
    at_perturbed = split_batch(at_perturbed, group_size, 'SAM')

    def grad_of_group(
      rows: Batch, key: Array, at_params: Embeddings, at_perturbed: Embeddings
    ) -> Params:
      there = perturbed(params, rows, key, at_params)
      return jax.vjp(lambda p: embed_fn(p, rows, key), there)[1](at_perturbed)[0]

    parts = (groups, keys, at_params, at_perturbed)
    return aux, sum_chunks(grad_of_group, parts, direct, unroll)

  return grad_fn
