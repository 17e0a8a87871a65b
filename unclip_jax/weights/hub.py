"""Models of a Hugging Face hub, 'owner/name' or 'owner/name@revision', as folders of its cache.

The files of a revision are listed, those that are read are chosen by their names, and they alone
are downloaded, all of one commit. They lie in the cache of huggingface_hub, which other programs
share; without a network it serves what it has. Tokens are huggingface_hub's own affair, and so are
the variables that begin with HF_.

No text of a failed request is shown: it may hold a signed URL.
"""

import contextlib
import functools
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from etils import epath

from unclip_jax.types import UnclipError
from unclip_jax.weights.folder import MANIFEST_NAME, inside
from unclip_jax.weights.foreign_folder import CONFIG_NAME, INDEX_NAME
from unclip_jax.weights.safetensors import write_atomically

# The hub's own rules; -- and .. are refused besides.
_NAME = r'\w(?:[\w.-]{0,94}\w)?'
# Names of git with a slash in them ('refs/pr/1') are left out: they look like paths.
_ID = re.compile(rf'{_NAME}/{_NAME}(?:@\w[\w.+-]{{0,254}})?', re.ASCII)
_COMMIT = re.compile('[0-9a-f]{40}')
_SECONDS_OF_PATIENCE = 30
_BUSY, _REFUSED, _NOT_FOUND, _SERVER_ERROR = 429, (401, 403), 404, 500

_OPEN_CLIP_CONFIG_NAME = 'open_clip_config.json'
_TEXT_ENDINGS = ('.json', '.txt', '.model')
_CHECKPOINT_ENDINGS = ('.pt', '.pth', '.ckpt', '.th')
# The best first; '' is what the others are variants of.
_VARIANTS = ('', 'fp16', 'bf16', 'ema', 'non_ema')
_VARIANT = '|'.join(_VARIANTS[1:])
_SHARD = re.compile(r'-\d+-of-\d+')
_WEIGHTS = re.compile(
  rf'(.+?)(?:\.({_VARIANT}))?\.(safetensors|bin)(\.index(?:\.({_VARIANT}))?\.json)?'
)


class _Weights(NamedTuple):
  """A file of weights, or the index of several, by what its name says."""

  name: str
  folder: str
  stem: str
  kind: str
  variant: str
  is_sharded: bool


def is_hub_id(model: str) -> bool:
  """Whether a model's name can be one of a hub: 'owner/name' or 'owner/name@revision'.

  A revision is a branch, a tag or a commit. A relative path can look the same: who asks has to
  look for a folder first.
  """
  name = model.partition('@')[0]
  return (
    _ID.fullmatch(model) is not None
    and '..' not in model
    and '--' not in name
    and not name.endswith('.git')
  )


def choose(names: Sequence[str]) -> list[str]:
  """The files of a repository that opening it reads, in the order given.

  Configs and tokenizers always: they are small. Of the weights of a component one kind, the one
  that `foreign_folder.find_weights` would read out of a whole copy: safetensors before pickles,
  plain before float16, a single file before several. Of a pipeline no weights beside its
  components' folders, of any other model only those at the root, where there are some. Checkpoints
  of torch (.pt, .ckpt, .th) at the root where there is nothing else. Of a model of ours, whose
  manifest names its files, all safetensors.

  Args:
    names: of all files, folders separated by slashes.
  """
  if MANIFEST_NAME in names:
    return [name for name in names if name.endswith((*_TEXT_ENDINGS, '.safetensors'))]
  # Deeper are the checkpoints of a training and what other programs put there.
  near = [name for name in names if name.count('/') <= 1]
  weights = list(filter(None, map(_weights, near)))
  at_root = [file for file in weights if not file.folder]
  if INDEX_NAME in names:
    weights = [file for file in weights if file.folder]
  elif at_root:
    weights = _of_one_program(at_root, names)
  chosen = set(_best(weights)) or {
    name for name in names if '/' not in name and name.endswith(_CHECKPOINT_ENDINGS)
  }
  chosen |= {name for name in near if name.endswith(_TEXT_ENDINGS) and not _is_of_weights(name)}
  return [name for name in names if name in chosen]


def _weights(name: str) -> _Weights | None:
  folder, _, file = name.rpartition('/')
  match = _WEIGHTS.fullmatch(_SHARD.sub('', file))
  if match is None:
    return None
  stem, variant, kind, index, index_variant = match.groups()
  # Much else ends in .bin: optimisers, arguments of a training, OpenVINO.
  if kind == 'bin' and stem != 'model' and not stem.endswith('pytorch_model'):
    return None
  is_sharded = index is not None or _SHARD.search(file) is not None
  return _Weights(name, folder, stem, kind, variant or index_variant or '', is_sharded)


