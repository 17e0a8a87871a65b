"""Measures quality against guidance and against steps: where the settings of a model come from.

  python -m experiments.emoji.sweep --run runs/emoji_small --judge runs/judge

One setting of the decoder changes at a time, the others are the model's own; the pictures are of
the decoder's size, before any upsampler.
"""

import matplotlib.pyplot as plt

from experiments.emoji import common
from experiments.emoji.bench import Bench, Row, make_parser, open_bench, table
from unclip_jax import Sampling

SETTINGS = {
  'guidance_scale': (1.0, 1.5, 2.0, 3.0, 5.0),
  'num_steps': (5, 10, 25, 50, 100),
}
SAMPLERS = ('ddpm', 'ddim')
SHOWN = ('R@1 same ground', 'silhouette IoU')


def sweep(bench: Bench) -> dict[tuple[str, str, float], Row]:
  """All measures by (setting, sampler, value)."""
  asked = [truth.caption for truth in bench.gallery.truths[: bench.gallery.num_asked]]
  config = bench.model.config.decoder
  own = {
    'guidance_scale': config.sampling.guidance_scale,
    'num_steps': config.sampling.num_steps,
  }
  rows = {}
  for setting, values in SETTINGS.items():
    for sampler in SAMPLERS:
      for value in values:
        decoder = Sampling(**{**own, setting: value}, sampler=sampler)
        images = bench.draw(asked, bench.num_samples, decoder=decoder, size=config.image_size)
        rows[setting, sampler, value] = bench.row(bench.measure(images))
  return rows


def plot(rows: dict[tuple[str, str, float], Row]) -> plt.Figure:
  """A panel for each setting and measure, with intervals."""
  shape = (len(SHOWN), len(SETTINGS))
  figure, panels = plt.subplots(*shape, figsize=(9, 5.5), sharey='row', layout='constrained')
  for line, measure in zip(panels, SHOWN, strict=True):
    for panel, (setting, values) in zip(line, SETTINGS.items(), strict=True):
      for sampler in SAMPLERS:
        found = [rows[setting, sampler, value][measure] for value in values]
        means = [x.mean for x in found]
        errors = [[x.mean - x.low for x in found], [x.high - x.mean for x in found]]
        panel.errorbar(values, means, errors, marker='o', capsize=3, label=sampler)
      panel.set(xlabel=f'{setting} of the decoder', ylabel=measure)
      panel.grid(alpha=0.3)
      panel.legend()
      if setting == 'num_steps':
        panel.set_xscale('log')
        panel.set_xticks(values, [str(value) for value in values])
  return figure


def main(argv: list[str] | None = None) -> None:
  args = make_parser(__doc__, samples=2).parse_args(argv)
  bench = open_bench(args, seed=0)
  rows = sweep(bench)
  figure = plot(rows)
  figure.savefig(args.images / 'sweep.png', dpi=80)
  plt.close(figure)
  print('## Guidance and steps\n')
  print(
    f'{args.samples} samples of each of the held-out captions, before the upsampler '
    f'({bench.model.config.decoder.image_size} px), from other noise than the tables above.\n'
  )
  print(table({f'{s} {value:g}, {sampler}': row for (s, sampler, value), row in rows.items()}))
  print(f'\n![Quality against guidance and steps]({args.images.name}/sweep.png)')


if __name__ == '__main__':
  common.run(main)
