"""Figure 7: what few principal components of CLIP's embedding hold of pictures, on one seed.

  python -m experiments.figures.pca
  python -m experiments.figures.pca --model MODEL --image fox.jpg owl.jpg --fit photos

The components are those of the pictures of --fit, more of them than an embedding has numbers;
without it those of an autoregressive prior where the model has one, else of emoji.
"""

from experiments.emoji.pool import make_pool
from experiments.figures.common import GROUPS, ONE_OR_MORE, STYLES, Figure, Setup, Sheet, make
from unclip_jax import manipulate
from unclip_jax.configs import ArPriorConfig
from unclip_jax.data.folder_source import PictureFolder
from unclip_jax.systems.picture_sets import clip_batches

NUM_FITTED, BATCH = 2048, 64
DIMS = (1, 5, 10, 20, 40, 80)


def pca(setup: Setup) -> Sheet:
  """A row for each picture."""
  model, found = setup.model, None
  how = manipulate.Drawing(seed=setup.how.seed)
  if setup.fit is not None:
    found = manipulate.fit_pca(model, clip_batches(model, PictureFolder(setup.fit)))
  elif not isinstance(model.config.prior, ArPriorConfig):
    pool = make_pool(64, NUM_FITTED, 0, ('train',), STYLES, GROUPS).images
    batches = (pool[start : start + BATCH] for start in range(0, NUM_FITTED, BATCH))
    found = manipulate.fit_pca(model, batches)
  most = model.config.prior.num_components if found is None else len(found.components)
  dims = [k for k in DIMS if k <= most]
  rows, cosines = [], []
  for picture in setup.pictures('cat face, flat, blue', 'red apple, 3d, white', 'owl, flat, red'):
    row = manipulate.pca_reconstruct(model, [picture], dims, found, how)
    rows.append([picture, *row.images])
    cosines.append(row.measured['cosine'])
  names = ['given', *(f'{k} component{"s"[: k > 1]}' for k in dims)]
  measured = {'cosine': cosines, 'fitted': found and found.count}
  return Sheet(rows, names, [''] * len(rows), measured)


FIGURE = Figure(pca, images=ONE_OR_MORE, may_fit=True)

if __name__ == '__main__':
  make(FIGURE, __doc__)