def _of_one_program(weights: list[_Weights], names: Sequence[str]) -> list[_Weights]:
  """Of a CLIP that is there twice, for open_clip and for transformers, one.

  It is open_clip's, which opening a whole copy takes, unless that one is in pickles alone.
  """
  of_open_clip = [file for file in weights if file.stem.startswith('open_clip')]
  others = [file for file in weights if file not in of_open_clip]
  if not of_open_clip or not others or not {CONFIG_NAME, _OPEN_CLIP_CONFIG_NAME} <= set(names):
    return weights
  kinds = [{file.kind for file in files} for files in (of_open_clip, others)]
  return others if kinds[0] == {'bin'} and 'safetensors' in kinds[1] else of_open_clip


def _is_of_weights(name: str) -> bool:
  """Whether a JSON file is the index of weights, also of kinds that are not read."""
  return re.search(r'\.index(\.\w+)?\.json$', name) is not None


def _best(weights: Iterable[_Weights]) -> list[str]:
  """The names of one kind and variant for each component."""
  components: dict[str, list[_Weights]] = {}
  for file in weights:
    components.setdefault(file.folder, []).append(file)
  names = []
  for files in components.values():
    kind = 'safetensors' if any(file.kind == 'safetensors' for file in files) else 'bin'
    stems: dict[str, list[_Weights]] = {}
    for file in files:
      if file.kind == kind:
        stems.setdefault(file.stem, []).append(file)
    for alike in stems.values():
      best = min(map(_rank, alike))
      names += [file.name for file in alike if _rank(file) == best]
  return names


def _rank(file: _Weights) -> tuple[int, bool]:
  return _VARIANTS.index(file.variant), file.is_sharded


@functools.cache
def download(model: str) -> epath.Path:
  """The folder of a hub's model, downloaded as far as the cache does not have it.

  A process asks the hub once for a model, and stays with the commit that it was given. Warns
  (UserWarning) where the hub cannot be reached and the cache serves; HF_HUB_OFFLINE=1 does not ask,
  and does not warn.

  Args:
    model: 'owner/name' for its main branch, or 'owner/name@revision'; see `is_hub_id`.

  Raises:
    UnclipError: the hub has no such model or revision, or not for this user; the hub cannot be
      reached and the cache has nothing of it; the repository holds no model, or names a file
      outside of itself; the cache cannot be written.
  """
  # It takes long to import, and opening a folder does without it.
  from huggingface_hub import constants

  repo, _, revision = model.partition('@')
  revision = revision or constants.DEFAULT_REVISION
  cache = constants.HF_HUB_CACHE
  with _quiet():
    if constants.HF_HUB_OFFLINE:
      if (folder := _cached(repo, revision)) is not None:
        return folder
      raise UnclipError(
        f'there is no folder {model}, and the cache {cache} does not have it: unset '
        'HF_HUB_OFFLINE to download it, or give a folder'
      )
    commit = None
    try:
      commit, names = _list(repo, revision)
      return _fetch(repo, revision, commit, names)
    except UnclipError:
      raise
    except Exception as error:  # of several HTTP libraries, of the store, of file systems
      error = _cause(error)
      outage, problem = _outage(error), _problem(error, model)
    # Outside of the handler: what the hub raised is not to be shown as the cause.
    if outage is None:
      raise UnclipError(problem)
    folder = _cached(repo, revision)
    # A commit that was listed but could not be had whole lies there in part.
    if folder is None or folder.name == commit:
      raise UnclipError(
        f'there is no folder {model}, {outage}, and the cache {cache} does not have it: check the '
        'name and the network, or give a folder'
      )
  warnings.warn(
    f'{outage}: {model} is taken from the cache as of commit {folder.name[:7]}', stacklevel=2
  )
  return folder


def _list(repo: str, revision: str) -> tuple[str, list[str]]:
  """The commit of a revision, and those of its files that are needed.

  Raises UnclipError, and what huggingface_hub does.
  """
  from huggingface_hub import HfApi

  info = HfApi().model_info(repo, revision=revision, timeout=_SECONDS_OF_PATIENCE)
  names = [file.rfilename for file in info.siblings or ()]
  for name in names:
    inside(epath.Path(repo), name, '')
  if _COMMIT.fullmatch(info.sha or '') is None:
    raise UnclipError(f'{_host()} names no commit of {repo}: check HF_ENDPOINT')
  if not (chosen := choose(names)):
    raise UnclipError(f'{repo} on {_host()} holds no files of a model: check the name')
  return info.sha, chosen


