"""Low-rank adapters from files, merged into the stages that they were trained for."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from unclip_jax.train.lora import merge_lora
from unclip_jax.types import Params, UnclipError
from unclip_jax.weights.lora import load_lora


def merge_files(
  params: Mapping[str, Params], files: Sequence[str | os.PathLike[str]], strength: Any
) -> dict[str, Params]:
  """The parameters of stages with adapters added; those of one stage add up.

  Args:
    params: of the stages, by their names.
    files: of `save_lora`.
    strength: what their scales are multiplied by; 0 is the model without them.

  Raises:
    UnclipError: a file is none of adapters, or is for another model; names it.
  """
  merged = dict(params)
  for file in files:
    stage, scale, adapters = load_lora(file)
    if stage not in merged:
      raise UnclipError(f'{file} is for a {stage}, which this model does not have')
    tree = merged[stage]
    is_inner = 'network' in tree
    try:
      network = merge_lora(tree['network'] if is_inner else tree, adapters, scale * strength)
    except UnclipError as error:
      raise UnclipError(f'{file} is for another model: {error}') from error
    merged[stage] = {**tree, 'network': network} if is_inner else network
  return merged
