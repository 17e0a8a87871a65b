"""The same training steps in diffusers, transformers and torch, with our weights.

A step is the forward pass, the mean squared error (CLIP's: the contrastive loss), the gradients,
their clipping, AdamW (fused) and the average of the parameters. It is given some help: x_t and the
timesteps are drawn once, before; the decoder's loss leaves out the bound on the learned variance;
convolutions run in the memory format that is the faster one. In bfloat16 it runs under autocast,
its parameters and moments float32 as ours are.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
import transformers

from experiments.karlo_peer import FORMATS, Karlo, to_torch
from experiments.training_cases import Case
from unclip_jax.measure.timing import seconds
from unclip_jax.stages.common import draw_training_step
from unclip_jax.train.state import OptimizerConfig
from unclip_jax.types import Array
from unclip_jax.weights import karlo, transformers_clip
from unclip_jax.weights.rules import write_tensors

_EMA_RATE = 1e-4
Losses = Callable[[Mapping[str, torch.nn.Module], Mapping[str, Any]], torch.Tensor]


class TrainingPeer:
  """Training steps on the device that JAX runs on."""

  def __init__(self, try_compile: bool, num_threads: int):
    self._karlo = Karlo(try_compile, num_threads)
    self._try_compile = try_compile

  def about(self) -> dict[str, Any]:
    """Versions and settings."""
    return self._karlo.about()

  def prepare(
    self, case: Case, key: Array, optimizer: OptimizerConfig, dtype: str, num_updates: int
  ) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """The contenders 'eager', and 'compiled' where torch.compile works, and notes on them.

    Args:
      case: what is trained.
      key: that our loss is given at the first update.
      optimizer: constant.
      dtype: of the networks.
      num_updates: of one call, which returns the loss of its first.

    Raises:
      UnclipError: Karlo has no such stage.
    """
    if case.stage == 'clip':
      modules = {'clip': _make_clip(case)}
    else:
      karlo.write_configs(case.config, 'CLIPTokenizer', 0)  # for its errors
      modules = self._karlo.open(case.config, case.stage, case.params, 'float32').modules
    for module in modules.values():
      module.to(self._karlo.device).train().requires_grad_(True)
    given = self._inputs(case, key)
    loss_of = functools.partial(_LOSSES.get(case.stage, _upsampler_loss), config=case.config)
    context = functools.partial(
      torch.autocast, self._karlo.device.type, torch.bfloat16, enabled=dtype == 'bfloat16'
    )

    def gradients(modules: Mapping[str, torch.nn.Module], given: Mapping[str, Any]) -> torch.Tensor:
      with context():
        loss = loss_of(modules, given)
      loss.backward()
      return loss.detach()

    notes: dict[str, str] = {}
    if case.stage not in ('clip', 'prior'):
      given = self._choose_format(modules, given, gradients, notes)
    params = [p for module in modules.values() for p in module.parameters()]
    average = [p.detach().clone() for p in params]
    adamw = torch.optim.AdamW(
      params,
      optimizer.learning_rate,
      (optimizer.b1, optimizer.b2),
      optimizer.eps,
      optimizer.weight_decay,
      fused=True,
    )

    def run(modules: Mapping[str, torch.nn.Module]) -> float:
      losses = []
      for _ in range(num_updates):
        losses.append(gradients(modules, given))
        torch.nn.utils.clip_grad_norm_(params, optimizer.max_grad_norm, foreach=True)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
          torch._foreach_lerp_(average, params, _EMA_RATE)
      self._wait()
      return float(losses[0])

    contenders = {'eager': functools.partial(run, modules)}
    if self._try_compile and (compiled := self._compile(modules, given, gradients, notes)):
      contenders['compiled'] = functools.partial(run, compiled)
    return contenders, notes

  def _inputs(self, case: Case, key: Array) -> dict[str, Any]:
    """What our loss draws for the first update, and the rest of the batch."""
    given: dict[str, Any] = {}
    batch, own = case.batch, case.config
    match case.stage:
      case 'clip':
        statistics = own.clip.pixel_mean, own.clip.pixel_std
        mean, std = (np.float32(v)[None, None, None] for v in statistics)
        pixels = ((np.asarray(batch['image']) + 1) / 2 - mean) / std
        given = {'pixels': pixels, 'ids': np.asarray(batch['text'].ids, np.int64)}
      case 'prior':
        statistics = case.params['statistics']
        x_0 = (batch['z_i'] - statistics['mean'][None]) / statistics['std'][None]
        x_t, _, step = draw_training_step(own.prior.diffusion, jax.random.split(key)[1], x_0)
        given = {'x_t': x_t, 't': step.t, 'target': x_0}
      case 'decoder':
        key_step = jax.random.split(key, 3)[1]
        x_t, eps, step = draw_training_step(own.decoder.diffusion, key_step, batch['image'])
        given = {'x_t': x_t, 't': step.t, 'target': eps, 'z_i': batch['z_i']}
      case _:
        up = own.upsamplers[0]
        x_t, eps, step = draw_training_step(up.diffusion, jax.random.split(key)[0], batch['image'])
        given = {'x_t': x_t, 't': step.t, 'target': eps, 'low': batch['low']}
    if case.stage in ('prior', 'decoder'):
      given |= {name: getattr(batch['text'], name) for name in ('z_t', 'states', 'mask')}
    return {name: to_torch(value).to(self._karlo.device) for name, value in given.items()}

  def _choose_format(
    self,
    modules: Mapping[str, torch.nn.Module],
    given: Mapping[str, Any],
    gradients: Losses,
    notes: dict[str, str],
  ) -> dict[str, Any]:
    """Lays the networks out as they are faster; returns the inputs laid out likewise."""
    took = {}
    for name in [*FORMATS, None]:
      chosen = FORMATS[min(took, key=took.get) if name is None else name]
      for module in modules.values():
        module.to(memory_format=chosen)
      laid = {k: x.contiguous(memory_format=chosen) if x.ndim == 4 else x for k, x in given.items()}
      if name is not None:
        run = functools.partial(self._run_once, modules, laid, gradients)
        run()
        took[name] = min(seconds(run)[1] for _ in range(2))
        notes[f'seconds_of_gradients_{name}'] = f'{took[name]:.4g}'
    notes['memory_format'] = min(took, key=took.get)
    return laid

  def _compile(
    self,
    modules: Mapping[str, torch.nn.Module],
    given: Mapping[str, Any],
    gradients: Losses,
    notes: dict[str, str],
  ) -> dict[str, torch.nn.Module] | None:
    torch.compiler.reset()
    compiled = {k: torch.compile(module, dynamic=False) for k, module in modules.items()}
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        _, took = seconds(functools.partial(self._run_once, compiled, given, gradients))
    except Exception as error:  # of as many kinds as compilers have
      first = (str(error).strip().splitlines() or [type(error).__name__])[0]
      notes['torch.compile'] = f'does not work here: {first[:200]}'
      return None
    notes['torch.compile'] = f'the first run took {took:.1f} s'
    return compiled

  def _run_once(
    self, modules: Mapping[str, torch.nn.Module], given: Mapping[str, Any], gradients: Losses
  ) -> None:
    gradients(modules, given)
    for module in modules.values():
      module.zero_grad(set_to_none=True)
    self._wait()

  def _wait(self) -> None:
    if self._karlo.device.type == 'cuda':
      torch.cuda.synchronize()


def _make_clip(case: Case) -> torch.nn.Module:
  """transformers' CLIPModel with our parameters."""
  config, params = case.config.clip, case.params
  files = transformers_clip.write_model_configs(config, config.text.vocab_size - 1)
  values = files['config.json']
  module = transformers.CLIPModel(
    transformers.CLIPConfig(
      text_config=values['text_config'],
      vision_config=values['vision_config'],
      projection_dim=config.embed_dim,
    )
  )
  tensors = write_tensors(params, transformers_clip.rules(config))
  own = {name: torch.from_numpy(np.array(x, np.float32)) for name, x in tensors.items()}
  missing = module.load_state_dict(own, strict=False)
  if missing.unexpected_keys or any('position_ids' not in name for name in missing.missing_keys):
    raise ValueError(f'the parameters do not fit: {missing}')
  return module


