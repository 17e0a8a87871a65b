"""What guidance costs and gives: distance to real pictures against CLIP score, scale by scale.

Figure 11 of the paper has FID against guidance, Nichol et al. 2021 FID against CLIP score. Here it
is the guidance of the decoder or of the prior; all scales draw the same captions with the same
noise.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from unclip_jax.data.examples import Source
from unclip_jax.data.pictures import PictureConfig
from unclip_jax.evaluate import frechet
from unclip_jax.systems import evaluation, settings
from unclip_jax.systems.evaluation import Entry, Options
from unclip_jax.systems.feature_networks import ClipJudge, FeatureNetwork
from unclip_jax.systems.picture_sets import Pictured, fit, read_pictures
from unclip_jax.systems.settings import Sampling
from unclip_jax.systems.unclip import Unclip
from unclip_jax.types import UnclipError

STAGES = ('decoder', 'prior')


class Subject(NamedTuple):
  """What is swept.

  Attributes:
    model: that draws.
    stage: whose guidance changes, of `STAGES`.
    scales: of guidance.
    captions: of pictures, one for each; of those of the reference where None.
    count: pictures at each scale at most, of captions evenly spaced; None draws one for each.
    seed: of the first; the next have the numbers after it.
  """

  model: Unclip
  stage: str
  scales: tuple[float, ...]
  captions: tuple[str, ...] | None
  count: int | None
  seed: int


def sweep(
  subject: Subject,
  reference: Source,
  inception: FeatureNetwork | None,
  judge: ClipJudge,
  options: Options,
  tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Draws pictures at each scale, and compares them with real ones and with their captions.

  Args:
    subject: what draws.
    reference: real pictures.
    inception: whose features the distance is of; None takes those of `judge`.
    judge: of captions; its opinion is worth little where it is the CLIP of the model itself.
    options: how pictures are compared, at the size that the model draws if it does not say.
    tell: is told of what is under way.

  Returns:
    {'about', 'rows'}, ready for JSON; a row has 'guidance', 'distance' and 'clip_score'.

  Raises:
    UnclipError: there are no captions or no scales, the stage has no guidance, the judge reads no
      captions, or a set is smaller than a figure needs.
  """
  _check(subject, judge)
  size = options.resolution or settings.picture_size(subject.model.config)
  networks = [judge.network, *([inception] if inception else [])]
  captions: list[str] = list(subject.captions or ())

  def pictures_and_captions() -> Iterator[Pictured]:
    for picture in read_pictures(reference, size, options.resize):
      if subject.captions is None and picture.captions:
        captions.append(picture.captions[0])
      yield picture

  def look(name: str, pictures: Iterator[Pictured], count: int) -> evaluation.PictureSet:
    report = lambda done: tell(f'{name}: {done} of {count}')  # noqa: E731
    return evaluation.look(pictures, count, networks, options, report)

  real = look('reference', pictures_and_captions(), len(reference))
  if not captions:
    raise UnclipError('the reference has no captions to draw from: give --prompts')
  if subject.count is not None:
    # Of all parts of a list, which may be sorted by what its pictures show.
    wanted = min(subject.count, len(captions))
    captions = [captions[i * len(captions) // wanted] for i in range(wanted)]
  rows = []
  for scale in subject.scales:
    pictures = _draw(subject, captions, scale, size, options)
    drawn = look(f'guidance {scale:g}', pictures, len(captions))
    rows.append(
      {
        'guidance': scale,
        'distance': evaluation.distance(networks[-1], drawn.seen[-1], real.seen[-1]),
        'clip_score': evaluation.meet_captions(judge, drawn.seen[0], drawn.captions, options)[0],
      }
    )
  tell('comparing')
  common = {'resolution': size, 'resize': options.resize}
  for row in rows:
    row['distance'] |= common
    row['clip_score'] |= common
  about = evaluation.about() | {'stage': subject.stage, 'seed': subject.seed}
  return {'about': about, 'rows': rows}


def _check(subject: Subject, judge: ClipJudge) -> None:
  if subject.stage not in STAGES:
    raise UnclipError(f'{subject.stage} has no guidance to sweep: take {" or ".join(STAGES)}')
  if not subject.scales:
    raise UnclipError('there are no scales to sweep: give some, such as 1,1.5,2,3')
  if judge.encode_text is None:
    raise UnclipError('the judge reads no captions: take a CLIP with a text tower')
  settings.check_seed(subject.seed)
  if subject.count is not None:
    settings.check_count('the number of pictures', subject.count, frechet.MIN_ROWS)
  if subject.model.config.decoder is None:
    raise UnclipError('the model has no decoder: it draws no pictures')
  if subject.stage == 'prior' and subject.model.config.prior is None:
    raise UnclipError('the model has no prior: sweep the decoder')


def _draw(
  subject: Subject, captions: Sequence[str], scale: float, size: int, options: Options
) -> Iterator[Pictured]:
  """A picture of each caption, each of noise of its own."""
  # Whether training knew all words is said once by `generate`, not for each of so many captions.
  model = dataclasses.replace(subject.model, vocabulary=None)
  rows = model.batch_size(len(captions))
  config = PictureConfig(size, kernel=options.resize)
  for start in range(0, len(captions), rows):
    some = list(captions[start : start + rows])
    # Filled up: one shape, and so one program, for all batches.
    prompts = some + [some[-1]] * (rows - len(some))
    seeds = [(subject.seed + start + i) % 2**32 for i in range(rows)]
    sampling = {subject.stage: Sampling(guidance_scale=scale)}
    drawn = model.sample(prompts, seeds, batch_size=rows, **sampling)
    for i, caption in enumerate(some):
      image = fit(np.asarray(drawn.images[i]), f'the picture of {caption!r}', config)
      yield Pictured(start + i, caption, image, (caption,))


def notices(results: dict[str, Any], is_own_clip: bool) -> list[str]:
  """What is to be said of a sweep."""
  found = []
  if is_own_clip:
    found.append(
      'the judge is the CLIP of the model itself, which guidance makes its pictures please: give '
      'another one by --clip'
    )
  first: Entry = results['rows'][0]['distance']
  if first['warning']:
    found.append(first['warning'])
  return found
