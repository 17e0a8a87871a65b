"""What a CLIP latent is good for (sections 3 to 5): manipulations of pictures by any model.

    from unclip_jax import load, manipulate
    model = load()
    row = manipulate.interpolate(model, one, other, n=7)  # uint8 [h, w, 3] each
    row.images, row.measured

Each is a few lines over `encode`, `decode` and `slerp`, to be composed otherwise. Pictures may be
of any size: the middle square of each is looked at.
"""

from unclip_jax.manipulate.edits import extend, image_to_image, inpaint, inpaint_in_turn
from unclip_jax.manipulate.latents import Drawing, Latents, decode, encode, slerp, thumbnail
from unclip_jax.manipulate.rows import (
  Row,
  fit_pca,
  interpolate,
  pca_reconstruct,
  reconstruct,
  text_diff,
  text_direction,
  variations,
)

__all__ = [
  'Drawing',
  'Latents',
  'Row',
  'decode',
  'encode',
  'extend',
  'fit_pca',
  'image_to_image',
  'inpaint',
  'inpaint_in_turn',
  'interpolate',
  'pca_reconstruct',
  'reconstruct',
  'slerp',
  'text_diff',
  'text_direction',
  'thumbnail',
  'variations',
]
