"""The page in a browser: each tab is used once, as a person would.

Asked for by name, as it needs Chromium (Debian's), Playwright, and the extra `demo`. Screenshots go
to the folder UNCLIP_JAX_SHOTS, if that is set.
"""

import io
import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
from broken_pictures import none
from PIL import Image
from playwright.sync_api import expect
from served_page import SECONDS

import unclip_jax

# Keeps the widths of all pictures that were ever shown, in their order.
KEEP_WIDTHS = """() => {
  window.widths = []
  const keep = (event) => event.target.tagName === 'IMG' &&
    window.widths.push(event.target.naturalWidth)
  document.addEventListener('load', keep, true)
}"""


def set_slider(place, label, value):
  place.get_by_label(f'number input for {label}').fill(str(value))
  place.get_by_label(f'number input for {label}').press('Tab')


def choose_steps(shown, place, steps):
  place.get_by_label('Denoising steps').click()
  shown.get_by_role('option', name=str(steps), exact=True).click()


def drawn(place, count):
  """Waits for pictures; the addresses of their files."""
  expect(place.get_by_text('rawn.')).to_be_visible(timeout=SECONDS * 1000)
  images = place.locator('.grid-container img')  # and not those of examples
  expect(images).to_have_count(count)
  return [image.get_attribute('src') for image in images.all()]


def test_generate(tab, shots, page):
  shown, place = tab('Generate')
  place.get_by_label('Prompt', exact=True).fill('a red apple, flat style')
  set_slider(place, 'How many', 2)
  place.get_by_role('button', name='Random').click()
  seed = int(place.get_by_label('Seed').input_value())
  shown.evaluate(KEEP_WIDTHS)
  place.get_by_role('button', name='Generate').click()
  shown.wait_for_function('window.widths.includes(32)')
  shown.screenshot(path=shots / 'generate-decoder.png')
  shown.wait_for_function('window.widths.includes(128)')
  shown.screenshot(path=shots / 'generate-upsampler.png')
  addresses = drawn(place, 2)
  # The decoder's pictures, small, and then those of the upsampler.
  widths = [width for width, _ in itertools.groupby(shown.evaluate('window.widths'))]
  assert widths[:4] == [32, 128] * 2 and widths[-1] == 128, widths
  shown.screenshot(path=shots / 'generate.png')
  with shown.expect_download() as download:
    place.get_by_role('button', name='Download all').click()
  with zipfile.ZipFile(download.value.path()) as archive:
    files = {name: archive.read(name) for name in archive.namelist()}
  (about,) = (json.loads(content) for name, content in files.items() if name.endswith('.json'))
  assert (about['prompt'], about['seed']) == ('a red apple, flat style', seed)
  pictures = [content for name, content in files.items() if name.endswith('.png')]
  assert len(pictures) == 2 and pictures[0] == page.get(addresses[0]).content
  with Image.open(io.BytesIO(pictures[0])) as picture:
    assert picture.size == (128, 128)
    assert json.loads(picture.text['settings'])['seed'] == seed


def test_variations(tab, shots, pictures):
  shown, place = tab('Variations')
  place.locator('input[type=file]').set_input_files(pictures[0])
  set_slider(place, 'How many', 2)
  choose_steps(shown, place, 10)
  place.get_by_role('button', name='Vary').click()
  assert len(set(drawn(place, 2))) == 2
  shown.screenshot(path=shots / 'variations.png')


def test_interpolation(tab, shots, pictures):
  shown, place = tab('Interpolation')
  for i, path in enumerate(pictures):
    place.locator('input[type=file]').nth(i).set_input_files(path)
    expect(place.locator('.image-frame img')).to_have_count(i + 1)
  choose_steps(shown, place, 10)
  place.get_by_role('button', name='Interpolate').click()
  addresses = drawn(place, 9)
  look_through(shown, place, 'From first to second', addresses, shots, 'interpolation')


def test_text_diff(tab, shots, pictures):
  shown, place = tab('Text diff')
  place.locator('input[type=file]').set_input_files(pictures[0])
  place.get_by_label('What it shows', exact=True).fill('a red apple, flat style')
  place.get_by_label('What it is to show').fill('a green apple, flat style')
  choose_steps(shown, place, 10)
  place.get_by_role('button', name='Turn').click()
  addresses = drawn(place, 7)
  look_through(shown, place, 'From the picture to the text', addresses, shots, 'text-diff')


