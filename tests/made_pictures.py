"""Pictures, captions and tar files for the tests of what reads data sets."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int, height: int = 24, width: int = 24) -> np.ndarray:
  """Noise, uint8 [height, width, 3]."""
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = 'PNG', **options) -> bytes:
  """The bytes of a picture file."""
  image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
  buffer = io.BytesIO()
  image.save(buffer, kind, **options)
  return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options) -> Path:
  """A tar file of members in their order."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w', **options) as tar:
    for name, content in members.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return path


def write_shard(path: Path, first: int, count: int) -> Path:
  """A tar file as img2dataset has it, of pictures `first` and so on."""
  members = {}
  for number in range(first, first + count):
    key = f'{number:09d}'
    members[f'{key}.png'] = encoded(pixels(number))
    members[f'{key}.json'] = b'{"caption": "of the json"}'
    members[f'{key}.txt'] = f'picture {number}'.encode()
  return write_tar(path, members)
