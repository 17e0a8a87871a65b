"""Pictures of which a part, or a little of all, is painted anew, by any model.

A network that was trained to complete pictures (GLIDE's, a decoder that `inpaints`) is given what
is known and where; by any other inpainting is RePaint's (`diffusion.resampling`). Image to image is
partial noising (SDEdit, Meng et al. 2022): the picture is noised as far as asked, and denoised as
another one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from unclip_jax.configs import DecoderConfig, GlideDecoderConfig
from unclip_jax.diffusion import gaussian, schedule
from unclip_jax.diffusion.guidance import Guidance
from unclip_jax.diffusion.resampling import jumping_timesteps
from unclip_jax.manipulate.latents import (
  AS_USUAL,
  Drawing,
  at_size,
  check_pictures,
  encode_images,
  thumbnail,
  to_x_0,
)
from unclip_jax.manipulate.rows import Row
from unclip_jax.stages import common, masks
from unclip_jax.systems import programs, settings
from unclip_jax.systems.given import as_array
from unclip_jax.systems.samples import Request
from unclip_jax.systems.settings import Sampling, StageSettings
from unclip_jax.systems.unclip import Unclip
from unclip_jax.types import Step, UnclipError

_STEPS = 50
_TIMES = 4


def inpaint(
  model: Unclip,
  image: Any,
  mask: Any,
  prompt: str = '',
  n: int = 1,
  jump: int = 5,
  times: int | None = None,
  z_i: Any = None,
  how: Drawing = AS_USUAL,
) -> Row:
  """A picture with a part painted anew; the rest is as it was, to the pixel.

  Args:
    model: any; its decoder need not know masks.
    image: [h, w, 3], uint8 or float in [-1, 1].
    mask: bool [h, w], true where it is to be painted.
    prompt: what the whole is to show. Around a picture (`extend`) it is best left out: an object
      is else drawn as large as training showed it.
    n: how many; they differ in their noise.
    jump: steps that are taken again together, so that both parts come to agree.
    times: how often they are taken, 1 for once. None: 4, but where the network knows masks none
      is taken again, as it sees at each step what is known.
    z_i: float [1 or n, d] to decode; None is the prior's of the prompt, and the picture's own
      where there is no prompt or no prior.
    how: as `Drawing` describes it.

  Raises:
    UnclipError: an argument is not as above, or the model has not what it takes.
  """
  picture, is_anew = _check_masked(image, mask)
  settings.check_count('the number of pictures', n, 1, settings.MAX_IMAGES)
  settings.check_count('jump', jump)
  if times is not None:
    settings.check_count('times', times)
  model = _by_resampling(at_size(model, how.size), times)
  decoder, size = model.config.decoder, settings.sizes(model.config)[0]
  pixels, x_0 = to_x_0(model, [picture])
  anew = _pool(is_anew, decoder.image_size)
  if model.config.autoencoder is not None:
    # The autoencoder's latents know something of their neighbours.
    anew = _grow(anew)

  def keep(request: Request) -> Request:
    rows, plan = len(request.captions), request.decoder.plan
    ends_at_x_0 = bool(plan.noise_var_next[-1] == 0)
    # A plan that ends at the least noisy timestep has it in no row.
    timesteps = plan.t if ends_at_x_0 else np.append(plan.t, 0)
    timesteps = jumping_timesteps(timesteps, jump, _TIMES if times is None else times)
    full = common.make_schedule(decoder.diffusion)
    plan = schedule.make_plan(full, timesteps, to_x_0=ends_at_x_0)
    known = 1 - np.broadcast_to(anew[None, :, :, None], (rows, *anew.shape, 1)).astype(np.float32)
    return request._replace(
      decoder=_with_plan(request.decoder, plan),
      known=(np.broadcast_to(x_0, (rows, *x_0.shape[1:])),),
      mask=(known,),
    )

  if masks.completes(decoder):
    # GLIDE's upsamplers read the picture as well, at their size.
    reads_whole = isinstance(decoder, GlideDecoderConfig)
    how_known = {
      'image': picture[None] if reads_whole else x_0,
      'mask': (is_anew if reads_whole else anew)[None],
    }
    sampling = Sampling(how.num_steps, guidance_scale=how.guidance_scale)
  else:
    how_known, sampling = {'revise': keep}, _ancestral(model, how)
  samples = model.sample(
    [prompt],
    how.seed,
    n,
    z_i=_seen(model, picture, prompt, z_i),
    decoder=sampling,
    size=how.size,
    **how_known,
  )
  # What was painted where the picture is known has only served what lies beside it.
  final = samples.images.shape[1]
  original = thumbnail(picture, final)
  images = np.where(_pool(is_anew, final)[None, :, :, None], samples.images, original)
  is_known = ~_pool(is_anew, size)
  off = np.abs(samples.stage_images[0] - pixels)[:, is_known] * 127.5
  measured = {
    'share_painted': round(float(is_anew.mean()), 4),
    # Before the original was put back; none where all is painted.
    'known_error_levels': round(float(off.mean()), 4) if off.size else None,
  }
  return Row(images, samples.z_i, measured)


def inpaint_in_turn(
  model: Unclip, image: Any, edits: Sequence[tuple[Any, str]], how: Drawing = AS_USUAL
) -> list[Row]:
  """Iterated edits (GLIDE, figure 3): each paints on what the one before made.

  Args:
    model: as of `inpaint`.
    image: [h, w, 3], uint8 or float in [-1, 1].
    edits: masks, bool [h, w], of the picture as it is given, and prompts.
    how: as `Drawing` describes it.

  Returns:
    A row of one picture for each edit.

  Raises:
    UnclipError: as `inpaint`; there is no edit.
  """
  if not edits:
    raise UnclipError('there is no edit: give one or more pairs of a mask and a prompt')
  checked = [(_check_masked(image, mask)[1], prompt) for mask, prompt in edits]
  rows: list[Row] = []
  for is_anew, prompt in checked:
    if rows:
      image = rows[-1].images[0]
      is_anew = _pool(is_anew, len(image))
    else:
      image = _square(check_pictures([image])[0])
    rows.append(inpaint(model, image, is_anew, prompt, how=how))
  return rows


def extend(image: Any, margin: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
  """A picture on a larger square, and the mask of what is new, for outpainting by `inpaint`.

  Args:
    image: [h, w, 3], uint8 or float in [-1, 1].
    margin: what is added on each side, as a share of the longer one, above 0 to 2.

  Returns:
    The square [s, s, 3], the picture in its middle and its border carried on around it, and bool
    [s, s].

  Raises:
    UnclipError: an argument is not as above.
  """
  (picture,) = check_pictures([image])
  margin = settings.check_number('the margin', margin)
  if not 0 < margin <= 2:
    raise UnclipError(f'the margin is {margin:g}: take more than 0, to 2')
  sides = picture.shape[:2]
  side = max(sides) + 2 * max(1, round(margin * max(sides)))
  before = [(side - length) // 2 for length in sides]
  pads = [(start, side - length - start) for start, length in zip(before, sides, strict=True)]
  is_anew = np.pad(np.zeros(sides, bool), pads, constant_values=True)
  return np.pad(picture, (*pads, (0, 0)), mode='edge'), is_anew


def image_to_image(
  model: Unclip,
  image: Any,
  prompt: str = '',
  strength: float = 0.3,
  n: int = 1,
  z_i: Any = None,
  how: Drawing = AS_USUAL,
) -> Row:
  """A picture that is noised in part and denoised as what the prompt says.

  Args:
    model: any.
    image: [h, w, 3], uint8 or float in [-1, 1].
    prompt: what it is to show.
    strength: how far it is noised, above 0 to 1, as a share of the schedule. The smaller the
      pictures of the decoder, the less leaves nothing of them.
    n: how many; they differ in their noise.
    z_i: as of `inpaint`.
    how: as `Drawing` describes it; steps are those of the whole schedule.

  Raises:
    UnclipError: an argument is not as above, the model has not what it takes, or no step is as
      little noised as that.
  """
  (picture,) = check_pictures([image])
  settings.check_count('the number of pictures', n, 1, settings.MAX_IMAGES)
  strength = settings.check_number('the strength', strength)
  if not 0 < strength <= 1:
    raise UnclipError(f'the strength is {strength:g}: take more than 0, to 1')
  model = at_size(model, how.size)
  pixels, x_0 = to_x_0(model, [picture])
  most = strength * (model.config.decoder.diffusion.num_steps - 1)
  steps = 0

  def from_the_middle(request: Request) -> Request:
    nonlocal steps
    plan = request.decoder.plan
    rows = np.flatnonzero(plan.t <= most)
    if not rows.size:
      raise UnclipError(
        f'a strength of {strength:g} leaves no step to take, of {len(plan.t)} in all: take more of '
        'either'
      )
    plan = schedule.take_part(plan, rows)
    steps = len(rows)
    keys = programs.stage_keys(
      programs.image_keys(request.seed, request.indices), stage=programs.DECODER
    )
    eps = programs.draw_start(keys, shape=x_0.shape[1:])
    first = jax.tree.map(lambda column: column[0], plan)
    x_start = np.asarray(gaussian.q_sample(x_0, eps, first))
    return request._replace(
      decoder=_with_plan(request.decoder, plan), noise=request.noise._replace(decoder=x_start)
    )

  samples = model.sample(
    [prompt],
    how.seed,
    n,
    z_i=_seen(model, picture, prompt, z_i),
    decoder=_ancestral(model, how),
    size=how.size,
    revise=from_the_middle,
  )
  change = np.abs(samples.stage_images[0] - pixels).mean() * 127.5
  measured = {
    'strength': strength,
    'num_steps': steps,
    'mean_change_levels': round(float(change), 4),
  }
  return Row(samples.images, samples.z_i, measured)


def _by_resampling(model: Unclip, times: int | None) -> Unclip:
  """The model as one whose decoder knows no masks, where resampling is asked for."""
  decoder = model.config.decoder
  if times is None or not masks.completes(decoder):
    return model
  if not isinstance(decoder, DecoderConfig):
    raise UnclipError(
      'times is without effect: this model is always given what is known of the picture: leave it '
      'out'
    )
  config = dataclasses.replace(model.config, decoder=dataclasses.replace(decoder, inpaints=False))
  return dataclasses.replace(model, config=config)


def _ancestral(model: Unclip, how: Drawing) -> Sampling:
  """DDPM, which draws from the forward process where a plan goes up."""
  learned = model.config.decoder.diffusion.learned_variance
  variance = 'learned' if learned else 'fixed_small'
  num_steps = _STEPS if how.num_steps is None else how.num_steps
  return Sampling(num_steps, 'ddpm', how.guidance_scale, None, variance, 'strided')


def _with_plan(decoder: StageSettings, plan: Step) -> StageSettings:
  """Settings with another plan through the same timesteps; they are guided where they were."""
  guided = decoder.guidance_scale
  if isinstance(guided, Guidance) and guided.is_on is not None:
    is_on = dict(zip(decoder.plan.t.tolist(), guided.is_on, strict=True))
    # The timestep that a plan ended at is as the last one that it had.
    rows = [is_on.get(t, guided.is_on[-1]) for t in plan.t.tolist()]
    guided = guided._replace(is_on=np.array(rows))
  return decoder._replace(plan=plan, guidance_scale=guided)


def _seen(model: Unclip, picture: np.ndarray, prompt: str, z_i: Any) -> Any:
  """z_i to decode; None where the prior makes it, or the model knows no CLIP."""
  config = model.config
  by_prior = config.prior is not None and isinstance(prompt, str) and prompt.strip()
  if z_i is not None or config.clip is None or by_prior:
    return z_i
  return encode_images(model, [picture])


def _check_masked(image: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
  """The middle squares of a picture and of its mask."""
  (picture,) = check_pictures([image])
  mask = as_array('mask', mask)
  if mask.dtype != bool or mask.ndim != 2:
    raise UnclipError(f'mask must be of booleans [h, w], not {mask.dtype} {list(mask.shape)}')
  if mask.shape != picture.shape[:2]:
    raise UnclipError(
      f'mask is of {list(mask.shape)} pixels and image of {list(picture.shape[:2])}: they must be '
      'of one size'
    )
  picture, mask = _square(picture), _square(mask)
  if not mask.any():
    raise UnclipError('mask has nothing to be painted in the middle square of the image')
  return picture, mask


def _square(array: np.ndarray) -> np.ndarray:
  """The middle of [h, w, ...], as `programs.prepare` cuts it out."""
  side = min(array.shape[:2])
  top, left = ((length - side) // 2 for length in array.shape[:2])
  return array[top : top + side, left : left + side]


def _pool(mask: np.ndarray, size: int) -> np.ndarray:
  """A mask [s, s] at another size: a pixel is painted if any is that it stands for."""
  starts = np.arange(size) * len(mask) // size
  for axis in (0, 1):
    mask = np.logical_or.reduceat(mask, starts, axis=axis)
  return mask


def _grow(mask: np.ndarray) -> np.ndarray:
  """A mask with one more pixel on each side."""
  size = len(mask)
  padded = np.pad(mask, 1)
  shifted = [padded[i : i + size, j : j + size] for i in range(3) for j in range(3)]
  return np.any(shifted, axis=0)
