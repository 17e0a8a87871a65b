"""unCLIP: caption -> CLIP text -> diffusion prior -> z_i -> decoder -> upsamplers -> picture.

`P(x|y) = P(x|z_i, y) P(z_i|y)` (section 2 of arXiv 2204.06125). The stages run one after the other,
each as one program; arrays stay on the device.

An image depends on its prompt, the seed and its index alone: image 2 of a seed is the same whether
it is drawn on its own, with others, or on several devices. Prompts share the noise of an index, so
that they can be compared.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from warnings import warn

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import UnclipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.data.vocabulary import Vocabulary
from unclip_jax.sharding import DATA_AXIS, Mesh
from unclip_jax.systems import notices, pipeline, programs, settings
from unclip_jax.systems.given import as_array, given_array
from unclip_jax.systems.loading import load_parts
from unclip_jax.systems.pipeline import Progress, Request, Samples, StartNoise
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
    tokenizer: of its captions.
    dtype: what the networks compute in.
    mesh: the devices that a batch is spread over, None for the default one.
    vocabulary: the words that it was trained on, None where the model does not say.
  """

  config: UnclipConfig
  params: Mapping[str, Params]
  tokenizer: Tokenizer
  dtype: Any = jnp.float32
  mesh: Mesh | None = None
  vocabulary: Vocabulary | None = None

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
    samples = self.sample(
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
    return samples.images

  def sample(
    self,
    prompts: str | Sequence[str],
    seed: int = 0,
    num_images: int = 1,
    *,
    first_image: int = 0,
    negative_prompt: str | None = None,
    prior: Sampling = _AS_THE_MODEL,
    decoder: Sampling = _AS_THE_MODEL,
    upsampler: Sampling = _AS_THE_MODEL,
    num_candidates: int | None = None,
    size: int | None = None,
    z_t: Any = None,
    z_i: Any = None,
    start_noise: StartNoise | None = None,
    with_trajectories: bool = False,
    batch_size: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    on_batch: Callable[[Samples], None] | None = None,
  ) -> Samples:
    """Pictures of captions, with everything that they came from.

    Args:
      prompts: one or several captions. What one has beyond the model's context length is cut, with
        a UserWarning that shows it; another one names words that the model never saw, and the
        nearest that it knows. Empty prompts are for z_i that are given.
      seed: 0 to 2^32 - 1.
      num_images: for each prompt; at most 10,000 pictures a call, which holds them all.
      first_image: the index of each prompt's first image: images 4 and 5 of a seed are
        `first_image=4, num_images=2`.
      negative_prompt: what guidance leads away from; without one, the empty caption.
      prior: how the prior is sampled, where not as the model says.
      decoder: the same for the decoder.
      upsampler: the same for all upsamplers.
      num_candidates: embeddings that the prior draws for each image, to keep the one nearest to
        z_t (section 2.2); None takes the model's.
      size: in pixels, that of the stage to stop at; None goes to the end.
      z_t: float [n or 1, d], CLIP text embeddings in place of the captions' own.
      z_i: float [n or 1, d], CLIP image embeddings to decode; the prior does not run.
      start_noise: what stages begin from, each float [n or 1, ...], where not drawn from the seed.
      with_trajectories: whether to return what lay between, at num_steps times the memory.
      batch_size: how many images go through a stage together at most; None takes 4 on a CPU, else
        16. The last batch is filled up, so that it compiles nothing.
      progress: called as stages begin and end.
      on_batch: called with each batch as it is complete, to save it before the next one.

    Raises:
      UnclipError: an argument is not as above; the message names it and the remedy.
    """
    captions = settings.check_prompts(prompts, allow_empty=z_i is not None)
    num_images = settings.check_count('the number of images', num_images)
    first_image = settings.check_count('the index of the first image', first_image, 0)
    settings.check_count('the index of the last image', first_image + num_images - 1, 0, 2**32 - 1)
    settings.check_total(len(captions), num_images)
    settings.check_callable('progress', progress)
    settings.check_callable('on_batch', on_batch)
    config, n = self.config, len(captions) * num_images
    if config.decoder is None or (config.prior is None and z_i is None):
      self._check_has('decoder' if config.decoder is None else 'prior')
    num_ups = settings.num_upsamplers(config, size)
    if not isinstance(upsampler, Sampling):
      raise UnclipError(f'upsampler: give a Sampling, not {type(upsampler).__name__}')
    if upsampler.guidance_scale is not None:
      raise UnclipError('upsampler: it is not guided; give the guidance scale to the decoder')
    if num_candidates is None:
      num_candidates = 1 if config.prior is None else config.prior.num_candidates
    settings.check_count('the number of candidates', num_candidates)
    prior_settings = None
    if config.prior is not None:
      prior_settings = settings.resolve(
        'prior', config.prior.diffusion, config.prior.sampling, prior
      )
    decoder_settings = settings.resolve(
      'decoder', config.decoder.diffusion, config.decoder.sampling, decoder
    )
    guided = decoder_settings.guidance_scale is not None or (
      z_i is None and prior_settings.guidance_scale is not None
    )
    # Those of all upsamplers are checked, also where an earlier size is the end.
    ups_settings = tuple(
      settings.resolve(f'upsampler {i}', up.diffusion, up.sampling, upsampler)
      for i, up in enumerate(config.upsamplers)
    )
    captions = [caption for caption in captions for _ in range(num_images)]
    request = Request(
      captions=tuple(captions),
      tokens=self.tokenizer.encode(captions),
      null_tokens=self._null_tokens(negative_prompt, n, guided),
      seed=np.uint32(settings.check_seed(seed)),
      indices=np.uint32(first_image) + np.arange(n, dtype=np.uint32) % np.uint32(num_images),
      num_candidates=num_candidates,
      prior=prior_settings,
      decoder=decoder_settings,
      upsamplers=ups_settings[:num_ups],
      z_t=given_array('z_t', z_t, n, (config.clip.embed_dim,)),
      z_i=given_array('z_i', z_i, n, (config.clip.embed_dim,)),
      noise=self._given_noise(start_noise, n, num_candidates, num_ups),
      with_trajectories=with_trajectories,
    )
    for stage in ('clip', 'prior', 'decoder', *(f'upsampler_{i}' for i in range(num_ups))):
      if stage != 'prior' or z_i is None:
        self._check_has(stage)
    texts = dict.fromkeys([*captions, negative_prompt or ''])
    self._warn([notices.of_cut(self.tokenizer, text) for text in texts])
    self._warn([self._notice_of_unseen(text) for text in texts])
    return self._run(request, self._batch_size(n, batch_size), progress, on_batch)

  def encode_text(self, texts: str | Sequence[str]) -> Array:
    """CLIP's embeddings z_t of captions, float32 [n, embed_dim].

    Raises:
      UnclipError: as `sample`; the empty caption has an embedding too.
    """
    texts = settings.check_prompts(texts, allow_empty=True)
    self._check_has('clip')
    self._warn([notices.of_cut(self.tokenizer, text) for text in texts])
    return self._encode_text(texts)

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
    self._check_has('clip')
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

    def report(batch: int, stage: str, status: Any) -> None:
      if progress is not None:
        progress(Progress(stage, status, batch, num_batches))

    parts = []
    for batch in range(num_batches):
      rows = np.arange(batch * batch_size, min(n, (batch + 1) * batch_size))
      filled = request.take(np.pad(rows, (0, batch_size - len(rows)), mode='edge'))
      samples = pipeline.sample_batch(
        self.config, self.params, filled, self.dtype, self.mesh, functools.partial(report, batch)
      )
      parts.append(pipeline.first_rows(samples, len(rows)))
      if on_batch is not None:
        on_batch(parts[-1])
    return pipeline.concatenate(parts)

  def _batch_size(self, n: int, most: int | None) -> int:
    """A power of two if it may be: few sizes, so few programs, whatever numbers are asked for."""
    if most is None:
      most = 4 if jax.default_backend() == 'cpu' else 16
    settings.check_count('the batch size', most)
    size = min(most, 1 << (n - 1).bit_length())
    devices = 1 if self.mesh is None else self.mesh.shape[DATA_AXIS]
    return -(-size // devices) * devices

  def _null_tokens(self, negative_prompt: str | None, n: int, guided: bool) -> Any:
    """Tokens [n] of what guidance leads away from."""
    if negative_prompt is not None:
      settings.check_text(negative_prompt, 'the negative prompt', allow_empty=True)
      if not guided:
        raise UnclipError(
          'the negative prompt is without effect as nothing is guided: give the decoder a guidance '
          'scale above 1'
        )
    return self.tokenizer.encode([negative_prompt or ''] * n) if guided else None

  def _given_noise(
    self, noise: StartNoise | None, n: int, num_candidates: int, num_upsamplers: int
  ) -> StartNoise:
    """The caller's noise, checked; what is for stages that do not run is dropped."""
    config, noise = self.config, StartNoise() if noise is None else noise
    if not isinstance(noise, StartNoise) or not isinstance(noise.upsamplers, Sequence):
      raise UnclipError('start_noise must be a StartNoise, with a tuple for the upsamplers')
    ups = (*noise.upsamplers, *[None] * num_upsamplers)[:num_upsamplers]
    return StartNoise(
      given_array('start_noise.prior', noise.prior, n, (num_candidates, config.clip.embed_dim)),
      given_array('start_noise.decoder', noise.decoder, n, pipeline.image_shape(config.decoder)),
      tuple(
        given_array(
          f'start_noise.upsamplers[{i}]', x, n, pipeline.image_shape(config.upsamplers[i])
        )
        for i, x in enumerate(ups)
      ),
    )

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

  def _notice_of_unseen(self, text: str) -> str | None:
    if self.vocabulary is None:
      return None
    return notices.of_unseen(self.vocabulary, text, self._nearest_concept)

  def _warn(self, messages: Sequence[str | None]) -> None:
    for message in filter(None, messages):
      warn(message, stacklevel=_level_of_the_user())

  def _check_has(self, stage: str) -> None:
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
) -> Unclip:
  """Opens a model: the one that comes with the package, or a folder.

  Args:
    model: 'default', or the folder of a model or of a training run (`gs://` and the like work),
      or a model of a hub, 'owner/name' or 'owner/name@revision'.
    dtype: what networks compute in and parameters are held in, 'float32' or 'bfloat16'.
    num_devices: over how many devices a batch is spread.
    offload: keep the parameters in the host's memory, and each stage's on the devices only while
      it runs.

  Raises:
    UnclipError: there is no such model, one of its files is missing, damaged, or belongs to another
      architecture, or there are not so many devices; the message names the culprit and the remedy.
  """
  dtype = settings.check_dtype(dtype)
  settings.check_count('the number of devices', num_devices)
  config, params, tokenizer, mesh, vocabulary = load_parts(model, dtype, num_devices, offload)
  return Unclip(config, params, tokenizer, dtype, mesh, vocabulary)


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
