"""A benchmark's figures, of `systems.bench.measure`: as text of 100 columns, JSON, a picture."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from unclip_jax.types import UnclipError

_WIDTH = 100
_GIB = 2**30
_LOAD = 0.5  # of a processor: more, and what is measured waits for what else runs


def check_writable(path: str | Path) -> Path:
  """The path, if a file can be written there: better known before than after an hour.

  Raises:
    UnclipError: it cannot.
  """
  path = Path(path)
  is_new = not path.exists()
  try:
    path.open('a').close()
  except OSError as error:
    raise UnclipError(f'{path} cannot be written ({error.strerror}): take another path') from error
  if is_new:
    path.unlink()
  return path


def check_can_plot(path: str | Path) -> None:
  """Raises UnclipError where matplotlib, of an extra, is missing or writes no such files."""
  try:
    from matplotlib import backend_bases
  except ImportError as error:
    raise UnclipError("plots need matplotlib: pip install 'unclip-jax[train]'") from error
  kind = Path(path).suffix.removeprefix('.').lower()
  if kind and kind not in backend_bases.FigureCanvasBase.get_supported_filetypes():
    raise UnclipError(f'{path}: there are no plots of this kind: take .png, .svg or .pdf')


def write_json(path: Path, results: Mapping[str, Any]) -> None:
  """All figures; what was there stays until they are whole.

  Raises:
    UnclipError: they cannot be written, a full disk for instance.
  """
  text = json.dumps(results, indent=2) + '\n'
  _write(path, lambda part: part.write_text(text, encoding='utf-8'))


def to_text(results: Mapping[str, Any]) -> str:
  """All figures for people, the machine and the versions on top."""
  parts = [_head(results['about'], results['peaks'])]
  if results['end_to_end']:
    parts.append(_end_to_end(results['end_to_end']))
  if results['stages']:
    parts += [_times(results['stages']), _work(results['stages'])]
  parts += [_peer(results), '\n'.join(_steps(results))]
  return '\n\n'.join(filter(None, parts))


def plot(path: Path, results: Mapping[str, Any]) -> None:
  """Images a second by batch size; beside them the ratios to the peer, or the shares of peaks.

  Raises:
    UnclipError: it cannot be written, a full disk for instance.
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=(11, 4.5), layout='constrained')
  left, right = figure.subplots(1, 2)
  series: dict[str, list[tuple[int, float]]] = {}
  for entry in [*results['end_to_end'], *results['stages']]:
    name = entry.get('stage', 'end to end')
    name += '' if entry['devices'] == 1 else f', {entry["devices"]} devices'
    series.setdefault(name, []).append((entry['batch_size'], entry['images_per_second']))
  for name, points in series.items():
    left.plot(*zip(*sorted(points), strict=True), marker='o', label=name)
  left.set(xlabel='batch size', ylabel='images a second', xscale='log', yscale='log')
  left.set_xticks(sorted({x for points in series.values() for x, _ in points}))
  left.xaxis.set_major_formatter('{x:g}')
  left.minorticks_off()
  left.grid(alpha=0.3)
  left.legend()
  bars = _ratio_bars(results) or _share_bars(results)
  if bars:
    labels, heights, lows, highs = zip(*bars, strict=True)
    errors = [
      [h - low for h, low in zip(heights, lows, strict=True)],
      [high - h for h, high in zip(heights, highs, strict=True)],
    ]
    right.barh(range(len(labels)), heights, xerr=errors)
    right.set_yticks(range(len(labels)), labels)
    right.invert_yaxis()
    right.grid(alpha=0.3, axis='x')
    is_ratio = bool(_ratio_bars(results))
    right.axvline(1, color='black', linewidth=0.8)
    right.set_xlabel('times the speed of the peer' if is_ratio else 'share of the matrix peak')
  about = results['about']
  figure.suptitle(f'{about["model"]}, {about["dtype"]}, {about["device"]}, {about["date"]}')
  kind = path.suffix.removeprefix('.').lower() or 'png'
  _write(path, lambda part: figure.savefig(part, dpi=150, format=kind))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
  """Through another name, so that the right one only ever holds a whole file."""
  part = path.with_name(f'.{path.name}.{os.getpid()}.part')
  try:
    write(part)
    part.replace(path)
  except OSError as error:
    part.unlink(missing_ok=True)
    raise UnclipError(
      f'{path} cannot be written ({error.strerror or error}): free some space or take another path'
    ) from error


