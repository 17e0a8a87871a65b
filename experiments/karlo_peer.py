"""Karlo in diffusers and torch with our weights: what `bench_sampling` times and checks against.

Each stage is the loop of diffusers' `UnCLIPPipeline`: `PriorTransformer`, `UnCLIPTextProjModel`
with `UNet2DConditionModel`, and two `UNet2DModel`s, each with an `UnCLIPScheduler`. It is given
some help: it draws no noise, but takes that of our loop; it waits for the device once, in the end;
its convolutions run in the memory format that is the faster one. The tables of its schedulers are
put into float64: the float32 of diffusers has four digits of alpha_bar at the noisy end.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import accelerate
import diffusers
import jax
import numpy as np
import torch
import transformers
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.schedulers import scheduling_unclip

from unclip_jax.configs import UnclipConfig
from unclip_jax.diffusion import samplers
from unclip_jax.measure.timing import seconds
from unclip_jax.stages import common
from unclip_jax.systems.samples import Request
from unclip_jax.systems.settings import StageSettings
from unclip_jax.systems.stage_calls import Call
from unclip_jax.types import Params, UnclipError
from unclip_jax.weights import karlo
from unclip_jax.weights.rules import write_tensors

FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
_TRIED_STEPS = 2
_CLASSES = {
  'prior': diffusers.PriorTransformer,
  'text_proj': UnCLIPTextProjModel,
  'decoder': diffusers.UNet2DConditionModel,
  'super_res_first': diffusers.UNet2DModel,
  'super_res_last': diffusers.UNet2DModel,
}


def make_module(config: UnclipConfig, component: str) -> torch.nn.Module:
  """A network of diffusers, or the text encoder of transformers, of the sizes of a config."""
  end_id = config.clip.text.vocab_size - 1
  values = karlo.write_configs(config, 'CLIPTokenizer', end_id)[f'{component}/config.json']
  if component == 'text_encoder':
    values = {k: v for k, v in values.items() if k not in ('architectures', 'model_type')}
    return transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**values))
  return _CLASSES[component](**{k: v for k, v in values.items() if k[0] != '_'})


def to_torch(x: Any) -> torch.Tensor:
  """NHWC -> NCHW; other arrays as they are."""
  x = np.asarray(x)
  x = x if x.dtype.kind in 'biu' else x.astype(np.float32)
  tensor = torch.from_numpy(np.array(x))
  return tensor.movedim(-1, 1).contiguous() if tensor.ndim == 4 else tensor


class Karlo:
  """diffusers on the device that JAX runs on."""

  name = 'diffusers'

  def __init__(self, try_compile: bool, num_threads: int):
    backend = jax.default_backend()
    if backend not in ('cpu', 'gpu'):
      raise UnclipError(
        f'--peer diffusers: torch has no device {backend!r}: run it on a CPU or GPU'
      )
    if backend == 'gpu' and not torch.cuda.is_available():
      raise UnclipError(
        '--peer diffusers: torch sees no GPU, and JAX does: install a torch that is made for it'
      )
    self.device = torch.device('cuda' if backend == 'gpu' else 'cpu')
    self._try_compile = try_compile
    torch.set_num_threads(num_threads)
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    # Float32 proper on both sides, and the fastest of cuDNN's convolutions.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True

  def about(self) -> dict[str, Any]:
    """Versions and settings."""
    return {
      'name': self.name,
      'versions': {m.__name__: m.__version__ for m in (torch, diffusers, transformers)},
      'device': str(self.device),
      'threads': torch.get_num_threads(),
      'attention': 'scaled_dot_product_attention',
    }

  def check(self, config: UnclipConfig, request: Request) -> None:
    """Raises UnclipError where Karlo's pipeline samples nothing like what is asked."""
    karlo.write_configs(config, 'CLIPTokenizer', 0)
    stages = {
      'prior': request.prior,
      'decoder': request.decoder,
      'upsampler': request.upsamplers[0],
    }
    for name, settings in stages.items():
      if settings is None:
        raise UnclipError(f'--peer diffusers: a Karlo has a {name}, this model has none')
      _check(name, settings)
    if request.num_candidates != 1:
      raise UnclipError('--peer diffusers: its prior draws one candidate, set prior.num_candidates')

  def open(self, config: UnclipConfig, stage: str, params: Params, dtype: str) -> 'Stage':
    """A stage's networks with our parameters."""
    components, rules = karlo.rules(config)[stage]
    tensors = write_tensors(params, rules)
    modules = {}
    for component in components:
      with accelerate.init_empty_weights():
        module = make_module(config, component)
      own = {}
      for name in [name for name in tensors if name.startswith(f'{component}/')]:
        own[name.partition('/')[2]] = torch.from_numpy(np.array(tensors.pop(name), np.float32))
      module.load_state_dict(own, assign=True)
      modules[component] = (
        module.eval().requires_grad_(False).to(self.device, getattr(torch, dtype))
      )
    return Stage(stage, modules, self.device, getattr(torch, dtype), self._try_compile)


