"""Figure 9: the decoder's guidance scale, on one noise and one z_i.

python -m experiments.figures.guidance
python -m experiments.figures.guidance --model MODEL --text "a green vase filled with red roses"
"""

from experiments.figures.common import ONE_OR_MORE, Figure, Setup, Sheet, make
from unclip_jax.systems.settings import Sampling

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def guidance(setup: Setup) -> Sheet:
  """A row for each caption."""
  rows, z_i = [], None
  texts = setup.prompts('a flat red apple', 'a 3d owl on a green background', 'a rocket')
  for text in texts:
    row = []
    for scale in SCALES:
      sampling = Sampling(guidance_scale=scale)
      drawn = setup.model.sample(text, setup.how.seed, z_i=z_i, decoder=sampling)
      z_i = drawn.z_i
      row.append(drawn.images[0])
    rows.append(row)
    z_i = None
  return Sheet(rows, [f'scale {scale:g}' for scale in SCALES], texts)


FIGURE = Figure(guidance, texts=ONE_OR_MORE)

if __name__ == '__main__':
  make(FIGURE, __doc__)
