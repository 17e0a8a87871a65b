"""Figures of evaluations as text, and a sweep of guidance as a picture."""

from collections.abc import Mapping, Sequence
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
  notes = [*_networks(figures), *_settings(figures), *_spreads(figures)]
  return '\n'.join([table(title, names, rows), '', *notes])


def _spread(entry: Entry) -> str:
  if 'std' in entry:
    return f'± {entry["std"]:.4f}'
  return f'[{entry["low"]:.4f}, {entry["high"]:.4f}]' if 'low' in entry else ''


def _spreads(figures: Sequence[Entry]) -> list[str]:
  """What `_spread` stands for."""
  said = {'std': '±: deviation over subsets', 'low': '[]: 95% interval over captions'}
  return [text for key, text in said.items() if any(key in entry for entry in figures)]


def _networks(figures: Sequence[Entry]) -> list[str]:
  named = {entry['features']: entry for entry in figures}
  return [
    f'{name}: {entry["dims"]} dimensions; pictures at {entry["preparation"]}'
    for name, entry in named.items()
  ]


def _settings(figures: Sequence[Entry]) -> list[str]:
  named: dict[str, list[str]] = {}
  for entry in figures:
    if entry.get('settings'):
      named.setdefault(entry['settings'], []).append(entry['figure'])
  return [f'{setting}: {", ".join(dict.fromkeys(of))}' for setting, of in named.items()]


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
  shown = [distance, score]
  notes = [*_networks(shown), *_settings([score]), *_spreads(shown)]
  return '\n'.join([table(title, names, rows), '', *notes])


def probe_to_text(figures: Sequence[Entry]) -> str:
  """A table of what was measured of a CLIP."""
  rows = [
    [entry['figure'], f'{entry["value"]:.4f}', f'{entry["count"]:,}', entry['settings']]
    for entry in figures
  ]
  title = f'at {figures[0]["resolution"]} px'
  return '\n'.join([table(title, ['figure', 'value', 'of', ''], rows), '', *_networks(figures)])


def warnings_of(figures: Sequence[Entry]) -> list[str]:
  """What is to be said of figures, once each."""
  found = (f'{entry["figure"]}: {entry["warning"]}' for entry in figures if entry.get('warning'))
  return list(dict.fromkeys(found))


def plot_sweep(path: Path, results: Mapping[str, Any]) -> None:
  """The distance to real pictures against the CLIP score, a point for each guidance scale.

  Bars are the score's 95% intervals; how far the distance is from that of more pictures none says.

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
  scores = [row['clip_score'] for row in rows]
  # Rounding may put a value of no spread outside of its interval.
  below, above = (
    [max(0.0, sign * (score[end] - score['value'])) for score in scores]
    for sign, end in ((-1, 'low'), (1, 'high'))
  )
  axes.errorbar(x, y, xerr=(below, above), marker='o', elinewidth=1, capsize=3, alpha=0.8)
  for row, *place in zip(rows, x, y, strict=True):
    axes.annotate(
      f'{row["guidance"]:g}', place, xytext=(4, 4), textcoords='offset points', fontsize=8
    )
  first = rows[0]
  judge, network = first['clip_score']['features'], first['distance']['features']
  axes.set(
    xlabel=f'CLIP score, higher is better ({judge})',
    ylabel=f'{distance}, lower is better ({network})',
  )
  axes.grid(alpha=0.3)
  axes.set_title(
    f'{results["about"]["model"]}, guidance of the {results["about"]["stage"]}, '
    f'{first["distance"]["generated"]:,} pictures each',
    fontsize=9,
  )
  kind = path.suffix.removeprefix('.').lower() or 'png'
  write_atomically(epath.Path(path), lambda part: figure.savefig(part, dpi=150, format=kind))
