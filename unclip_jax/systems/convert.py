"""Any model that can be opened, written in another format."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath

from unclip_jax.config_json import to_json
from unclip_jax.configs import UnclipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.systems import loading, pipelines
from unclip_jax.systems.formats import Model
from unclip_jax.types import Params, UnclipError
from unclip_jax.weights import transformers_clip
from unclip_jax.weights.folder import write_model
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
  prior: str | os.PathLike[str] | None = None,
) -> None:
  """Opens a model and writes it to a folder, which is made if need be.

  Args:
    model: 'default', a folder of any known format, or a model of a hub.
    out: a new folder, or an empty one: what lies in another would be opened along with the model.
    to: 'unclip', our own folder; 'orbax', the same with Orbax checkpoints; 'diffusers', a pipeline
      that diffusers opens and runs; 'transformers', the CLIP alone, as a `CLIPModel`.
    dtype: of what is written; our own format keeps vectors in float32.
    written_by: program and version.
    prior: a model whose CLIP and prior are taken, as for `load`.

  Raises:
    UnclipError: the model cannot be opened, or the format has no such model; names what is
      different. Nothing is written then.
  """
  for what, word, known in (('format', to, FORMATS), ('dtype', dtype, DTYPES)):
    if word not in known:
      raise UnclipError(f'there is no {what} {word!r}: take {", ".join(known)}')
  if not os.fspath(out):
    raise UnclipError('the output folder has no name: give one')
  opened, out = loading.open_model(model, prior), reach(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UnclipError(f'{out} is there already: give the name of a new folder')
  if to in ('unclip', 'orbax'):
    params = loading.read_stages(opened, jnp.float32)
    ending = '.orbax' if to == 'orbax' else '.safetensors'
    vocabulary = None if opened.vocabulary is None else opened.vocabulary.to_json()
    tokenizers = (opened.tokenizer, opened.decoder_tokenizer)
    write_ours(
      out,
      opened.config,
      params,
      tokenizers,
      vocabulary,
      jnp.dtype(dtype),
      written_by,
      ending,
      opened.eps_power,
    )
    return
  # The configs come first: they say whether there can be such a folder at all.
  foreign = _as_pipeline(opened) if to == 'diffusers' else _as_clip(opened)
  if missing := sorted(foreign.stages.keys() - opened.stages.keys()):
    raise UnclipError(f'{opened.folder} has no {", ".join(missing)}: train it first')
  for name, rules in foreign.stages.items():
    params = loading.read_stages(opened, jnp.float32, [name])[name]
    _write_components(params, rules, out, dtype, foreign.of_transformers)
  for folder, tokenizer in foreign.tokenizers.items():
    tokenizer.save_transformers(out / folder)
  for name, values in foreign.files.items():
    _write_json(out / name, values)


class _Foreign(NamedTuple):
  """A folder of other programs: its JSON files, the rules of each stage, its tokenizers.

  Of its components those of transformers have files of another name.
  """

  files: Mapping[str, Any]
  stages: Mapping[str, list[Rule]]
  tokenizers: Mapping[str, Tokenizer]
  of_transformers: Sequence[str]


def _as_pipeline(opened: Model) -> _Foreign:
  config, tokenizer, decoder_tokenizer = (
    opened.config, opened.tokenizer, opened.decoder_tokenizer
  )  # fmt: skip
  family = pipelines.family_of(config)
  # Captions may be read by the decoder alone.
  reader = tokenizer or decoder_tokenizer
  files = family.write_configs(
    config,
    tokenizer and tokenizer.transformers_class,
    reader.end_id,
    decoder_tokenizer and decoder_tokenizer.transformers_class,
  )
  stages = {
    name: rules(()) if callable(rules) else rules
    for name, (_, rules) in family.rules(config).items()
  }
  found = {family.TOKENIZER: tokenizer, family.DECODER_TOKENIZER: decoder_tokenizer}
  tokenizers = {folder: each for folder, each in found.items() if each is not None}
  return _Foreign(files, stages, tokenizers, family.OF_TRANSFORMERS)


def _as_clip(opened: Model) -> _Foreign:
  clip, tokenizer = opened.config.clip, opened.tokenizer
  if clip is None or clip.text is None:
    raise UnclipError('this model has no CLIP with both towers: transformers has no such CLIPModel')
  files = transformers_clip.write_model_configs(clip, tokenizer.end_id)
  stages = {'clip': transformers_clip.rules(clip)}
  return _Foreign(files, stages, {'': tokenizer}, ('',))


def write_ours(
  out: epath.Path,
  config: UnclipConfig,
  params: Mapping[str, Params],
  tokenizers: tuple[Tokenizer | None, Tokenizer | None],
  vocabulary: Mapping[str, Any] | None,
  dtype: Any,
  written_by: str,
  ending: Literal['.safetensors', '.orbax'] = '.safetensors',
  eps_power: Mapping[str, np.ndarray] | None = None,
) -> None:
  """As `weights.folder.write_model`, given the tokenizers: of captions, of the decoder's own."""
  with tempfile.TemporaryDirectory() as folder:
    files: list[Path | None] = []
    for i, tokenizer in enumerate(tokenizers):
      files.append(tokenizer and Path(folder) / f'{i}.json')
      if tokenizer is not None:
        tokenizer.save(files[-1])
    write_model(
      out,
      to_json(config),
      params,
      files[0],
      dtype,
      written_by,
      vocabulary=vocabulary,
      ending=ending,
      decoder_tokenizer_file=files[1],
      eps_power=eps_power,
    )


def _write_components(
  params: Params, rules: list[Rule], out: epath.Path, dtype: str, of_transformers: Sequence[str]
) -> None:
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
    stem = 'model' if component in of_transformers else 'diffusion_pytorch_model'
    save_params(out / component / f'{stem}.safetensors', tensors, metadata=_OF_TORCH)


def _write_json(path: epath.Path, values: Any) -> None:
  text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + '\n'
  write_atomically(path, lambda part: _write_text(part, text))


def _write_text(path: Path, text: str) -> None:
  path.write_text(text, encoding='utf-8')
