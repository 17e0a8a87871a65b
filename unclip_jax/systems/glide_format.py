"""GLIDE's original release: a folder of OpenAI's checkpoints, with GPT-2's vocabulary in it."""

import contextlib
import functools
from collections.abc import Iterator, Mapping

from etils import epath

from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.systems.karlo_format import Release
from unclip_jax.types import Params, UnclipError
from unclip_jax.weights import glide
from unclip_jax.weights.foreign_folder import Joined
from unclip_jax.weights.glide import BASE, UPSAMPLE
from unclip_jax.weights.rules import Rule, Tensors, read_params
from unclip_jax.weights.tensor_files import open_tensors

WRITTEN_BY = 'OpenAI (GLIDE)'
# Each part's file, of either pair of the release.
_PLAIN = {BASE: 'base.pt', UPSAMPLE: 'upsample.pt'}
_INPAINT = {BASE: 'base_inpaint.pt', UPSAMPLE: 'upsample_inpaint.pt'}


def is_release(folder: epath.Path) -> bool:
  """Whether a folder holds GLIDE's checkpoints, by the names of its files."""
  return any(_find(folder, pair) for pair in (_PLAIN, _INPAINT))


def open_release(folder: epath.Path) -> Release:
  """Opens a folder of which `is_release` is true.

  Raises:
    UnclipError: a file is missing, both pairs are there, or a file is damaged or of another model;
      names it.
  """
  paths = _find_pair(folder)
  with _open(paths) as parts:
    config = glide.read_config(parts, str(folder))
  stages = {}
  for name, rules in glide.rules(config).items():
    files = {part: paths[part] for part in glide.STAGE_PARTS[name]}
    read = functools.partial(_read, files, rules, str(folder))
    stages[name] = (read, tuple(files.values()))
  return Release(config, Tokenizer.from_gpt2(folder, config.decoder.text.context_length), stages)


def _find(folder: epath.Path, pair: Mapping[str, str]) -> dict[str, epath.Path]:
  paths = {part: folder / name for part, name in pair.items()}
  return {part: path for part, path in paths.items() if path.exists()}


def _find_pair(folder: epath.Path) -> dict[str, epath.Path]:
  plain, inpaint = _find(folder, _PLAIN), _find(folder, _INPAINT)
  if plain and inpaint:
    names = ' and '.join(path.name for path in (*plain.values(), *inpaint.values()))
    raise UnclipError(f'{folder} has {names}: keep the pair that inpaints in a folder of its own')
  found, names = (plain, _PLAIN) if plain else (inpaint, _INPAINT)
  if BASE not in found:
    raise UnclipError(f'{folder} has no {names[BASE]}: GLIDE needs it, download it as well')
  return found


def _read(
  paths: Mapping[str, epath.Path], rules: list[Rule], where: str, expected: Params
) -> Params:
  with _open(paths) as parts:
    return read_params(Joined(parts), rules, expected, where)


@contextlib.contextmanager
def _open(paths: Mapping[str, epath.Path]) -> Iterator[dict[str, Tensors]]:
  with contextlib.ExitStack() as stack:
    yield {part: stack.enter_context(open_tensors(path)) for part, path in paths.items()}
