"""The autoregressive prior as a stage (section 2.2): z_i one principal component after the other.

Each component is quantised into buckets of equal width, from the least to the greatest value that
training saw of it. Beside the caption and z_t the network is told the dot product z_i . z_t, which
says how well an image and its caption match: at sampling it is drawn from the top half of its
distribution over the training set (the paper swept 50, 70, 85 and 95%, and found half to be best).

For guidance the caption is dropped, and the dot product with it: beside an empty caption it would
still speak of the true one. It is dropped as often on its own account, so that also a negative
caption may stand without one, as it does in the half that guidance leads away from.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import ArPriorConfig
from unclip_jax.diffusion import guidance
from unclip_jax.nn import columns
from unclip_jax.nn.ar_prior import ArPriorNetwork, make_room
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.layers import l2_normalize
from unclip_jax.nn.prior import Prefix
from unclip_jax.stages.diffusion_prior import for_candidates, replace_text
from unclip_jax.types import Array, Params, UnclipError

# (z_i [b, d], z_t [b, d]), a batch after the other
Pairs = Iterable[tuple[np.ndarray, np.ndarray]]


class Quantiser(NamedTuple):
  """What turns embeddings into tokens and back, float32.

  Attributes:
    mean: [d] of the embeddings.
    components: [k, d] unit vectors, by decreasing eigenvalue.
    low: [k] where the first bucket of each component begins.
    high: [k] where the last one ends.
    dot_low: [] the same of z_i . z_t.
    dot_high: [] the same of z_i . z_t.
    dot_shares: [num_buckets], of the training pairs, how many have a dot product in each bucket.
  """

  mean: Array
  components: Array
  low: Array
  high: Array
  dot_low: Array
  dot_high: Array
  dot_shares: Array


def quantiser_shapes(config: ArPriorConfig) -> Quantiser:
  """Shapes and types of a config's quantiser."""
  d, k, n = config.embed_dim, config.num_components, config.num_buckets
  shapes = ((d,), (k, d), (k,), (k,), (), (), (n,))
  return Quantiser(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))


def fit_quantiser(
  config: ArPriorConfig, mean: np.ndarray, components: np.ndarray, read: Callable[[], Pairs]
) -> Quantiser:
  """The quantiser of a training set, which is streamed twice: for its ranges, and to count.

  Args:
    config: the prior's.
    mean: [d] of its image embeddings, as `train.pca.fit` gives it.
    components: [k or more, d] of them, by decreasing eigenvalue.
    read: gives the pairs of embeddings of images and their captions from the first on.

  Raises:
    UnclipError: there is nothing to read, or a component, or the dot product, is always the same.
  """
  mean = np.asarray(mean, np.float64)
  components = np.asarray(components, np.float64)[: config.num_components]
  low, high, count = np.array(np.inf), np.array(-np.inf), 0
  for z_i, z_t in read():
    values = _values(mean, components, z_i, z_t)
    low = np.minimum(low, values.min(axis=0))
    high = np.maximum(high, values.max(axis=0))
    count += len(values)
  if not count:
    raise UnclipError('there are no embeddings to quantise: give some')
  # As they are stored: what is counted here is what tokens are made with.
  low, high = low.astype(np.float32), high.astype(np.float32)
  flat = np.flatnonzero(~(low < high))
  if len(flat):
    what = 'z_i . z_t' if flat[0] == len(components) else f'component {flat[0]} of z_i'
    raise UnclipError(
      f'{what} is {low[flat[0]]:g} in all {count} examples: give others, or fewer components'
    )
  counts = np.zeros(config.num_buckets)
  for z_i, z_t in read():
    dots = _values(mean, components, z_i, z_t)[:, -1]
    place = (dots - low[-1]) / np.float64(high[-1] - low[-1]) * config.num_buckets
    tokens = np.clip(place.astype(int), 0, config.num_buckets - 1)
    counts += np.bincount(tokens, minlength=config.num_buckets)
  ranges = low[:-1], high[:-1], low[-1], high[-1]
  parts = mean, components, *ranges, counts / counts.sum()
  return Quantiser(*(np.asarray(part, np.float32) for part in parts))


def _values(
  mean: np.ndarray, components: np.ndarray, z_i: np.ndarray, z_t: np.ndarray
) -> np.ndarray:
  """The components of z_i, and z_i . z_t as the last: float64 [b, k + 1]."""
  z_i, z_t = np.asarray(z_i, np.float64), np.asarray(z_t, np.float64)
  return np.concatenate([(z_i - mean) @ components.T, (z_i * z_t).sum(axis=1)[:, None]], axis=1)


def quantise(quantiser: Quantiser, num_buckets: int, z_i: Array) -> Array:
  """The buckets of embeddings [b, d], int32 [b, k]; what is beyond the ends is in the last ones."""
  apart = z_i.astype(jnp.float32) - quantiser.mean[None]
  values = jnp.matmul(apart, quantiser.components.T, precision='highest')
  return _tokens(values, quantiser.low[None], quantiser.high[None], num_buckets)


def quantise_dot(quantiser: Quantiser, num_buckets: int, z_i: Array, z_t: Array) -> Array:
  """The tokens of z_i . z_t of embeddings [b, d], int32 [b]."""
  dots = (z_i.astype(jnp.float32) * z_t.astype(jnp.float32)).sum(axis=-1)
  return _tokens(dots, quantiser.dot_low, quantiser.dot_high, num_buckets)


def _tokens(values: Array, low: Array, high: Array, num_buckets: int) -> Array:
  place = (values - low) / (high - low) * num_buckets
  return jnp.clip(jnp.floor(place), 0, num_buckets - 1).astype(jnp.int32)


