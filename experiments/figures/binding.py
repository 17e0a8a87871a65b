"""Figure 14: what is of which colour, by guidance scale, with and without the text path.

python -m experiments.figures.binding
python -m experiments.figures.binding --model MODEL --text "a red cube on top of a blue cube"
"""

from experiments.figures.common import ONE_OR_MORE, Figure, Setup, Sheet, make
from unclip_jax.systems.settings import Sampling

SCALES, NUM_IMAGES = (1.0, 2.0, 4.0), 2


def binding(setup: Setup) -> Sheet:
  """Two rows for each caption, of the same z_i and noise: the decoder reads it, or does not."""
  model, seed = setup.model, setup.how.seed
  rows, titles = [], []
  for text in setup.prompts(
    'a flat red apple on a green background', 'a flat green apple on a red background'
  ):
    z_i = model.sample(text, seed, NUM_IMAGES).z_i
    for read in (text, ''):
      row = []
      for scale in SCALES:
        row += [
          model.sample(
            read, seed, z_i=z[None], first_image=i, decoder=Sampling(guidance_scale=scale)
          ).images[0]
          for i, z in enumerate(z_i)
        ]
      rows.append(row)
      titles.append(f'{text}: {"read by the decoder too" if read else "z_i alone"}')
  names = [f'scale {scale:g}' for scale in SCALES for _ in range(NUM_IMAGES)]
  return Sheet(rows, names, titles)


FIGURE = Figure(binding, texts=ONE_OR_MORE)

if __name__ == '__main__':
  make(FIGURE, __doc__)
