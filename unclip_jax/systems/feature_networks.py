"""The networks whose features pictures are compared by: FID's Inception, and any CLIP.

A batch is split over the devices of a mesh. Features of CLIP are of unit norm.
"""

import os
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import ClipConfig
from unclip_jax.data.vocabulary import Vocabulary
from unclip_jax.sharding import Mesh, filled_size, shard_params, sharded
from unclip_jax.stages import clip, inception
from unclip_jax.stages.common import listed
from unclip_jax.systems import loading, programs
from unclip_jax.systems.formats import Model
from unclip_jax.systems.series import digest_of
from unclip_jax.types import Array, Params, UnclipError
from unclip_jax.weights.inception import file_digest, read_inception
from unclip_jax.weights.safetensors import reach

_TEXTS = 64  # captions at a time


class FeatureNetwork(NamedTuple):
  """A network that pictures are looked at with.

  Attributes:
    kind: what it is, which decides on the figures that are made of its features.
    name: which weights: for people, with a digest of them.
    dims: of the features.
    size: pixels a side that it takes.
    preparation: for people: how pictures come to the size that it takes.
    encode: pictures uint8 [b, h, w, 3] -> features float32 [b, dims]; compiled for each b, h, w.
  """

  kind: Literal['inception', 'clip']
  name: str
  dims: int
  size: int
  preparation: str
  encode: Callable[[np.ndarray], np.ndarray]


class ClipJudge(NamedTuple):
  """Both towers of a CLIP.

  Attributes:
    network: of pictures.
    encode_text: captions -> embeddings float32 [n, d] of unit norm; None where it reads none.
    vocabulary: the words that it was trained on, None where the model does not say.
  """

  network: FeatureNetwork
  encode_text: Callable[[Sequence[str]], np.ndarray] | None
  vocabulary: Vocabulary | None = None


def open_inception(path: str | os.PathLike[str], preparation: str, mesh: Mesh) -> FeatureNetwork:
  """FID's Inception.

  Args:
    path: of its weights (`weights.inception`).
    preparation: whose way of resizing pictures: one of `stages.inception.PREPARATIONS`.
    mesh: the devices that a batch is split over.

  Raises:
    UnclipError: there is no such preparation, or no such file.
  """
  if preparation not in inception.PREPARATIONS:
    known = listed(tuple(inception.PREPARATIONS))
    raise UnclipError(f'there is no preparation {preparation!r} for Inception: take {known}')
  path, how = reach(path), inception.PREPARATIONS[preparation]
  expected = jax.eval_shape(inception.init, jax.random.key(0))
  params = shard_params(read_inception(path, expected), mesh)

  def features(params: Params, image_bhwc: Array) -> Array:
    with jax.default_matmul_precision('highest'):
      return inception.features(params, image_bhwc, how)

  run = sharded(features, mesh)
  return FeatureNetwork(
    'inception',
    f'Inception {file_digest(path)}',
    inception.DIM,
    inception.SIZE,
    f'{inception.SIZE} px as {preparation}',
    lambda images: np.asarray(run(params, images)),
  )


def open_clip(model: str | os.PathLike[str], mesh: Mesh) -> ClipJudge:
  """The CLIP of a model, or one that is a model of its own.

  Args:
    model: 'default', a folder, a file of OpenAI or open_clip, or a hub's owner/name.
    mesh: the devices that a batch is split over.

  Raises:
    UnclipError: it cannot be opened, has no CLIP, or its CLIP sees no pictures.
  """
  opened = loading.open_model(model)
  config = opened.config.clip
  if config is None or 'clip' not in opened.stages:
    raise UnclipError(f'the model {model} has no CLIP: take one that has')
  if config.vision is None:
    raise UnclipError(f'the CLIP of {model} came without its image tower: it sees no pictures')
  params = loading.read_stages(opened, np.dtype('float32'), ('clip',), mesh)['clip']
  size = config.vision.image_size

  def features(params: Params, image_bhwc: Array) -> Array:
    with jax.default_matmul_precision('highest'):
      return _unit(clip.encode_image(config, params, programs.prepare(image_bhwc, size)))

  run = sharded(features, mesh)
  network = FeatureNetwork(
    'clip',
    f'CLIP {os.path.basename(os.fspath(model).rstrip("/"))} {digest_of({"clip": params})[:8]}',
    config.embed_dim,
    size,
    f'{size} px, bicubic',
    lambda images: np.asarray(run(params, images)),
  )
  reads = config.text is not None and opened.tokenizer is not None
  encode_text = _text_encoder(config, opened, params, mesh) if reads else None
  return ClipJudge(network, encode_text, opened.vocabulary)


def _text_encoder(
  config: ClipConfig, opened: Model, params: Params, mesh: Mesh
) -> Callable[[Sequence[str]], np.ndarray]:
  def features(params: Params, tokens: tuple[Array, Array]) -> Array:
    with jax.default_matmul_precision('highest'):
      return _unit(clip.encode_text(config, params, *tokens).z_t)

  run, rows = sharded(features, mesh), filled_size(_TEXTS, mesh)

  def encode_text(texts: Sequence[str]) -> np.ndarray:
    parts = [np.zeros((0, config.embed_dim), np.float32)]
    for start in range(0, len(texts), rows):
      some = list(texts[start : start + rows])
      # Filled up: one shape, and so one program, for all.
      tokens = opened.tokenizer.encode(some + [some[-1]] * (rows - len(some)))
      parts.append(np.asarray(run(params, (tokens.ids, tokens.mask)))[: len(some)])
    return np.concatenate(parts)

  return encode_text


def _unit(z: Array) -> Array:
  return z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-12)