def look_through(shown, place, slider, addresses, shots, name):
  """Moves the slider, and looks at the frame."""
  frame = place.locator('.image-frame img').last
  for share, number in ((0.5, len(addresses) // 2), (1, -1), (0, 0)):
    set_slider(place, slider, share)
    expect(frame).to_have_attribute('src', addresses[number])
    shown.screenshot(path=shots / f'{name}-{share}.png')


def test_inpainting(tab, shots, pictures, page):
  shown, place = tab('Inpainting')
  place.locator('input[type=file]').first.set_input_files(pictures[0])
  shown.wait_for_timeout(2000)  # the canvas grows to the picture
  box = place.locator('canvas').first.bounding_box()
  x, y = box['x'] + box['width'] / 2, box['y'] + box['height'] / 2
  shown.mouse.move(x - 30, y)
  shown.mouse.down()
  shown.mouse.move(x + 30, y, steps=5)
  shown.mouse.up()
  place.get_by_label('Prompt').fill('a green apple, flat style')
  choose_steps(shown, place, 10)
  place.get_by_role('button', name='Paint', exact=True).click()
  (address,) = drawn(place, 1)
  shown.screenshot(path=shots / 'inpainting.png')
  painted = np.asarray(Image.open(io.BytesIO(page.get(address).content))).astype(int)
  original = np.asarray(Image.open(pictures[0])).astype(int)
  changed = np.abs(painted - original).max(axis=-1) > 0
  assert 0.005 < changed.mean() < 0.5
  assert not changed[:16].any() and not changed[-16:].any()
  assert changed[60:68, 60:68].any()


def test_examples_fill_in_the_fields_of_a_tab(tab, page):
  assets = Path(unclip_jax.__file__).parent / 'assets' / 'demo'
  for name, texts in (
    ('Variations', {}),
    ('Interpolation', {}),
    ('Text diff', {'What it shows': 'a flat cat face', 'What it is to show': 'a 3d cat face'}),
  ):
    _, place = tab(name)
    images = place.locator('.image-frame img')
    expect(images).to_have_count(0)
    place.locator('.gallery-item, tr.tr-body').first.click()
    names = ('cat', 'owl') if name == 'Interpolation' else ('cat',)
    expect(images).to_have_count(len(names))
    for image, stem in zip(images.all(), names, strict=True):
      content = page.get(image.get_attribute('src')).content
      assert content == (assets / f'{stem}.png').read_bytes()
    for label, text in texts.items():
      expect(place.get_by_label(label, exact=True)).to_have_value(text)
  _, place = tab('Inpainting')
  place.locator('tr.tr-body').first.click()
  expect(place.get_by_label('Prompt')).to_have_value('a flat tiger face')


def test_a_file_that_is_refused_is_told_of(tab, shots, tmp_path):
  (tmp_path / 'picture.png').write_bytes(none()['bomb'])
  shown, place = tab('Variations')
  place.locator('input[type=file]').set_input_files(tmp_path / 'picture.png')
  expect(place.locator('.image-frame img')).to_have_count(1)
  place.get_by_role('button', name='Vary').click()
  expect(shown.get_by_text('million pixels')).to_be_visible()
  shown.wait_for_timeout(500)  # it comes in slowly
  shown.screenshot(path=shots / 'refused.png')


def test_who_stops_waits_no_longer_and_can_go_on(tab, shots):
  shown, place = tab('Generate')
  set_slider(place, 'How many', 4)
  place.get_by_role('button', name='Generate').click()
  expect(place.get_by_text('batch 1 of 4')).to_be_visible(timeout=SECONDS * 1000)
  place.get_by_role('button', name='Stop').click()
  shown.wait_for_timeout(2000)
  before = place.inner_text()
  assert 'drawn.' not in before
  shown.wait_for_timeout(2000)
  assert place.inner_text() == before
  set_slider(place, 'How many', 1)
  place.get_by_role('button', name='Generate').click()
  drawn(place, 1)