class Stage:
  """The networks of a stage, ready to be timed."""

  def __init__(
    self,
    stage: str,
    modules: dict[str, torch.nn.Module],
    device: torch.device,
    dtype: torch.dtype,
    try_compile: bool,
  ):
    self._stage, self.modules, self._device, self._dtype = stage, modules, device, dtype
    self._try_compile = try_compile
    self._format: str | None = None
    self.notes: dict[str, str] = {}

  def prepare(self, calls: Sequence[Call], config: Any) -> Mapping[str, Callable[[], torch.Tensor]]:
    """The contenders 'eager', and 'compiled' where torch.compile works, on the inputs of `calls`.

    The first batch size chooses the memory format; `notes` says of both.
    """
    run = functools.partial(self._run, self._inputs(calls), config)
    if self._format is None:
      self._choose_format(run)
    contenders = {'eager': functools.partial(run, self.modules)}
    if self._try_compile and (compiled := self._compile(run)) is not None:
      contenders['compiled'] = functools.partial(run, compiled)
    return contenders

  def read(self, result: torch.Tensor) -> np.ndarray:
    """NCHW -> NHWC, float32."""
    result = result.float().cpu()
    return (result.movedim(1, -1) if result.ndim == 4 else result).numpy()

  def _choose_format(self, run: Callable[..., Any]) -> None:
    self._format = 'contiguous'
    if self._stage in ('clip', 'prior'):
      return
    took = {}
    for name, memory_format in FORMATS.items():
      self._format = name
      for module in self.modules.values():
        module.to(memory_format=memory_format)
      run(self.modules, 1)
      took[name] = min(seconds(lambda: run(self.modules, _TRIED_STEPS))[1] for _ in range(2))
    self._format = min(took, key=took.get)
    for module in self.modules.values():
      module.to(memory_format=FORMATS[self._format])
    self.notes['memory_format'] = self._format
    for name, each in took.items():
      self.notes[f'seconds_of_{_TRIED_STEPS}_steps_{name}'] = f'{each:.4g}'

  def _compile(self, run: Callable[..., Any]) -> dict[str, torch.nn.Module] | None:
    torch.compiler.reset()
    compiled = {k: torch.compile(module, dynamic=False) for k, module in self.modules.items()}
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        _, took = seconds(lambda: run(compiled))
    except Exception as error:  # of as many kinds as compilers have
      first = (str(error).strip().splitlines() or [type(error).__name__])[0]
      self.notes['torch.compile'] = f'does not work here: {first[:200]}'
      return None
    self.notes['torch.compile'] = f'the first run took {took:.1f} s'
    return compiled

  def _inputs(self, calls: Sequence[Call]) -> dict[str, Any]:
    """Arrays of ours as tensors on the device, the unconditional half first."""
    args = calls[0].args
    if self._stage == 'clip':
      return {'ids': [self._place(call.args['ids_bt']).long() for call in calls]}
    given: dict[str, Any] = {'scale': None, 'steps': [int(t) for t in args['plan'].t]}
    given['t'] = torch.tensor(given['steps'], device=self._device)
    if args.get('guidance_scale') is not None:
      given['scale'] = float(args['guidance_scale'])
    halves = []
    match self._stage:
      case 'prior':
        halves = [args['null_text'], args['text']]
        keys, start = args['key_bn'][:, 0], np.asarray(args['x_start_bnd'])[:, 0]
      case 'decoder':
        halves = [args['prompt'].null_text, args['prompt'].text]
        given['z_i'] = self._place(args['prompt'].z_i)
        keys, start = args['key_b'], args['x_start']
      case _:
        given['low'] = self._place(args['low_bhwc'])
        keys, start = args['key_b'], args['x_start']
    for name in ('z_t', 'states', 'mask') if halves else ():
      kept = halves[1:] if given['scale'] is None else halves
      given[name] = torch.cat([self._place(getattr(half, name)) for half in kept])
    given['start'] = self._place(start)
    rows = [jax.tree.map(lambda x, i=i: x[i], args['plan']) for i in range(len(given['steps']))]
    given['noise'] = [
      self._place(samplers.step_noise(keys, row, np.shape(start)[1:])) for row in rows
    ]
    return given

  def _place(self, x: Any) -> torch.Tensor:
    tensor = to_torch(x).to(self._device)
    return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

  @torch.inference_mode()
  def _run(
    self,
    given: Mapping[str, Any],
    config: Any,
    modules: Mapping[str, torch.nn.Module],
    limit: int | None = None,
  ) -> torch.Tensor:
    """The stage, or its first `limit` steps, to its end on the device."""
    sample = {'clip': encode_text, 'prior': sample_prior, 'decoder': sample_decoder}
    made = sample.get(self._stage, sample_super_res)(modules, self._laid_out(given), config, limit)
    if self._device.type == 'cuda':
      torch.cuda.synchronize()
    return made

  def _laid_out(self, given: Mapping[str, Any]) -> dict[str, Any]:
    def lay(x: Any) -> Any:
      images = isinstance(x, torch.Tensor) and x.ndim == 4
      return x.contiguous(memory_format=FORMATS[self._format]) if images else x

    return {name: lay(x) for name, x in given.items()}


