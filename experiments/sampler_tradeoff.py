"""How good the decoder's pictures are after how many steps, and seconds, of each sampler.

  python -m experiments.sampler_tradeoff --judge runs/judge
  python -m experiments.sampler_tradeoff --samplers ddim unipc --steps 8 12 --spacings trailing

All draw the same captions from the same z_i and noise, at the decoder's own size and guidance, so
that they differ in the sampler alone. Captions are the first of the gallery of `emoji.evaluate`,
held-out pairs before others. A judge that the model never saw finds each picture's caption among
those of all objects of the gallery in the same style and on the same background (R@1). The Fréchet
distance is to the real pictures of the captions, on the judge's features along as many of their
principal components as so few pictures bear. Intervals are 95%: of a bootstrap over captions, of a
jackknife for the distance.

Seconds are of one of four pictures together, from z_i on: in each of --rounds rounds all settings
that --out holds take their turns, and the median counts. The loop is on the host, so that all
samplers share one program of the network.

--out holds {'about', 'rows'}; started again, only what is missing there is measured.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
from etils import epath

import unclip_jax
from experiments.emoji import bench, common, held_out
from experiments.emoji.compose import load_sprites
from experiments.emoji.parser import Parser
from experiments.emoji.samplers import (
  SAMPLERS,
  SHOWN,
  Subject,
  measure,
  measure_seconds,
  resolve,
)
from unclip_jax.stages import common as stage_common
from unclip_jax.systems import settings
from unclip_jax.types import UnclipError
from unclip_jax.weights.safetensors import write_atomically

STEPS = (4, 6, 8, 12, 16, 25, 50)
Rows = dict[str, dict[str, Any]]  # by 'sampler, spacing, steps'


def plot(rows: Rows) -> plt.Figure:
  """A panel for each measure, against steps and against seconds."""
  timed = {name: row for name, row in rows.items() if 'seconds' in row}
  figure, panels = plt.subplots(len(SHOWN), 2, figsize=(10, 8), sharey='row', layout='constrained')
  spacings = [*dict.fromkeys(name.split(', ')[1] for name in rows)]
  for line, shown in zip(panels, SHOWN, strict=True):
    for label in dict.fromkeys(name.rpartition(', ')[0] for name in rows):
      sampler, spacing = label.split(', ')
      style = ('-', '--', ':', '-.')[spacings.index(spacing) % 4]
      colour = f'C{list(SAMPLERS).index(sampler)}'
      for panel, found in zip(line, (rows, timed), strict=True):
        own = {int(k.rpartition(' ')[2]): v for k, v in found.items() if k.startswith(f'{label}, ')}
        x = [row['seconds'][0] if found is timed else steps for steps, row in sorted(own.items())]
        y = [row[shown][0] for _, row in sorted(own.items())]
        panel.plot(x, y, style, color=colour, marker='.', lw=1.2, label=label)
    for panel, found, what in zip(line, (rows, timed), ('steps', 'seconds a picture'), strict=True):
      panel.set(xlabel=what, ylabel=shown)
      if found:
        panel.set_xscale('log', base=2)
        panel.xaxis.set_major_formatter('{x:.2g}')
      panel.grid(alpha=0.3)
    if shown == SHOWN[2]:
      line[0].set_yscale('log')
  steps = sorted({int(name.rpartition(' ')[2]) for name in rows})
  for panel in panels[:, 0]:
    panel.set_xticks(steps, [str(n) for n in steps])
    panel.minorticks_off()
  figure.legend(*panels[0, 0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
  return figure


def table(rows: Rows) -> str:
  """The rows in Markdown, by their steps."""
  lines = [f'| sampler, spacing, steps | seconds | {" | ".join(SHOWN)} |', '|---' * 5 + '|']
  for name, row in sorted(rows.items(), key=lambda item: int(item[0].rpartition(' ')[2])):
    cells = [
      '{:.4f} [{:.4f}, {:.4f}]'.format(*row[key]) for key in ('seconds', *SHOWN) if key in row
    ]
    lines.append(f'| {name} | ' + ('| ' if 'seconds' not in row else '') + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
  """The options; raises UnclipError where one makes no sense."""
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--run', default='default', help='the model that is measured')
  add('--judge', default='runs/judge', help='run of train_judge')
  add('--out', type=Path, default=Path('runs/sampler_tradeoff.json'), help='what was measured')
  add('--picture', type=Path, default=None, help='of the curves, .png or .webp; beside --out')
  add('--num-captions', type=int, default=128, help='pictures of each setting')
  add('--gallery', type=int, default=200, help='captions among which they are to be found')
  add('--samplers', nargs='+', default=list(SAMPLERS), choices=SAMPLERS)
  add('--spacings', nargs='+', default=['strided'], choices=stage_common.SPACINGS)
  add('--steps', nargs='+', type=int, default=list(STEPS))
  add('--rounds', type=int, default=3, help='of timing; 0 leaves it out')
  add('--seed', type=int, default=0)
  args = parser.parse_args(argv)
  settings.check_count('--rounds', args.rounds, 0)
  if not 12 <= args.num_captions <= args.gallery:
    raise UnclipError(
      f'--num-captions {args.num_captions}: take 12 to the {args.gallery} of --gallery'
    )
  return args


def read(path: Path, about: dict[str, Any]) -> Rows:
  """The rows that were measured before; raises UnclipError where they are of something else."""
  if not path.exists():
    return {}
  try:
    before = json.loads(path.read_text())
    rows, measured = dict(before['rows']), dict(before['about'])
  except (ValueError, TypeError, KeyError) as error:
    raise UnclipError(f'{path} is damaged ({error}): remove it') from error
  for name, value in about.items():
    if measured.get(name) != value:
      raise UnclipError(
        f'{path} was measured with {name} {measured.get(name)}, not {value}: give another --out'
      )
  return rows


def main(argv: list[str] | None = None) -> None:
  args = parse(argv)
  about = {
    name: getattr(args, name) for name in ('run', 'judge', 'num_captions', 'gallery', 'seed')
  }
  about |= {'jax': jax.__version__, 'device': jax.devices()[0].device_kind}
  rows = read(args.out, about)
  asked = [
    f'{sampler}, {spacing}, {steps}'
    for steps in sorted(set(args.steps))
    for spacing in args.spacings
    for sampler in args.samplers
  ]
  missing = [name for name in asked if name not in rows]

  def save() -> None:
    text = json.dumps({'about': about, 'rows': rows}, indent=1) + '\n'
    write_atomically(epath.Path(args.out), lambda part: part.write_text(text))

  if missing or (args.rounds and not all('seconds' in row for row in rows.values())):
    options, sprites = bench.read_options(Path(args.run)), load_sprites()
    model = dataclasses.replace(unclip_jax.load(args.run), vocabulary=None)
    for name in missing:
      resolve(model, name)  # what is wrong is said before anything is measured
    gallery = held_out.make_gallery(sprites, *bench.domain_of(options), args.gallery)
    gallery = gallery._replace(num_asked=min(args.num_captions, len(gallery.truths)))
    judge = unclip_jax.load(args.judge)
    bench_ = bench.Bench(model, judge, sprites, gallery, options, 1, args.seed)
    subject = Subject(model, [truth.caption for truth in bench_.asked], args.seed)
    for name in missing:
      rows[name] = measure(subject, bench_, name)
      save()
      print(f'{name}: measured', file=sys.stderr, flush=True)
    if args.rounds:
      for name, seconds in measure_seconds(subject, [*rows], args.rounds).items():
        rows[name]['seconds'] = seconds
      save()
  print(table(rows))
  figure = plot(rows)
  figure.savefig(args.picture or args.out.with_suffix('.png'), dpi=80)
  plt.close(figure)


if __name__ == '__main__':
  common.run(main)
