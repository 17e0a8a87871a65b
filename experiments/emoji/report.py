"""Draws a grid of samples not hand-picked, and prints how the model was trained.

  python -m experiments.emoji.report --run runs/emoji_small --images docs/images > docs/emoji.md

The captions are those of the first held-out (concept, style) pairs in the order of a seeded data
set: nobody chose them. The text printed holds no figure that is not measured here or read from
the runs' metrics.
"""

import argparse
import csv
import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

import unclip_jax
from experiments.emoji import common
from experiments.emoji.bench import read_options
from experiments.emoji.compose import CaptionedEmoji, Sprites, Truth, load_sprites
from experiments.emoji.held_out import real_pictures
from experiments.emoji.parser import Parser
from unclip_jax import Unclip
from unclip_jax.images import make_grid
from unclip_jax.systems import settings
from unclip_jax.types import UnclipError

# The draft is part of the decoder.
STAGES = ('clip', 'prior', 'draft', 'decoder', 'upsampler_0', 'upsampler_1')
COLUMNS = 8
COMPARED = 16  # real pictures beside the model's
CAPTION_HEIGHT = 34


def labelled_grid(images: np.ndarray, captions: list[str]) -> Image.Image:
  """uint8 [n, h, w, 3] in rows of eight, each above its caption."""
  n, h, w, _ = images.shape
  sheet = Image.new('RGB', (COLUMNS * w, -(-n // COLUMNS) * (h + CAPTION_HEIGHT)), 'white')
  draw = ImageDraw.Draw(sheet)
  for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
    x, y = i % COLUMNS * w, i // COLUMNS * (h + CAPTION_HEIGHT)
    sheet.paste(Image.fromarray(image), (x, y))
    lines = '\n'.join(textwrap.wrap(caption, 24)[:3])
    draw.multiline_text((x + 2, y + h), lines, fill='black', spacing=0)
  return sheet


def truths_of(sprites: Sprites, options: dict, split: str, num: int) -> list[Truth]:
  """Truths of different sprites of a split, single objects, in the data set's order.

  Where there are fewer than `num` sprites, they come again on other backgrounds.
  """
  source = CaptionedEmoji(
    sprites,
    32,
    num * 20,
    seed=1,
    splits=(split,),
    styles=options['styles'],
    groups=options['groups'],
    labels=options['labels'],
    scene_fraction=0.0,
  )
  truths = [source.truth(i) for i in range(len(source))]
  chosen: dict[Any, Truth] = {}
  for truth in truths:
    chosen.setdefault(truth.sprite_index, truth)
  seen = {(truth.sprite_index, truth.background) for truth in chosen.values()}
  for truth in truths:
    if (truth.sprite_index, truth.background) not in seen:
      chosen.setdefault((truth.sprite_index, truth.background), truth)
  return list(chosen.values())[:num]


def training_rows(folder: Path) -> list[str]:
  """Lines of the table: updates, examples, hours, the last losses; earlier runs below."""
  rows = [row for row in read_metrics(folder) if row.get('loss')]
  options = json.loads((folder / 'options.json').read_text())
  steps = int(rows[-1]['step'])
  spacing = steps / len(rows) * options['batch_size']
  hours = sum(spacing / float(row['examples_per_s']) for row in rows) / 3600
  tail = rows[-max(1, len(rows) // 20) :]
  names = [n for n in ('loss', 'mse', 'draft_mse', 'accuracy', 'cosine') if rows[-1].get(n)]
  figures = ', '.join(f'{n} {np.mean([float(r[n]) for r in tail]):.4f}' for n in names)
  examples = steps * options['batch_size']
  lines = [f'| {folder.name} | {steps:,} | {examples:,} | {hours:.2f} | {figures} |']
  # What a run started from was trained before it.
  before = Path(options.get('init') or '') / folder.name
  if (before / 'metrics.csv').exists() and before.resolve() != folder.resolve():
    name = f'| {folder.name} |'
    lines += [line.replace(name, f'{name[:-2]}, before |') for line in training_rows(before)]
  return lines


def compare(model: Unclip, sprites: Sprites, truths: list[Truth]) -> np.ndarray:
  """Three rows: the real pictures, decoded from their true z_i, and drawn from their captions."""
  captions = [truth.caption for truth in truths]
  size = settings.picture_size(model.config)
  seen = real_pictures(sprites, truths, model.config.clip.vision.image_size)
  decoded = model.sample(captions, seed=0, z_i=model.encode_image(seen)).images
  rows = (real_pictures(sprites, truths, size), decoded, model.sample(captions, seed=0).images)
  return make_grid(np.concatenate(rows), len(truths))


def plot_curves(run: Path, stages: list[str], file: Path) -> None:
  """The loss of each stage against its updates, the mean of each hundredth of the run."""
  figure, panels = plt.subplots(
    1, len(stages), figsize=(3 * len(stages), 2.6), layout='constrained'
  )
  for panel, stage in zip(np.atleast_1d(panels), stages, strict=True):
    rows = [row for row in read_metrics(run / stage) if row.get('loss')]
    points = np.array([(float(row['step']), float(row['loss'])) for row in rows])
    points = np.array([part.mean(axis=0) for part in np.array_split(points, min(100, len(points)))])
    panel.plot(points[:, 0], points[:, 1], linewidth=1)
    panel.set(title=stage, xlabel='update', ylabel='loss', yscale='log')
    panel.grid(alpha=0.3)
  figure.savefig(file, dpi=70)
  plt.close(figure)


def read_metrics(folder: Path) -> list[dict[str, str]]:
  """The rows of a stage's log."""
  with (folder / 'metrics.csv').open() as file:
    return list(csv.DictReader(file))


def main(argv: list[str] | None = None) -> None:
  parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--run', type=Path, default=Path('runs/emoji_small'))
  parser.add_argument('--images', type=Path, default=Path('docs/images'))
  parser.add_argument('--data', type=Path, default=None, help='a build as large as the pictures')
  args = parser.parse_args(argv)
  options = read_options(args.run)
  there = [stage for stage in STAGES if (args.run / stage / 'metrics.csv').exists()]
  if not there:
    raise UnclipError(f'{args.run} has no log of a training: give the folder of a run')
  args.images.mkdir(parents=True, exist_ok=True)
  # Held-out captions have words that the model never saw: no need to hear of each.
  model = dataclasses.replace(unclip_jax.load(args.run), vocabulary=None)
  sprites, sections = load_sprites(args.data), []
  for split, what in (
    (
      'val_pairs',
      'Held-out pairs: the concept was seen in another style if at all, never in this one',
    ),
    ('val_concepts', 'Held-out concepts: never seen in any style'),
    ('train', 'Captions of the training set'),
  ):
    truths = truths_of(sprites, options, split, COLUMNS * COLUMNS)
    captions = [truth.caption for truth in truths]
    images = np.concatenate(
      [model.sample(c, seed=0, first_image=i).images for i, c in enumerate(captions)]
    )
    name = f'emoji_{split}.webp'
    labelled_grid(images, captions).save(args.images / name, quality=60, method=6)
    objects = len({truth.sprite_index for truth in truths})
    sections.append(
      f'## {what}\n\n![{len(captions)} samples of {objects} objects]({args.images.name}/{name})\n'
    )
    if split == 'val_pairs':
      grid = compare(model, sprites, truths[:COMPARED])
      Image.fromarray(grid).save(args.images / 'compared.webp', quality=80)
      sections.append(
        'Real pictures, what the decoder makes of their true z_i, and what the model draws from '
        f'their captions:\n\n![three rows]({args.images.name}/compared.webp)\n'
      )
  print('# The embedded emoji model\n')
  groups, labels = (', '.join(options[name] or ()) for name in ('groups', 'labels'))
  domain = f'the groups {groups}' + (f', and of: {labels}' if labels else '') if groups else 'all'
  print(
    f'Trained on styles {", ".join(options["styles"] or ["all"])} of {domain}. '
    f'{options["scene_fraction"]:.0%} of the pictures show two objects. Sampled with jax '
    f'{jax.__version__} on {jax.devices()[0].device_kind}: image i of seed 0 for caption i, with '
    'the settings of the model.\n'
  )
  print('| stage | updates | examples | hours | mean of the last twentieth of the run |')
  print('|---|---|---|---|---|')
  for stage in there:
    print('\n'.join(training_rows(args.run / stage)))
  plot_curves(args.run, there, args.images / 'curves.png')
  print(f'\n![Training curves]({args.images.name}/curves.png)\n')
  print('\n'.join(sections), end='')


if __name__ == '__main__':
  common.run(main)
