"""Pointers of Git LFS: what a clone holds in place of large files until it fetches them."""

from etils import epath

from unclip_jax.types import UnclipError

_MAGIC = b'version https://git-lfs.github.com/spec/v1'
HEAD = len(_MAGIC)


def refuse_pointer(path: epath.Path, head: bytes | str) -> None:
  """Looks at how a file begins.

  Args:
    path: of the file, for the message.
    head: its first `HEAD` bytes or more, or its text.

  Raises:
    UnclipError: it is a pointer.
  """
  if head[:HEAD] in (_MAGIC, _MAGIC.decode()):
    raise UnclipError(
      f'{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder'
    )
