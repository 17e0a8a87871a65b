"""The autoregressive prior: its network position by position, its quantiser, losses and samples."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_params import randomised
from tiny_stages import keys, normal

from unclip_jax.configs import ArPriorConfig, ArSamplingConfig, TextConfig
from unclip_jax.nn.ar_prior import ArPriorNetwork, make_room
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.layers import LayerNorm
from unclip_jax.nn.prior import Prefix
from unclip_jax.nn.transformer import Transformer
from unclip_jax.stages import ar_prior
from unclip_jax.train import pca
from unclip_jax.types import UnclipError

CONFIG = ArPriorConfig(
  embed_dim=7,
  context_length=5,
  width=21,
  depth=2,
  num_heads=3,
  num_components=4,
  num_buckets=11,
  text_width=9,
)
SHALLOW = dataclasses.replace(CONFIG, depth=1)
K, N = CONFIG.num_components, CONFIG.num_buckets


def make_text(b=3, seed=0):
  draw = np.random.default_rng(seed)
  ends = draw.integers(1, CONFIG.context_length + 1, (b, 1))
  return TextFeatures(
    ids=jnp.asarray(draw.integers(0, 30, (b, CONFIG.context_length))),
    mask=jnp.asarray(np.arange(CONFIG.context_length)[None] < ends),
    states=normal(b, CONFIG.context_length, CONFIG.text_width, seed=seed),
    z_t=normal(b, CONFIG.embed_dim, seed=seed + 1),
  )


def make_tokens(b=3, seed=0):
  draw = np.random.default_rng(seed)
  return draw.integers(0, N, (b, K)), draw.integers(0, N + 1, b)


@functools.cache
def params_of(config=CONFIG, seed=0):
  shapes = jax.eval_shape(lambda key: ar_prior.init(config, key), jax.random.key(0))
  params = randomised(shapes, seed)
  params['out_proj']['kernel'] *= 3  # logits of a spread that shows in frequencies
  return params


@functools.cache
def make_quantiser(config=CONFIG):
  z_i, z_t = pairs()
  found = pca.fit([z_i])
  return ar_prior.fit_quantiser(config, found.mean, found.components, lambda: [(z_i, z_t)])


def pairs(n=300):
  draw = np.random.default_rng(0)
  mix = draw.normal(size=(CONFIG.embed_dim,) * 2) * 0.8 ** np.arange(CONFIG.embed_dim)[:, None]
  z_i = draw.normal(size=(n, CONFIG.embed_dim)) @ mix + 1
  return z_i, draw.normal(size=(n, CONFIG.embed_dim)) + 0.5 * z_i


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, dot, text):
  return ArPriorNetwork(config).apply({'params': params}, tokens, dot, text)


loss_of = jax.jit(ar_prior.loss, static_argnums=(0, 7))


@functools.partial(jax.jit, static_argnums=(0, 5), static_argnames=('dtype',))
def sample(
  config,
  text,
  null_text,
  key_b,
  scale=None,
  num_candidates=1,
  params=None,
  quantiser=None,
  dtype=jnp.float32,
):
  params = params_of() if params is None else params
  quantiser = make_quantiser() if quantiser is None else quantiser
  given = (params, quantiser, text, null_text, key_b, scale, dtype, num_candidates)
  return ar_prior.sample(config, *given)


def in_one_pass(tokens, dot, text):
  """The whole sequence without a cache, written from the paper's order of it."""
  params = params_of()

  def dense(name, x):
    return np.asarray(x) @ params[name]['kernel'] + params[name]['bias']

  sequence = [
    dense('text_proj', text.states),
    dense('z_t_proj', text.z_t)[:, None],
    params['dot_tokens']['embedding'][dot][:, None],
    params['bucket_tokens']['embedding'][tokens],
  ]
  x = jnp.concatenate(sequence, axis=1)[:, :-1] + params['positions'][None]
  length = x.shape[1]
  seen = np.pad(text.mask, ((0, 0), (0, 1 + K)), constant_values=True)
  mask = np.tril(np.ones((length, length), bool))[None] & seen[:, None]
  blocks = Transformer(width=CONFIG.width, depth=CONFIG.depth, num_heads=CONFIG.num_heads)
  x, _ = blocks.apply({'params': params['blocks']}, x, mask[:, None])
  return dense('out_proj', LayerNorm().apply({'params': params['norm']}, x[:, -K:]))


