"""What a call of `unclip` asks for and what it gives, as arrays with one row an image."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np

from unclip_jax.data.tokenizer import Tokens
from unclip_jax.diffusion.samplers import Trajectory
from unclip_jax.systems.ar_settings import ArSettings
from unclip_jax.systems.settings import StageSettings
from unclip_jax.types import Array, UnclipError

# Of a request, what has one row an image.
OF_ROWS = (
  'tokens',
  'null_tokens',
  'decoder_tokens',
  'null_decoder_tokens',
  'seed',
  'indices',
  'z_t',
  'z_i',
  'known',
  'mask',
  'noise',
)


class StartNoise(NamedTuple):
  """The noise that each stage begins from, unit normal.

  Attributes:
    prior: [n, num_candidates, embed_dim]; None of an autoregressive one, which has none.
    decoder: [n, size, size, 3]; of latents [n, size, size, channels].
    upsamplers: for each [n, size, size, 3].
  """

  prior: Array | np.ndarray | None = None
  decoder: Array | np.ndarray | None = None
  upsamplers: tuple[Array | np.ndarray | None, ...] = ()


class Trajectories(NamedTuple):
  """What each stage's loop went through; arrays [num_steps, n, ...].

  The prior may not have run, or be autoregressive.
  """

  prior: Trajectory | None
  decoder: Trajectory
  upsamplers: tuple[Trajectory, ...]


class Samples(NamedTuple):
  """Images and what they came from; rows are prompts times images, those of a prompt together.

  Attributes:
    images: uint8 [n, h, w, 3].
    prompts: n captions.
    indices: int [n], each image's index within its seed.
    z_t: float32 [n, d], the captions' CLIP embeddings; None where the model has none.
    z_i: float32 [n, d], the image embeddings that were decoded; None where the model has none.
    stage_images: float32 [n, size, size, 3] around [-1, 1], the decoder's, then each upsampler's.
    latents: float32 [n, size, size, channels], what the decoder painted where an autoencoder made
      pictures of it, else None.
    start_noise: what the stages began from; give it back to begin there again.
    trajectories: if they were asked for.
  """

  images: np.ndarray
  prompts: tuple[str, ...]
  indices: np.ndarray
  z_t: np.ndarray | None
  z_i: np.ndarray | None
  stage_images: tuple[np.ndarray, ...]
  latents: np.ndarray | None
  start_noise: StartNoise
  trajectories: Trajectories | None


class Progress(NamedTuple):
  """Where a call stands, for a `progress` function.

  Attributes:
    stage: 'clip', 'prior', 'decoder_text', 'decoder', 'autoencoder', 'upsampler_0', ...
    status: 'preparing' while its program is compiled or fetched, 'sampling', 'done'.
    batch: which of the batches, from 0.
    num_batches: how many there are.
    images: float32 [b, h, w, 3] around [-1, 1], what a stage that paints pictures made of the
      batch, once it is done. A NaN in them is found, and said, only after the last stage.
  """

  stage: str
  status: Literal['preparing', 'sampling', 'done']
  batch: int
  num_batches: int
  images: np.ndarray | None = None


class Request(NamedTuple):
  """What a batch is to become, checked; arrays and captions have one row an image.

  Attributes:
    captions: of the images.
    tokens: of the captions.
    null_tokens: of what guidance leads away from; None where nothing is guided.
    decoder_tokens: of the captions, as the decoder's own text encoder reads them; None without.
    null_decoder_tokens: the same of null_tokens.
    is_negative: whether guidance leads away from a caption that the caller gave.
    seed: uint32 [b], of each image.
    indices: uint32 [b], the images' indices within their seeds.
    num_candidates: embeddings that the prior draws for each image.
    prior: settings, as the next two.
    decoder: settings.
    upsamplers: settings of those that run.
    z_t: [b, d] in place of the captions' own.
    z_i: [b, d] in place of the prior's.
    noise_level: int32, the timestep that z_i is noised to; None where it is not.
    known: [b, h, w, 3], for each stage that is to complete a picture; of a decoder of latents one.
    mask: [b, h, w, 1], 1 where it is known, the same.
    noise: in place of the seed's.
    with_trajectories: whether to return what lay between.
    tile: pixels a side of what an autoencoder decodes at a time; None for all.
  """

  captions: tuple[str, ...]
  tokens: Tokens
  null_tokens: Tokens | None
  decoder_tokens: Tokens | None
  null_decoder_tokens: Tokens | None
  is_negative: bool
  seed: np.ndarray
  indices: np.ndarray
  num_candidates: int
  prior: StageSettings | ArSettings | None
  decoder: StageSettings
  upsamplers: tuple[StageSettings, ...]
  z_t: np.ndarray | None
  z_i: np.ndarray | None
  noise_level: np.int32 | None
  known: tuple[np.ndarray, ...] | None
  mask: tuple[np.ndarray, ...] | None
  noise: StartNoise
  with_trajectories: bool
  tile: int | None

  def take(self, rows: np.ndarray) -> 'Request':
    """The request of some of the images."""
    arrays = {name: getattr(self, name) for name in OF_ROWS}
    taken = jax.tree.map(lambda x: x[rows], arrays)
    return self._replace(captions=tuple(self.captions[row] for row in rows), **taken)


def first_rows(samples: Samples, n: int) -> Samples:
  """The first n images."""
  kept = jax.tree.map(lambda x: x[:n], samples._replace(prompts=(), trajectories=None))
  trajectories = jax.tree.map(lambda x: x[:, :n], samples.trajectories)
  return kept._replace(prompts=samples.prompts[:n], trajectories=trajectories)


def concatenate(parts: list[Samples]) -> Samples:
  """The images of several batches as one."""
  if len(parts) == 1:
    return parts[0]
  arrays = [part._replace(prompts=(), trajectories=None) for part in parts]
  joined = jax.tree.map(lambda *x: np.concatenate(x), *arrays)
  trajectories = jax.tree.map(
    lambda *x: np.concatenate(x, axis=1), *(part.trajectories for part in parts)
  )
  prompts = tuple(prompt for part in parts for prompt in part.prompts)
  return joined._replace(prompts=prompts, trajectories=trajectories)


def of_stages(samples: Samples) -> dict[str, Array | np.ndarray]:
  """What each stage made, by its name, in their order."""
  upsamplers = [f'upsampler_{i}' for i in range(len(samples.stage_images) - 1)]
  first = 'decoder' if samples.latents is None else 'autoencoder'
  made = zip(
    ('clip', 'prior', 'decoder', first, *upsamplers),
    (samples.z_t, samples.z_i, samples.latents, *samples.stage_images),
    strict=True,
  )
  return {name: array for name, array in made if array is not None}


def check_finite(is_finite: Mapping[str, bool | np.ndarray]) -> None:
  """A NaN would else be a black picture, which nobody could explain.

  Args:
    is_finite: stage -> whether all that it made is, in the order of the stages.

  Raises:
    UnclipError: a stage made one; names the first.
  """
  for name, finite in is_finite.items():
    if not finite:
      raise UnclipError(
        f'the {name} made a NaN or an infinity: take the dtype float32, or other weights'
      )
