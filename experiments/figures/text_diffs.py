"""Figure 5: a picture on its way from one caption to another.

python -m experiments.figures.text_diffs
python -m experiments.figures.text_diffs --model MODEL --image cat.jpg --text "a cat" "a lion"
"""

from experiments.figures.common import ONE_OR_MORE, PAIRS, Figure, Setup, Sheet, make
from unclip_jax import manipulate
from unclip_jax.types import UnclipError

THETA, FRAMES = 0.5, 6


def text_diffs(setup: Setup) -> Sheet:
  """A row for each picture and each pair of captions; the first also by the other baselines."""
  pictures = setup.pictures('cat face, flat, blue', 'red apple, flat, yellow', 'owl, flat, red')
  texts = setup.prompts(
    'a flat cat face',
    'a 3d cat face',
    'a red apple',
    'a green apple',
    'an owl on a red background',
    'an owl on a green background',
  )
  if len(texts) != 2 * len(pictures):  # of pictures that are the figure's own
    raise UnclipError('give two captions for each picture: what it shows, and what it is to show')
  rows, titles, measured = [], [], []
  for i, picture in enumerate(pictures):
    source, target = texts[2 * i : 2 * i + 2]
    for baseline in manipulate.rows.BASELINES if i == 0 else ('caption',):
      found = manipulate.text_diff(
        setup.model, picture, source, target, THETA, FRAMES, baseline, setup.how
      )
      away = {'caption': source, 'dummy': manipulate.rows.DUMMY, 'empty': '(empty)'}
      rows.append([picture, *found.images])
      titles.append(f'{away.get(baseline, "")} -> {target}'.strip())
      measured.append(found.measured)
  names = ['given', *(f'theta {THETA * i / (FRAMES - 1):.1f}' for i in range(FRAMES))]
  return Sheet(rows, names, titles, measured)


FIGURE = Figure(text_diffs, images=ONE_OR_MORE, texts=PAIRS, texts_per_image=2)

if __name__ == '__main__':
  make(FIGURE, __doc__)
