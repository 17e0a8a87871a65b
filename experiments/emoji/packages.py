"""The npm packages that the emoji are made of: fetched by name and version, checked by hash.

`npm pack` brings each package as a tarball. Its SHA-512 is compared with the value recorded here,
so that a build starts from the same bytes everywhere. `read_icons` joins the drawings to the labels
of emojibase.
"""

import base64
import dataclasses
import hashlib
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from experiments.emoji import concepts
from unclip_jax.types import UnclipError


@dataclasses.dataclass(frozen=True)
class Package:
  """One npm package.

  Attributes:
    name: its npm name.
    version: the pinned version.
    sha512: base64 of the tarball's SHA-512, as npm records it.
    style: the word for its drawings in captions, None where it holds no drawings.
    licence: SPDX name of its licence.
  """

  name: str
  version: str
  sha512: str
  style: str | None
  licence: str

  @property
  def tarball(self) -> str:
    """The file name that `npm pack` gives the package."""
    return f'{self.name.lstrip("@").replace("/", "-")}-{self.version}.tgz'


FLAT = Package(
  '@iconify-json/fluent-emoji-flat',
  '1.2.6',
  'RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==',
  'flat',
  'MIT',
)
GRADIENT = Package(
  '@iconify-json/fluent-emoji',
  '1.2.7',
  'D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==',
  'gradient',
  'MIT',
)
NOTO = Package(
  '@iconify-json/noto',
  '1.2.9',
  'DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==',
  'noto',
  'Apache-2.0',
)
TWEMOJI = Package(
  '@iconify-json/twemoji',
  '1.2.5',
  'uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==',
  'twemoji',
  'CC-BY-4.0',
)
RENDERED_3D = Package(
  '@lobehub/fluent-emoji-3d',
  '1.1.0',
  'Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==',
  '3d',
  'MIT',
)
EMOJIBASE = Package(
  'emojibase-data',
  '17.0.0',
  'Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==',
  None,
  'MIT',
)
SVG_PACKAGES = (FLAT, GRADIENT, NOTO, TWEMOJI)
PACKAGES = (*SVG_PACKAGES, RENDERED_3D, EMOJIBASE)


@dataclasses.dataclass(frozen=True)
class Icon:
  """One drawing of one emoji.

  Attributes:
    emoji: what it shows.
    style: 'flat', 'gradient', 'noto', 'twemoji' or '3d'.
    svg: the SVG document, None for the 3D renderings.
    webp: the encoded 256x256 image of a 3D rendering, None for vector graphics.
  """

  emoji: concepts.Emoji
  style: str
  svg: str | None = None
  webp: bytes | None = None


def fetch_packages(cache_dir: Path) -> dict[Package, Path]:
  """Returns the tarball of each package, downloading what `cache_dir` lacks.

  Args:
    cache_dir: folder that keeps the tarballs between builds. Created if missing.

  Raises:
    UnclipError: npm is not installed, a download fails, or a tarball's hash is another one.
  """
  cache_dir.mkdir(parents=True, exist_ok=True)
  paths = {}
  for package in PACKAGES:
    path = cache_dir / package.tarball
    if not path.exists():
      _npm_pack(package, cache_dir)
    check_integrity(path, package)
    paths[package] = path
  return paths


def check_integrity(path: Path, package: Package) -> None:
  """Raises UnclipError unless the file at `path` has the SHA-512 recorded for `package`."""
  digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
  if digest != package.sha512:
    raise UnclipError(
      f'{path} is not {package.name}@{package.version} as recorded (sha512-{digest}): delete the '
      'file and build again'
    )


def read_icons(tarballs: dict[Package, Path]) -> list[Icon]:
  """Returns every icon that a build holds, ordered by style and code points.

  Icons without a label in emojibase, variants in skin tone, gender or direction and the flags of
  countries are left out.

  Args:
    tarballs: what `fetch_packages` returned.
  """
  with tarfile.open(tarballs[EMOJIBASE]) as archive:
    records = _read_json(archive, 'package/en/data.json')
    meta = _read_json(archive, 'package/meta/groups.json')
  emojis = concepts.read_emojibase(records, meta)
  icons = {}
  for icon in _read_all(tarballs, emojis):
    icons.setdefault((icon.style, icon.emoji.code_points), icon)
  return [icons[key] for key in sorted(icons)]


def _read_all(tarballs: dict[Package, Path], emojis: dict[str, concepts.Emoji]) -> Iterator[Icon]:
  # fluent-emoji lists no code points; its icons have the names of fluent-emoji-flat.
  for package in SVG_PACKAGES:
    named_by = FLAT if package is GRADIENT else package
    with tarfile.open(tarballs[named_by]) as archive:
      names = _read_json(archive, 'package/chars.json')
    with tarfile.open(tarballs[package]) as archive:
      icon_set = _read_json(archive, 'package/icons.json')
    for code_points, name in sorted(names.items()):
      emoji = emojis.get(concepts.normal_form(code_points))
      body = icon_set['icons'].get(name)
      if emoji is not None and body is not None:
        yield Icon(emoji, package.style, svg=_svg_document(body, icon_set))
  with tarfile.open(tarballs[RENDERED_3D]) as archive:
    for member in sorted(archive.getmembers(), key=lambda member: member.name):
      code_points = concepts.normal_form(Path(member.name).stem)
      if member.name.endswith('.webp') and code_points in emojis:
        webp = archive.extractfile(member).read()
        yield Icon(emojis[code_points], RENDERED_3D.style, webp=webp)


def _svg_document(icon: dict, icon_set: dict) -> str:
  width = icon.get('width', icon_set.get('width', 16))
  height = icon.get('height', icon_set.get('height', 16))
  left, top = icon.get('left', 0), icon.get('top', 0)
  return (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">'
    f'{icon["body"]}</svg>'
  )


def _read_json(archive: tarfile.TarFile, name: str):
  return json.load(archive.extractfile(name))


def _npm_pack(package: Package, cache_dir: Path) -> None:
  npm = shutil.which('npm')
  if npm is None:
    raise UnclipError('npm is not on the PATH: install Node.js, which brings it, and build again')
  result = subprocess.run(
    [npm, 'pack', '--silent', f'{package.name}@{package.version}'],
    cwd=cache_dir,
    capture_output=True,
    text=True,
  )
  if result.returncode != 0:
    lines = result.stderr.strip().splitlines() or ['no message']
    raise UnclipError(f'npm pack {package.name}@{package.version} failed: {lines[-1]}')
