"""Gradient caching (Gao et al. 2021, section 3): a contrastive loss over more than memory holds.

The gradient of the loss with respect to the embeddings of a batch is all that is needed of the
other examples: with it the parameters' gradient is a sum over parts of the batch. Embeddings are
computed twice, the first time without what a gradient would keep.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unclip_jax.train.state import Batch, GradFn, Metrics
from unclip_jax.types import Array, Params, UnclipError

Embeddings = Any  # A pytree of arrays, the leading axis of each is the batch.
EmbedFn = Callable[[Params, Batch, Array], Embeddings]
EmbeddingsLossFn = Callable[[Params, Embeddings], tuple[Array, Metrics]]


def make_cached_grad(
  embed_fn: EmbedFn, loss_fn: EmbeddingsLossFn, chunk_size: int, unroll: bool = False
) -> GradFn:
  """Returns the gradient of `loss_fn(params, embed_fn(params, batch, key))`, chunk by chunk.

  Args:
    embed_fn: (params, examples, key) -> embeddings, a pytree of arrays [chunk_size, ...]. Row i
      depends on example i alone. Each chunk has a key of its own, the same in both passes, so that
      what dropout leaves out is the same.
    loss_fn: (params, embeddings of the whole batch) -> (loss [], metrics of scalars). What it takes
      of the parameters itself, such as a temperature, is differentiated too.
    chunk_size: examples whose activations are held at a time; a divisor of the batch. Where a batch
      is split over devices so is each chunk: take a multiple of their number.
    unroll: whether the chunks are written out rather than looped over. XLA runs the gradients of
      convolutions in loops on a CPU tens of times slower; elsewhere it takes memory.

  Returns:
    (params, batch, key) -> ((loss, metrics), gradient), in the place of
    `jax.value_and_grad(..., has_aux=True)`. It raises UnclipError for chunks that do not divide
    the batch.
  """

  def grad_fn(params: Params, batch: Batch, key: Array) -> tuple[tuple[Array, Metrics], Params]:
    chunks = split_batch(batch, chunk_size, 'gradient cache')
    keys = chunk_keys(key, chunks)
    embeddings = map_chunks(lambda rows, key: embed_fn(params, rows, key), (chunks, keys), unroll)
    (loss, metrics), (direct, cotangents) = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(
      params, join_batch(embeddings)
    )
    cotangents = split_batch(cotangents, chunk_size, 'gradient cache')

    def grad_of_chunk(rows: Batch, key: Array, cotangent: Embeddings) -> Params:
      return jax.vjp(lambda p: embed_fn(p, rows, key), params)[1](cotangent)[0]

    return (loss, metrics), sum_chunks(grad_of_chunk, (chunks, keys, cotangents), direct, unroll)

  return grad_fn


def split_batch(batch: Batch, size: int, what: str) -> Batch:
  """Arrays [b, ...] as [b / size, size, ...]: of n parts each takes every nth row.

  The part of a row does not depend on how many devices the rows are split over, and each part is
  split over all of them, as long as their number divides `size`.

  Args:
    batch: a pytree of arrays.
    size: rows of a part.
    what: takes the parts, for the message.

  Raises:
    UnclipError: the size does not divide the batch.
  """
  n = num_parts(batch, size, what)
  return jax.tree.map(lambda a: a.reshape(size, n, *a.shape[1:]).swapaxes(0, 1), batch)


def num_parts(batch: Batch, size: int, what: str) -> int:
  """Of arrays [b, ...], b / size; arguments and errors as of `split_batch`."""
  b = jax.tree.leaves(batch)[0].shape[0]
  if size < 1 or b % size:
    raise UnclipError(
      f'{what}: a batch of {b} cannot be split into parts of {size}: take a divisor of {b}'
    )
  return b // size


def join_batch(parts: Batch) -> Batch:
  """The inverse of `split_batch`: [n, size, ...] as [n * size, ...]."""
  return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(-1, *a.shape[2:]), parts)


def chunk_keys(key: Array, chunks: Batch) -> Array:
  """A key for each of the chunks [n, ...]: [n]."""
  n = jax.tree.leaves(chunks)[0].shape[0]
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))


def map_chunks(fn: Callable[..., Any], parts: tuple[Any, ...], unroll: bool) -> Any:
  """Results of `fn(*part)`, stacked; one part at a time."""

  def body(_: None, part: tuple[Any, ...]) -> tuple[None, Any]:
    return None, fn(*part)

  return jax.lax.scan(body, None, parts, unroll=unroll)[1]


def sum_chunks(
  fn: Callable[..., Params], parts: tuple[Any, ...], start: Params, unroll: bool
) -> Params:
  """`start` plus the sum of `fn(*part)`, one part at a time."""

  def body(total: Params, part: tuple[Any, ...]) -> tuple[Params, None]:
    return jax.tree.map(jnp.add, total, fn(*part)), None

  return jax.lax.scan(body, start, parts, unroll=unroll)[0]
