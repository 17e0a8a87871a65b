"""Figure 4: from one picture to another, with their own noise and with one noise for all.

python -m experiments.figures.interpolations
python -m experiments.figures.interpolations --model MODEL --image fox.jpg owl.jpg
"""

from experiments.figures.common import PAIRS, Figure, Setup, Sheet, make
from unclip_jax import manipulate

FRAMES = 6


def interpolations(setup: Setup) -> Sheet:
  """Two rows for each pair of pictures."""
  pictures = setup.pictures(
    'cat face, flat, blue', 'owl, flat, red', 'red apple, 3d, yellow', 'rocket, 3d, white'
  )
  rows, titles, measured = [], [], []
  for one, other in zip(pictures[::2], pictures[1::2], strict=True):
    for noise in manipulate.rows.NOISES:
      found = manipulate.interpolate(setup.model, one, other, FRAMES, noise, setup.how)
      rows.append([one, *found.images, other])
      titles.append(f'{noise} noise')
      measured.append(found.measured)
  names = ['given', *(f'theta {i / (FRAMES - 1):.1f}' for i in range(FRAMES)), 'given']
  return Sheet(rows, names, titles, measured)


FIGURE = Figure(interpolations, images=PAIRS)

if __name__ == '__main__':
  make(FIGURE, __doc__)
