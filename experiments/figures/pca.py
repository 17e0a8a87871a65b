"""Figure 7: what few principal components of CLIP's embedding hold of pictures, on one seed.

  python -m experiments.figures.pca
  python -m experiments.figures.pca --model MODEL --image fox.jpg owl.jpg

The components are those of an autoregressive prior where the model has one, else of embeddings of
emoji: `unclip-jax pca --fit FOLDER` takes them from other pictures.
"""

from experiments.emoji.pool import make_pool
from experiments.figures.common import GROUPS, STYLES, Setup, Sheet, make
from unclip_jax import manipulate
from unclip_jax.configs import ArPriorConfig

NUM_FITTED, BATCH = 2048, 64
DIMS = (1, 5, 10, 20, 40, 80)


def pca(setup: Setup) -> Sheet:
  """A row for each picture."""
  model, found = setup.model, None
  how = manipulate.Drawing(seed=setup.how.seed)
  if not isinstance(model.config.prior, ArPriorConfig):
    pool = make_pool(64, NUM_FITTED, 0, ('train',), STYLES, GROUPS).images
    batches = (pool[start : start + BATCH] for start in range(0, NUM_FITTED, BATCH))
    found = manipulate.fit_pca(model, batches)
  rows, cosines = [], []
  for picture in setup.pictures('cat face, flat, blue', 'red apple, 3d, white', 'owl, flat, red'):
    row = manipulate.pca_reconstruct(model, [picture], DIMS, found, how)
    rows.append([picture, *row.images])
    cosines.append(row.measured['cosine'])
  names = ['given', *(f'{k} component{"s"[: k > 1]}' for k in DIMS)]
  return Sheet(rows, names, [''] * len(rows), {'cosine': cosines})


if __name__ == '__main__':
  make(pca, __doc__)
