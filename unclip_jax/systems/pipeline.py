"""One batch through all stages, without the host waiting in between."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from unclip_jax.configs import (
  AnyDecoderConfig,
  AnyUpsamplerConfig,
  ArPriorConfig,
  GlideUpsamplerConfig,
  KandinskyDecoderConfig,
  UnclipConfig,
)
from unclip_jax.data.tokenizer import Tokens
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.sharding import DATA_AXIS, Mesh, place_batch
from unclip_jax.systems import programs
from unclip_jax.systems.offload import Offloaded
from unclip_jax.systems.programs import Prompt, Sampled
from unclip_jax.systems.samples import (
  OF_ROWS,
  Request,
  Samples,
  StartNoise,
  Trajectories,
  check_finite,
  of_stages,
)
from unclip_jax.systems.settings import StageSettings
from unclip_jax.types import Array, Params

# (stage, 'preparing', 'sampling' or 'done'), and once done its pictures or None
Report = Callable[..., None]
# (program, its arguments, what is static of them by name) -> what it gives
Runner = Callable[..., Any]


def _run_now(program: Callable[..., Any], *args: Any, **static: Any) -> Any:
  return program(*args, **static)


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
  report: Report,
) -> Samples:
  """Hands all stages to the device, then waits for them in their order.

  Args:
    config: of the model.
    params: of its stages.
    request: of b images.
    dtype: of the networks.
    mesh: the devices that b is spread over, a multiple of their number; None for the default one.
    report: told of each stage, before it is handed over, after that, and once it has run; then of
      the pictures that it made, too.

  Raises:
    UnclipError: a stage made a NaN; names it.
  """
  run = _Run(config, params, request, dtype, mesh, report, _run_now)
  samples = _draw(run)
  run.wait()
  samples = jax.device_get(samples)
  check_finite({name: np.isfinite(array).all() for name, array in of_stages(samples).items()})
  return samples._replace(prompts=request.captions, indices=request.indices.astype(np.int64))


def draw_batch(
  config: UnclipConfig,
  params: Mapping[str, Params],
  request: Request,
  dtype: Any,
  report: Report = lambda *_: None,
  run: Runner = _run_now,
) -> Samples:
  """Hands all stages over and waits for none; also inside of a program that holds them all.

  The arguments that `sample_batch` has too are as there; nothing is checked or spread.

  Args:
    config: of the model.
    params: of its stages.
    request: of b images.
    dtype: of the networks.
    report: told of each stage before it is handed over, and after that.
    run: what is done with a program and its arguments, in place of calling it.
  """
  return _draw(_Run(config, params, request, dtype, None, report, run))


def _draw(run: '_Run') -> Samples:
  """All stages in their order; of the samples, prompts are left out."""
  request, config = run.request, run.config
  text, null_text, null_z_i = run.read_captions()
  prior, prior_start, z_i = None, None, request.z_i
  if z_i is None and config.prior is not None:
    prior, prior_start = run.sample_prior(text, null_text)
    z_i = prior.x_0
  if request.is_negative and null_z_i is not None and config.prior is not None:
    null_z_i = run.sample_null_z_i(null_text)
  prompt = run.make_prompt(text, null_text, z_i, null_z_i)
  decoder, decoder_start = run.sample_decoder(prompt)
  image, latents = decoder.x_0, None
  if config.autoencoder is not None:
    image, latents = run.decode_latents(decoder.x_0), decoder.x_0
  stage_images, upsampled, upsampler_starts = [image], [], []
  for i in range(len(request.upsamplers)):
    drawn, x_start = run.sample_upsampler(i, stage_images[-1], prompt)
    stage_images.append(drawn.x_0)
    upsampled.append(drawn)
    upsampler_starts.append(x_start)
  images = run.run(programs.to_uint8, stage_images[-1])
  trajectories = None
  if request.with_trajectories:
    trajectories = Trajectories(
      None if prior is None else prior.trajectory,
      decoder.trajectory,
      tuple(drawn.trajectory for drawn in upsampled),
    )
  return Samples(
    images=images,
    prompts=(),
    indices=request.indices,
    z_t=None if text is None else text.z_t,
    z_i=z_i,
    stage_images=tuple(stage_images),
    latents=latents,
    start_noise=StartNoise(prior_start, decoder_start, tuple(upsampler_starts)),
    trajectories=trajectories,
  )


class _Run:
  """A batch on its way; each method hands a stage over and does not wait for it."""

  def __init__(
    self,
    config: UnclipConfig,
    params: Mapping[str, Params],
    request: Request,
    dtype: Any,
    mesh: Mesh | None,
    report: Report,
    run: Runner,
  ):
    self.config, self.params, self.dtype = config, params, dtype
    self.report, self.run = report, run
    placed = {name: _place(getattr(request, name), mesh) for name in OF_ROWS}
    self.request = request._replace(**placed)
    self.key_b = run(programs.image_keys, self.request.seed, self.request.indices)
    self.finished: dict[str, Any] = {}

  def read_captions(self) -> tuple[TextFeatures | None, TextFeatures | None, Array | None]:
    """CLIP's features of the captions and of what guidance leads away from, and "no z_i".

    Where nothing is guided the second has only to be of the right shape.
    """
    request, config = self.request, self.config.clip
    if config is None:
      return None, None, None
    self.report('clip', 'preparing')
    own = self.params['clip']  # looked up once: it may have to come from the host
    text = null_text = null_z_i = None
    if config.text is not None:

      def encode(tokens: Tokens) -> TextFeatures:
        ids, mask = tokens
        return self.run(programs.encode_text, own, ids, mask, config=config, dtype=self.dtype)

      text = null_text = encode(request.tokens)
      if request.null_tokens is not None:
        null_text = encode(request.null_tokens)
      if request.z_t is not None:
        text = text._replace(z_t=request.z_t)
    is_guided = request.decoder.guidance_scale is not None
    if is_guided and isinstance(self.config.decoder, KandinskyDecoderConfig):
      rows = request.indices.shape[0]
      null_z_i = self.run(programs.encode_zeros, own, config=config, rows=rows, dtype=self.dtype)
    self.report('clip', 'sampling')
    self._finish('clip', (text, null_text, null_z_i))
    return text, null_text, null_z_i

  def sample_prior(
    self, text: TextFeatures, null_text: TextFeatures
  ) -> tuple[Sampled, Array | None]:
    """z_i of the captions, and the noise that they began from, if from any."""
    self.report('prior', 'preparing')
    scale = self.request.prior.guidance_scale
    drawn, x_start = self._prior(programs.PRIOR, text, null_text, scale, self.request.noise.prior)
    self.report('prior', 'sampling')
    return self._finish('prior', drawn), x_start

  def sample_null_z_i(self, null_text: TextFeatures) -> Array:
    """z_i of the negative captions, which Kandinsky leads the decoder away from."""
    drawn, _ = self._prior(programs.NEGATIVE_PRIOR, null_text, null_text, None, None)
    return drawn.x_0

  def make_prompt(
    self,
    text: TextFeatures | None,
    null_text: TextFeatures | None,
    z_i: Array | None,
    null_z_i: Array | None,
  ) -> Prompt:
    """What decoder and upsamplers are given, with the captions as they read them."""
    request, config = self.request, self.config
    if config.decoder_text is not None:
      self.report('decoder_text', 'preparing')
      own = self.params['decoder_text']

      def encode(tokens: Tokens) -> TextFeatures:
        ids, mask = tokens
        encoder = config.decoder_text
        program = programs.encode_decoder_text
        return self.run(program, own, ids, mask, config=encoder, dtype=self.dtype)

      text = null_text = encode(request.decoder_tokens)
      if request.null_decoder_tokens is not None:
        null_text = encode(request.null_decoder_tokens)
      self.report('decoder_text', 'sampling')
      self._finish('decoder_text', (text, null_text))
    elif isinstance(config.decoder, KandinskyDecoderConfig):
      text = null_text = None  # 2.2 reads none
    elif text is None:  # GLIDE reads the tokens themselves
      text = null_text = TextFeatures(*request.tokens, None, None)
      if request.null_tokens is not None:
        null_text = TextFeatures(*request.null_tokens, None, None)
    return Prompt(text, null_text, z_i, null_z_i, request.noise_level)

  def sample_decoder(self, prompt: Prompt) -> tuple[Sampled, Array]:
    """Images, or latents, and the noise that they began from."""
    config, settings = self.config.decoder, self.request.decoder
    self.report('decoder', 'preparing')
    keys = self.run(programs.stage_keys, self.key_b, stage=programs.DECODER)
    x_start = self._start(keys, image_shape(config), self.request.noise.decoder)
    drawn = self.run(
      programs.sample_decoder,
      self.params['decoder'],
      self._with_known(prompt, 0),
      keys,
      settings.plan,
      settings.guidance_scale,
      settings.eta,
      x_start,
      **self._static(config, settings),
    )
    self.report('decoder', 'sampling')
    return self._finish('decoder', drawn), x_start

  def decode_latents(self, latents: Array) -> Array:
    """Images of what the decoder painted."""
    self.report('autoencoder', 'preparing')
    image = self.run(
      programs.decode_latents,
      self.params['autoencoder'],
      latents,
      config=self.config.autoencoder,
      tile=self.request.tile,
      dtype=self.dtype,
    )
    self.report('autoencoder', 'sampling')
    return self._finish('autoencoder', image)

  def sample_upsampler(self, i: int, low: Array, prompt: Prompt) -> tuple[Sampled, Array]:
    """Larger images of those of the stage before, and the noise that they began from."""
    name, config, settings = f'upsampler_{i}', self.config.upsamplers[i], self.request.upsamplers[i]
    self.report(name, 'preparing')
    keys = self.run(programs.stage_keys, self.key_b, stage=programs.UPSAMPLER + i)
    x_start = self._start(keys, image_shape(config), self.request.noise.upsamplers[i])
    # What an upsampler does not look at would be an argument of its program all the same.
    reads = isinstance(config, GlideUpsamplerConfig)
    drawn = self.run(
      programs.sample_upsampler,
      self.params[name],
      low,
      self._with_known(prompt, 1 + i) if reads else Prompt(None, None, None),
      keys,
      settings.plan,
      settings.eta,
      x_start,
      **self._static(config, settings),
    )
    self.report(name, 'sampling')
    return self._finish(name, drawn), x_start

  def wait(self) -> None:
    """Until all stages have run, telling of each."""
    painted = 'decoder' if self.config.autoencoder is None else 'autoencoder'
    for name, output in self.finished.items():
      jax.block_until_ready(output)
      is_picture = name == painted or name.startswith('upsampler')
      image = output.x_0 if isinstance(output, Sampled) else output
      self.report(name, 'done', image if is_picture else None)

  def _prior(
    self,
    stage: int,
    text: TextFeatures,
    null_text: TextFeatures,
    guidance_scale: Any,
    noise: Any,
  ) -> tuple[Sampled, Array | None]:
    config, settings = self.config.prior, self.request.prior
    keys = self.run(programs.stage_keys, self.key_b, stage=stage)
    keys = self.run(programs.candidate_keys, keys, num_candidates=self.request.num_candidates)
    if isinstance(config, ArPriorConfig):
      params, program = self.params['prior'], programs.sample_ar_prior
      args = (params, text, null_text, keys, guidance_scale)
      return self.run(program, *args, config=config, dtype=self.dtype), None
    x_start = self._start(keys, (config.embed_dim,), noise)
    drawn = self.run(
      programs.sample_prior,
      self.params['prior'],
      text,
      null_text,
      keys,
      settings.plan,
      guidance_scale,
      settings.eta,
      x_start,
      **self._static(config, settings),
    )
    return drawn, x_start

  def _start(self, keys: Array, shape: tuple[int, ...], given: Any) -> Any:
    return self.run(programs.draw_start, keys, shape=shape) if given is None else given

  def _static(self, config: Any, settings: StageSettings) -> dict[str, Any]:
    """What makes the program of a sampled stage another one."""
    return {
      'config': config,
      'sampler': settings.sampler,
      'variance': settings.variance,
      'with_trajectory': self.request.with_trajectories,
      'dtype': self.dtype,
    }

  def _with_known(self, prompt: Prompt, stage: int) -> Prompt:
    """With the picture that is to be completed, at the size of a stage."""
    request = self.request
    if request.known is None or stage >= len(request.known):
      return prompt
    return prompt._replace(known=request.known[stage], mask=request.mask[stage])

  def _finish(self, name: str, output: Any) -> Any:
    """Stages follow each other without the host, but where each has to make room for the next."""
    is_offloaded = isinstance(self.params, Offloaded)
    self.finished[name] = jax.block_until_ready(output) if is_offloaded else output
    return output


def image_shape(stage: AnyDecoderConfig | AnyUpsamplerConfig) -> tuple[int, int, int]:
  """The shape of one image, or latent, of a stage."""
  return (stage.image_size, stage.image_size, stage.unet.in_channels)


def _place(rows: Any, mesh: Mesh | None) -> Any:
  """Spreads the rows of arrays over the devices, where there are several."""
  divides = mesh is not None and all(
    x.shape[0] % mesh.shape[DATA_AXIS] == 0 for x in jax.tree.leaves(rows)
  )
  return place_batch(rows, mesh) if divides and jax.tree.leaves(rows) else rows
