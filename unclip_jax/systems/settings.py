"""What a caller may ask for: prompts, sampling settings, sizes and dtypes, checked in one place."""

import dataclasses
import operator
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import ArSamplingConfig, DiffusionConfig, SamplingConfig, UnclipConfig
from unclip_jax.diffusion.guidance import Guidance
from unclip_jax.diffusion.schedule import FAST27_STEPS, with_eps_power
from unclip_jax.stages import common
from unclip_jax.types import Step, UnclipError

DTYPES = ('float32', 'bfloat16', 'float16')
_LISTED_DTYPES = 'float32, bfloat16 or float16'
_MAX_SEED = _MAX_INDEX = 2**32 - 1
_MAX_NUMBER = float(np.finfo(np.float32).max)
MAX_IMAGES = 10_000  # of a call, which holds them all


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one call samples a stage; None keeps what the model's `SamplingConfig` says.

  Attributes:
    num_steps: denoising steps, at most those of the schedule.
    sampler: one of `common.SAMPLERS`: 'ddpm' (ancestral), 'ddim', 'dpmpp_2m', 'unipc', ...
    guidance_scale: 0 or more; 1 is conditional only and costs half. Not for upsamplers.
    eta: of ddim and analytic, from 0 (deterministic) to 1 (the noise of ddpm).
    variance: of ddpm, 'fixed_small', 'fixed_large' or 'learned'.
    spacing: of the timesteps, one of `common.SPACINGS`: 'strided', 'trailing', 'log_snr', ...
    guidance_rescale: from 0 to 1, the share of the contrast that guidance adds which is taken back.
    guidance_interval: (from, to), in shares of the schedule from 0 (x_0) to 1 (noise): steps
      outside are conditional only, at half the cost.
  """

  num_steps: int | None = None
  sampler: str | None = None
  guidance_scale: float | None = None
  eta: float | None = None
  variance: str | None = None
  spacing: str | None = None
  guidance_rescale: float | None = None
  guidance_interval: tuple[float, float] | None = None


class StageSettings(NamedTuple):
  """A stage's settings, ready for its program.

  Attributes:
    plan: the transitions, Step of numpy arrays [n].
    guidance_scale: float32 scalar, None where there is no guidance, or all that there is to it.
    eta: float32 scalar.
    sampler: one of `common.SAMPLERS`.
    variance: of ddpm.
  """

  plan: Step
  guidance_scale: np.float32 | Guidance | None
  eta: np.float32
  sampler: str
  variance: str


def merge(default: SamplingConfig, asked: Sampling) -> SamplingConfig:
  """A model's own settings, changed where the caller asks for something else.

  Asking a model whose spacing is fast27 for another number of steps is asking for strides; asking
  for a solver is asking for trailing ones, and for analytic, for the noise of ddpm.
  """
  changes = {name: value for name, value in dataclasses.asdict(asked).items() if value is not None}
  sampler = changes.get('sampler', default.sampler)
  if sampler in common.SOLVERS and default.sampler not in common.SOLVERS:
    # With few steps solvers lose much at strided ones (docs/benchmarks.md).
    changes.setdefault('spacing', 'trailing')
  if sampler == 'analytic' != default.sampler:
    changes.setdefault('eta', 1.0)
  if default.spacing == 'fast27' and changes.get('num_steps', FAST27_STEPS) != FAST27_STEPS:
    changes.setdefault('spacing', 'strided')
  return dataclasses.replace(default, **changes)


def check_words(name: str, asked: Sampling) -> None:
  """Raises UnclipError where a stage is asked for a sampler or a spacing that does not exist.

  What else is wrong with a setting shows once the model is known.
  """
  for what, word, known in (
    ('sampler', asked.sampler, common.SAMPLERS),
    ('spacing', asked.spacing, common.SPACINGS),
  ):
    if word is not None and word not in known:
      raise UnclipError(f'{name}: there is no {what} {word!r}: take {common.listed(known)}')


def describe(default: SamplingConfig | ArSamplingConfig, asked: Sampling) -> dict[str, Any]:
  """The settings that have an effect, ready for json.dumps."""
  if isinstance(default, ArSamplingConfig):
    scale = {} if asked.guidance_scale is None else {'guidance_scale': asked.guidance_scale}
    return dataclasses.asdict(default) | scale
  used = dataclasses.asdict(merge(default, asked))
  if used['sampler'] != 'ddpm':
    del used['variance']
  if used['sampler'] not in common.WITH_ETA:
    del used['eta']
  for name, unused in (('guidance_rescale', 0.0), ('guidance_interval', None)):
    if used[name] == unused:
      del used[name]
  if used['spacing'] not in ('leading', 'inner'):
    del used['offset']
  if used['to_x_0']:
    del used['to_x_0']
  return used


def summary(sampling: SamplingConfig | ArSamplingConfig) -> str:
  """The settings in a few words."""
  guidance = f', guidance {sampling.guidance_scale:g}' if sampling.guidance_scale != 1 else ''
  if isinstance(sampling, ArSamplingConfig):
    return f'autoregressive{guidance}'
  return f'{sampling.sampler}, {sampling.num_steps} steps{guidance}'


def resolve(
  name: str,
  diffusion: DiffusionConfig,
  default: SamplingConfig,
  asked: Sampling,
  eps_power: np.ndarray | None = None,
) -> StageSettings:
  """The settings of one stage: those asked for, the model's own for the rest.

  Args:
    name: of the stage, for messages.
    diffusion: the stage's.
    default: the stage's own settings.
    asked: what the caller wants otherwise.
    eps_power: [T] of the stage, which analytic needs.

  Raises:
    UnclipError: a setting does not exist, is out of range, or would be without effect.
  """
  if not isinstance(asked, Sampling):
    raise UnclipError(f'{name}: give a Sampling, not {type(asked).__name__}')
  sampling = merge(default, asked)
  try:
    common.make_sampler(sampling.sampler, sampling.variance)
    plan = common.make_plan(diffusion, sampling)
  except UnclipError as error:
    raise UnclipError(f'{name}: {error}') from error
  check_count(f'{name}: the number of steps', sampling.num_steps)
  kind = sampling.sampler
  if kind not in common.WITH_ETA and asked.eta is not None:
    raise UnclipError(f'{name}: eta is without effect on {kind}: take the sampler ddim with it')
  if kind != 'ddpm' and asked.variance is not None:
    raise UnclipError(f'{name}: the variance is without effect on {kind}: take ddpm with it')
  if kind == 'analytic':
    if eps_power is None:
      raise UnclipError(
        f'{name}: analytic needs statistics that this model came without: measure them '
        '(experiments/emoji/measure_noise.py), or take another sampler'
      )
    plan = with_eps_power(plan, eps_power)
  learned = sampling.sampler == 'ddpm' and sampling.variance == 'learned'
  if learned and not diffusion.learned_variance:
    raise UnclipError(
      f'{name}: its network has no learned variance: take fixed_small or fixed_large'
    )
  scale = check_number(f'{name}: guidance scale', sampling.guidance_scale)
  eta = check_number(f'{name}: eta', sampling.eta)
  if scale < 0:
    raise UnclipError(f'{name}: guidance scale {scale:g} is negative: take 0 or more')
  if not 0 <= eta <= 1:
    raise UnclipError(f'{name}: eta {eta:g} is not within 0..1')
  given = {'rescale': asked.guidance_rescale, 'interval': asked.guidance_interval}
  for what, value in given.items():
    if scale == 1 and value is not None:
      raise UnclipError(
        f'{name}: a guidance {what} is without effect at a scale of 1: give a guidance scale too'
      )
  guidance_scale = _guidance(name, diffusion, sampling, plan, scale)
  return StageSettings(plan, guidance_scale, np.float32(eta), sampling.sampler, sampling.variance)


def _guidance(
  name: str, diffusion: DiffusionConfig, sampling: SamplingConfig, plan: Step, scale: float
) -> np.float32 | Guidance | None:
  """The guidance of a stage, None where nothing is guided."""
  rescale = check_number(f'{name}: guidance rescale', sampling.guidance_rescale)
  if not 0 <= rescale <= 1:
    raise UnclipError(f'{name}: guidance rescale {rescale:g} is not within 0..1')
  is_on = None
  if sampling.guidance_interval is not None:
    try:
      ends = tuple(map(float, sampling.guidance_interval))
    except (TypeError, ValueError):
      ends = ()
    if len(ends) != 2 or not 0 <= ends[0] < ends[1] <= 1:
      raise UnclipError(
        f'{name}: guidance interval {sampling.guidance_interval!r}: give two numbers within 0..1 '
        'that rise'
      )
    share = plan.t / max(diffusion.num_steps - 1, 1)
    is_on = (ends[0] <= share) & (share <= ends[1])
    if not is_on.any():
      nearest = share[np.abs(share - np.mean(ends)).argmin()]
      raise UnclipError(
        f'{name}: no step lies within the guidance interval {ends[0]:g} to {ends[1]:g}, the '
        f'nearest one is at {nearest:.3f}: take a wider one, or a scale of 1'
      )
    is_on = None if is_on.all() else is_on
  if scale == 1:
    return None
  if not rescale and is_on is None:
    return np.float32(scale)
  return Guidance(np.float32(scale), np.float32(rescale) if rescale else None, is_on)


def check_prompts(prompts: str | Sequence[str], allow_empty: bool = False) -> list[str]:
  """The prompts as a list.

  Args:
    prompts: one or several captions.
    allow_empty: whether a caption may be empty, as where z_i says what is to be seen.

  Raises:
    UnclipError: no prompt, one that is no string, an empty one, or one with control characters.
  """
  if isinstance(prompts, str):
    prompts = [prompts]
  if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
    raise UnclipError(f'a prompt must be text or a list of texts, not {type(prompts).__name__}')
  if not prompts:
    raise UnclipError('there is no prompt: give one or more')
  for i, prompt in enumerate(prompts, 1):
    check_text(prompt, f'prompt {i}' if len(prompts) > 1 else 'the prompt', allow_empty)
  return list(prompts)


def check_text(text: object, what: str, allow_empty: bool = False) -> str:
  """`text`, if a caption can be made of it; as `check_prompts`."""
  if not isinstance(text, str):
    raise UnclipError(f'{what} must be text, not {type(text).__name__}: {text!r}')
  if not text.strip() and not allow_empty:
    raise UnclipError(f'{what} is empty: say what is to be seen')
  for position, character in enumerate(text, 1):
    category = unicodedata.category(character)
    if category == 'Cs':
      raise UnclipError(f'{what} is not valid Unicode at character {position}: give it as UTF-8')
    if category == 'Cc':
      raise UnclipError(
        f'{what} has the control character U+{ord(character):04X} at character {position}: '
        'remove it'
      )
  return text


def check_count(what: str, value: object, least: int = 1, most: int | None = None) -> int:
  """`value` as an int.

  Raises:
    UnclipError: it is no whole number, or out of range.
  """
  try:
    count = operator.index(value)  # type: ignore[arg-type]
  except TypeError:
    raise UnclipError(f'{what} must be a whole number, not {value!r}') from None
  if isinstance(value, bool):
    raise UnclipError(f'{what} must be a whole number, not {value!r}')
  if count < least:
    raise UnclipError(f'{what} is {count}: take {least} or more')
  if most is not None and count > most:
    raise UnclipError(f'{what} is {count}: take at most {most}')
  return count


def check_total(num_prompts: int, num_images: int) -> None:
  """Raises UnclipError where a call would hold more pictures than memory does."""
  if num_prompts * num_images > MAX_IMAGES:
    raise UnclipError(
      f'{num_prompts * num_images:,} pictures are more than the {MAX_IMAGES:,} of one call: take '
      'fewer, and continue the series with the index of the first image'
    )


def check_callable(what: str, value: object) -> None:
  """Raises UnclipError where `value` is neither None nor a function."""
  if value is not None and not callable(value):
    raise UnclipError(f'{what} must be a function, not {value!r}')


def check_seed(seed: object, what: str = 'the seed') -> int:
  """`seed` within 0..2^32 - 1; as `check_count`."""
  return check_count(what, seed, 0, _MAX_SEED)


def check_first(index: object) -> int:
  """`index` of a prompt's first image; as `check_count`."""
  return check_count('the index of the first image', index, 0)