def encode_text(
  modules: Mapping[str, Any], given: Mapping[str, Any], config: Any, limit: int | None
) -> torch.Tensor:
  """z_t of the captions; the empty ones are read as well."""
  made = [modules['text_encoder'](ids) for ids in given['ids']]
  return made[0].text_embeds


def sample_prior(
  modules: Mapping[str, Any], given: Mapping[str, Any], config: Any, limit: int | None
) -> torch.Tensor:
  """z_i [b, d]."""
  prior = modules['prior']

  def evaluate(i: int, x: torch.Tensor) -> torch.Tensor:
    output = prior(
      x if given['scale'] is None else torch.cat([x] * 2),
      timestep=given['t'][i],
      proj_embedding=given['z_t'],
      encoder_hidden_states=given['states'],
      attention_mask=given['mask'],
    ).predicted_image_embedding
    if given['scale'] is None:
      return output
    uncond, cond = output.chunk(2)
    return uncond + given['scale'] * (cond - uncond)

  values = {'prediction_type': 'sample', 'clip_sample_range': config.diffusion.clip_x_0}
  return prior.post_process_latents(_loop(evaluate, values, config, given, limit))


def sample_decoder(
  modules: Mapping[str, Any], given: Mapping[str, Any], config: Any, limit: int | None
) -> torch.Tensor:
  """Images [b, 3, h, w]."""
  is_guided = given['scale'] is not None
  context, emb = modules['text_proj'](
    image_embeddings=given['z_i'],
    prompt_embeds=given['z_t'],
    text_encoder_hidden_states=given['states'],
    do_classifier_free_guidance=is_guided,
  )
  mask = torch.nn.functional.pad(given['mask'], (config.num_image_tokens, 0), value=True)

  def evaluate(i: int, x: torch.Tensor) -> torch.Tensor:
    output = modules['decoder'](
      sample=torch.cat([x] * 2) if is_guided else x,
      timestep=given['t'][i],
      encoder_hidden_states=context,
      class_labels=emb,
      attention_mask=mask,
    ).sample
    if not is_guided:
      return output
    uncond, cond = output.chunk(2)
    uncond, _ = uncond.split(x.shape[1], dim=1)
    cond, variance = cond.split(x.shape[1], dim=1)
    return torch.cat([uncond + given['scale'] * (cond - uncond), variance], dim=1)

  return _loop(evaluate, {'variance_type': 'learned_range'}, config, given, limit)