def test_cached_equals_uncached():
  (tokens, dot), text = make_tokens(), make_text()
  network, variables = ArPriorNetwork(CONFIG), {'params': params_of()}
  expected = in_one_pass(tokens, dot, text)
  atol = 1e-5 * float(expected.std())
  np.testing.assert_allclose(logits_of(CONFIG, params_of(), tokens, dot, text), expected, atol=atol)
  prefix = network.apply(variables, text, method='encode_prefix')
  room = make_room(prefix, K)
  x = network.apply(variables, dot, method='embed_dot')
  step = jax.jit(lambda *args: network.apply(variables, *args, method='step'))
  for i in range(K):
    logits, caches = step(x, i, room)
    np.testing.assert_allclose(logits, expected[:, i], atol=atol)
    room = Prefix(caches, room.mask)
    x = network.apply(variables, tokens[:, i], method='embed_bucket')
  assert room.caches[0][0].shape[1] == CONFIG.context_length + 1 + K


def test_a_component_depends_on_what_is_before_it_and_on_nothing_else():
  (tokens, dot), text = make_tokens(), make_text()
  given = functools.partial(logits_of, CONFIG, params_of())
  logits = given(tokens, dot, text)
  for i in range(K):
    other = tokens.copy()
    other[:, i] = (other[:, i] + 5) % N
    changed = np.abs(given(other, dot, text) - logits).max(axis=2)
    np.testing.assert_array_equal(changed[:, : i + 1], 0)
    assert (changed[:, i + 1 :] > 1e-3).all()
  padded = np.where(text.mask[:, :, None], text.states, 9.0)
  same = given(tokens, dot, text._replace(states=padded))
  np.testing.assert_allclose(same, logits, atol=1e-5)
  for other in (
    given(tokens, (dot + 1) % (N + 1), text),
    given(tokens, dot, text._replace(states=text.states + 1)),
    given(tokens, dot, text._replace(z_t=text.z_t + 1)),
  ):
    assert (np.abs(other - logits).max(axis=2) > 1e-3).all()


def test_a_text_transformer_of_its_own_reads_tokens_and_no_states():
  own = TextConfig(vocab_size=30, context_length=5, width=12, depth=1, num_heads=2)
  config = dataclasses.replace(CONFIG, text=own, text_width=None)
  params, (tokens, dot), text = params_of(config), make_tokens(), make_text()
  logits = logits_of(config, params, tokens, dot, text._replace(states=None))
  other = text._replace(states=None, ids=(text.ids + 1) % 30)
  apart = np.abs(logits_of(config, params, tokens, dot, other) - logits)
  assert (apart.max(axis=(1, 2)) > 1e-3).all()
  z_i = sample(config, text._replace(states=None), other, keys(3), jnp.float32(2), params=params)
  np.testing.assert_allclose(np.linalg.norm(z_i, axis=1), 1, rtol=1e-5)


def test_training_and_sampling_in_bfloat16_are_finite():
  (tokens, _), text = make_tokens(), make_text()
  z_i = ar_prior.dequantise(make_quantiser(), N, jnp.asarray(tokens))
  null_text, key = make_text(1, seed=7), jax.random.key(0)
  args = (SHALLOW, params_of(SHALLOW), make_quantiser(), z_i, text, null_text, key)
  exact, rounded = (loss_of(*args, dtype)[0] for dtype in (jnp.float32, jnp.bfloat16))
  np.testing.assert_allclose(rounded, exact, rtol=0.1)
  assert rounded.dtype == jnp.float32 and rounded != exact
  sampled = sample(SHALLOW, text, text, keys(3), jnp.float32(2), params=args[1], dtype=jnp.bfloat16)
  assert sampled.dtype == jnp.float32 and np.isfinite(sampled).all()


