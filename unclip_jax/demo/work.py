"""What the tabs of the page do: each a generator of what there is to see, without Gradio.

All that makes another program is of a few values, and batches are of one shape: what people ask for
compiles a bounded number of programs, and no more memory is taken the longer the page is open.
"""

import contextlib
import dataclasses
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import jax
import numpy as np

import unclip_jax
from unclip_jax import manipulate
from unclip_jax.data.vocabulary import CONCEPTS, Vocabulary
from unclip_jax.demo import limits
from unclip_jax.demo.limits import Drawing
from unclip_jax.manipulate.rows import BASELINES, NOISES, Row
from unclip_jax.sharding import filled_size
from unclip_jax.systems import settings
from unclip_jax.systems.samples import Progress, Samples
from unclip_jax.systems.settings import Sampling
from unclip_jax.systems.unclip import Unclip
from unclip_jax.terminal import memory_errors

STEPS = (0, 10, 25, 50, 100)  # of the decoder; 0 is as the model or the manipulation has it
MOST_IMAGES = 4
FRAMES = 9  # of an interpolation, both ends among them
DIFF_FRAMES = 7  # of a text diff, the picture itself the first
# What the page calls what people give; what is said of it is said in these words.
COUNT, SEED, STEPS_LABEL, SIZE = 'How many', 'Seed', 'Denoising steps', 'Size, pixels'
PROMPT, NEGATIVE = 'Prompt', 'Negative prompt'
NOISE, BASELINE = 'Noise', 'Turned away from'
SOURCE, TARGET = 'What it shows', 'What it is to show'
_MOST_NAMED = 8  # concepts, of hundreds
_LEAST_SIDE = 64  # pixels of what is put in
_WORDS = {'preparing': 'is being prepared', 'sampling': 'is at work', 'done': 'is done'}


class Shown(NamedTuple):
  """What there is to see.

  Attributes:
    images: uint8 [h, w, 3] each; while it is drawn of several sizes.
    line: what goes on, or what was measured.
    captions: of the images; () for none.
    about: what they were made by, ready for json.dumps; None while they are not complete.
  """

  images: Sequence[np.ndarray]
  line: str
  captions: Sequence[str] = ()
  about: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InBatches(Unclip):
  """A model that draws any number of pictures in batches of one size, the last one filled up.

  Attributes:
    rows: of a batch.
  """

  rows: int = 1

  def batch_size(self, n: int, most: int | None = None) -> int:
    """`rows`, whatever is wanted."""
    return filled_size(self.rows, self.mesh)


class _Left(Exception):
  """Nobody looks any more."""


