"""What of a network is trained: all of it, or low-rank adapters beside weights that stay."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.emoji import common, origin
from experiments.emoji.options import TrainConfig
from unclip_jax import sharding
from unclip_jax.systems.loading import find_folder
from unclip_jax.train.lora import init_lora, merge_lora
from unclip_jax.train.state import LossFn, Metrics
from unclip_jax.types import Array, Params, UnclipError
from unclip_jax.weights.lora import load_lora, save_lora

ADAPTERS_NAME = 'lora.safetensors'


class Tuning(NamedTuple):
  """A network, split into what is trained and what is not.

  Attributes:
    trained: the parameters of the network, or adapters of it.
    frozen: the parameters below the adapters, None where there are none.
    scale: of the adapters.
  """

  trained: Params
  frozen: Params | None = None
  scale: float = 1.0

  def whole(self, trained: Params) -> Params:
    """The parameters of the network, given what is trained as it is by now."""
    return trained if self.frozen is None else merge_lora(self.frozen, trained, self.scale)

  def loss_of_trained(self, loss_fn: LossFn) -> LossFn:
    """A network's loss as a function of what is trained, its batches as of `make_updates`."""
    if self.frozen is None:
      return loss_fn

    def loss_of_adapters(adapters: Params, batch: Any, key: Array) -> tuple[Array, Metrics]:
      rows, frozen = batch
      return loss_fn(merge_lora(frozen, adapters, self.scale), rows, key)

    return loss_of_adapters


def begin_tuning(train: TrainConfig, stage: str, params: Params, key: Array) -> Tuning:
  """What a run trains of a network.

  Args:
    train: the options.
    stage: 'prior' or 'decoder'.
    params: of its network, as `start_from` gives them.
    key: of new adapters.

  Raises:
    UnclipError: the run is the model of `--init` itself, or has another CLIP than it; or the file
      of `--init-lora` is damaged, for another stage or for another model.
  """
  if not train.trains_adapters:
    return Tuning(params)
  if train.run.resolve() == Path(find_folder(train.init)).resolve():
    raise UnclipError(
      f'--init {train.init}: it is the folder of --run, where adapters are merged into it: take '
      'another one for --run'
    )
  if not origin.has_clip_of_init(train):
    raise UnclipError(
      f'--run {train.run}: its CLIP is not that of --init {train.init}, whose {stage} would stay '
      'as it is: take a new folder'
    )
  if train.init_lora is None:
    alpha = train.lora if train.lora_alpha is None else train.lora_alpha
    return Tuning(init_lora(params, train.lora, key), params, alpha / train.lora)
  made_for, scale, adapters = load_lora(train.init_lora)
  if made_for != stage:
    raise UnclipError(f'--init-lora {train.init_lora}: it is for the {made_for}, not the {stage}')
  try:
    jax.eval_shape(merge_lora, params, adapters)
  except UnclipError as error:
    raise UnclipError(f'--init-lora {train.init_lora}: {error}') from error
  return Tuning(adapters, params, scale)


def export_tuned(
  train: TrainConfig, stage: str, tuning: Tuning, trained: Params, params: Params
) -> None:
  """Writes a trained stage into the run's folder, adapters both merged and on their own.

  Merged weights are float32: bfloat16 would round off most of what adapters change.

  Args:
    train: the options.
    stage: 'prior' or 'decoder'.
    tuning: of its network.
    trained: what was trained of it, as it is by now.
    params: of the stage, the network whole.
  """
  if tuning.frozen is None:
    common.export_stage(train, stage, params)
    return
  trained = sharding.fetch(trained)
  if jax.process_index() == 0:
    save_lora(train.run / stage / ADAPTERS_NAME, trained, tuning.scale, stage)
  common.export_stage(train, stage, params, dtype=jnp.float32)
