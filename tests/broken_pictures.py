"""Files that people put in, by mistake or on purpose: whole, of odd kinds, damaged, no pictures."""

import functools
import io
import struct
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np
from made_pictures import encoded, pixels
from PIL import Image, PngImagePlugin

FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'TIFF', 'WEBP')
# Which Pillow knows, and the page does not take.
OTHERS = ('DDS', 'ICO', 'JPEG2000', 'PCX', 'PPM', 'SGI', 'TGA', 'PDF')


@functools.cache
def whole() -> dict[str, bytes]:
  """Pictures of all kinds, each to be read."""
  rgb = Image.fromarray(pixels(1, 24, 36))
  turned = Image.Exif()
  turned[274] = 6
  levels = pixels(2)[..., 0].astype(np.uint16) * 257
  real = np.random.default_rng(3).random((9, 7), np.float32)
  real[0, 0] = np.nan
  frames = [Image.fromarray(pixels(seed)) for seed in range(3)]
  return {
    **{kind: encoded(rgb, kind) for kind in FORMATS},
    'one pixel': encoded(rgb.resize((1, 1))),
    'thin': encoded(rgb.resize((1, 300))),
    'animated gif': encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:]),
    'animated webp': encoded(frames[0], 'WEBP', save_all=True, append_images=frames[1:]),
    'turned': encoded(rgb, 'JPEG', exif=turned),
    'cmyk': encoded(rgb.convert('CMYK'), 'JPEG'),
    'palette': encoded(rgb.convert('P'), 'PNG', transparency=3),
    'bits': encoded(rgb.convert('1')),
    'grey': encoded(rgb.convert('L'), 'JPEG'),
    'grey and alpha': encoded(rgb.convert('LA')),
    'transparent': encoded(rgb.convert('RGBA')),
    '16 bits': encoded(Image.fromarray(levels)),
    'floats': encoded(Image.fromarray(real), 'TIFF'),
  }


@functools.cache
def none() -> dict[str, bytes]:
  """What is to be refused."""
  rgb = Image.fromarray(pixels(1, 24, 36))
  archive = io.BytesIO()
  with zipfile.ZipFile(archive, 'w') as file:
    file.writestr('picture.png', encoded(rgb))
  return {
    'nothing': b'',
    'one byte': b'\x89',
    'text': b'a red apple, flat style',
    'svg': b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    'postscript': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nquit\n',
    'zip': archive.getvalue(),
    'png signature': encoded(rgb)[:8],
    'bomb': header_of(60_000, 60_000),
    'large': header_of(5_000, 5_000),
    'no pixels': header_of(0, 9),
    'bomb of text': bomb_of_text(),
    **{kind: encoded(rgb, kind) for kind in OTHERS},
  }


def header_of(width: int, height: int) -> bytes:
  """A PNG that says to be of a size, and has next to no pixels."""
  chunks = [
    (b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)),
    (b'IDAT', zlib.compress(bytes(1000))),
    (b'IEND', b''),
  ]
  parts = [
    struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    for name, data in chunks
  ]
  return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def bomb_of_text() -> bytes:
  """A PNG of few pixels with 100 MB of text, in 100 KB."""
  text = PngImagePlugin.PngInfo()
  text.add_text('note', ' ' * 10**8, zip=True)
  return encoded(Image.fromarray(pixels(1)), 'PNG', pnginfo=text)


def damaged(count: int, seed: int = 0) -> Iterator[bytes]:
  """Pictures that are cut, flipped in some bits, spliced or mixed; some can still be read."""
  draw = np.random.default_rng(seed)
  files = list(whole().values())
  for i in range(count):
    file = bytearray(files[i % len(files)])
    match i // len(files) % 5:
      case 0:
        del file[int(draw.integers(len(file))) :]
      case 1:
        for place in draw.integers(len(file), size=int(draw.integers(1, 30))):
          file[place] ^= 1 << int(draw.integers(8))
      case 2:  # where the header is
        for place in draw.integers(min(len(file), 64), size=3):
          file[place] = int(draw.integers(256))
      case 3:
        other = files[int(draw.integers(len(files)))]
        file[int(draw.integers(len(file))) :] = other[int(draw.integers(len(other))) :]
      case 4:
        start, end = sorted(draw.integers(len(file), size=2))
        file[start:end] = draw.bytes(int(draw.integers(1, 200)))
    yield bytes(file)
