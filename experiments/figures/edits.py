"""What is painted anew of a picture: a part, a margin, parts in turn, or all of it a little.

python -m experiments.figures.edits
python -m experiments.figures.edits --model MODEL --image cat.jpg --text "a cat with a hat"
"""

import numpy as np

from experiments.figures.common import ONE, Figure, Setup, Sheet, make
from unclip_jax import manipulate

HOLE = 127  # grey
NUM_IMAGES = 4
STRENGTHS = (0.05, 0.1, 0.15, 0.2, 0.3)  # one more


def edits(setup: Setup) -> Sheet:
  """A row each: a half painted anew, a margin, halves in turn, and noised more and more."""
  (picture,) = setup.pictures('cat face, 3d, blue')
  (text,) = setup.prompts('a 3d tiger face on a blue background')
  model, how = setup.model, setup.how
  rows, measured = [], {}

  def show(name: str, given: np.ndarray, mask: np.ndarray, row: manipulate.Row) -> None:
    rows.append([picture, with_hole(given, mask), *row.images])
    measured[name] = row.measured

  def inpaint(given: np.ndarray, mask: np.ndarray, prompt: str = '') -> manipulate.Row:
    return manipulate.inpaint(model, given, mask, prompt, NUM_IMAGES, how=how)

  lower = half(picture, 'lower')
  show('as it was', picture, lower, inpaint(picture, lower))
  right = half(picture, 'right')
  show('anew', picture, right, inpaint(picture, right, text))
  wide, margin = manipulate.extend(picture, 0.25)
  show('around', wide, margin, inpaint(wide, margin))
  turns = [(half(picture, side), text) for side in ('right', 'left', 'upper', 'lower')]
  in_turn = manipulate.inpaint_in_turn(model, picture, turns, how)
  rows.append([picture, with_hole(picture, turns[0][0]), *(row.images[0] for row in in_turn)])
  noised = [manipulate.image_to_image(model, picture, text, s, how=how) for s in STRENGTHS]
  rows.append([picture, *(row.images[0] for row in noised)])
  measured['redraw'] = [row.measured for row in noised]
  names = ['given', *[''] * (NUM_IMAGES + 1)]
  strengths = ', '.join(f'{strength:g}' for strength in STRENGTHS)
  titles = [
    'painted anew, by no caption',
    f'painted anew as "{text}"',
    'carried on around it',
    f'in turn right, left, upper and lower half, as "{text}"',
    f'noised by {strengths} of the schedule, and drawn on as "{text}"',
  ]
  return Sheet(rows, names, titles, measured)


def with_hole(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """What is known of a picture uint8 [h, w, 3]."""
  return np.where(mask[..., None], np.uint8(HOLE), picture)


def half(picture: np.ndarray, which: str) -> np.ndarray:
  """The mask, bool [h, w], of the upper, lower, left or right half of a picture."""
  h, w = picture.shape[:2]
  y, x = np.arange(h)[:, None], np.arange(w)[None, :]
  sides = {'upper': y < h // 2, 'lower': y >= h // 2, 'left': x < w // 2, 'right': x >= w // 2}
  return np.broadcast_to(sides[which], (h, w))


FIGURE = Figure(edits, images=ONE, texts=ONE)

if __name__ == '__main__':
  make(FIGURE, __doc__)
