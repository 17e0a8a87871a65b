"""One batch through all stages, without the host waiting in between."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from unclip_jax.configs import DecoderConfig, UnclipConfig, UpsamplerConfig
from unclip_jax.data.tokenizer import Tokens
from unclip_jax.diffusion.samplers import Trajectory
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.sharding import DATA_AXIS, Mesh, place_batch
from unclip_jax.systems import programs
from unclip_jax.systems.offload import Offloaded
from unclip_jax.systems.settings import StageSettings
from unclip_jax.types import Array, Params, UnclipError


class StartNoise(NamedTuple):
  """The noise that each stage begins from, unit normal.

  Attributes:
    prior: [n, num_candidates, embed_dim].
    decoder: [n, size, size, 3].
    upsamplers: for each [n, size, size, 3].
  """

  prior: Array | np.ndarray | None = None
  decoder: Array | np.ndarray | None = None
  upsamplers: tuple[Array | np.ndarray | None, ...] = ()


class Trajectories(NamedTuple):
  """What each stage's loop went through; arrays [num_steps, n, ...]. The prior may not have run."""

  prior: Trajectory | None
  decoder: Trajectory
  upsamplers: tuple[Trajectory, ...]


class Samples(NamedTuple):
  """Images and what they came from; rows are prompts times images, those of a prompt together.

  Attributes:
    images: uint8 [n, h, w, 3].
    prompts: n captions.
    indices: int [n], each image's index within its seed.
    z_t: float32 [n, d], the captions' CLIP embeddings.
    z_i: float32 [n, d], the image embeddings that were decoded.
    stage_images: float32 [n, size, size, 3] around [-1, 1], the decoder's, then each upsampler's.
    start_noise: what the stages began from; give it back to begin there again.
    trajectories: if they were asked for.
  """

  images: np.ndarray
  prompts: tuple[str, ...]
  indices: np.ndarray
  z_t: np.ndarray
  z_i: np.ndarray
  stage_images: tuple[np.ndarray, ...]
  start_noise: StartNoise
  trajectories: Trajectories | None


class Progress(NamedTuple):
  """Where a call stands, for a `progress` function.

  Attributes:
    stage: 'clip', 'prior', 'decoder', 'upsampler_0', ...
    status: 'preparing' while its program is compiled or fetched, 'sampling', 'done'.
    batch: which of the batches, from 0.
    num_batches: how many there are.
  """

  stage: str
  status: Literal['preparing', 'sampling', 'done']
  batch: int
  num_batches: int


class Request(NamedTuple):
  """What a batch is to become, checked; arrays and captions have one row an image.

  Attributes:
    captions: of the images.
    tokens: of the captions.
    null_tokens: of what guidance leads away from; None where nothing is guided.
    seed: uint32.
    indices: uint32 [b], the images' indices within the seed.
    num_candidates: embeddings that the prior draws for each image.
    prior: settings, as the next two.
    decoder: settings.
    upsamplers: settings of those that run.
    z_t: [b, d] in place of the captions' own.
    z_i: [b, d] in place of the prior's.
    noise: in place of the seed's.
    with_trajectories: whether to return what lay between.
  """

  captions: tuple[str, ...]
  tokens: Tokens
  null_tokens: Tokens | None
  seed: np.uint32
  indices: np.ndarray
  num_candidates: int
  prior: StageSettings
  decoder: StageSettings
  upsamplers: tuple[StageSettings, ...]
  z_t: np.ndarray | None
  z_i: np.ndarray | None
  noise: StartNoise
  with_trajectories: bool

  def take(self, rows: np.ndarray) -> 'Request':
    """The request of some of the images."""
    arrays = (self.tokens, self.null_tokens, self.indices, self.z_t, self.z_i, self.noise)
    tokens, null_tokens, indices, z_t, z_i, noise = jax.tree.map(lambda x: x[rows], arrays)
    return self._replace(
      captions=tuple(self.captions[row] for row in rows),
      tokens=tokens,
      null_tokens=null_tokens,
      indices=indices,
      z_t=z_t,
      z_i=z_i,
      noise=noise,
    )


def encode_text(
  config: UnclipConfig, params: Mapping[str, Params], tokens: Tokens, dtype: Any, mesh: Mesh | None
) -> TextFeatures:
  """CLIP's features of captions [b]."""
  tokens = _place(tokens, mesh)
  return programs.encode_text(
    params['clip'], tokens.ids, tokens.mask, config=config.clip, dtype=dtype
  )


