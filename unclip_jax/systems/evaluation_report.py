"""Figures of evaluations as text, and a sweep of guidance as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from unclip_jax.measure.report import table
from unclip_jax.weights.safetensors import write_atomically

Entry = Mapping[str, Any]


def to_text(figures: Sequence[Entry]) -> str:
  """A table of figures, with how they were made below."""
  first = figures[0]
  title = f'at {first["resolution"]} px, resized by {first["resize"]}'
  names = ['figure', 'value', '', 'generated', 'reference', 'features']
  rows = [
    [
      entry['figure'],
      f'{entry["value"]:.4f}',
      _spread(entry),
      f'{entry["generated"]:,}',
      f'{entry["reference"]:,}' if 'reference' in entry else '',
      entry['features'],
    ]
    for entry in figures
  ]
  return '\n'.join([table(title, names, rows), '', *_notes(figures)])


def _spread(entry: Entry) -> str:
  if 'std' in entry:
    return f'± {entry["std"]:.4f}'
  return f'[{entry["low"]:.4f}, {entry["high"]:.4f}]' if 'low' in entry else ''


def _notes(figures: Sequence[Entry]) -> Iterator[str]:
  networks = {entry['features']: entry for entry in figures}
  for name, entry in networks.items():
    yield f'{name}: {entry["dims"]} dimensions; pictures at {entry["preparation"]}'
  settings: dict[str, list[str]] = {}
  for entry in figures:
    if entry.get('settings'):
      settings.setdefault(entry['settings'], []).append(entry['figure'])
  for setting, of in settings.items():
    yield f'{setting}: {", ".join(dict.fromkeys(of))}'


def sweep_to_text(results: Mapping[str, Any]) -> str:
  """A table of a sweep, a line for each scale."""
  first = results['rows'][0]
  distance, score = first['distance'], first['clip_score']
  title = (
    f'guidance of the {results["about"]["stage"]}, at {distance["resolution"]} px, resized by '
    f'{distance["resize"]}'
  )
  names = ['guidance', distance['figure'], score['figure'], '', 'generated', 'reference']
  rows = [
    [
      f'{row["guidance"]:g}',
      f'{row["distance"]["value"]:.4f}',
      f'{row["clip_score"]["value"]:.4f}',
      _spread(row['clip_score']),
      f'{row["distance"]["generated"]:,}',
      f'{row["distance"]["reference"]:,}',
    ]
    for row in results['rows']
  ]
  return '\n'.join([table(title, names, rows), '', *_notes([distance, score])])


def warnings_of(figures: Sequence[Entry]) -> list[str]:
  """What is to be said of figures, once each."""
  found = (f'{entry["figure"]}: {entry["warning"]}' for entry in figures if entry.get('warning'))
  return list(dict.fromkeys(found))


def plot_sweep(path: Path, results: Mapping[str, Any]) -> None:
  """The distance to real pictures against the CLIP score, a point for each guidance scale.

  Raises:
    UnclipError: it cannot be written, a full disk for instance.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6, 4.5), layout='constrained')
  axes = figure.subplots()
  rows = results['rows']
  distance = rows[0]['distance']['figure']
  x = [row['clip_score']['value'] for row in rows]
  y = [row['distance']['value'] for row in rows]
  axes.plot(x, y, marker='o')
  for row, *place in zip(rows, x, y, strict=True):
    axes.annotate(
      f'{row["guidance"]:g}', place, xytext=(4, 4), textcoords='offset points', fontsize=8
    )
  first = rows[0]
  judge, network = first['clip_score']['features'], first['distance']['features']
  axes.set(xlabel=f'CLIP score ({judge})', ylabel=f'{distance} ({network})')
  axes.grid(alpha=0.3)
  axes.set_title(
    f'{results["about"]["model"]}, guidance of the {results["about"]["stage"]}, '
    f'{first["distance"]["generated"]:,} pictures each',
    fontsize=9,
  )
  kind = path.suffix.removeprefix('.').lower() or 'png'
  write_atomically(epath.Path(path), lambda part: figure.savefig(part, dpi=150, format=kind))
