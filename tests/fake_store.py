"""A store of objects (`gs://`) that is a folder on this machine, and notes what is asked of it."""

import os
from pathlib import Path
from typing import BinaryIO

import pytest
from etils.epath import backend, gpath
from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

BUCKET = 'gs://bucket'


class FakeStore(AbstractFileSystem):
  """Serves a folder as the bucket `bucket`, by ranges of bytes as stores do."""

  cachable = False
  protocol = 'gs'

  def __init__(self, folder: Path) -> None:
    super().__init__(use_listings_cache=False)
    self.folder = folder
    self.num_fetched = 0  # bytes

  def local(self, path: str) -> Path:
    return self.folder / self._strip_protocol(path).removeprefix('bucket').strip('/')

  def info(self, path: str, **_: object) -> dict:
    local = self.local(path)
    if not local.exists():
      raise FileNotFoundError(path)
    kind = 'directory' if local.is_dir() else 'file'
    return {'name': self._strip_protocol(path), 'size': local.stat().st_size, 'type': kind}

  def ls(self, path: str, detail: bool = True, **_: object) -> list:
    names = [f'{self._strip_protocol(path)}/{name}' for name in os.listdir(self.local(path))]
    return [self.info(name) for name in names] if detail else names

  def _open(self, path: str, mode: str = 'rb', **_: object) -> AbstractBufferedFile | BinaryIO:
    if mode == 'wb':
      self.local(path).parent.mkdir(parents=True, exist_ok=True)
      return self.local(path).open('wb')
    assert mode == 'rb', mode
    return _File(self, path, mode)


class _File(AbstractBufferedFile):
  def _fetch_range(self, start: int, end: int) -> bytes:
    self.fs.num_fetched += end - start
    with self.fs.local(self.path).open('rb') as file:
      file.seek(start)
      return file.read(end - start)


def serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeStore:
  """Makes what is in a folder the content of `gs://bucket`."""
  store = FakeStore(folder)
  monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)
  monkeypatch.setattr(backend.fsspec_backend, 'fs', lambda path: store)
  return store