def _fetch(repo: str, revision: str, commit: str, names: Sequence[str]) -> epath.Path:
  """Downloads files of a commit. Raises what huggingface_hub does."""
  from huggingface_hub import hf_hub_download

  # One after the other: `snapshot_download` does it in threads, which Ctrl-C does not end.
  for name in names:
    file = epath.Path(hf_hub_download(repo, name, revision=commit))
  folder = file.parents[name.count('/')]
  if revision != commit:
    # As huggingface_hub notes where a branch is, which it does not where a commit is asked for;
    # after the download, so that it leads to a whole model. A cache that is only read does without.
    with contextlib.suppress(UnclipError):
      note = folder.parents[1] / 'refs' / revision
      write_atomically(note, lambda part: part.write_text(commit))
  return folder


def _cached(repo: str, revision: str) -> epath.Path | None:
  """The folder of a revision in the cache, None where there is none."""
  from huggingface_hub import snapshot_download

  try:
    # No patterns: what a whole folder has to hold is not known here. What is missing is found when
    # it is opened.
    return epath.Path(
      snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[])
    )
  except OSError:  # there is none, or it may not be read
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Leaves out huggingface_hub's warnings: they hold URLs. Its bars are for terminals alone."""
  from huggingface_hub.utils import logging

  verbosity = logging.get_verbosity()
  # Who sets HF_HUB_VERBOSITY to less than warnings wants to see them.
  if verbosity >= logging.WARNING:
    logging.set_verbosity(logging.CRITICAL)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


# --- What went wrong.


def _cause(error: Exception) -> BaseException:
  """What is behind huggingface_hub's finding that the cache has nothing either."""
  from huggingface_hub.errors import LocalEntryNotFoundError

  cause: BaseException = error
  while isinstance(cause, LocalEntryNotFoundError) and cause.__cause__ is not None:
    cause = cause.__cause__
  return cause


def _outage(error: BaseException) -> str | None:
  """Says of an error that the hub is out of reach, None where that is not so."""
  from huggingface_hub.errors import HfHubHTTPError

  if isinstance(error, HfHubHTTPError):
    status = _status(error)
    is_down = status is not None and (status == _BUSY or status >= _SERVER_ERROR)
    return f'{_host()} answers with the error {status}' if is_down else None
  if isinstance(error, json.JSONDecodeError):  # the page of a hotel's network, for instance
    return f'{_host()} does not answer as a hub does'
  # Of the HTTP library that huggingface_hub is built on, whichever its version takes.
  library = tuple(
    kind for kind in HfHubHTTPError.__mro__[1:] if kind.__module__.partition('.')[0] != 'builtins'
  )
  if isinstance(error, (*library, ConnectionError, TimeoutError)):
    return f'{_host()} cannot be reached ({_reason(error)})'
  return None


def _problem(error: BaseException, model: str) -> str:
  """One line on an error that is no outage."""
  from huggingface_hub import constants
  from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
  )

  host, (repo, _, revision) = _host(), model.partition('@')
  status = _status(error) if isinstance(error, HfHubHTTPError) else None
  if isinstance(error, GatedRepoError):
    return (
      f'{repo} is gated: ask for access on its page on {host}, log in with `hf auth login`, and '
      'try again'
    )
  if isinstance(error, RevisionNotFoundError):
    revision = revision or constants.DEFAULT_REVISION
    return f'{repo} on {host} has no branch, tag or commit {revision!r}: check its name'
  if isinstance(error, DisabledRepoError):
    return f'{repo} was disabled on {host}: take another model'
  is_of_file = isinstance(error, EntryNotFoundError)
  if isinstance(error, RepositoryNotFoundError) or (status == _NOT_FOUND and not is_of_file):
    return (
      f'there is no folder {model}, and {host} has no model {repo}, or not for you: check the '
      'name, or log in with `hf auth login`'
    )
  if status in _REFUSED:
    return (
      f'{host} refuses {repo} (error {status}): log in with `hf auth login`, with a token that may '
      'read it'
    )
  if status is not None:
    return f'{host} answers with the error {status} where {model} is asked for: try again'
  if isinstance(error, OSError) and error.errno is not None:
    return (
      f'cannot write to the cache {constants.HF_HUB_CACHE} ({error.strerror}): free some space, or '
      'let HF_HOME name a folder that can be written'
    )
  return (
    f'{model} could not be downloaded from {host} ({type(error).__name__}): check the network and '
    'HF_ENDPOINT, and try again'
  )


def _status(error: BaseException) -> int | None:
  return getattr(getattr(error, 'response', None), 'status_code', None)


def _reason(error: BaseException) -> str:
  """What the system said: it knows of no URLs."""
  reason, link = type(error).__name__, error
  while link is not None:
    if isinstance(link, OSError) and link.strerror:
      reason = link.strerror
    link = link.__cause__ or link.__context__
  return reason


def _host() -> str:
  """The hub's name, without a password that HF_ENDPOINT may hold."""
  from huggingface_hub import constants

  place = constants.ENDPOINT.partition('://')[2].partition('/')[0]
  return place.rpartition('@')[2] or 'the hub'