def sample_super_res(
  modules: Mapping[str, Any], given: Mapping[str, Any], config: Any, limit: int | None
) -> torch.Tensor:
  """Images [b, 3, h, w]; the second network takes the last step."""
  size = given['start'].shape[-2:]
  low = torch.nn.functional.interpolate(  # of which torch's CPU has no bfloat16
    given['low'].float(), size=size, mode='bicubic', align_corners=False, antialias=True
  ).to(given['low'].dtype)
  last = len(given['steps']) - 1

  def evaluate(i: int, x: torch.Tensor) -> torch.Tensor:
    network = modules['super_res_last' if i == last else 'super_res_first']
    return network(sample=torch.cat([x, low], dim=1), timestep=given['t'][i]).sample

  return _loop(evaluate, {}, config, given, limit)


def _loop(
  evaluate: Callable[[int, torch.Tensor], torch.Tensor],
  values: Mapping[str, Any],
  config: Any,
  given: Mapping[str, Any],
  limit: int | None,
) -> torch.Tensor:
  scheduler = make_scheduler(values, config)
  steps, noise = given['steps'], iter(given['noise'])
  scheduler.set_timesteps(len(steps))
  if scheduler.timesteps.tolist() != steps:
    raise ValueError(f'its timesteps are {scheduler.timesteps.tolist()}, ours {steps}')
  x = given['start']
  with mock.patch.object(scheduling_unclip, 'randn_tensor', lambda *_, **__: next(noise)):
    for i, t in enumerate(steps[:limit]):
      s = steps[i + 1] if i + 1 < len(steps) else None
      x = scheduler.step(evaluate(i, x), t, x, prev_timestep=s).prev_sample
  return x


def make_scheduler(values: Mapping[str, Any], config: Any) -> diffusers.UnCLIPScheduler:
  """diffusers' scheduler of a stage, its tables in float64."""
  scheduler = diffusers.UnCLIPScheduler(num_train_timesteps=config.diffusion.num_steps, **values)
  alpha_bar = torch.from_numpy(common.make_schedule(config.diffusion).alpha_bar.copy())
  scheduler.alphas_cumprod = alpha_bar
  scheduler.alphas = alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])
  scheduler.betas = 1 - scheduler.alphas
  return scheduler


def _check(name: str, settings: StageSettings) -> None:
  if settings.sampler != 'ddpm':
    raise UnclipError(
      f'--peer diffusers: its {name} is sampled by ddpm, not {settings.sampler}: take that'
    )
  n = len(settings.plan.t)
  scheduler = diffusers.UnCLIPScheduler()
  if n < 2:
    raise UnclipError(f'--peer diffusers: its {name} takes 2 steps or more, not {n}')
  scheduler.set_timesteps(n)
  if scheduler.timesteps.tolist() != [int(t) for t in settings.plan.t]:
    raise UnclipError(f"--peer diffusers: its {name} has Karlo's timesteps, this model has others")
