"""unCLIP: caption -> CLIP text -> diffusion prior -> z_i -> decoder -> upsamplers -> picture.

`P(x|y) = P(x|z_i, y) P(z_i|y)` (section 2 of arXiv 2204.06125). The stages run one after the other,
each as one program; arrays stay on the device.

An image depends on its prompt, the seed and its index alone: image 2 of a seed is the same whether
it is drawn on its own, with others, or on several devices. Prompts share the noise of an index, so
that they can be compared.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from warnings import warn

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import UnclipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.vocabulary import Vocabulary
from unclip_jax.sharding import Mesh, filled_size
from unclip_jax.systems import notices, pipeline, programs, requests, samples, settings
from unclip_jax.systems.given import as_array
from unclip_jax.systems.loading import load_parts
from unclip_jax.systems.samples import Progress, Request, Samples, StartNoise
from unclip_jax.systems.settings import Sampling
from unclip_jax.types import Array, Params, UnclipError

_AS_THE_MODEL = Sampling()
_PACKAGE = __name__.partition('.')[0]
_MOST_OF_A_FLOAT = 1.5  # samples overshoot [-1, 1] a little


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Unclip:
  """A model that is ready to sample; made by `load`.

  Attributes:
    config: of its stages.
    params: 'clip', 'prior' ({'network', 'statistics'}), 'decoder', 'upsampler_0', ... A stage may
      be absent until a call needs it.
    tokenizer: of its captions; None where the decoder alone reads them.
    dtype: what the networks compute in.
    mesh: the devices that a batch is spread over, None for the default one.
    vocabulary: the words that it was trained on, None where the model does not say.
    decoder_tokenizer: of a decoder with a text encoder of its own.
    eps_power: of stages, [T] the mean square of the noise that they predict, which the sampler
      analytic needs.
  """

  config: UnclipConfig
  params: Mapping[str, Params]
  tokenizer: Tokenizer | None
  dtype: Any = jnp.float32
  mesh: Mesh | None = None
  vocabulary: Vocabulary | None = None
  decoder_tokenizer: Tokenizer | None = None
  eps_power: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def __repr__(self) -> str:
    made = ' or '.join(map(str, settings.sizes(self.config))) or 'no'
    return f'Unclip({", ".join(self.params)}; {made} px, {jnp.dtype(self.dtype).name})'

  def generate(
    self,
    prompts: str | Sequence[str],
    seed: int = 0,
    num_images: int = 1,
    *,
    negative_prompt: str | None = None,
    prior: Sampling = _AS_THE_MODEL,
    decoder: Sampling = _AS_THE_MODEL,
    upsampler: Sampling = _AS_THE_MODEL,
    num_candidates: int | None = None,
    size: int | None = None,
    progress: Callable[[Progress], None] | None = None,
  ) -> np.ndarray:
    """Pictures of captions: uint8 [len(prompts) * num_images, h, w, 3], a prompt's together.

    The arguments are those of `sample`, which takes and gives more: embeddings, noise,
    trajectories.

    Raises:
      UnclipError: as `sample`.
    """
    drawn = self.sample(
      prompts,
      seed,
      num_images,
      negative_prompt=negative_prompt,
      prior=prior,
      decoder=decoder,
      upsampler=upsampler,
      num_candidates=num_candidates,
      size=size,
      progress=progress,
    )
    return drawn.images

  def sample(
    self,
    prompts: str | Sequence[str],
    seed: int | Sequence[int] = 0,
    num_images: int = 1,
    *,
    first_image: int | Sequence[int] = 0,
    negative_prompt: str | None = None,
    prior: Sampling = _AS_THE_MODEL,
    decoder: Sampling = _AS_THE_MODEL,
    upsampler: Sampling = _AS_THE_MODEL,
    num_candidates: int | None = None,
    size: int | None = None,
    z_t: Any = None,
    z_i: Any = None,
    image: Any = None,
    mask: Any = None,
    noise_level: int | None = None,
    start_noise: StartNoise | None = None,
    with_trajectories: bool = False,
    tile: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    on_batch: Callable[[Samples], None] | None = None,
    revise: Callable[[Request], Request] | None = None,
  ) -> Samples:
    """Pictures of captions, with everything that they came from.

    Args:
      prompts: one or several captions. What one has beyond the model's context length is cut, with
        a UserWarning that shows it; another one names words that the model never saw, and the
        nearest that it knows. Empty prompts are for z_i that are given.
      seed: 0 to 2^32 - 1; one for all prompts, or one for each.
      num_images: for each prompt; at most 10,000 pictures a call, which holds them all:
        `systems.series` draws any number.
      first_image: the index of each prompt's first image, one for all or one for each: images 4 and
        5 of a seed are `first_image=4, num_images=2`.
      negative_prompt: what guidance leads away from; without one, the empty caption.
      prior: how the prior is sampled, where not as the model says.
      decoder: the same for the decoder.
      upsampler: the same for all upsamplers.
      num_candidates: embeddings that the prior draws for each image, to keep the one nearest to
        z_t (section 2.2); None takes the model's.
      size: in pixels, that of the stage to stop at; None takes the model's `default_size`, and
        without one goes to the end. A decoder of latents paints other sizes than its own too.
      z_t: float [n or 1, d], CLIP text embeddings in place of the captions' own.
      z_i: float [n or 1, d], CLIP image embeddings to decode; the prior does not run.
      image: [n or 1, h, w, 3], uint8 or float in [-1, 1], for a network that completes pictures.
      mask: bool [n or 1, h, w], true where `image` is to be painted anew.
      noise_level: the timestep that Stable unCLIP noises z_i to, from 0: the higher it is, the more
        the pictures of one z_i differ. None takes the model's.
      start_noise: what stages begin from, each float [n or 1, ...], where not drawn from the seed.
      with_trajectories: whether to return what lay between, at num_steps times the memory.
      tile: pixels a side that an autoencoder decodes at a time, for devices that have no room for
        all; tiles are blended, and not quite what it would make of the whole. None decodes it.
      batch_size: how many images go through a stage together at most; None takes 4 on a CPU, else
        16. The last batch is filled up, so that it compiles nothing.
      progress: called as stages begin and end.
      on_batch: called with each batch as it is complete, to save it before the next one.
      revise: makes another request of what was asked for, such as one of another plan; what it
        gives is not checked. `manipulate` is made of it.

    Raises:
      UnclipError: an argument is not as above; the message names it and the remedy.
    """
    settings.check_callable('progress', progress)
    settings.check_callable('on_batch', on_batch)
    settings.check_callable('revise', revise)
    model = self._at(size)
    request = requests.make(
      model.config,
      model.tokenizer,
      model.decoder_tokenizer,
      prompts,
      seed,
      num_images,
      first_image,
      negative_prompt,
      requests.Samplings(prior, decoder, upsampler),
      num_candidates,
      size,
      requests.Given(z_t, z_i, image, mask, noise_level, start_noise),
      with_trajectories,
      tile,
      self.eps_power,
    )
    request = request if revise is None else revise(request)
    for stage in requests.stages(model.config, request):
      self.check_has(stage)
    texts = dict.fromkeys([*request.captions, negative_prompt or ''])
    readers = [self.tokenizer, self.decoder_tokenizer]
    self._warn([notices.of_cut(reader, text) for reader in readers if reader for text in texts])
    self.warn_of_unseen(texts)
    n = len(request.captions)
    return model._run(request, self.batch_size(n, batch_size), progress, on_batch)

  def encode_text(self, texts: str | Sequence[str]) -> Array:
    """CLIP's embeddings z_t of captions, float32 [n, embed_dim].

    Raises:
      UnclipError: as `sample`; the empty caption has an embedding too.
    """
    texts = settings.check_prompts(texts, allow_empty=True)
    self.check_has('clip')
    if self.config.clip.text is None:
      raise UnclipError('this model came without the text tower of its CLIP: it reads no captions')
    self._warn([notices.of_cut(self.tokenizer, text) for text in texts])
    return self._encode_text(texts)

  def warn_of_unseen(self, texts: Iterable[str]) -> None:
    """A UserWarning for each text with words that the model never saw, which names the nearest.

    `sample` warns so by itself; `encode_text`, which reads sets of captions too, does not. A model
    without a vocabulary says nothing.
    """
    if self.vocabulary is not None:
      found = (notices.of_unseen(self.vocabulary, text, self._nearest_concept) for text in texts)
      self._warn(list(found))

  def encode_image(self, images: Any) -> Array:
    """CLIP's embeddings z_i of images, float32 [n, embed_dim].

    Args:
      images: [n, h, w, 3], uint8 or float in [-1, 1]; resized to the size that CLIP looks at.

    Raises:
      UnclipError: they are of another shape or kind.
    """
    images = images if isinstance(images, jax.Array) else as_array('images', images)
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
      raise UnclipError(f'images must be an array [n, h, w, 3], not {list(images.shape)}')
    if images.dtype != np.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
      raise UnclipError(f'images must be uint8, or float in [-1, 1], not {images.dtype}')
    if images.dtype != np.uint8 and not abs(images).max() <= _MOST_OF_A_FLOAT:
      raise UnclipError('images of floats must be in [-1, 1], without a NaN; 0 to 255 is for uint8')
    self.check_has('clip')
    if self.config.clip.vision is None:
      raise UnclipError('this model came without the image tower of its CLIP: it sees no images')
    params = self.params['clip']
    return programs.encode_image(params, images, config=self.config.clip, dtype=self.dtype)

  def _run(
    self,
    request: Request,
    batch_size: int,
    progress: Callable[[Progress], None] | None,
    on_batch: Callable[[Samples], None] | None,
  ) -> Samples:
    n = len(request.captions)
    num_batches = -(-n // batch_size)

    def report(batch: int, stage: str, status: Any, image: Any = None) -> None:
      if progress is not None:
        own = min(batch_size, n - batch * batch_size)
        images = None if image is None else np.asarray(image)[:own]
        progress(Progress(stage, status, batch, num_batches, images))

    parts = []
    for batch in range(num_batches):
      rows = np.arange(batch * batch_size, min(n, (batch + 1) * batch_size))
      filled = request.take(np.pad(rows, (0, batch_size - len(rows)), mode='edge'))
      drawn = pipeline.sample_batch(
        self.config, self.params, filled, self.dtype, self.mesh, functools.partial(report, batch)
      )
      parts.append(samples.first_rows(drawn, len(rows)))
      if on_batch is not None:
        on_batch(parts[-1])
    return samples.concatenate(parts)

  def batch_size(self, n: int, most: int | None = None) -> int:
    """How many images go through a stage together where n are wanted, at most `most`.

    A power of two if it may be: few sizes, so few programs, whatever numbers are asked for. Of
    several devices a multiple, which can be more than `most`.

    Raises:
      UnclipError: `most` is no whole number, or not positive.
    """
    if most is None:
      most = 4 if jax.default_backend() == 'cpu' else 16
    settings.check_count('the batch size', most)
    return filled_size(min(most, 1 << (n - 1).bit_length()), self.mesh)

  def _encode_text(self, texts: Sequence[str]) -> Array:
    tokens = self.tokenizer.encode(texts)
    return pipeline.encode_text(self.config, self.params, tokens, self.dtype, self.mesh).z_t

  @functools.cached_property
  def _concepts_nd(self) -> np.ndarray:
    """CLIP's embeddings of the concepts that the model knows, of unit norm."""
    z_t = np.asarray(self._encode_text(self.vocabulary.concepts))
    return z_t / np.linalg.norm(z_t, axis=1, keepdims=True)

  def _nearest_concept(self, word: str) -> str:
    """What the model makes of a word that it never saw, as far as CLIP's text goes."""
    z_t = np.asarray(self._encode_text([word]))[0]
    return self.vocabulary.concepts[int((self._concepts_nd @ z_t).argmax())]

  def _warn(self, messages: Sequence[str | None]) -> None:
    for message in filter(None, messages):
      warn(message, stacklevel=_level_of_the_user())

  def _at(self, size: int | None) -> 'Unclip':
    """The model for pictures of another size, where its decoder paints latents of any."""
    config = settings.at_size(self.config, size)
    return self if config is self.config else dataclasses.replace(self, config=config)

  def check_has(self, stage: str) -> None:
    """Raises UnclipError where the model came without a stage."""
    if stage not in self.params:
      raise UnclipError(
        f'this model has no {stage}, only {", ".join(self.params) or "a config"}: take one that '
        'has, or train that stage into its folder'
      )


