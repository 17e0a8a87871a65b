"""A model folder as configs, parameters, tokenizer and vocabulary, checked against each other."""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.errors import FlaxError

from unclip_jax.configs import (
  ArPriorConfig,
  GlideDecoderConfig,
  GlideUpsamplerConfig,
  StableUnclipDecoderConfig,
  UnclipConfig,
)
from unclip_jax.sharding import Mesh, make_mesh, param_shardings, shard_params
from unclip_jax.stages import (
  ar_prior,
  autoencoder,
  clip,
  decoder,
  diffusion_prior,
  glide,
  text_encoder,
  upsampler,
)
from unclip_jax.systems import by_columns, formats
from unclip_jax.systems.adapters import merge_files
from unclip_jax.systems.described import described
from unclip_jax.systems.offload import Offloaded
from unclip_jax.types import Array, Params, UnclipError
from unclip_jax.weights import hub
from unclip_jax.weights.folder import MANIFEST_NAME
from unclip_jax.weights.safetensors import reach

DEFAULT = 'default'
DEFAULT_FOLDER = Path(__file__).parents[1] / 'assets' / 'default'


def find_folder(model: str | os.PathLike[str]) -> epath.Path:
  """The folder of a model: the package's own, one that is there, or a hub's once downloaded.

  Args:
    model: 'default' for the package's own, a folder, or, where there is no folder of that name,
      text that names a model of a hub: 'owner/name' or 'owner/name@revision'.

  Raises:
    UnclipError: the package came without a model, the name is empty, it is of a store that
      cannot be reached, or it is of a hub that does not give it (`weights.hub.download`).
  """
  if not isinstance(model, str | os.PathLike) or not os.fspath(model):
    raise UnclipError(f"model {model!r}: give 'default' or a folder")
  if model != DEFAULT:
    if isinstance(model, str) and hub.is_hub_id(model) and not Path(model).exists():
      return hub.download(model)
    return reach(model)
  if not (DEFAULT_FOLDER / MANIFEST_NAME).exists():
    raise UnclipError(
      'this installation came without a default model: install unclip-jax again, or give the '
      'folder of a model'
    )
  return epath.Path(DEFAULT_FOLDER)


def open_model(
  model: str | os.PathLike[str], prior: str | os.PathLike[str] | None = None
) -> formats.Model:
  """Finds a model and opens it; a prior that was published apart is found and opened with it."""
  prior_folder = None if prior is None else find_folder(prior)
  return formats.open_model(find_folder(model), prior_folder)


def expected_params(config: UnclipConfig, dtype: Any = jnp.float32) -> dict[str, Params]:
  """Names, shapes and types of all parameters, a tree of `jax.ShapeDtypeStruct`s for each stage.

  Floating parameters are of `dtype`; statistics of embeddings are float32 always, as what they
  standardise is.
  """

  def shapes(init: Any, stage_config: Any) -> Params:
    tree = _init_shapes(init, stage_config)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)

  def statistics(width: int) -> Params:
    row = jax.ShapeDtypeStruct((width,), jnp.float32)
    return {'mean': row, 'std': row}

  stages: dict[str, Params] = {}
  if config.clip is not None:
    stages['clip'] = shapes(clip.init, config.clip)
  if isinstance(config.prior, ArPriorConfig):
    network = shapes(ar_prior.init, config.prior)
    quantiser = ar_prior.quantiser_shapes(config.prior)._asdict()
    stages['prior'] = {'network': network, 'quantiser': quantiser}
  elif config.prior is not None:
    network = shapes(diffusion_prior.init, config.prior)
    stages['prior'] = {'network': network, 'statistics': statistics(config.prior.embed_dim)}
  if config.decoder_text is not None:
    stages['decoder_text'] = shapes(text_encoder.init, config.decoder_text)
  match config.decoder:
    case None:
      pass
    case GlideDecoderConfig():
      stages['decoder'] = shapes(glide.init, config.decoder)
    case StableUnclipDecoderConfig():
      network = shapes(decoder.init, config.decoder)
      normalizer = statistics(config.decoder.embed_dim)
      stages['decoder'] = {'network': network, 'normalizer': normalizer}
    case _:
      stages['decoder'] = shapes(decoder.init, config.decoder)
  if config.autoencoder is not None:
    stages['autoencoder'] = shapes(autoencoder.init, config.autoencoder)
  for i, stage in enumerate(config.upsamplers):
    init = glide.init if isinstance(stage, GlideUpsamplerConfig) else upsampler.init
    stages[f'upsampler_{i}'] = shapes(init, stage)
  return stages


@functools.cache
def _init_shapes(init: Callable[[Any, Array], Params], stage_config: Any) -> Params:
  """Traced once a config: it takes as long as all else that opening a model does."""
  return jax.eval_shape(functools.partial(init, stage_config), jax.random.key(0))


def read_stages(
  opened: formats.Model, dtype: Any, names: Iterable[str] | None = None, mesh: Mesh | None = None
) -> dict[str, Params]:
  """The parameters of stages of a model, straight to their devices.

  Args:
    opened: the model.
    dtype: of floating parameters.
    names: of the stages; None takes all that are there.
    mesh: the devices that hold them; None for the default one.

  Raises:
    UnclipError: no network can be built from the config, or the files are damaged or of another
      architecture.
  """
  try:
    expected = expected_params(opened.config, dtype)
  except (ArithmeticError, TypeError, ValueError, FlaxError) as error:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    raise UnclipError(
      f'{opened.path}: no network can be built from this config ({first})'
    ) from error
  if unknown := sorted(opened.stages.keys() - expected.keys()):
    raise UnclipError(
      f'{opened.path} names a stage {unknown[0]!r}, which its config does not have: it has '
      f'{", ".join(expected)}'
    )
  if mesh is not None:
    expected = described(expected, param_shardings(expected, mesh))
  wanted = expected if names is None else names
  return {
    name: opened.stages[name].read(expected[name]) for name in wanted if name in opened.stages
  }


def load_parts(
  model: str | os.PathLike[str],
  dtype: np.dtype,
  num_devices: int,
  model_devices: int,
  offload: bool,
  prior: str | os.PathLike[str] | None,
  lora: Sequence[str | os.PathLike[str]],
  lora_strength: float,
) -> tuple[formats.Model, Mapping[str, Params], Mesh | None]:
  """What was opened, its parameters, the devices; `unclip.load` says what is raised."""
  opened = open_model(model, prior)
  mesh = None if num_devices == model_devices == 1 else make_mesh(num_devices, model_devices)
  if offload:
    with jax.default_device(jax.local_devices(backend='cpu')[0]):
      params = merge_files(read_stages(opened, dtype), lora, lora_strength)
    return opened, Offloaded(params, mesh), mesh
  params = dict(merge_files(read_stages(opened, dtype, mesh=mesh), lora, lora_strength))
  if mesh is not None:
    return opened, shard_params(params, mesh), mesh
  if 'prior' in params:
    own, params['prior'] = [params['prior']], None  # its place among the stages is kept
    params['prior'] = by_columns.lay_out(own.pop())
  return opened, params, None