def sample_batch(
  config: UnclipConfig,
  params: Mapping[str, Params],
  request: Request,
  dtype: Any,
  mesh: Mesh | None,
  report: Callable[[str, Literal['preparing', 'sampling', 'done']], None],
) -> Samples:
  """Hands all stages to the device, then waits for them in their order.

  Args:
    config: of the model.
    params: of its stages.
    request: of b images.
    dtype: of the networks.
    mesh: the devices that b is spread over, a multiple of their number; None for the default one.
    report: told of each stage, before it is handed over, after that, and once it has run.

  Raises:
    UnclipError: a stage made a NaN; names it.
  """
  request_arrays = (request.tokens, request.null_tokens, request.indices, request.z_t, request.z_i)
  tokens, null_tokens, indices, z_t, z_i = _place(request_arrays, mesh)
  noise = _place(request.noise, mesh)
  with_trajectory = request.with_trajectories

  report('clip', 'preparing')
  own = {'clip': params['clip']}  # looked up once: it may have to come from the host
  text = encode_text(config, own, tokens, dtype, None)
  # Where nothing is guided it is not looked at, and has only to be of the right shape.
  null_text = text
  if null_tokens is not None:
    null_text = encode_text(config, own, null_tokens, dtype, None)
  del own
  if z_t is not None:
    text = text._replace(z_t=z_t)
  key_b = programs.image_keys(request.seed, indices)
  report('clip', 'sampling')
  finished: dict[str, Any] = {}

  def finish(name: str, output: Any) -> Any:
    """Stages follow each other without the host, but where each has to make room for the next."""
    finished[name] = jax.block_until_ready(output) if isinstance(params, Offloaded) else output
    return output

  finish('clip', text.z_t)

  prior, prior_start = None, None
  if z_i is None:
    report('prior', 'preparing')
    keys = programs.stage_keys(key_b, stage=programs.PRIOR)
    keys = programs.candidate_keys(keys, num_candidates=request.num_candidates)
    prior_start = _start(keys, (config.prior.embed_dim,), noise.prior)
    prior = programs.sample_prior(
      params['prior'],
      text,
      null_text,
      keys,
      request.prior.plan,
      request.prior.guidance_scale,
      request.prior.eta,
      prior_start,
      config=config.prior,
      sampler=request.prior.sampler,
      variance=request.prior.variance,
      with_trajectory=with_trajectory,
      dtype=dtype,
    )
    report('prior', 'sampling')
    z_i = finish('prior', prior.x_0)

  report('decoder', 'preparing')
  keys = programs.stage_keys(key_b, stage=programs.DECODER)
  decoder_start = _start(keys, image_shape(config.decoder), noise.decoder)
  decoder = programs.sample_decoder(
    params['decoder'],
    text,
    null_text,
    z_i,
    keys,
    request.decoder.plan,
    request.decoder.guidance_scale,
    request.decoder.eta,
    decoder_start,
    config=config.decoder,
    sampler=request.decoder.sampler,
    variance=request.decoder.variance,
    with_trajectory=with_trajectory,
    dtype=dtype,
  )
  report('decoder', 'sampling')
  image = finish('decoder', decoder.x_0)

  upsampled, upsampler_starts = [], []
  for i, stage in enumerate(request.upsamplers):
    name = f'upsampler_{i}'
    report(name, 'preparing')
    keys = programs.stage_keys(key_b, stage=programs.UPSAMPLER + i)
    x_start = _start(keys, image_shape(config.upsamplers[i]), noise.upsamplers[i])
    drawn = programs.sample_upsampler(
      params[name],
      image,
      keys,
      stage.plan,
      stage.eta,
      x_start,
      config=config.upsamplers[i],
      sampler=stage.sampler,
      variance=stage.variance,
      with_trajectory=with_trajectory,
      dtype=dtype,
    )
    report(name, 'sampling')
    image = finish(name, drawn.x_0)
    upsampled.append(drawn)
    upsampler_starts.append(x_start)
  images = programs.to_uint8(image)

  for name, output in finished.items():
    jax.block_until_ready(output)
    report(name, 'done')
  samples = Samples(
    images=images,
    prompts=(),
    indices=request.indices.astype(np.int64),
    z_t=text.z_t,
    z_i=z_i,
    stage_images=(decoder.x_0, *(drawn.x_0 for drawn in upsampled)),
    start_noise=StartNoise(prior_start, decoder_start, tuple(upsampler_starts)),
    trajectories=Trajectories(
      None if prior is None else prior.trajectory,
      decoder.trajectory,
      tuple(drawn.trajectory for drawn in upsampled),
    )
    if with_trajectory
    else None,
  )
  samples = jax.device_get(samples)
  _check_finite(samples)
  return samples._replace(prompts=request.captions)


def image_shape(stage: DecoderConfig | UpsamplerConfig) -> tuple[int, int, int]:
  """The shape of one image of a stage."""
  return (stage.image_size, stage.image_size, stage.unet.in_channels)


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


def _check_finite(samples: Samples) -> None:
  """A NaN would else be a black picture, which nobody could explain."""
  upsamplers = [f'upsampler_{i}' for i in range(len(samples.stage_images) - 1)]
  made = zip(
    ('clip', 'prior', 'decoder', *upsamplers),
    (samples.z_t, samples.z_i, *samples.stage_images),
    strict=True,
  )
  for name, array in made:
    if not np.isfinite(array).all():
      raise UnclipError(
        f'the {name} made a NaN or an infinity: take the dtype float32, or other weights'
      )


def _start(keys: Array, shape: tuple[int, ...], given: Any) -> Any:
  return programs.draw_start(keys, shape=shape) if given is None else given


def _place(rows: Any, mesh: Mesh | None) -> Any:
  """Spreads the rows of arrays over the devices, where there are several."""
  divides = mesh is not None and all(
    x.shape[0] % mesh.shape[DATA_AXIS] == 0 for x in jax.tree.leaves(rows)
  )
  return place_batch(rows, mesh) if divides and jax.tree.leaves(rows) else rows
