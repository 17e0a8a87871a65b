"""Figure 3: variations of a picture, the freer the larger eta.

python -m experiments.figures.variations
python -m experiments.figures.variations --model MODEL --image fox.jpg owl.jpg
"""

from experiments.figures.common import ONE_OR_MORE, Figure, Setup, Sheet, make
from unclip_jax import manipulate

ETAS = (0.0, 0.5, 1.0)
NUM_IMAGES = 2  # for each eta above 0


def variations(setup: Setup) -> Sheet:
  """A row for each picture: the picture, then what is drawn of its latents by each eta."""
  names = ['given', *(f'eta {eta:g}' for eta in ETAS for _ in range(NUM_IMAGES if eta else 1))]
  rows, errors = [], []
  for picture in setup.pictures('cat face, flat, blue', 'red apple, 3d, white', 'owl, flat, red'):
    row = [picture]
    for eta in ETAS:
      found = manipulate.variations(setup.model, picture, NUM_IMAGES if eta else 1, eta, setup.how)
      row += list(found.images)
    rows.append(row)
    errors += found.measured['error_levels']
  return Sheet(rows, names, [''] * len(rows), {'error_levels': errors})


FIGURE = Figure(variations, images=ONE_OR_MORE)

if __name__ == '__main__':
  make(FIGURE, __doc__)
