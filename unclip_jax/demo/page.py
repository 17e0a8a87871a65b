"""The layout of the page, and the server of it."""

import contextlib
import html
import importlib.util
import json
import os
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import unclip_jax
from unclip_jax.demo import limits, work
from unclip_jax.demo.gate import Gate
from unclip_jax.demo.limits import Drawing
from unclip_jax.demo.work import MOST_IMAGES, STEPS, Shown, Studio, hint
from unclip_jax.images import save_png, slug
from unclip_jax.manipulate.rows import BASELINES, DUMMY, NOISES
from unclip_jax.types import UnclipError

_STORED_SECONDS = 3600  # that a file is kept
_SESSIONS = 50  # whose settings are remembered; nothing depends on them
_LARGEST_SEED = 2**32 - 1
_RANDOM_SEED = '() => Math.floor(Math.random() * 4294967296)'
# Which the embedded model drew: 'a flat cat face on a blue background', and so on, of seed 3.
_EXAMPLES = Path(unclip_jax.__file__).parent / 'assets' / 'demo'
_PICTURES = [str(_EXAMPLES / f'{name}.png') for name in ('cat', 'apple', 'owl', 'rocket')]
# Small pictures as large as there is room.
_CSS = '.frame .image-frame img { width: 100%; height: 100%; object-fit: contain; }'
# Of the frames of a row the one that the slider is at; the server has no part in it.
_PICK_FRAME = """(share, frames) =>
  frames && frames.length ? frames[Math.round(share * (frames.length - 1))].image : null"""


@contextlib.contextmanager
def serve(studio: Studio, host: str, port: int, waiting: int) -> Iterator[str]:
  """Serves the page while the context lasts; yields its address.

  Args:
    studio: what draws.
    host: the address that it is bound to.
    port: the port.
    waiting: how many requests may wait at most; one more is told to come back later.

  Raises:
    UnclipError: Gradio is not installed, or the port is taken.
  """
  if importlib.util.find_spec('gradio') is None:
    raise UnclipError("the page needs Gradio: pip install 'unclip-jax[demo]'")
  with tempfile.TemporaryDirectory(prefix='unclip_jax_demo_') as folder:
    # Where Gradio keeps files; there is no other way to tell it.
    os.environ['GRADIO_TEMP_DIR'] = folder
    from gradio.themes import Default
    from starlette.middleware import Middleware

    page = build(studio)
    page.queue(max_size=waiting, default_concurrency_limit=1, api_open=False)
    try:
      _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
        css=_CSS,
        allowed_paths=[str(_EXAMPLES)],
        max_file_size=limits.MOST_BYTES,
        state_session_capacity=_SESSIONS,
        # No fonts from elsewhere.
        theme=Default(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace']),
        app_kwargs={
          'middleware': [Middleware(Gate, folder=folder)],
          'openapi_url': None,
        },
      )
    except OSError as error:
      raise UnclipError(f'the port {port} of {host} cannot be had: take another --port') from error
    try:
      yield url
    finally:
      page.close(verbose=False)