def dequantise(quantiser: Quantiser, num_buckets: int, tokens_bk: Array) -> Array:
  """The embeddings, float32 [b, d], in the middle of their buckets."""
  share = (tokens_bk.astype(jnp.float32) + 0.5) / num_buckets
  values = quantiser.low[None] + share * (quantiser.high - quantiser.low)[None]
  return jnp.matmul(values, quantiser.components, precision='highest') + quantiser.mean[None]


def init(config: ArPriorConfig, key: Array) -> Params:
  """Fresh parameters of the network."""
  length = config.context_length
  text = TextFeatures(
    ids=jnp.zeros((1, length), jnp.int32),
    mask=jnp.ones((1, length), bool),
    states=jnp.zeros((1, length, config.text_width or 1)),
    z_t=jnp.zeros((1, config.embed_dim)),
  )
  tokens = jnp.zeros((1, config.num_components), jnp.int32)
  return ArPriorNetwork(config).init(key, tokens, tokens[:, 0], text)['params']


def loss(
  config: ArPriorConfig,
  params: Params,
  quantiser: Quantiser,
  z_i: Array,
  text: TextFeatures,
  null_text: TextFeatures,
  key: Array,
  dtype: Any = jnp.float32,
  remat: bool = False,
) -> tuple[Array, dict[str, Array]]:
  """Cross entropy of the components' buckets.

  Args:
    config: the prior's.
    params: the network's.
    quantiser: of the training set.
    z_i: [b, embed_dim] CLIP embeddings of the images.
    text: features of their captions.
    null_text: features [1] of the empty caption, which stands in for 10% of them.
    key: of this step.
    dtype: the network's.
    remat: whether blocks of the network run again for their gradients, which keeps less in memory.

  Returns:
    The loss in nats a component, and {'bits'}: the same in bits; log2(num_buckets) is chance.
  """
  key_text, key_dot = jax.random.split(key)
  no_text, no_dot = (
    jax.random.bernoulli(each, config.text_drop, z_i.shape[:1]) for each in (key_text, key_dot)
  )
  dot = quantise_dot(quantiser, config.num_buckets, z_i, text.z_t)
  dot = jnp.where(no_text | no_dot, config.num_buckets, dot)
  tokens = quantise(quantiser, config.num_buckets, z_i)
  text = replace_text(no_text, text, null_text)
  logits = ArPriorNetwork(config, dtype, remat).apply({'params': params}, tokens, dot, text)
  of_tokens = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
  nats = -of_tokens.mean()
  return nats, {'bits': nats / math.log(2)}


def sample(
  config: ArPriorConfig,
  params: Params,
  quantiser: Quantiser,
  text: TextFeatures,
  null_text: TextFeatures,
  key_b: Array,
  guidance_scale: Array | None = None,
  dtype: Any = jnp.float32,
  num_candidates: int = 1,
) -> Array:
  """Draws n = num_candidates z_i a caption: float32 [b * n, embed_dim] in CLIP's space.

  The candidates of a caption stand together; its keys and values are computed once. Each draws a
  dot product of its own.

  Args:
    config: the prior's.
    params: the network's; kernels may be by columns (`nn.columns`).
    quantiser: of the training set.
    text: features of b captions.
    null_text: features [b] of what guidance leads away from: empty or negative captions.
    key_b: typed keys [b * n].
    guidance_scale: of the logits, scalar or [b * n]; None draws without at half the cost.
    dtype: the network's.
    num_candidates: n.
  """
  network = ArPriorNetwork(config, dtype)

  def apply(*args: Any, method: str) -> Any:
    return network.apply({'params': columns.plain(params)}, *args, method=method)

  guided, k = guidance_scale is not None, config.num_components
  pair = guidance.interleave(text, null_text) if guided else text
  prefix = apply(pair, method='encode_prefix')
  room = make_room(for_candidates(prefix, text.ids.shape[0], num_candidates), k)
  dot = draw_dot(quantiser, config.sampling.dot_share, key_b)
  if guided:
    dot = guidance.interleave(dot, jnp.full_like(dot, config.num_buckets))
  x_start = apply(dot, method='embed_dot')

  def draw_next(carry: tuple[Array, Any], index: Array) -> tuple[tuple[Array, Any], Array]:
    x, caches = carry
    logits, caches = apply(x, index, Prefix(caches, room.mask), method='step')
    if guided:
      logits = guidance.guide(logits, guidance_scale)
    token = _draw(key_b, 1 + index, logits / config.sampling.temperature)
    both = guidance.interleave(token, token) if guided else token
    return (apply(both, method='embed_bucket'), caches), token

  _, tokens_kb = jax.lax.scan(draw_next, (x_start, room.caches), jnp.arange(k))
  z_i = dequantise(quantiser, config.num_buckets, tokens_kb.T)
  return l2_normalize(z_i) if config.unit_norm else z_i


def draw_dot(quantiser: Quantiser, share: float, key_b: Array) -> Array:
  """Tokens of z_i . z_t, int32 [b], from the top `share` of its distribution over training pairs.

  The bucket that the share ends in counts in part.
  """
  below = jnp.cumsum(quantiser.dot_shares)
  below = below / below[-1]

  def draw(key: Array) -> Array:
    return jax.random.uniform(jax.random.fold_in(key, 0), minval=1 - share)

  tokens = jnp.searchsorted(below, jax.vmap(draw)(key_b), side='right')
  return jnp.minimum(tokens, len(below) - 1).astype(jnp.int32)


def _draw(key_b: Array, index: Array, logits: Array) -> Array:
  """A token of each row of logits [b, n], int32 [b], by its key and its place in the sequence."""
  keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(key_b)
  return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