def _ratio_bars(results: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
  return [
    (f'{_name(e)} {kind}, batch {e["batch_size"]}', r['median'], r['least'], r['most'])
    for e in [*results['end_to_end'], *results['stages']]
    for kind, contender in e.get('peer', {}).get('contenders', {}).items()
    for r in [contender['ratio']]
  ]


def _share_bars(results: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
  return [
    (f'{_name(e)}, batch {e["batch_size"]}', *[e['share_of_matmul_peak']] * 3)
    for e in results['stages']
  ]


def _head(about: Mapping[str, Any], peaks: Mapping[str, Any]) -> str:
  peer = about.get('peer')
  versions = dict(about['versions']) | (peer['versions'] if peer else {})
  steps = ', '.join(f'{name} {n}' for name, n in about['steps'].items())
  samplers = ', '.join(dict.fromkeys(about['samplers'].values()))
  threads, shared = f'{about["threads"]} threads', about['model_devices']
  if peer:
    threads += f' (torch {peer["threads"]}, on {peer["device"]}, {peer["attention"]})'
  lines = [
    f'{about["model"]}, {about["dtype"]}, {about["date"]}',
    f'device    {about["num_devices"]} × {about["device"]} ({about["platform"]}), '
    f'{about["machine"]}, {threads}',
    'versions  ' + ', '.join(f'{name} {version}' for name, version in versions.items()),
    f'steps     {steps}; {samplers}; guided: {", ".join(about["guided"]) or "nothing"}; '
    f'{about["rounds"]} rounds'
    + (f'; {shared} devices share one copy of the parameters' if shared > 1 else ''),
    f'peaks     {peaks["flops_per_second"] / 1e12:.3g} TFLOP/s, copy '
    f'{peaks["bytes_per_second"] / 1e9:.3g} GB/s, a product of {peaks["skinny_rows"]} rows '
    f'{peaks["skinny_bytes_per_second"] / 1e9:.3g} GB/s of weights',
  ]
  if resumed := about.get('resumed'):
    lines.append(f'before    {", ".join(f"{stage} {date}" for stage, date in resumed.items())}')
  if about['load'] is not None and about['load'] > _LOAD:
    lines.append(
      f'BUSY      the load was {about["load"]:.1f} before: figures are those of a busy machine, '
      "the peer's most"
    )
  return '\n'.join(part for line in lines for part in wrapped(line))


def wrapped(line: str) -> list[str]:
  """Lines of the width, those that go on below the first word's column."""
  words, found = line.split(' '), ['']
  for word in words:
    if len(found[-1]) + 1 + len(word) > _WIDTH:
      found.append(' ' * 9)
    found[-1] += (' ' if found[-1] or word == '' else '') + word
  return found


def _end_to_end(entries: Sequence[Mapping[str, Any]]) -> str:
  rows = [
    [
      str(e['batch_size']),
      str(e['devices']),
      _of(e, 'first_image_seconds', '.3g'),
      *_spread(e['seconds']),
      f'{e["images_per_second"]:.3g}',
      _of(e, 'peak_bytes', '.2f', _GIB),
    ]
    for e in entries
  ]
  is_sum = any(e.get('sum_of_stages') for e in entries)
  title = 'end to end' + (', as the sum of the stages' if is_sum else ', from caption to picture')
  names = ['batch', 'devices', 'first image s', 's', 'least', 'most', 'images/s', 'peak GiB']
  return table(title, names, rows)


def _times(entries: Sequence[Mapping[str, Any]]) -> str:
  rows = [
    [
      *_place(e),
      '' if e['steps'] is None else str(e['steps']),
      f'{e["compile_seconds"]:.1f}',
      *_spread(e['seconds']),
      f'{e["images_per_second"]:.3g}',
    ]
    for e in entries
  ]
  names = ['stage', 'batch', 'devices', 'steps', 'compile s', 's', 'least', 'most', 'images/s']
  return table('stages', names, rows)


def _work(entries: Sequence[Mapping[str, Any]]) -> str:
  rows = []
  for e in entries:
    by_hand = e['analytic_flops']
    rows.append(
      [
        *_place(e),
        f'{e["matmul_flops"] / 1e9:,.4g}',
        '' if by_hand is None else f'{e["matmul_flops"] / by_hand:.3f}',
        f'{e["share_of_matmul_peak"]:.1%}',
        f'{e["bytes"] / 1e9:.3g}',
        f'{e["share_of_copy"]:.1%}',
        f'{e["program_bytes"] / _GIB:.2f}',
        _of(e, 'peak_bytes', '.2f', _GIB),
      ]
    )
  names = ['stage', 'batch', 'devices', 'GFLOP', '/ by hand', 'of peak', 'GB', 'of copy']
  return table('what they do', [*names, 'program GiB', 'peak GiB'], rows)


def _peer(results: Mapping[str, Any]) -> str:
  rows, notes = [], {}  # what is noted of a stage for each batch size is said once
  for e in [*results['end_to_end'], *results['stages']]:
    if 'peer' not in e:
      continue
    for name, contender in e['peer']['contenders'].items():
      ratio = contender['ratio']
      rows.append(
        [
          _name(e),
          str(e['batch_size']),
          name,
          f'{contender["seconds"]["median"]:.4g}',
          f'{e["seconds"]["median"]:.4g}',
          *(f'{ratio[k]:.2f}' for k in ('median', 'least', 'most')),
          _of(contender, 'largest_error', '.1e'),
          _of(contender, 'rms_error', '.1e'),
        ]
      )
    for name, note in e['peer'].get('notes', {}).items():
      notes.setdefault(f'{_name(e)}: {name} {note}', None)
  if not rows:
    return ''
  names = ['stage', 'batch', 'peer', 'its s', 'our s', 'ratio', 'least', 'most', 'max error', 'rms']
  return '\n'.join(
    [
      table('against the peer (ratio: its seconds over ours)', names, rows),
      *(line for note in notes for line in wrapped(note)),
    ]
  )


def _steps(results: Mapping[str, Any]) -> list[str]:
  lines = []
  for entry in results['stages']:
    if step := entry.get('step'):
      share = _of(step, 'share_of_skinny', '.0%')
      lines.append(
        f'a step of the prior at batch {entry["batch_size"]}: '
        f'{step["seconds"]["median"] * 1e3:.3g} ms, weights at '
        f'{step["weights_bytes_per_second"] / 1e9:.3g} GB/s'
        + (f', {share} of the skinny product' if share else '')
      )
  return lines


def _name(entry: Mapping[str, Any]) -> str:
  return entry.get('stage', 'end to end')


def _place(entry: Mapping[str, Any]) -> list[str]:
  return [entry['stage'], str(entry['batch_size']), str(entry['devices'])]


def _spread(seconds: Mapping[str, Any]) -> list[str]:
  return [f'{seconds[k]:.4g}' for k in ('median', 'least', 'most')]


def _of(entry: Mapping[str, Any], name: str, form: str, unit: float = 1) -> str:
  value = entry.get(name)
  return '' if value is None else f'{value / unit:{form}}'


def table(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Columns under their names, the first to the left, the others to the right."""
  widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]

  def line(cells: Sequence[str]) -> str:
    first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return '  '.join([cells[0].ljust(len(first)), *others]).rstrip()

  return '\n'.join([title, line(names), *map(line, rows)])