def build(studio: Studio) -> Any:
  """The page, a `gradio.Blocks`."""
  import gradio as gr

  with gr.Blocks(
    title='unclip_jax',
    analytics_enabled=False,
    delete_cache=(_STORED_SECONDS // 6, _STORED_SECONDS),
  ) as page:
    about = f'The model `{html.escape(studio.name)}`, {studio.size} px. '
    gr.Markdown(f'# unclip_jax\n{about}{html.escape(hint(studio.model.vocabulary), quote=False)}')
    for name, tab in _TABS.items():
      with gr.Tab(name), gr.Row():
        tab(studio)
  return page


def _generate(studio: Studio) -> None:
  import gradio as gr

  with gr.Column():
    prompt = _text(work.PROMPT, 'a red apple, flat style')
    negative = _text(work.NEGATIVE, '', 'what is not to be seen')
    n, seed = _count(), _seed()
    with gr.Accordion('Settings', open=False):
      steps = _steps()
      own = studio.model.config.decoder.sampling.guidance_scale
      guidance = gr.Slider(1, max(10, own), own, step=0.1, label='Guidance scale')
      size = gr.Dropdown(list(studio.sizes), value=studio.size, label=work.SIZE)
    with gr.Row():
      button = gr.Button('Generate', variant='primary', scale=3)
      stop = gr.Button('Stop', scale=1, min_width=80)
  asked = [prompt, negative, n, seed, steps, guidance, size]
  event = _connect(button, studio.generate, asked, also=[prompt.submit])
  stop.click(None, cancels=event, api_visibility='private')


def _variations(studio: Studio) -> None:
  import gradio as gr

  with gr.Column():
    picture = _picture('Picture')
    eta = gr.Slider(0, 1, 1, step=0.05, label='Freedom (eta): 0 gives the picture back')
    n, seed, steps = _count(), _seed(), _steps()
    button = gr.Button('Vary', variant='primary')
    _examples([picture], [[path] for path in _PICTURES])
  _connect(button, studio.variations, [picture, n, eta, seed, steps])


def _interpolate(studio: Studio) -> None:
  import gradio as gr

  with gr.Column():
    with gr.Row():
      one, other = _picture('First picture'), _picture('Second picture')
    noise = gr.Radio(
      list(NOISES), value=NOISES[0], label=work.NOISE, info='inverted: the ends are the pictures'
    )
    seed, steps = _seed(), _steps()
    button = gr.Button('Interpolate', variant='primary')
    cat, apple, owl, rocket = _PICTURES
    _examples([one, other], [[cat, owl], [apple, rocket]])
  _connect(button, studio.interpolate, [one, other, noise, seed, steps], 'From first to second')


def _text_diff(studio: Studio) -> None:
  import gradio as gr

  with gr.Column():
    picture = _picture('Picture')
    source = _text(work.SOURCE, '', 'a flat cat')
    target = _text(work.TARGET, '', 'a 3D cat')
    theta = gr.Slider(0.05, 1, 0.5, step=0.05, label='How far the last frame is turned (theta)')
    words = ('what it shows', f'"{DUMMY}"', 'an empty caption', 'nothing')
    baseline = gr.Radio(
      list(zip(words, BASELINES, strict=True)), value=BASELINES[0], label=work.BASELINE
    )
    seed, steps = _seed(), _steps()
    button = gr.Button('Turn', variant='primary')
    cat, apple, owl, _ = _PICTURES
    turns = [
      [cat, 'a flat cat face', 'a 3d cat face'],
      [apple, 'a red apple', 'a green apple'],
      [owl, 'an owl on a red background', 'an owl on a green background'],
    ]
    _examples([picture, source, target], turns)
  asked = [picture, source, target, theta, baseline, seed, steps]
  _connect(button, studio.text_diff, asked, 'From the picture to the text')


def _inpaint(studio: Studio) -> None:
  import gradio as gr

  with gr.Column():
    drawing = _drawing()
    prompt = _text(work.PROMPT, '', 'what the whole is to show')
    n, seed, steps = _count(), _seed(), _steps()
    button = gr.Button('Paint', variant='primary')
    captions = 'a flat tiger face', 'a 3d green apple', 'a flat cat face', 'a 3d house'
    _examples([drawing, prompt], list(map(list, zip(_PICTURES, captions, strict=True))))
  _connect(button, studio.inpaint, [drawing, prompt, n, seed, steps])


_TABS: dict[str, Callable[[Studio], None]] = {
  'Generate': _generate,
  'Variations': _variations,
  'Interpolation': _interpolate,
  'Text diff': _text_diff,
  'Inpainting': _inpaint,
}


def _examples(places: list[Any], values: list[list[str]]) -> None:
  """Pictures, and words, to begin with: a click fills in the fields of a tab."""
  import gradio as gr

  # gr.Examples asks past the queue, at an address that nothing else of the page needs.
  examples = gr.Dataset(components=places, samples=values, label='Examples', type='values')
  how = {'show_progress': 'hidden', 'concurrency_limit': None, 'api_visibility': 'private'}
  examples.click(lambda asked: asked if len(places) > 1 else asked[0], examples, places, **how)


def _text(label: str, value: str, placeholder: str = '') -> Any:
  import gradio as gr

  return gr.Textbox(
    value, label=label, placeholder=placeholder, max_length=limits.MOST_CHARACTERS, max_lines=4
  )


def _count() -> Any:
  import gradio as gr

  return gr.Slider(1, MOST_IMAGES, 1, step=1, label=work.COUNT)


def _seed() -> Any:
  import gradio as gr

  with gr.Row():
    seed = gr.Number(0, label=work.SEED, precision=0, minimum=0, maximum=_LARGEST_SEED, scale=3)
    dice = gr.Button('Random', scale=1, min_width=80)
  dice.click(None, None, seed, js=_RANDOM_SEED, api_visibility='private')
  return seed


def _steps() -> Any:
  import gradio as gr

  choices = [(str(steps) if steps else 'as usual', steps) for steps in STEPS]
  return gr.Dropdown(choices, value=STEPS[0], label=work.STEPS_LABEL)


def _picture(label: str) -> Any:
  """A place for a picture; what is drawn of it is given its file, which is not decoded before."""
  import gradio as gr

  place = gr.Image(
    type='filepath', sources=['upload', 'clipboard'], label=label, height=240, buttons=[]
  )
  place.preprocess = lambda payload: None if payload is None else payload.path
  return place


def _drawing() -> Any:
  """A place for a picture that is painted on; what is drawn of it is given the files."""
  import gradio as gr

  place = gr.ImageEditor(
    type='filepath',
    sources=['upload', 'clipboard'],
    label='Paint over it',
    brush=gr.Brush(colors=['#7048e8'], color_mode='fixed'),
    layers=False,
    transforms=[],
    buttons=[],
    height=420,
  )

  def files(payload: Any) -> Drawing | None:
    if payload is None:
      return None
    background = None if payload.background is None else payload.background.path
    return Drawing(background, tuple(layer.path for layer in payload.layers))

  place.preprocess = files
  return place


def _connect(
  button: Any,
  method: Callable[..., Iterator[Shown]],
  asked: list[Any],
  slider_label: str | None = None,
  also: list[Any] | None = None,
) -> Any:
  """The right half of a tab: what is drawn, as the button is pressed.

  Args:
    button: that one.
    method: of a `Studio`.
    asked: the components that its arguments come from.
    slider_label: of a slider through the pictures; None for no slider.
    also: other events that have the same effect.

  Returns:
    The event, which may be cancelled.
  """
  import gradio as gr

  with gr.Column():
    frame = slider = None
    if slider_label is not None:
      frame = gr.Image(
        label='Frame',
        interactive=False,
        height=320,
        format='png',
        buttons=['download', 'fullscreen'],
        elem_classes='frame',
      )
      slider = gr.Slider(0, 1, 0, step=0.01, label=slider_label)
    gallery = gr.Gallery(
      label='Pictures',
      show_label=False,  # it would hide a corner of the first one
      columns=2 if slider is None else 4,
      height=480 if slider is None else None,
      object_fit='contain',
      format='png',
      interactive=False,
      buttons=['download', 'fullscreen'],
    )
    line = gr.Markdown()
    files = gr.DownloadButton('Download all', interactive=False)
  event = gr.on(
    [button.click, *(also or [])],
    _handler(method),
    asked,
    [gallery, line, files],
    concurrency_id='draw',
    concurrency_limit=1,
    show_progress_on=gallery,
    api_visibility='private',
  )
  if slider is not None:
    places = {'inputs': [slider, gallery], 'outputs': frame, 'api_visibility': 'private'}
    event.success(None, js=_PICK_FRAME, **places)
    slider.change(None, js=_PICK_FRAME, **places)
  return event


def _handler(method: Callable[..., Iterator[Shown]]) -> Callable[..., Iterator[Any]]:
  """What Gradio calls: it is given files, and told of mistakes in its own way."""
  import gradio as gr

  def draw(*asked: Any) -> Iterator[Any]:
    # Gradio copies the files of each look before it asks for the next.
    with tempfile.TemporaryDirectory() as folder:
      try:
        for number, shown in enumerate(method(*asked)):
          place = Path(folder, str(number))
          place.mkdir()
          yield _write(shown, place)
      except UnclipError as error:
        line = html.escape(str(error))
        raise gr.Error(f'{line[:1].upper()}{line[1:]}.', print_exception=False) from error

  return draw


def _write(shown: Shown, folder: Path) -> tuple[Any, Any, Any]:
  """The gallery, the line below it and the download."""
  import gradio as gr

  about = None if shown.about is None else json.dumps(shown.about, indent=2, ensure_ascii=False)
  name = 'look' if shown.about is None else slug(_title(shown.about))
  text = {} if about is None else {'settings': about}
  paths = []
  for i, image in enumerate(shown.images):
    paths.append(folder / f'{name}-{i:02d}.png')
    save_png(paths[-1], image, text)
  captions = shown.captions or [None] * len(paths)
  gallery = [(str(path), caption) for path, caption in zip(paths, captions, strict=True)]
  if about is None:
    return gallery, shown.line, gr.DownloadButton(interactive=False)
  archive = folder / f'{name}.zip'
  with zipfile.ZipFile(archive, 'w') as file:
    for path in paths:
      file.write(path, path.name)
    file.writestr(f'{name}.json', about + '\n')
  return gallery, shown.line, gr.DownloadButton(value=str(archive), interactive=True)


def _title(about: dict[str, Any]) -> str:
  return ' '.join(filter(None, [about['command'], about.get('prompt'), about.get('target')]))


def wait() -> None:
  """Until Ctrl-C."""
  with contextlib.suppress(KeyboardInterrupt):
    threading.Event().wait()
