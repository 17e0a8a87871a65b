"""The diffusion prior as a stage (section 2.2): from a caption to a CLIP image embedding.

It diffuses standardised embeddings: `Statistics` are stored with the model. The paper's are a
mean of 0 and a std of 1 / 17.2 for each dimension; Karlo's, and ours, are measured.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unclip_jax.configs import PriorConfig
from unclip_jax.diffusion import guidance, losses, samplers
from unclip_jax.diffusion.guidance import Guidance
from unclip_jax.nn import columns
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.layers import l2_normalize
from unclip_jax.nn.prior import PriorNetwork
from unclip_jax.stages.common import draw_training_step, make_denoise_fn
from unclip_jax.types import Array, Params, Step

# Appendix C: so that the variance of unit embeddings of 1024 dimensions matches that of RGB pixels
# in [-1, 1].
PAPER_SCALE = 17.2


class Statistics(NamedTuple):
  """What embeddings are standardised by, float32 [embed_dim] each."""

  mean: Array
  std: Array


def paper_statistics(embed_dim: int) -> Statistics:
  """Embeddings times 17.2, as in the paper."""
  return Statistics(jnp.zeros(embed_dim), jnp.full(embed_dim, 1 / PAPER_SCALE))


def fit_statistics(z_i: Array) -> Statistics:
  """The mean and std of each dimension of embeddings [n, embed_dim]."""
  z_i = jnp.asarray(z_i, jnp.float32)
  return Statistics(z_i.mean(axis=0), z_i.std(axis=0))


def init(config: PriorConfig, key: Array) -> Params:
  """Fresh parameters."""
  text = TextFeatures(
    ids=jnp.zeros((1, config.context_length), jnp.int32),
    mask=jnp.ones((1, config.context_length), bool),
    states=jnp.zeros((1, config.context_length, config.text_width)),
    z_t=jnp.zeros((1, config.embed_dim)),
  )
  z_i, t = jnp.zeros((1, config.embed_dim)), jnp.zeros(1, jnp.int32)
  return PriorNetwork(config).init(key, z_i, t, text, method='predict')['params']


def drop_text(
  key: Array, text: TextFeatures, null_text: TextFeatures, probability: float
) -> TextFeatures:
  """Replaces each caption [b] by the empty one [1] with the given probability."""
  drop = jax.random.bernoulli(key, probability, (text.ids.shape[0],))
  return replace_text(drop, text, null_text)


def replace_text(drop_b: Array, text: TextFeatures, null_text: TextFeatures) -> TextFeatures:
  """The captions [b], and the empty one [1] where `drop_b` is true."""

  def choose(kept: Array, null: Array) -> Array:
    where = drop_b.reshape(-1, *[1] * (kept.ndim - 1))
    return jnp.where(where, jnp.broadcast_to(null, kept.shape).astype(kept.dtype), kept)

  return jax.tree.map(choose, text, null_text)


def loss(
  config: PriorConfig,
  params: Params,
  statistics: Statistics,
  z_i: Array,
  text: TextFeatures,
  null_text: TextFeatures,
  key: Array,
  dtype: Any = jnp.float32,
  remat: bool = False,
) -> tuple[Array, dict[str, Array]]:
  """Mean squared error of the predicted un-noised embedding.

  Args:
    config: the prior's.
    params: the network's.
    statistics: of the embeddings.
    z_i: [b, embed_dim] CLIP embeddings of the images.
    text: features of their captions.
    null_text: features [1] of the empty caption, which stands in for 10% of them.
    key: of this step.
    dtype: the network's.
    remat: whether blocks of the network run again for their gradients, which keeps less in memory.

  Returns:
    The loss, and {'cosine'}: the mean cosine of the predicted and the true embedding.
  """
  key_drop, key_step = jax.random.split(key)
  text = drop_text(key_drop, text, null_text, config.text_drop)
  x_0 = (z_i - statistics.mean[None]) / statistics.std[None]
  x_t, eps, step = draw_training_step(config.diffusion, key_step, x_0)
  network = PriorNetwork(config, dtype, remat)
  output = network.apply({'params': params}, x_t, step.t, text, method='predict')
  loss_b, _ = losses.diffusion_loss(
    output,
    x_0,
    eps,
    x_t,
    step,
    config.diffusion.prediction,
    False,
    config.diffusion.min_snr_gamma,
    noise_power=config.diffusion.noise_power,
  )
  z_i_hat = output * statistics.std[None] + statistics.mean[None]
  cosine = (l2_normalize(z_i_hat) * l2_normalize(z_i)).sum(axis=-1).mean()
  return loss_b.mean(), {'cosine': cosine}


def sample(
  config: PriorConfig,
  params: Params,
  statistics: Statistics,
  text: TextFeatures,
  null_text: TextFeatures,
  key_b: Array,
  plan: Step,
  sampler: samplers.Sampler,
  guidance_scale: Array | Guidance | None = None,
  x_start: Array | None = None,
  with_trajectory: bool = False,
  dtype: Any = jnp.float32,
  num_candidates: int = 1,
) -> tuple[Array, samplers.Trajectory | None]:
  """Draws n = num_candidates z_i a caption: float32 [b * n, embed_dim] in CLIP's space.

  The candidates of a caption stand together; what it needs of the network is computed once.

  Args:
    config: the prior's.
    params: the network's; kernels may be by columns (`nn.columns`).
    statistics: of the embeddings.
    text: features of b captions.
    null_text: features [b] of what guidance leads away from: empty or negative captions.
    key_b: typed keys [b * n].
    plan: of `common.make_plan`.
    sampler: of `common.make_sampler`.
    guidance_scale: scalar or [b * n], or a `Guidance`; None draws without at half the cost.
    x_start: [b * n, embed_dim] the noise to start from (standardised); drawn from the keys if None.
    with_trajectory: whether to return what lay between (standardised).
    dtype: the network's.
    num_candidates: n.
  """
  if x_start is None:
    x_start = samplers.start_noise(key_b, (config.embed_dim,))
  network = PriorNetwork(config, dtype)

  def apply(*args: Any, method: str | None = None) -> Any:
    return network.apply({'params': columns.plain(params)}, *args, method=method)

  pair = text if guidance_scale is None else guidance.interleave(text, null_text)
  prefix = apply(pair, method='encode_prefix')
  prefix = for_candidates(prefix, text.ids.shape[0], num_candidates)
  time_embs = apply(plan.t, method='encode_time')
  denoise_fn = make_denoise_fn(
    apply,
    prefix,
    time_embs,
    config.diffusion,
    guidance_scale,
  )
  result = samplers.sample_loop(denoise_fn, sampler, plan, x_start, key_b, with_trajectory)
  x_0, trajectory = result if with_trajectory else (result, None)
  z_i = x_0 * statistics.std[None] + statistics.mean[None]
  return (l2_normalize(z_i) if config.unit_norm else z_i), trajectory


def for_candidates(tree: Any, b: int, num_candidates: int) -> Any:
  """Arrays of b captions, a row or a pair of rows each, once for each candidate of a caption."""
  if num_candidates == 1:
    return tree

  def each(x: Array) -> Array:
    rows = jnp.repeat(x.reshape(b, -1, *x.shape[1:]), num_candidates, axis=0)
    return rows.reshape(-1, *x.shape[1:])

  return jax.tree.map(each, tree)


def rerank(z_i_bnd: Array, z_t: Array) -> Array:
  """Of n candidates [b, n, d] the one with the highest dot product with z_t [b, d]: [b, d]."""
  best = jnp.einsum('bnd,bd->bn', z_i_bnd, z_t).argmax(axis=1)
  return jnp.take_along_axis(z_i_bnd, best[:, None, None], axis=1)[:, 0]
