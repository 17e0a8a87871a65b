"""All figures: python -m experiments.figures --out docs/images/gallery."""

from experiments.figures import common
from experiments.figures.binding import binding
from experiments.figures.guidance import guidance
from experiments.figures.interpolations import interpolations
from experiments.figures.pca import pca
from experiments.figures.priors import priors
from experiments.figures.reconstructions import reconstructions
from experiments.figures.text_diffs import text_diffs
from experiments.figures.typographic_attack import typographic_attack
from experiments.figures.variations import variations
from experiments.figures.words import words

# In the order of the paper: 3 to 9, 14 to 16.
FIGURES = (
  variations,
  interpolations,
  text_diffs,
  typographic_attack,
  pca,
  priors,
  guidance,
  binding,
  reconstructions,
  words,
)

if __name__ == '__main__':
  common.make(FIGURES, __doc__)
