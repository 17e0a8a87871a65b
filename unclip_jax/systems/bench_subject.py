"""What is measured: a model, of the package, of a folder, or of random weights, and how."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.configs import ArPriorConfig, GlideDecoderConfig, UnclipConfig
from unclip_jax.data.tokenizer import Tokens
from unclip_jax.presets import preset
from unclip_jax.systems import by_columns, requests
from unclip_jax.systems.requests import Given, Samplings
from unclip_jax.systems.samples import Request
from unclip_jax.systems.settings import Sampling
from unclip_jax.systems.stage_calls import random_params
from unclip_jax.systems.unclip import Unclip, load
from unclip_jax.types import Params, UnclipError

CAPTION = 'a red apple on a table'
_CAPTION_TOKENS = 9
_GUIDANCE = 2.0  # where guidance is asked of a model that has none of its own


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured, and how.

  Attributes:
    batch_sizes: images at a time; filled up where the devices do not divide one.
    devices: over how many a batch is spread, one after the other.
    model_devices: how many of them share one copy of the parameters.
    dtype: of networks and parameters.
    steps: of each stage of the model that denoises in their order (prior, decoder, upsamplers
      together); empty: the model's own.
    sampler: of all of them; None: the model's own.
    guided: whether prior and decoder are guided; None: as the model is.
    stages: those to measure, `end_to_end` among them; empty: all.
    rounds: how often each is timed.
    profile: a folder for a trace of one run of each stage (jax.profiler); None for none.
  """

  batch_sizes: tuple[int, ...] = (1,)
  devices: tuple[int, ...] = (1,)
  model_devices: int = 1
  dtype: str = 'float32'
  steps: tuple[int, ...] = ()
  sampler: str | None = None
  guided: bool | None = None
  stages: tuple[str, ...] = ()
  rounds: int = 3
  profile: str | None = None


class Subject(NamedTuple):
  """The model that is measured.

  Attributes:
    name: for the report.
    config: of its stages.
    tokenizer: of its captions, and
    decoder_tokenizer: of its decoder's; anything with `encode`.
    read: (stage, dtype) -> its parameters, which the subject need not keep.
    eps_power: of stages, what the sampler analytic needs.
  """

  name: str
  config: UnclipConfig
  tokenizer: Any
  decoder_tokenizer: Any
  read: Callable[[str, Any], Params]
  eps_power: Mapping[str, np.ndarray] = MappingProxyType({})


class AnyWords:
  """Reads any text as tokens of a vocabulary that nobody wrote: for weights that nobody trained."""

  def __init__(self, vocab_size: int, context_length: int):
    self._vocab_size, self._context_length = vocab_size, context_length
    self.end_id = vocab_size - 1

  def encode(self, texts: Sequence[str]) -> Tokens:
    """Captions of nine tokens, the empty one of two; each ends with the last of the vocabulary."""
    lengths = np.array([min(_CAPTION_TOKENS, self._context_length) if t else 2 for t in texts])
    place = np.arange(self._context_length)[None]
    ids = np.random.default_rng(0).integers(1, self.end_id, (1, self._context_length))
    ids = np.where(place < lengths[:, None] - 1, ids, 0)
    ids = np.where(place == lengths[:, None] - 1, self.end_id, ids)
    return Tokens(ids.astype(np.int32), place < lengths[:, None])


def of_preset(name: str, config: UnclipConfig | None = None) -> Subject:
  """Random weights of a preset's sizes, or of a config that is given; one stage at a time.

  The image tower, which draws no pictures, is left out.

  Raises:
    UnclipError: there is no such preset.
  """
  config = preset(name) if config is None else config
  if config.clip is not None and config.prior is not None:
    config = dataclasses.replace(config, clip=dataclasses.replace(config.clip, vision=None))
  text = config.clip.text
  words = AnyWords(text.vocab_size, text.context_length)

  def read(stage: str, dtype: Any) -> Params:
    params = random_params(config, stage, dtype)
    return by_columns.lay_out(params) if stage == 'prior' else params

  return Subject(f'{name} (random weights)', config, words, None, read)


def of_model(model: str, dtype: Any, prior: str | None = None) -> Subject:
  """A model of `load`, all stages in memory.

  Raises:
    UnclipError: as `load`.
  """
  loaded: Unclip = load(model, dtype, prior=prior)
  readers = (loaded.tokenizer, loaded.decoder_tokenizer)
  read = lambda stage, _: loaded.params[stage]  # noqa: E731
  return Subject(model, loaded.config, *readers, read, loaded.eps_power)


def make_request(subject: Subject, options: Options, rows: int) -> Request:
  """The request of a batch of `rows` pictures.

  Raises:
    UnclipError: the steps or the sampler do not suit the model.
  """
  config = subject.config
  if config.decoder is None:
    raise UnclipError(f'{subject.name} has no decoder: it draws no pictures')
  sampled = {'prior': config.prior, 'decoder': config.decoder}
  sampled |= {'upsampler': config.upsamplers[0]} if config.upsamplers else {}
  sampled = {name: stage for name, stage in sampled.items() if stage is not None}
  denoising = [name for name, stage in sampled.items() if not isinstance(stage, ArPriorConfig)]
  if options.steps and len(options.steps) != len(denoising):
    raise UnclipError(
      f'--steps {" ".join(map(str, options.steps))}: give {len(denoising)} numbers, of '
      f'{", ".join(denoising)}'
    )
  steps = dict(zip(denoising, options.steps, strict=False))
  asked = {}
  for name, stage in sampled.items():
    scale = None
    if options.guided is not None and name != 'upsampler':
      own = stage.sampling.guidance_scale
      scale = (_GUIDANCE if own == 1 else own) if options.guided else 1.0
    sampler = options.sampler if name in denoising else None
    asked[name] = Sampling(steps.get(name), sampler, scale)
  nothing = Sampling()
  samplings = Samplings(*(asked.get(name, nothing) for name in Samplings._fields))
  z_i, caption = None, CAPTION
  if config.prior is None and not isinstance(config.decoder, GlideDecoderConfig):
    z_i = np.random.default_rng(0).normal(size=(1, config.clip.embed_dim)).astype(np.float32)
    caption = ''
  given = Given(None, z_i, None, None, None, None)
  readers = (subject.tokenizer, subject.decoder_tokenizer)
  # One caption many times, as requests count captions times images.
  return requests.make(
    config,
    *readers,
    caption,
    0,
    rows,
    0,
    None,
    samplings,
    None,
    None,
    given,
    False,
    None,
    subject.eps_power,
  )
