r"""Figure 6: a word is pasted on an object; what CLIP takes it for, and what variations of it show.

  python -m experiments.figures.typographic_attack
  python -m experiments.figures.typographic_attack --model MODEL --image apple.jpg \
    --text "an apple" "an iPod" "a pizza"

What is written is the second of the captions, without its first word, an article. The embedded CLIP
never saw a word in a picture.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.figures.common import ONE, TWO_OR_MORE, Figure, Setup, Sheet, make
from unclip_jax import manipulate
from unclip_jax.stages.clip import logit_scale

NUM_IMAGES = 4


def typographic_attack(setup: Setup) -> Sheet:
  """A row for the picture and one for the same with a word on it, titled with probabilities."""
  model = setup.model
  (picture,) = setup.pictures('red apple, flat, white')
  texts = setup.prompts('a red apple', 'a rocket', 'a pizza')
  rows, titles, measured = [], [], []
  for given in (picture, write(picture, texts[1].split(' ', 1)[-1])):
    z_i, z_t = np.asarray(model.encode_image(given[None]))[0], np.asarray(model.encode_text(texts))
    cosines = z_t @ z_i / np.linalg.norm(z_t, axis=1) / np.linalg.norm(z_i)
    logits = cosines * float(logit_scale(model.params['clip']['log_scale']))
    share = np.exp(logits - logits.max())
    share = share / share.sum()
    found = manipulate.variations(model, given, NUM_IMAGES, 1.0, setup.how)
    rows.append([given, *found.images])
    titles.append(', '.join(f'{text} {p:.1%}' for text, p in zip(texts, share, strict=True)))
    measured.append(dict(zip(texts, share.round(4).tolist(), strict=True)))
  return Sheet(rows, ['given', *['variation'] * NUM_IMAGES], titles, measured)


def write(picture: np.ndarray, word: str) -> np.ndarray:
  """The picture with a label across its middle."""
  image = Image.fromarray(picture)
  width, height = image.size
  pen = ImageDraw.Draw(image)
  size = height / 5
  font = ImageFont.load_default(
    min(size, size * 0.8 * width / ImageFont.load_default(size).getlength(word))
  )
  pen.rectangle((0.06 * width, 0.38 * height, 0.94 * width, 0.62 * height), 'white', 'black')
  pen.text((width / 2, height / 2), word, 'black', font, anchor='mm')
  return np.asarray(image)


FIGURE = Figure(typographic_attack, images=ONE, texts=TWO_OR_MORE)

if __name__ == '__main__':
  make(FIGURE, __doc__)
