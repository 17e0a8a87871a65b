"""Programs of `fuse` in a folder, compiled for other machines or by them: `jax.export`.

  unclip.json, tokenizer.json, <stage>.safetensors    a model folder, which `load` opens too
  program.bin     the program of all stages as jax.export serialises it: StableHLO
  program.json    what it was made for, see `_KEYS`

The program is called with the parameters and a flat dict of arrays, as `fused.draw` is.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax import export

from unclip_jax.config_json import from_json, to_json
from unclip_jax.nn import columns
from unclip_jax.systems import formats, requests, settings
from unclip_jax.systems.convert import write_ours
from unclip_jax.systems.fused import Drawn, Fused, Inputs
from unclip_jax.systems.settings import Sampling
from unclip_jax.types import Params, UnclipError
from unclip_jax.weights.safetensors import reach, write_atomically

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
PROGRAM_NAME, DESCRIPTION_NAME = 'program.bin', 'program.json'
FORMAT_VERSION = 1
# Attention where it is exported on a GPU of NVIDIA: calls that JAX does not promise to keep.
_CUDNN = [
  export.DisabledSafetyCheck.custom_call(f'__cudnn$fmha{kind}')
  for kind in ('Softmax', 'ScaleBiasSoftmax')
]
_SAMPLED = ('prior', 'decoder', 'upsampler')
_KEYS = {
  'format_version',
  'written_by',
  'jax_version',
  'calling_convention_version',
  'platforms',
  'sha256',
  'batch_size',
  'dtype',
  'size',
  'num_candidates',
  'samplings',
  'inputs',
}


def write_exported(
  fused: Fused,
  out: str | os.PathLike[str],
  platforms: Sequence[str] | None = None,
  written_by: str = 'unclip_jax',
) -> None:
  """Writes a program, its parameters and tokenizers into a folder; nothing is compiled.

  Args:
    fused: of `fuse`, on one device.
    out: a new folder, or an empty one.
    platforms: for which the program is lowered, of `PLATFORMS`, whatever this machine has. None is
      this machine's.
    written_by: program and version.

  Raises:
    UnclipError: there is no such platform, the folder holds something, or cannot be written.
  """
  platforms = [export.default_export_platform()] if platforms is None else list(platforms)
  if unknown := [name for name in platforms if name not in PLATFORMS]:
    raise UnclipError(f'there is no platform {unknown[0]!r}: take {", ".join(PLATFORMS)}')
  if not platforms or len(set(platforms)) < len(platforms):
    raise UnclipError('the platforms to export for: give each once, and one at least')
  if fused.mesh is not None:
    raise UnclipError('a program over several devices is not exported: open the model on one')
  out = reach(out)
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UnclipError(f'{out} is there already: give the name of a new folder')
  expected, _ = fused.made_for
  params = columns.plain(dict(fused.params))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  lowered = export.export(jax.jit(fused.program), platforms=platforms, disabled_checks=_CUDNN)(
    shapes, expected
  )
  blob = bytes(lowered.serialize())
  description = {
    'format_version': FORMAT_VERSION,
    'written_by': written_by,
    'jax_version': jax.__version__,
    'calling_convention_version': lowered.calling_convention_version,
    'platforms': list(lowered.platforms),
    'sha256': hashlib.sha256(blob).hexdigest(),
    'batch_size': fused.batch_size,
    'dtype': str(jax.numpy.dtype(fused.dtype)),
    'size': fused.size,
    'num_candidates': fused.num_candidates,
    'samplings': dict(zip(_SAMPLED, map(to_json, fused.samplings), strict=True)),
    'inputs': {name: f'{spec.dtype}{list(spec.shape)}' for name, spec in expected.items()},
  }
  text = json.dumps(description, indent=2) + '\n'
  write_atomically(out / PROGRAM_NAME, functools.partial(_write, blob))
  tokenizers = (fused.tokenizer, fused.decoder_tokenizer)
  write_ours(
    out,
    fused.config,
    params,
    tokenizers,
    None,
    None,
    written_by,
    eps_power=fused.eps_power,
  )
  write_atomically(out / DESCRIPTION_NAME, functools.partial(_write, text.encode()))


def load_exported(folder: str | os.PathLike[str]) -> Fused:
  """Opens a program that `write_exported` wrote, with its parameters on the default device.

  A program is code: open only what comes from somebody whom you trust.

  Raises:
    UnclipError: the folder holds none, its files are damaged, or the program is for another
      platform or another version; the message names it and the remedy.
  """
  folder = reach(folder)
  path = folder / DESCRIPTION_NAME
  if not path.exists():
    raise UnclipError(
      f'{folder} is no exported program: it has no {DESCRIPTION_NAME}; give the folder that '
      'unclip-jax export wrote'
    )
  fields = _read_description(path)
  exported = _read_program(folder / PROGRAM_NAME, fields)
  here = export.default_export_platform()
  if here not in exported.platforms:
    raise UnclipError(
      f'{folder} was exported for {" and ".join(exported.platforms)}, this machine has {here}: '
      f'export it with --platforms {",".join([*exported.platforms, here])}'
    )
  opened = formats.open_model(folder)
  (params, inputs), _ = jax.tree.unflatten(
    exported.in_tree,
    [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in exported.in_avals],
  )
  asked = fields['samplings']
  samplings = [from_json(Sampling, asked[name], f'{path}: {name}') for name in _SAMPLED]
  fused = Fused(
    opened.config,
    {},
    opened.tokenizer,
    opened.decoder_tokenizer,
    settings.check_dtype(fields['dtype']),
    settings.check_count(f'{path}: batch_size', fields['batch_size']),
    requests.Samplings(*samplings),
    fields['num_candidates'],
    fields['size'],
    _runner(exported, folder / PROGRAM_NAME, fields['jax_version']),
    eps_power=opened.eps_power,
  )
  expected, _ = fused.made_for
  if _described(expected) != _described(inputs):
    raise UnclipError(
      f'{folder} was exported by {fields["written_by"]}, whose programs are given other inputs '
      'than this version makes: export it again, or install that version'
    )
  return dataclasses.replace(fused, params=_read_params(opened, params))


def _runner(exported: export.Exported, path: epath.Path, version: str) -> Callable[..., Drawn]:
  """The program, which the compiler of this machine may not be able to read."""
  jitted = jax.jit(exported.call)

  def run(params: Mapping[str, Params], inputs: Inputs) -> Drawn:
    try:
      return jitted(params, inputs)
    except jax.errors.JaxRuntimeError as error:
      if 'StableHLO' not in str(error):
        raise
      raise UnclipError(
        f'{path} was exported by jax {version}, and jax {jax.__version__} cannot compile it: '
        'export it again, or install that jax'
      ) from error

  return run


def _write(data: bytes, path: Path) -> None:
  path.write_bytes(data)


def _read_description(path: epath.Path) -> dict[str, Any]:
  try:
    fields = json.loads(path.read_text(encoding='utf-8'))
  except (RecursionError, ValueError) as error:
    raise UnclipError(f'{path} is not valid JSON ({error}): copy or export it again') from error
  except OSError as error:
    raise UnclipError(f'cannot read {path} ({error.strerror or error})') from error
  if not isinstance(fields, dict):
    raise UnclipError(f'{path} is not a JSON object: copy or export it again')
  version = fields.get('format_version')
  if type(version) is not int or version != FORMAT_VERSION:
    raise UnclipError(
      f'{path} is of format version {version!r}, this program reads {FORMAT_VERSION}: export it '
      'again, or upgrade with pip install -U unclip-jax'
    )
  if fields.keys() != _KEYS or not isinstance(fields['samplings'], dict):
    odd = sorted(fields.keys() ^ _KEYS) or ['samplings']
    raise UnclipError(f'{path} lacks {odd[0]}, or should not have it: copy or export it again')
  if missing := [name for name in _SAMPLED if name not in fields['samplings']]:
    raise UnclipError(f'{path}: samplings lack {missing[0]}: copy or export it again')
  oldest = export.minimum_supported_calling_convention_version
  newest = export.maximum_supported_calling_convention_version
  convention = fields['calling_convention_version']
  if type(convention) is not int or not oldest <= convention <= newest:
    raise UnclipError(
      f'{path.parent} was exported by jax {fields["jax_version"]} with calling convention '
      f'{convention!r}, jax {jax.__version__} runs {oldest} to {newest}: export it again, or '
      'install that jax'
    )
  return fields


def _read_program(path: epath.Path, fields: Mapping[str, Any]) -> export.Exported:
  try:
    blob = path.read_bytes()
  except OSError as error:
    raise UnclipError(
      f'cannot read {path} ({error.strerror or error}): copy or export it again'
    ) from error
  if hashlib.sha256(blob).hexdigest() != fields['sha256']:
    raise UnclipError(f'{path} is damaged or cut short: copy or export it again')
  try:
    return export.deserialize(bytearray(blob))
  except Exception as error:  # of flatbuffers, of the compiler: as many kinds as there are reasons
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UnclipError(
      f'{path} was exported by jax {fields["jax_version"]}, and jax {jax.__version__} cannot read '
      f'it ({reason}): export it again, or install that jax'
    ) from error


def _read_params(opened: formats.Model, expected: Mapping[str, Params]) -> dict[str, Params]:
  """The parameters as the program takes them, whatever this version would make of the config."""
  if missing := sorted(expected.keys() - opened.stages.keys()):
    raise UnclipError(f'{opened.path} names no {missing[0]}: copy or export it again')
  return {name: opened.stages[name].read(tree) for name, tree in expected.items()}


def _described(inputs: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
  return {name: (spec.shape, str(spec.dtype)) for name, spec in inputs.items()}