class Studio:
  """A model, and the functions behind the tabs.

  Each is a generator of `Shown`, of which the last has `about`, and raises UnclipError where an
  argument is not as it says. One of them draws at a time; the others wait.

  Args:
    model: the model.
    name: what to call it in descriptions of pictures.
    rows: of a batch; None is 1 on a CPU, where each picture is seen as soon as it can be, else 4.
  """

  def __init__(self, model: Unclip, name: str = 'default', rows: int | None = None) -> None:
    if model.config.decoder is None:
      raise unclip_jax.UnclipError('this model has no decoder: it draws no pictures')
    if rows is None:
      rows = 1 if jax.default_backend() == 'cpu' else MOST_IMAGES
    settings.check_count('the batch size', rows)
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(Unclip)}
    self.model = InBatches(**fields, rows=rows)
    self.name = name
    self.sizes, self.size = settings.sizes(model.config), settings.picture_size(model.config)
    sees = None if model.config.clip is None else model.config.clip.vision
    self._side = max(_LEAST_SIDE, self.size, 0 if sees is None else sees.image_size)
    self._turn = threading.Lock()

  def generate(
    self,
    prompt: object,
    negative_prompt: object,
    n: object,
    seed: object,
    steps: object,
    guidance_scale: object,
    size: object,
  ) -> Iterator[Shown]:
    """Pictures of a caption, seen after each stage.

    Args:
      prompt: the caption.
      negative_prompt: what is not to be seen; empty for nothing.
      n: how many, at most `MOST_IMAGES`.
      seed: as of `Unclip.sample`.
      steps: of the decoder, one of `STEPS`.
      guidance_scale: of the decoder; None is the model's.
      size: one of `sizes`.
    """
    prompt = settings.check_text(limits.caption(prompt, _said(PROMPT)), _said(PROMPT))
    negative = limits.caption(negative_prompt or '', _said(NEGATIVE)) or None
    n = settings.check_count(_said(COUNT), n, 1, MOST_IMAGES)
    seed = settings.check_seed(seed)
    steps = limits.choice(steps, STEPS, _said(STEPS_LABEL)) or None
    size = limits.choice(size, self.sizes, _said(SIZE))

    def draw(tell: Callable[[Shown], None]) -> Shown:
      complete: list[np.ndarray] = []
      seen: list[np.ndarray] = []

      def report(event: Progress) -> None:
        if event.images is not None:
          seen[:] = list(_to_uint8(event.images))
        which = f', batch {event.batch + 1} of {event.num_batches}' if event.num_batches > 1 else ''
        name = 'CLIP' if event.stage == 'clip' else f'The {event.stage.replace("_", " ")}'
        tell(Shown([*complete, *seen], f'{name} {_WORDS[event.status]}{which}.'))

      def keep(samples: Samples) -> None:
        complete.extend(samples.images)
        seen.clear()

      samples = self.model.sample(
        prompt,
        seed,
        n,
        negative_prompt=negative,
        decoder=Sampling(steps, guidance_scale=guidance_scale),
        size=size,
        progress=report,
        on_batch=keep,
      )
      about = {
        'prompt': prompt,
        'negative_prompt': negative,
        'seed': seed,
        'num_steps': steps,
        'guidance_scale': guidance_scale,
        'size': size,
      }
      return self._shown('generate', list(samples.images), about, {})

    return self._in_turn(draw)

  def variations(
    self, path: Any, n: object, eta: object, seed: object, steps: object
  ) -> Iterator[Shown]:
    """`manipulate.variations` of a picture file."""
    n = settings.check_count(_said(COUNT), n, 1, MOST_IMAGES)
    how = _how(seed, steps)

    def draw(_: Any) -> Shown:
      picture = limits.read_picture(path, self._side)
      row = manipulate.variations(self.model, picture, n, eta, how)
      return self._row('variations', row, how, {'eta': eta})

    return self._in_turn(draw)

  def interpolate(
    self, path: Any, other_path: Any, noise: object, seed: object, steps: object
  ) -> Iterator[Shown]:
    """`manipulate.interpolate` between two picture files, `FRAMES` of them."""
    noise = limits.choice(noise, NOISES, _said(NOISE))
    how = _how(seed, steps)

    def draw(_: Any) -> Shown:
      one = limits.read_picture(path, self._side, 'first picture')
      other = limits.read_picture(other_path, self._side, 'second picture')
      row = manipulate.interpolate(self.model, one, other, FRAMES, noise, how)
      return self._row('interpolate', row, how, {'noise': noise}, _thetas(row))

    return self._in_turn(draw)

  def text_diff(
    self,
    path: Any,
    source: object,
    target: object,
    theta: object,
    baseline: object,
    seed: object,
    steps: object,
  ) -> Iterator[Shown]:
    """`manipulate.text_diff` of a picture file, `DIFF_FRAMES` of them."""
    source, target = limits.caption(source, _said(SOURCE)), limits.caption(target, _said(TARGET))
    baseline = limits.choice(baseline, BASELINES, _said(BASELINE))
    settings.check_text(source, _said(SOURCE), allow_empty=baseline != 'caption')
    settings.check_text(target, _said(TARGET))
    how = _how(seed, steps)

    def draw(_: Any) -> Shown:
      picture = limits.read_picture(path, self._side)
      row = manipulate.text_diff(
        self.model, picture, source, target, theta, DIFF_FRAMES, baseline, how
      )
      about = {'source': source, 'target': target, 'baseline': baseline}
      return self._row('text_diff', row, how, about, _thetas(row))

    return self._in_turn(draw)

  def inpaint(
    self, drawing: Drawing | None, prompt: object, n: object, seed: object, steps: object
  ) -> Iterator[Shown]:
    """`manipulate.inpaint` of a picture where it was painted on."""
    prompt = limits.caption(prompt, _said(PROMPT))
    n = settings.check_count(_said(COUNT), n, 1, MOST_IMAGES)
    how = _how(seed, steps)

    def draw(_: Any) -> Shown:
      picture, is_painted = limits.read_drawing(drawing, self._side)
      row = manipulate.inpaint(self.model, picture, is_painted, prompt, n, how=how)
      return self._row('inpaint', row, how, {'prompt': prompt})

    return self._in_turn(draw)

  def _row(
    self,
    what: str,
    row: Row,
    how: manipulate.Drawing,
    about: dict[str, Any],
    captions: Sequence[str] = (),
  ) -> Shown:
    about = {**about, 'seed': how.seed, 'num_steps': how.num_steps}
    return self._shown(what, list(row.images), about, row.measured, captions)

  def _shown(
    self,
    what: str,
    images: list[np.ndarray],
    about: dict[str, Any],
    measured: dict[str, Any],
    captions: Sequence[str] = (),
  ) -> Shown:
    software = f'unclip_jax {unclip_jax.__version__}, jax {metadata.version("jax")}'
    about = {'command': what, **about, 'model': self.name, 'software': software}
    if measured:
      about['measured'] = measured
    error = measured.get('error_levels')
    line = f'{len(images)} drawn.' if len(images) > 1 else 'Drawn.'
    if error is not None:
      line += f' What was put in is given back within {max(error):.2f} grey levels of 255.'
    return Shown(images, line, captions, about)

  def _in_turn(self, draw: Callable[[Callable[[Shown], None]], Shown]) -> Iterator[Shown]:
    """What `draw` tells, as it does, and at last what it returns with its warnings.

    It runs in a thread of its own, and ends at the next stage where nobody looks any more.
    """
    told: queue.SimpleQueue[Shown | BaseException] = queue.SimpleQueue()
    is_left = threading.Event()

    def tell(shown: Shown) -> None:
      if is_left.is_set():
        raise _Left
      told.put(shown)

    def run() -> None:
      try:
        with self._turn, _recorded() as caught, memory_errors():
          if is_left.is_set():
            return
          shown = draw(tell)
        lines = dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning)
        told.put(shown._replace(line='\n\n'.join([shown.line, *lines])))
      except BaseException as error:  # raised again where it is waited for
        told.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
      while True:
        shown = told.get()
        if isinstance(shown, BaseException):
          raise shown
        yield shown
        if shown.about is not None:
          return
    finally:
      is_left.set()


