"""Any model that can be opened, written in another format."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from unclip_jax.config_json import to_json
from unclip_jax.systems import formats, loading
from unclip_jax.systems.formats import Model
from unclip_jax.types import Params, UnclipError
from unclip_jax.weights import karlo, transformers_clip
from unclip_jax.weights.folder import TOKENIZER_NAME, write_model
from unclip_jax.weights.rules import Rule, write_tensors
from unclip_jax.weights.safetensors import reach, save_params, write_atomically

FORMATS = ('unclip', 'orbax', 'diffusers', 'transformers')
DTYPES = ('float32', 'bfloat16', 'float16')
# What diffusers and transformers look for in a file's header.
_OF_TORCH = {'format': 'pt'}


def convert(
  model: str | os.PathLike[str],
  out: str | os.PathLike[str],
  to: str,
  dtype: str = 'float32',
  written_by: str = 'unclip_jax',
) -> None:
  """Opens a model and writes it to a folder, which is made if need be.

  Args:
    model: 'default', a folder of any known format, or a model of a hub.
    out: a new folder, or an empty one: what lies in another would be opened along with the model.
    to: 'unclip', our own folder; 'orbax', the same with Orbax checkpoints; 'diffusers', a pipeline
      that diffusers opens and runs; 'transformers', the CLIP alone, as a `CLIPModel`.
    dtype: of what is written; our own format keeps vectors in float32.
    written_by: program and version.

  Raises:
    UnclipError: the model cannot be opened, or the format has no such model; names what is
      different. Nothing is written then.
  """
  for what, word, known in (('format', to, FORMATS), ('dtype', dtype, DTYPES)):
    if word not in known:
      raise UnclipError(f'there is no {what} {word!r}: take {", ".join(known)}')
  if not os.fspath(out):
    raise UnclipError('the output folder has no name: give one')
  opened, out = formats.open_model(loading.find_folder(model)), reach(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UnclipError(f'{out} is there already: give the name of a new folder')
  if to in ('unclip', 'orbax'):
    params = loading.read_stages(opened, jnp.float32)
    ending = '.orbax' if to == 'orbax' else '.safetensors'
    _write_ours(opened, params, out, jnp.dtype(dtype), written_by, ending)
    return
  # The configs come first: they say whether there can be such a folder at all.
  tokenizer = opened.tokenizer
  if to == 'diffusers':
    files = karlo.write_configs(opened.config, tokenizer.transformers_class, tokenizer.end_id)
    stages, tokenizer_folder = karlo.rules(opened.config), out / formats.TOKENIZER_FOLDER
  else:
    files = transformers_clip.write_model_configs(opened.config.clip, tokenizer.end_id)
    stages, tokenizer_folder = {'clip': ((), transformers_clip.rules(opened.config.clip))}, out
  if missing := sorted(stages.keys() - opened.stages.keys()):
    raise UnclipError(f'{opened.folder} has no {", ".join(missing)}: train it first')
  for name, (_, rules) in stages.items():
    params = loading.read_stages(opened, jnp.float32, [name])[name]
    _write_components(params, rules, out, dtype)
  tokenizer.save_transformers(tokenizer_folder)
  for name, values in files.items():
    _write_json(out / name, values)


def _write_ours(
  opened: Model,
  params: dict[str, Params],
  out: epath.Path,
  dtype: Any,
  written_by: str,
  ending: Any,
) -> None:
  vocabulary = None if opened.vocabulary is None else opened.vocabulary.to_json()
  with tempfile.TemporaryDirectory() as folder:
    tokenizer = Path(folder) / TOKENIZER_NAME
    opened.tokenizer.save(tokenizer)
    write_model(
      out,
      to_json(opened.config),
      params,
      tokenizer,
      dtype,
      written_by,
      vocabulary=vocabulary,
      ending=ending,
    )


def _write_components(params: Params, rules: list[Rule], out: epath.Path, dtype: str) -> None:
  """One safetensors file for each component that the names of the tensors begin with."""
  components: dict[str, dict[str, np.ndarray]] = {}
  for name, tensor in write_tensors(params, rules).items():
    component, _, rest = name.rpartition('/')
    with np.errstate(over='ignore'):
      cast = tensor.astype(jnp.dtype(dtype))
    if not np.isfinite(cast).all():
      raise UnclipError(f'{name} does not fit into {dtype}: take bfloat16 or float32')
    components.setdefault(component, {})[rest] = cast
  for component, tensors in components.items():
    is_transformers = component in ('', *karlo.OF_TRANSFORMERS)
    stem = 'model' if is_transformers else 'diffusion_pytorch_model'
    save_params(out / component / f'{stem}.safetensors', tensors, metadata=_OF_TORCH)


def _write_json(path: epath.Path, values: Any) -> None:
  text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + '\n'
  write_atomically(path, lambda part: _write_text(part, text))


def _write_text(path: Path, text: str) -> None:
  path.write_text(text, encoding='utf-8')
