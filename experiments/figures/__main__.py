"""The figures of the paper, all of them or some.

python -m experiments.figures --out docs/images/gallery
python -m experiments.figures text_diffs --model MODEL --image cat.jpg --text "a cat" "a lion"
"""

from experiments.figures import (
  binding,
  common,
  edits,
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

# In the order of the paper, 3 to 9 and 14 to 16; last what it does not draw.
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
    edits,
  )
)

if __name__ == '__main__':
  common.make(FIGURES, __doc__)
