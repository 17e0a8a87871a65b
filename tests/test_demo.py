"""The page without a browser: what its tabs do, what it takes of people, what it lets through."""

import asyncio
import dataclasses
import json

import numpy as np
import pytest
from broken_pictures import damaged, header_of, none, whole
from commands import run
from known_words import KNOWN
from made_pictures import encoded, pixels
from PIL import Image
from tiny_model import TEXTS, load_tiny, without, write_tiny_model

from unclip_jax import UnclipError, manipulate
from unclip_jax.demo import limits, page
from unclip_jax.demo.gate import Gate
from unclip_jax.demo.limits import Drawing
from unclip_jax.demo.work import DIFF_FRAMES, FRAMES, MOST_IMAGES, Studio
from unclip_jax.manipulate import Drawing as How
from unclip_jax.systems import programs

APPLE, ROCKET, _ = TEXTS
STEPS, SIDE = 10, 64


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return load_tiny(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def studio(model):
  return Studio(model, 'tiny', rows=2)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Two files of pictures, of other sizes and modes."""
  folder = tmp_path_factory.mktemp('files')
  Image.fromarray(pixels(1, 70, 90)).save(folder / 'one.png')
  Image.fromarray(pixels(2, 40, 30)).convert('L').save(folder / 'other.jpg')
  return folder / 'one.png', folder / 'other.jpg'


@pytest.fixture(scope='module')
def drawing(tmp_path_factory):
  """A picture of 80×60 pixels with its middle painted on."""
  layer = np.zeros((60, 80, 4), np.uint8)
  layer[20:40, 30:50] = 224, 49, 49, 255
  folder = tmp_path_factory.mktemp('drawing')
  (folder / 'picture').write_bytes(encoded(pixels(3, 60, 80)))
  (folder / 'layer').write_bytes(encoded(layer))
  return Drawing(str(folder / 'picture'), (str(folder / 'layer'),))


def generate(studio, prompt=APPLE, n=3, **changes):
  asked = {'negative': '', 'seed': 7, 'steps': 0, 'guidance': None, 'size': studio.sizes[-1]}
  asked |= changes
  return studio.generate(
    prompt, asked['negative'], n, *(asked[name] for name in ('seed', 'steps', 'guidance', 'size'))
  )


def last(looks):
  *before, end = looks
  assert all(look.about is None for look in before) and end.about is not None
  return end


def test_pictures_appear_stage_by_stage_and_end_as_the_model_draws_them(studio, model):
  looks = list(generate(studio))
  seen = [[len(image) for image in look.images] for look in looks]
  distinct = [sizes for sizes, before in zip(seen, [None, *seen], strict=False) if sizes != before]
  assert distinct == [[], [16] * 2, [32] * 2, [32] * 2 + [16], [32] * 3]
  expected = model.sample(APPLE, 7, 3, batch_size=2)
  np.testing.assert_array_equal(looks[-1].images, expected.images)
  about = last(looks).about
  assert (about['prompt'], about['seed'], about['model']) == (APPLE, 7, 'tiny')
  assert any('decoder is at work, batch 2 of 2' in look.line for look in looks)


def test_any_number_of_pictures_has_one_program(studio):
  last(generate(studio, n=1))
  before = programs.sample_decoder._cache_size(), programs.sample_upsampler._cache_size()
  for n in range(1, MOST_IMAGES + 1):
    last(generate(studio, ROCKET, n, seed=n, negative='a tree'))
  after = programs.sample_decoder._cache_size(), programs.sample_upsampler._cache_size()
  assert after == before


def test_words_that_the_model_never_saw_are_named_below_the_pictures(studio):
  shown = last(generate(studio, ' '.join(['a red apple'] * 30), n=1))
  assert shown.line.startswith('Drawn.') and 'this was cut off' in shown.line


def test_who_leaves_is_drawn_for_no_longer_and_nobody_waits(studio, monkeypatch):
  stages = []
  sample = studio.model.sample.__func__

  def watched(self, *args, progress, **options):
    def report(event):
      stages.append(event.batch)
      progress(event)

    return sample(self, *args, progress=report, **options)

  monkeypatch.setattr(type(studio.model), 'sample', watched)
  looks = generate(studio, n=4)
  next(looks)
  looks.close()
  with studio._turn:
    assert max(stages) == 0
  monkeypatch.undo()
  assert len(last(generate(studio, n=2)).images) == 2


def read(path):
  return limits.read_picture(path, SIDE)


def test_rows_are_those_of_the_functions(studio, files, drawing):
  one, other = files
  model = studio.model  # whose programs are there already
  how = How(STEPS, seed=5)
  shown = last(studio.variations(one, 3, 0, 5, STEPS))
  expected = manipulate.variations(model, read(one), 3, 0, how)
  np.testing.assert_array_equal(shown.images, expected.images)
  assert shown.about['measured'] == expected.measured and 'grey levels' in shown.line

  shown = last(studio.interpolate(one, other, 'inverted', 5, STEPS))
  expected = manipulate.interpolate(model, read(one), read(other), FRAMES, how=how)
  np.testing.assert_array_equal(shown.images, expected.images)
  assert shown.captions[0] == '0' and shown.captions[-1] == '1'

  shown = last(studio.text_diff(one, APPLE, ROCKET, 0.5, 'caption', 5, STEPS))
  expected = manipulate.text_diff(model, read(one), APPLE, ROCKET, 0.5, DIFF_FRAMES, how=how)
  np.testing.assert_array_equal(shown.images, expected.images)

  shown = last(studio.inpaint(drawing, ROCKET, 2, 5, STEPS))
  picture, is_painted = limits.read_drawing(drawing, SIDE)
  expected = manipulate.inpaint(model, picture, is_painted, ROCKET, 2, how=how)
  np.testing.assert_array_equal(shown.images, expected.images)


def test_words_that_the_model_never_saw_are_named_below_rows_too(model, files, drawing):
  studio = Studio(dataclasses.replace(model, vocabulary=KNOWN), rows=2)
  shown = last(studio.text_diff(files[0], 'a rokcet', 'a laptop', 0.5, 'caption', 5, STEPS))
  for word in ('rokcet', 'laptop'):
    assert f"\n\n'a {word}': the model never saw '{word}'" in shown.line
  shown = last(studio.inpaint(drawing, 'a rokcet', 2, 5, STEPS))
  assert "the model never saw 'rokcet'; the nearest it knows is 'rocket'" in shown.line


@pytest.mark.parametrize(
  ('tab', 'asked', 'message'),
  [
    ('generate', ('', '', 1, 0, 0, None, 32), '"Prompt" is empty'),
    ('generate', ('a' * 401, '', 1, 0, 0, None, 32), '"Prompt" has 401 characters'),
    ('generate', ('a', 'b' * 401, 1, 0, 0, None, 32), '"Negative prompt" has 401'),
    ('generate', (5, '', 1, 0, 0, None, 32), '"Prompt" must be text'),
    ('generate', ('a\x00b', '', 1, 0, 0, None, 32), 'the control character U+0000'),
    ('generate', ('a', '', 5, 0, 0, None, 32), '"How many" is 5'),
    ('generate', ('a', '', 1, -1, 0, None, 32), 'the seed is -1'),
    ('generate', ('a', '', 1, None, 0, None, 32), 'the seed must be a whole number'),
    ('generate', ('a', '', 1, 0, 11, None, 32), '"Denoising steps" cannot be 11'),
    ('generate', ('a', '', 1, 0, 0, float('nan'), 32), 'guidance scale'),
    ('generate', ('a', '', 1, 0, 0, None, 33), '"Size, pixels" cannot be 33'),
    ('variations', (None, 1, 1.0, 0, STEPS), 'there is no picture: put one in'),
    ('variations', ('ONE', 1, 1.5, 0, STEPS), 'eta is 1.5'),
    ('interpolate', ('ONE', None, 'inverted', 0, STEPS), 'there is no second picture'),
    ('interpolate', ('ONE', 'ONE', 'none', 0, STEPS), '"Noise" cannot be'),
    ('text_diff', ('ONE', 'a', 'a', 0.5, 'caption', 0, STEPS), 'the same to CLIP'),
    ('text_diff', ('ONE', 'a', 'b', 0, 'caption', 0, STEPS), 'theta is 0'),
    ('text_diff', ('ONE', '', 'b', 0.5, 'caption', 0, STEPS), '"What it shows" is empty'),
    ('text_diff', ('ONE', '', '', 0.5, 'none', 0, STEPS), '"What it is to show" is empty'),
    ('text_diff', ('ONE', '', 'b', 0.5, 'any', 0, STEPS), '"Turned away from" cannot be'),
    ('inpaint', (None, 'a', 1, 0, STEPS), 'there is no picture: put one in, and paint'),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
def test_what_is_not_taken_is_told(studio, files, tab, asked, message):
  asked = [files[0] if value == 'ONE' else value for value in asked]
  with pytest.raises(UnclipError) as caught:
    last(getattr(studio, tab)(*asked))
  assert message in str(caught.value)


def test_two_pictures_that_are_one_have_a_way_between_them(studio, files):
  shown = last(studio.interpolate(files[0], files[0], 'inverted', 0, STEPS))
  for image in shown.images[1:]:
    assert np.abs(image.astype(int) - shown.images[0].astype(int)).max() <= 1


def test_a_stage_that_is_missing_is_named(model):
  with pytest.raises(UnclipError, match='no prior'):
    last(generate(Studio(without(model, 'prior'), rows=2), n=1))


@pytest.mark.parametrize('name', whole())
def test_pictures_of_all_kinds_are_read(tmp_path, name):
  (tmp_path / 'picture').write_bytes(whole()[name])
  picture = read(tmp_path / 'picture')
  assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8


def test_a_picture_is_turned_and_cut_as_people_see_it(tmp_path):
  seen = np.zeros((SIDE, 96, 3), np.uint8)
  seen[:, 16:48], seen[:, 48:80] = 255, 90
  turned = Image.Exif()
  turned[274] = 6  # to be turned to the right
  Image.fromarray(np.rot90(seen)).save(tmp_path / 'turned.png', exif=turned)
  picture = read(tmp_path / 'turned.png')
  np.testing.assert_array_equal(picture, seen[:, 16:80])


@pytest.mark.parametrize('name', none())
def test_what_is_no_picture_is_refused_and_not_decoded(tmp_path, name, monkeypatch):
  (tmp_path / 'picture').write_bytes(none()[name])
  decoded = []
  monkeypatch.setattr(limits, 'open_rgb', lambda *_: decoded.append(name))
  with pytest.raises(UnclipError) as caught:
    read(tmp_path / 'picture')
  assert not decoded and str(tmp_path) not in str(caught.value)
  wanted = 'million pixels' if name in ('bomb', 'large') else 'the picture is '
  assert wanted in str(caught.value)


def test_a_large_file_is_not_opened(tmp_path):
  with open(tmp_path / 'picture.png', 'wb') as file:
    file.write(encoded(pixels(1)))
    file.truncate(limits.MOST_BYTES + 1)
  with pytest.raises(UnclipError, match='larger than 10 MB'):
    read(tmp_path / 'picture.png')


def test_a_file_is_read_as_what_its_header_says(tmp_path, monkeypatch):
  """A file may be of two formats, of which one alone was looked at."""
  (tmp_path / 'picture').write_bytes(whole()['TIFF'])
  asked = []

  def watched(file, formats=None):
    asked.append(formats)
    return open_picture(file, formats=formats)

  open_picture = Image.open
  monkeypatch.setattr(Image, 'open', watched)
  read(tmp_path / 'picture')
  assert asked == [limits.FORMATS] * 2


def test_a_file_that_is_gone_is_asked_for_again(tmp_path):
  for path in (tmp_path / 'picture', tmp_path):
    with pytest.raises(UnclipError, match='no longer kept here'):
      read(path)


def test_damaged_files_are_read_or_refused(tmp_path):
  results = {'read': 0, 'refused': 0}
  for content in damaged(300):
    (tmp_path / 'picture').write_bytes(content)
    try:
      assert read(tmp_path / 'picture').shape == (SIDE, SIDE, 3)
      results['read'] += 1
    except UnclipError as error:
      assert 'the picture' in str(error) and str(tmp_path) not in str(error)
      results['refused'] += 1
  assert min(results.values()) > 30, results


def test_a_drawing_has_a_mask_where_it_was_painted(drawing):
  picture, is_painted = limits.read_drawing(drawing, 60)
  np.testing.assert_array_equal(picture, pixels(3, 60, 80)[:, 10:70])
  expected = np.zeros((60, 60), bool)
  expected[20:40, 20:40] = True
  np.testing.assert_array_equal(is_painted, expected)


def test_drawings_that_are_not_whole_are_refused(drawing, tmp_path):
  picture, (layer,) = drawing

  def file(content):
    path = tmp_path / str(len(list(tmp_path.iterdir())))
    path.write_bytes(encoded(content) if isinstance(content, np.ndarray) else content)
    return str(path)

  empty, aside = np.zeros((2, 60, 80, 4), np.uint8)
  aside[:, :5] = 255
  refused = [
    ('there is no picture', Drawing(None, (layer,))),
    ('nothing is painted', Drawing(picture, ())),
    ('nothing is painted', Drawing(picture, (file(empty),))),
    ('in the middle square', Drawing(picture, (file(aside),))),
    ('not of the size', Drawing(file(pixels(3, 60, 60)), (layer,))),
    ('painted layer is no file', Drawing(picture, (file(b'layer'),))),
    ('was painted is damaged', Drawing(picture, (file(encoded(aside)[:-30]),))),
    ('million pixels', Drawing(file(header_of(60_000, 60_000)), (layer,))),
    ('larger than 10 MB', Drawing(file(bytes(limits.MOST_BYTES + 1)), (layer,))),
    ('5 layers', Drawing(picture, (layer,) * 5)),
  ]
  for message, given in refused:
    with pytest.raises(UnclipError, match=message):
      limits.read_drawing(given, SIDE)


def ask(gate, method, path, body=b'', length=None):
  """The status that a request is answered with; 200 where it comes through."""
  sent, given = [], [{'type': 'http.request', 'body': body, 'more_body': False}]
  length = str(len(body)) if length is None else length
  headers = [(b'content-length', length.encode())] if length else []
  scope = {'type': 'http', 'method': method, 'path': path, 'headers': headers}

  async def receive():
    return given.pop(0)

  async def send(message):
    sent.append(message)

  asyncio.run(gate(scope, receive, send))
  return sent[0]['status']


@pytest.fixture
def gate(tmp_path):
  """One that lets through to something that answers with what it was given."""
  (tmp_path / 'kept').mkdir()
  (tmp_path / 'kept' / 'picture.png').write_bytes(b'picture')
  (tmp_path / 'secret').write_text('secret')
  (tmp_path / 'kept' / 'link').symlink_to(tmp_path / 'secret')

  async def app(scope, receive, send):
    if scope['method'] == 'POST':
      message = await receive()
      assert message['type'] == 'http.request'
    await send({'type': 'http.response.start', 'status': 200, 'headers': []})

  return Gate(app, str(tmp_path / 'kept'))


def test_the_gate_lets_through_what_the_page_needs_and_nothing_else(gate, tmp_path):
  file = '/gradio_api/file='
  through = ['/', '/config', '/theme.css', '/assets/a.js', f'{file}{tmp_path}/kept/picture.png']
  through += ['/gradio_api/queue/data', '/gradio_api/heartbeat/ab12', '/gradio_api/info']
  refused = [f'{file}{tmp_path}/secret', f'{file}{tmp_path}/kept/../secret', f'{file}/etc/passwd']
  refused += [f'{file}{tmp_path}/kept/link', f'{file}{tmp_path}/kept', f'{file}setup.cfg']
  refused += [f'{file}http://127.0.0.1/', f'{file}//etc/passwd', f'{file}\0', '/gradio_api/file/a']
  refused += ['/gradio_api/proxy=http://127.0.0.1/', '/docs', '/monitoring', '/gradio_api/runs']
  refused += ['/gradio_api/token', '/gradio_api/deep_link', '/login', '/gradio_api/stream/1']
  assert [path for path in through if ask(gate, 'GET', path) != 200] == []
  assert [path for path in refused if ask(gate, 'GET', path) != 404] == []
  for path in (
    'run/predict',
    'api/predict',
    'call/predict',
    'process_recording',
    'component_server',
  ):
    assert ask(gate, 'POST', f'/gradio_api/{path}', b'{}') == 404
  assert ask(gate, 'PUT', '/gradio_api/upload', b'{}') == 404
  assert ask(gate, 'POST', '/gradio_api/upload', b'picture') == 200
  closed = []

  async def send(message):
    closed.append(message['type'])

  asyncio.run(gate({'type': 'websocket', 'path': '/'}, None, send))
  assert closed == ['websocket.close']


def test_the_gate_takes_small_requests_that_name_files_of_the_page(gate, tmp_path, monkeypatch):
  join = '/gradio_api/queue/join'
  kept, secret = f'{tmp_path}/kept/picture.png', f'{tmp_path}/secret'

  def asked(*data):
    return json.dumps({'data': data, 'fn_index': 0}).encode()

  assert ask(gate, 'POST', join, asked('a', 1, None, {'path': kept, 'meta': {}})) == 200
  for path in (secret, 'http://127.0.0.1/', '/etc/passwd', '\0', '\ud800', 5, ['a']):
    assert ask(gate, 'POST', join, asked({'path': path, 'meta': {}})) == 400
    assert ask(gate, 'POST', join, asked([{'background': {'path': path}}])) == 400
  for body in (b'', b'{', b'\xff', b'[' * 60_000):
    assert ask(gate, 'POST', join, body) == 400
  assert ask(gate, 'POST', join, asked('a' * 2**16)) == 413
  assert ask(gate, 'POST', '/gradio_api/upload', length='9' * 5000) == 413
  assert ask(gate, 'POST', '/gradio_api/upload', length=str(2**24)) == 413
  assert ask(gate, 'POST', '/gradio_api/upload', length='-1') == 411
  assert ask(gate, 'POST', '/gradio_api/upload', length='') == 411
  monkeypatch.setattr('unclip_jax.demo.gate.MOST_STORED', 3)
  assert ask(gate, 'POST', '/gradio_api/upload', b'picture') == 503


def test_without_gradio_the_command_says_what_is_missing(tmp_path, monkeypatch, capsys):
  model = write_tiny_model(tmp_path / 'model')
  monkeypatch.setattr(page.importlib.util, 'find_spec', lambda name: None)
  assert run('demo', '--model', model, '--no-cache') == 1
  assert "pip install 'unclip-jax[demo]'" in capsys.readouterr().err