def test_buckets_are_of_equal_width_between_the_ends():
  z_i, quantiser = pairs()[0], make_quantiser()
  mean, components = (np.float64(x) for x in (quantiser.mean, quantiser.components))
  values = (z_i - mean) @ components.T
  low, high = values.min(axis=0), values.max(axis=0)
  np.testing.assert_allclose([quantiser.low, quantiser.high], [low, high], rtol=1e-5)
  tokens = np.asarray(ar_prior.quantise(quantiser, N, jnp.asarray(z_i, jnp.float32)))
  assert tokens.min() == 0 and tokens.max() == N - 1
  expected = np.stack(
    [np.digitize(values[:, i], np.linspace(low[i], high[i], N + 1)[1:-1]) for i in range(K)], axis=1
  )
  assert (tokens != expected).mean() < 0.01  # rounding, at the borders
  back = np.asarray(ar_prior.dequantise(quantiser, N, jnp.asarray(tokens)))
  apart = np.abs((back - mean) @ components.T - values)
  assert (apart <= (high - low)[None] / N / 2 * 1.001).all()
  np.testing.assert_array_equal(ar_prior.quantise(quantiser, N, jnp.asarray(back)), tokens)
  far = ar_prior.quantise(quantiser, N, jnp.asarray(mean + 100 * components[:1], jnp.float32))
  assert far[0, 0] == N - 1


def test_the_shares_of_dot_products_are_counted():
  z_i, z_t = pairs()
  quantiser, dots = make_quantiser(), (z_i * z_t).sum(axis=1)
  counts, _ = np.histogram(dots, N, (dots.min(), dots.max()))
  np.testing.assert_allclose(quantiser.dot_shares, counts / counts.sum(), atol=1.01 / len(dots))
  tokens = ar_prior.quantise_dot(quantiser, N, *(jnp.asarray(z, jnp.float32) for z in (z_i, z_t)))
  np.testing.assert_allclose(
    np.bincount(tokens, minlength=N) / len(dots), quantiser.dot_shares, atol=1.01 / len(dots)
  )
  in_parts = ar_prior.fit_quantiser(
    CONFIG,
    quantiser.mean,
    quantiser.components,
    lambda: ((z_i[i : i + 50], z_t[i : i + 50]) for i in range(0, 300, 50)),
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1.01 / 300), in_parts, quantiser
  )


def test_what_cannot_be_quantised_is_refused():
  z_i, z_t = pairs()
  mean, components, flat = np.zeros(7), np.eye(7), z_i.copy()
  flat[:, 2] = 3
  for read, message in (
    (lambda: [(flat, z_t)], 'component 2 of z_i is 3 in all 300 examples'),
    (lambda: [(z_i, 0 * z_t)], r'z_i \. z_t is 0 in all 300'),
    (list, 'there are no embeddings'),
  ):
    with pytest.raises(UnclipError, match=message):
      ar_prior.fit_quantiser(CONFIG, mean, components, read)


@pytest.mark.parametrize('share', [0.5, 0.15, 1.0])
def test_dot_products_are_drawn_from_the_top_of_their_distribution(share):
  quantiser, n = make_quantiser(), 20_000
  tokens = np.asarray(ar_prior.draw_dot(quantiser, share, keys(n)))
  left, expected = share, np.zeros(N)
  for i in reversed(range(N)):  # from the highest down, until the share is used up
    expected[i] = min(left, float(quantiser.dot_shares[i]))
    left -= expected[i]
  expected /= share
  error = 5 * np.sqrt(expected * (1 - expected) / n) + 1e-4
  assert (np.abs(np.bincount(tokens, minlength=N) / n - expected) < error).all()
  assert (expected == 0).any() or share == 1


