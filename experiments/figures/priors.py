"""Figure 8: what the prior is worth: the same decoder by the caption alone, by z_t, and by z_i.

python -m experiments.figures.priors
python -m experiments.figures.priors --model MODEL --text "a hedgehog using a calculator"
"""

import numpy as np

from experiments.figures.common import ONE_OR_MORE, Figure, Setup, Sheet, make
from unclip_jax import Unclip
from unclip_jax.configs import DecoderConfig

NUM_IMAGES = 2


def priors(setup: Setup) -> Sheet:
  """A row for each caption; the same noise in all three."""
  model = setup.model
  rows = []
  texts = setup.prompts('a flat red apple', 'a 3d owl on a green background', 'a rocket')
  for text in texts:
    z_t = np.asarray(model.encode_text([text]))
    by_prior = model.sample(text, setup.how.seed, NUM_IMAGES)
    row = [
      image
      for z_i in (no_z_i(model, z_t), z_t)
      for image in model.sample(text, setup.how.seed, NUM_IMAGES, z_i=z_i).images
    ]
    rows.append([*row, *by_prior.images])
  names = ['caption alone', '', 'z_t for z_i', '', 'z_i of the prior', '']
  return Sheet(rows, names, texts)


def no_z_i(model: Unclip, z_t: np.ndarray) -> np.ndarray:
  """What the decoder learned to take for no z_i, else zeros, of the shape of z_t."""
  config = model.config.decoder
  if not isinstance(config, DecoderConfig):
    return np.zeros_like(z_t)
  # It stands in for a z_i that was scaled.
  null = np.asarray(model.params['decoder']['null_z_i'], np.float32) / config.embed_scale
  return np.broadcast_to(null, z_t.shape)


FIGURE = Figure(priors, texts=ONE_OR_MORE)

if __name__ == '__main__':
  make(FIGURE, __doc__)
