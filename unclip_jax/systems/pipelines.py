"""Which family of models a pipeline of diffusers is of, and where its components lie."""

from types import ModuleType

from etils import epath

from unclip_jax.configs import (
  ArPriorConfig,
  GlideDecoderConfig,
  KandinskyDecoderConfig,
  StableUnclipDecoderConfig,
  UnclipConfig,
)
from unclip_jax.types import UnclipError
from unclip_jax.weights import kandinsky, karlo, stable_unclip
from unclip_jax.weights.foreign_folder import INDEX_NAME, Components, read_components

# By the classes of pipelines. A family is a module: it reads configs (`read_config`), names tensors
# (`rules`) and writes both (`write_configs`).
FAMILIES: dict[str, ModuleType] = {
  name: family for family in (karlo, kandinsky, stable_unclip) for name in family.NAMES
}
_OF_KANDINSKY = dict.fromkeys(kandinsky.PRIOR_NAMES, kandinsky.PRIOR_COMPONENTS)
# What each pipeline that has a prior calls its parts.
_PRIORS = {
  **_OF_KANDINSKY,
  karlo.TEXT_TO_IMAGE: {
    'prior': 'prior',
    'prior_text_encoder': 'text_encoder',
    'prior_tokenizer': 'tokenizer',
    'prior_scheduler': 'prior_scheduler',
  },
}


def find_components(
  folder: epath.Path, prior: epath.Path | None
) -> tuple[str, ModuleType, Components]:
  """The class of a pipeline, its family, and the folders of components by the family's names.

  Args:
    folder: of the pipeline.
    prior: of another one whose CLIP and prior are taken.

  Raises:
    UnclipError: it is of no known family, or the two do not go together.
  """
  name, found = read_components(folder)
  path = folder / INDEX_NAME
  if name in _OF_KANDINSKY:
    if prior is not None:
      raise UnclipError(f'{folder} is a prior itself: give the decoder as the model')
    return name, kandinsky, _renamed(found, kandinsky.PRIOR_COMPONENTS)
  if name not in FAMILIES:
    known = ', '.join([*FAMILIES, *_OF_KANDINSKY])
    raise UnclipError(f'{path}: _class_name is {name!r}: only {known} can be opened')
  family = FAMILIES[name]
  for extra in family.EXTRA:
    if (folder / extra).exists():
      found[extra] = folder / extra
  if prior is not None:
    found |= _find_prior(prior, family)
  elif family is kandinsky and 'prior_prior' not in found:
    version = '2-2' if 'V22' in name else '2-1'
    raise UnclipError(
      f'{folder} is the decoder of Kandinsky: give its prior as well (--prior-model, or prior= of '
      f'load), such as kandinsky-community/kandinsky-{version}-prior'
    )
  return name, family, found


def family_of(config: UnclipConfig) -> ModuleType:
  """The family that a config is of, whose `write_configs` says whether it is all of it.

  Raises:
    UnclipError: diffusers has none such.
  """
  if isinstance(config.prior, ArPriorConfig):
    raise UnclipError('diffusers has no autoregressive prior: write it as unclip or orbax')
  match config.decoder:
    case KandinskyDecoderConfig():
      return kandinsky
    case StableUnclipDecoderConfig():
      return stable_unclip
    case GlideDecoderConfig():
      raise UnclipError('diffusers has no pipeline for GLIDE: write it as unclip or orbax')
  return karlo


def _find_prior(folder: epath.Path, family: ModuleType) -> Components:
  name, found = read_components(folder)
  if family is karlo:
    raise UnclipError(f'Karlo brings its own prior: leave {folder} out')
  if name not in _PRIORS:
    raise UnclipError(
      f'{folder / INDEX_NAME}: _class_name is {name!r}: a prior is taken from {", ".join(_PRIORS)}'
    )
  renamed = _renamed(found, _PRIORS[name])
  if family is not kandinsky and 'prior_prior' in renamed:
    renamed['prior'] = renamed.pop('prior_prior')
  if family is kandinsky and 'prior' in renamed:
    raise UnclipError(f'{folder} is a prior of Karlo: Kandinsky has its own')
  return renamed


def _renamed(found: Components, names: dict[str, str]) -> Components:
  result = Components({ours: found[theirs] for ours, theirs in names.items() if theirs in found})
  result.where = found.where
  return result
