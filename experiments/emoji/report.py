"""Draws a grid of samples not hand-picked, and prints how the model was trained.

  python -m experiments.emoji.report --run runs/emoji_small --images docs/images > docs/emoji.md

The captions are those of the first held-out (concept, style) pairs in the order of a seeded data
set: nobody chose them. The text printed holds no figure that is not measured here or read from
the runs' metrics.
"""

import csv
import json
import textwrap
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw

import unclip_jax
from experiments.emoji import common
from experiments.emoji.compose import CaptionedEmoji, load_sprites

STAGES = ('clip', 'prior', 'draft', 'decoder', 'upsampler_0')  # the draft is part of the decoder
COLUMNS = 8
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


def captions_of(options: dict, split: str, num: int) -> list[str]:
  """Captions of `num` different sprites of a split, single objects, in the data set's order."""
  source = CaptionedEmoji(
    load_sprites(None),
    32,
    num * 20,
    seed=1,
    splits=(split,),
    styles=options['styles'],
    groups=options['groups'],
    labels=options['labels'],
    scene_fraction=0.0,
  )
  chosen: dict[int, str] = {}
  for i in range(len(source)):
    truth = source.truth(i)
    chosen.setdefault(truth.sprite_index, truth.caption)
  return list(chosen.values())[:num]


def training_row(folder: Path) -> str:
  """One line of the table: updates, examples, hours, the last losses."""
  with (folder / 'metrics.csv').open() as file:
    rows = list(csv.DictReader(file))
  options = json.loads((folder / 'options.json').read_text())
  rows = [row for row in rows if row.get('loss')]
  steps = int(rows[-1]['step'])
  spacing = steps / len(rows) * options['batch_size']
  hours = sum(spacing / float(row['examples_per_s']) for row in rows) / 3600
  tail = rows[-max(1, len(rows) // 20) :]
  names = [n for n in ('loss', 'mse', 'draft_mse', 'accuracy', 'cosine') if rows[-1].get(n)]
  figures = ', '.join(f'{n} {np.mean([float(r[n]) for r in tail]):.4f}' for n in names)
  examples = steps * options['batch_size']
  return f'| {folder.name} | {steps:,} | {examples:,} | {hours:.2f} | {figures} |'


def main() -> None:
  parser = common.Parser(description=__doc__)
  parser.add_argument('--run', type=Path, default=Path('runs/emoji_small'))
  parser.add_argument('--images', type=Path, default=Path('docs/images'))
  args = parser.parse_args()
  args.images.mkdir(parents=True, exist_ok=True)
  model = unclip_jax.load(args.run)
  options = json.loads((args.run / 'decoder' / 'options.json').read_text())
  sections = []
  for split, what in (
    ('val_pairs', 'Held-out pairs: the concept was seen in other styles, in this one never'),
    ('val_concepts', 'Held-out concepts: never seen in any style'),
    ('train', 'Captions of the training set'),
  ):
    captions = captions_of(options, split, COLUMNS * COLUMNS)
    images = np.concatenate(
      [model.sample(c, seed=0, first_image=i).images for i, c in enumerate(captions)]
    )
    name = f'emoji_{split}.webp'
    labelled_grid(images, captions).save(args.images / name, quality=80)
    sections.append(f'## {what}\n\n![{len(captions)} samples]({args.images.name}/{name})\n')
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
  for stage in STAGES:
    if (args.run / stage).exists():
      print(training_row(args.run / stage))
  print('\n' + '\n'.join(sections), end='')


if __name__ == '__main__':
  common.run(main)
