"""The figures of the paper, all of them or some.

python -m experiments.figures --out docs/images/gallery
python -m experiments.figures text_diffs --model MODEL --image cat.jpg --text "a cat" "a lion"
"""

from experiments.figures import (
  binding,
  common,
  guidance,
  interpolations,
  pca,
  priors,
  reconstructions,
  text_diffs,
  typographic_attack,
  variations,
  words,
)

# In the order of the paper: 3 to 9, 14 to 16.
FIGURES = tuple(
  module.FIGURE
  for module in (
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
)

if __name__ == '__main__':
  common.make(FIGURES, __doc__)
