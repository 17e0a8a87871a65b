"""Figure 15: pictures of two objects, decoded from CLIP's embedding alone: what it binds.

python -m experiments.figures.reconstructions
python -m experiments.figures.reconstructions --model MODEL --image cubes.jpg
"""

import numpy as np

from experiments.figures.common import ONE_OR_MORE, Figure, Setup, Sheet, make
from unclip_jax import manipulate

NUM_IMAGES = 4


def reconstructions(setup: Setup) -> Sheet:
  """A row for each picture: given, there and back with its own noise, and from other noise."""
  rows, errors, how = [], [], manipulate.Drawing(seed=setup.how.seed)
  pictures = setup.pictures(
    'rocket above house, flat, blue',
    'house above rocket, flat, blue',
    'tiger face left of cat face, 3d, white',
  )
  for picture in pictures:
    own = manipulate.reconstruct(setup.model, [picture], setup.how)
    z_i = np.asarray(setup.model.encode_image(picture[None]))
    others = manipulate.decode(setup.model, z_i, num_images=NUM_IMAGES, how=how)
    rows.append([picture, *own.images, *others.images])
    errors += own.measured['error_levels']
  names = ['given', 'its own noise', *['other noise'] * NUM_IMAGES]
  return Sheet(rows, names, [''] * len(rows), {'error_levels': errors})


FIGURE = Figure(reconstructions, images=ONE_OR_MORE)

if __name__ == '__main__':
  make(FIGURE, __doc__)