def _clip_loss(modules: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> torch.Tensor:
  return modules['clip'](
    input_ids=given['ids'], pixel_values=given['pixels'], return_loss=True
  ).loss


def _prior_loss(modules: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> torch.Tensor:
  output = modules['prior'](
    given['x_t'],
    timestep=given['t'],
    proj_embedding=given['z_t'],
    encoder_hidden_states=given['states'],
    attention_mask=given['mask'],
  ).predicted_image_embedding
  return torch.nn.functional.mse_loss(output.float(), given['target'])


def _decoder_loss(
  modules: Mapping[str, Any], given: Mapping[str, Any], config: Any
) -> torch.Tensor:
  context, emb = modules['text_proj'](
    image_embeddings=given['z_i'],
    prompt_embeds=given['z_t'],
    text_encoder_hidden_states=given['states'],
    do_classifier_free_guidance=False,
  )
  tokens = config.decoder.num_image_tokens
  output = modules['decoder'](
    sample=given['x_t'],
    timestep=given['t'],
    encoder_hidden_states=context,
    class_labels=emb,
    attention_mask=torch.nn.functional.pad(given['mask'], (tokens, 0), value=True),
  ).sample
  return torch.nn.functional.mse_loss(output[:, :3].float(), given['target'])


def _upsampler_loss(
  modules: Mapping[str, Any], given: Mapping[str, Any], config: Any
) -> torch.Tensor:
  """The sum over both networks, which see the same batch."""
  low = torch.nn.functional.interpolate(
    given['low'], given['x_t'].shape[-2:], mode='bicubic', align_corners=False, antialias=True
  )
  x = torch.cat([given['x_t'], low], dim=1)
  outputs = [module(sample=x, timestep=given['t']).sample for module in modules.values()]
  return sum(torch.nn.functional.mse_loss(out.float(), given['target']) for out in outputs)


_LOSSES = {'clip': _clip_loss, 'prior': _prior_loss, 'decoder': _decoder_loss}