@pytest.mark.parametrize('scale', [None, 2.5])
def test_samples_are_those_of_a_loop_without_a_cache(scale):
  text, null_text, key_b = make_text(), make_text(seed=5), keys(3)
  given = functools.partial(logits_of, CONFIG, params_of())
  dot = ar_prior.draw_dot(make_quantiser(), 0.5, key_b)
  tokens = np.zeros((3, K), int)
  for i in range(K):
    logits = given(tokens, dot, text)[:, i]
    if scale is not None:
      away = given(tokens, np.full(3, N), null_text)[:, i]
      logits = away + scale * (logits - away)
    for row in range(3):
      gumbel = jax.random.gumbel(jax.random.fold_in(key_b[row], 1 + i), (N,))
      tokens[row, i] = np.argmax(np.asarray(logits[row]) + gumbel)
  quantiser = jax.tree.map(np.float64, make_quantiser())
  middle = quantiser.low + (tokens + 0.5) / N * (quantiser.high - quantiser.low)
  z_i = middle @ quantiser.components + quantiser.mean
  z_i /= np.linalg.norm(z_i, axis=1, keepdims=True)
  drawn = sample(CONFIG, text, null_text, key_b, scale and jnp.float32(scale))
  np.testing.assert_allclose(drawn, z_i, atol=1e-5)


def test_sample_of_a_batch_is_what_it_is_alone_and_candidates_are_captions_repeated():
  text, null_text, key_b, scale = make_text(), make_text(seed=5), keys(6), jnp.float32(2)
  batch = sample(CONFIG, text, null_text, key_b, scale, 2)
  assert batch.shape == (6, CONFIG.embed_dim)
  one, null = jax.tree.map(lambda x: x[2:], (text, null_text))
  np.testing.assert_allclose(sample(CONFIG, one, null, key_b[4:], scale, 2), batch[4:], atol=1e-5)
  twice = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), (text, null_text))
  np.testing.assert_allclose(sample(CONFIG, *twice, key_b, scale), batch, atol=1e-5)
  assert np.abs(batch[4] - batch[5]).max() > 1e-2
  unguided, one = sample(CONFIG, *twice, key_b), jnp.float32(1)
  np.testing.assert_allclose(sample(CONFIG, *twice, key_b, one), unguided, atol=1e-5)


