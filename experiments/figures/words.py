"""Figure 16: words in pictures, which unCLIP spells badly; the embedded model never saw any.

python -m experiments.figures.words
python -m experiments.figures.words --model MODEL --text "a sign that says deep learning"
"""

from experiments.figures.common import ONE_OR_MORE, Figure, Setup, Sheet, make

NUM_IMAGES = 6


def words(setup: Setup) -> Sheet:
  """A row of samples for each caption."""
  texts = setup.prompts('a sign that says deep learning')
  rows = [setup.model.sample(text, setup.how.seed, NUM_IMAGES).images for text in texts]
  return Sheet(rows, [''] * NUM_IMAGES, texts)


FIGURE = Figure(words, texts=ONE_OR_MORE)

if __name__ == '__main__':
  make(FIGURE, __doc__)