@contextlib.contextmanager
def _recorded() -> Iterator[list[warnings.WarningMessage]]:
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always', UserWarning)
    yield caught


def hint(vocabulary: Vocabulary | None) -> str:
  """What a model can be asked for, in one line; '' where it has no vocabulary."""
  if vocabulary is None:
    return ''
  named = vocabulary.concepts[:: -(-len(vocabulary.concepts) // _MOST_NAMED)]
  others = [
    f'{name}: {", ".join(items)}'
    for name, items in vocabulary.lists.items()
    if name != CONCEPTS and len(items) <= 2 * _MOST_NAMED
  ]
  objects = f'{len(vocabulary.concepts):,} {CONCEPTS} such as {", ".join(named)}'
  return f'It knows {"; ".join([objects, *others])}. `unclip-jax info --vocabulary` lists all.'


def _said(label: str) -> str:
  """A field of the page, within what is said of it."""
  return f'"{label}"'


def _how(seed: object, steps: object) -> manipulate.Drawing:
  steps = limits.choice(steps, STEPS, _said(STEPS_LABEL)) or None
  return manipulate.Drawing(steps, seed=settings.check_seed(seed))


def _thetas(row: Row) -> list[str]:
  return [f'{theta:.3g}' for theta in row.measured['theta']]


def _to_uint8(images: np.ndarray) -> np.ndarray:
  """For a look only: what a stage made, before the last one."""
  return (np.clip(np.nan_to_num(images), -1, 1) * 127.5 + 127.5).round().astype(np.uint8)