def check_last(index: object, where: str = '') -> int:
  """`index` of a prompt's last image; as `check_count`. Messages go on with `where`."""
  return check_count(f'the index of the last image{where}', index, 0, _MAX_INDEX)


def check_dtype(dtype: Any) -> np.dtype:
  """The dtype that networks compute in.

  Raises:
    UnclipError: it is none of `DTYPES`.
  """
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found is None or found.name not in DTYPES:
    name = dtype if found is None else found.name
    raise UnclipError(f'there is no dtype {name!r} here: take {_LISTED_DTYPES}')
  return found


def sizes(config: UnclipConfig) -> tuple[int, ...]:
  """The sizes that a model can stop at, in pixels, the decoder's first."""
  if config.decoder is None:
    return ()
  factor = 1 if config.autoencoder is None else config.autoencoder.factor
  return (config.decoder.image_size * factor, *(up.image_size for up in config.upsamplers))


def size_multiple(config: UnclipConfig) -> int | None:
  """What sizes have to be multiples of where latents may be of any; None where they may not."""
  if config.autoencoder is None or config.decoder is None or config.upsamplers:
    return None
  return config.autoencoder.factor * 2 ** (len(config.decoder.unet.multipliers) - 1)


def at_size(config: UnclipConfig, size: int | None) -> UnclipConfig:
  """The config with latents of the size that pictures of `size` pixels need.

  What has no latents, or ends in an upsampler, has the sizes of its stages and no others.

  Raises:
    UnclipError: latents of that size cannot be halved as often as the U-Net does.
  """
  multiple = size_multiple(config)
  if size is None or multiple is None or size in sizes(config):
    return config
  check_count('the size', size)
  if size % multiple:
    raise UnclipError(f'the size is {size}: this model makes multiples of {multiple} pixels')
  decoder = dataclasses.replace(config.decoder, image_size=size // config.autoencoder.factor)
  return dataclasses.replace(config, decoder=decoder)


def picture_size(config: UnclipConfig, size: int | None = None) -> int:
  """Pixels a side of the pictures of a call that asks for `size`; as `num_upsamplers`."""
  return sizes(config)[num_upsamplers(config, size)]


def num_upsamplers(config: UnclipConfig, size: int | None) -> int:
  """How many upsamplers make images of `size` pixels; None is the model's own size.

  Raises:
    UnclipError: no stage ends at that size.
  """
  known = sizes(config)
  size = config.default_size if size is None else size
  if size is None:
    return len(known) - 1
  if isinstance(size, bool | float) or size not in known:
    raise UnclipError(f'there is no size {size!r}: this model makes {" or ".join(map(str, known))}')
  return known.index(size)


def check_number(what: str, value: object) -> float:
  """`value` as a float.

  Raises:
    UnclipError: it is no number, or none that float32 can hold.
  """
  try:
    number = float(value)  # type: ignore[arg-type]
  except (TypeError, ValueError):
    number = None
  if number is None or isinstance(value, str | bool):
    raise UnclipError(f'{what} must be a number, not {value!r}')
  if not abs(number) <= _MAX_NUMBER:
    raise UnclipError(f'{what} is {number:g}: take a finite number of float32')
  return number