def load(
  model: str | Any = 'default',
  dtype: Any = 'float32',
  num_devices: int = 1,
  offload: bool = False,
  prior: str | Any = None,
  lora: str | Any | Sequence[str | Any] = (),
  lora_strength: float = 1.0,
  model_devices: int = 1,
) -> Unclip:
  """Opens a model: the one that comes with the package, or a folder.

  Args:
    model: 'default', or the folder of a model or of a training run (`gs://` and the like work),
      or a model of a hub, 'owner/name' or 'owner/name@revision'.
    dtype: what networks compute in and parameters are held in, 'float32', 'bfloat16' or 'float16'.
    num_devices: on how many devices it runs; a batch is spread over num_devices / model_devices.
    offload: keep the parameters in the host's memory, and each stage's on the devices only while
      it runs.
    prior: a model whose CLIP and prior are taken: Kandinsky is published as two, and Stable unCLIP
      without one.
    lora: one or several files of adapters, of `train_prior --lora` and the like, that are added.
    lora_strength: what adapters are multiplied by.
    model_devices: how many devices share one copy of the parameters, for a model that is too large
      for one; divides num_devices.

  Raises:
    UnclipError: there is no such model, one of its files is missing, damaged, or belongs to another
      architecture, or the devices are too few or do not divide; the message names the culprit and
      the remedy.
  """
  dtype = settings.check_dtype(dtype)
  settings.check_count('the number of devices', num_devices)
  settings.check_count('model_devices', model_devices)
  files = [lora] if isinstance(lora, str | os.PathLike) else list(lora)
  strength = settings.check_number('the strength of adapters', lora_strength)
  opened, params, mesh = load_parts(
    model, dtype, num_devices, model_devices, offload, prior, files, strength
  )
  return Unclip(
    opened.config,
    params,
    opened.tokenizer,
    dtype,
    mesh,
    opened.vocabulary,
    opened.decoder_tokenizer,
    opened.eps_power,
  )


@functools.cache
def _default() -> Unclip:
  return load()


def generate(prompts: str | Sequence[str], seed: int = 0, num_images: int = 1) -> np.ndarray:
  """Pictures of captions by the model of the package, which stays in memory for the next call.

  For all else: `load`, then `Unclip.generate`.

  Returns:
    uint8 [len(prompts) * num_images, h, w, 3].

  Raises:
    UnclipError: as `Unclip.generate`.
  """
  return _default().generate(prompts, seed, num_images)


def _level_of_the_user() -> int:
  """The `stacklevel` with which the caller's warning points out of the package."""
  level, frame = 1, sys._getframe(1)
  while frame.f_back and frame.f_globals.get('__name__', '').partition('.')[0] == _PACKAGE:
    level, frame = level + 1, frame.f_back
  return level