@pytest.mark.parametrize('temperature', [1.0, 1.6])
def test_frequencies_of_samples_are_the_softmax_of_the_logits(temperature):
  """Of the first two components together, at one dot product."""
  n, sampling = 10_000, ArSamplingConfig(temperature=temperature)
  config = dataclasses.replace(SHALLOW, num_buckets=5, sampling=sampling, unit_norm=False)
  params, text = params_of(config), make_text(1)
  shares = jnp.zeros(5).at[3].set(1.0)
  quantiser = make_quantiser(config)._replace(dot_shares=shares)
  z_i = sample(config, text, text, keys(n), None, n, params, quantiser)
  tokens = np.asarray(ar_prior.quantise(quantiser, 5, z_i))
  drawn = np.bincount(5 * tokens[:, 0] + tokens[:, 1], minlength=25).reshape(5, 5) / n
  every = jnp.zeros((5, K), int).at[:, 0].set(jnp.arange(5))
  five = jax.tree.map(lambda x: jnp.repeat(x, 5, axis=0), text)
  logits = np.float64(logits_of(config, params, every, jnp.full(5, 3), five)) / temperature
  chances = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
  expected = chances[0, 0][:, None] * chances[:, 1]
  assert expected.max() < 0.9 and (expected > 0.01).sum() >= 4
  assert (np.abs(drawn - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-4).all()


def test_loss_is_the_cross_entropy_of_the_buckets():
  config = dataclasses.replace(CONFIG, text_drop=0.0)
  z_i, z_t = (jnp.asarray(z[:3], jnp.float32) for z in pairs())
  text, quantiser = make_text()._replace(z_t=z_t), make_quantiser()
  null_text, key = make_text(1, seed=7), jax.random.key(0)
  value, metrics = loss_of(config, params_of(), quantiser, z_i, text, null_text, key)
  tokens = np.asarray(ar_prior.quantise(quantiser, N, z_i))
  dot = ar_prior.quantise_dot(quantiser, N, z_i, z_t)
  logits = np.float64(logits_of(config, params_of(), tokens, dot, text))
  nats = [
    np.log(np.exp(logits[b, i]).sum()) - logits[b, i, tokens[b, i]]
    for b in range(3)
    for i in range(K)
  ]
  np.testing.assert_allclose(value, np.mean(nats), rtol=1e-5)
  np.testing.assert_allclose(metrics['bits'], np.mean(nats) / np.log(2), rtol=1e-5)
  still = params_of() | {'out_proj': jax.tree.map(np.zeros_like, params_of()['out_proj'])}
  value, _ = loss_of(config, still, quantiser, z_i, text, null_text, key)
  np.testing.assert_allclose(value, np.log(N), rtol=1e-6)


def test_captions_are_dropped_with_their_dot_products_and_those_alone_too(monkeypatch):
  n, seen = 20_000, []

  class Recorder:
    def __init__(self, config, dtype, remat):
      pass

    def apply(self, variables, tokens, dot, text):
      seen.append((np.asarray(dot), text))
      return jnp.zeros((*tokens.shape, N))

  monkeypatch.setattr(ar_prior, 'ArPriorNetwork', Recorder)
  z_i, text, null_text = normal(n, CONFIG.embed_dim), make_text(n), make_text(1, seed=9)
  quantiser = make_quantiser()
  ar_prior.loss(CONFIG, {}, quantiser, z_i, text, null_text, jax.random.key(0))
  dot, seen_text = seen[0]
  no_text = (np.asarray(seen_text.z_t) == np.asarray(null_text.z_t)).all(axis=1)
  for field in ('ids', 'mask', 'states'):
    given, null = np.asarray(getattr(text, field)), np.asarray(getattr(null_text, field))
    where = no_text.reshape(-1, *[1] * (given.ndim - 1))
    np.testing.assert_array_equal(getattr(seen_text, field), np.where(where, null, given))
  assert (dot[no_text] == N).all()
  expected = np.asarray(ar_prior.quantise_dot(quantiser, N, z_i, text.z_t))
  np.testing.assert_array_equal(dot[dot != N], expected[dot != N])
  for share in (no_text.mean(), (dot[~no_text] == N).mean()):
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / n) ** 0.5


def test_it_learns_one_batch_and_draws_it():
  config = dataclasses.replace(SHALLOW, text_drop=0.0, unit_norm=False)
  z_i = jnp.asarray(pairs()[0][:8], jnp.float32)
  # A dot product of 1 is the only one.
  text = make_text(8)._replace(z_t=z_i / (z_i**2).sum(axis=1, keepdims=True))
  quantiser, optimizer = make_quantiser(), optax.adam(1e-2)
  dot = ar_prior.quantise_dot(quantiser, N, z_i, text.z_t)
  quantiser = quantiser._replace(dot_shares=jnp.zeros(N).at[dot].set(1.0))

  @jax.jit
  def update(params, state, key):
    def loss_fn(params):
      return ar_prior.loss(config, params, quantiser, z_i, text, make_text(1, seed=7), key)

    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(params, updates), state, loss

  params = jax.jit(ar_prior.init, static_argnums=0)(config, jax.random.key(0))
  state = optimizer.init(params)
  for key in keys(100):
    params, state, loss = update(params, state, key)
  assert loss < 0.1 < np.log(N)
  drawn = sample(config, text, text, keys(8), None, 1, params, quantiser)
  tokens, true = (np.asarray(ar_prior.quantise(quantiser, N, z)) for z in (drawn, z_i))
  assert (tokens == true).mean() > 0.7
