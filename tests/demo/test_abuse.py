"""More than the page can do, and what it is not for; afterwards it draws as before.

Asked for by name, as test_page is.
"""

import collections
import os
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import httpx
import numpy as np
import pytest
from broken_pictures import damaged, none
from made_pictures import encoded, pixels
from playwright.sync_api import expect
from served_page import WAITING
from tiny_model import write_tiny_model

from unclip_jax.demo.limits import MOST_BYTES

APPLE = 'a red apple, flat style'


@pytest.fixture(scope='module')
def before(page):
  status, answer = page.generate(APPLE, 7)
  assert status == 200 and answer['success'], answer
  return page.pixels(answer)


def assert_draws_as(page, before):
  status, answer = page.generate(APPLE, 7)
  assert status == 200 and answer['success']
  np.testing.assert_array_equal(page.pixels(answer), before)


def test_fifty_at_once_are_answered_or_turned_away(page, before, tab, shots):
  shown, place = tab('Generate')
  with ThreadPoolExecutor(50) as pool:
    asked = [pool.submit(page.generate, APPLE, i, n=3) for i in range(50)]
    wait(asked, return_when=FIRST_COMPLETED)  # that one was turned away
    place.get_by_role('button', name='Generate').click()
    expect(shown.get_by_text('currently busy')).to_be_visible()
    shown.wait_for_timeout(500)  # it comes in slowly
    shown.screenshot(path=shots / 'busy.png')
    answers = [one.result() for one in asked]
  counts = collections.Counter(status for status, _ in answers)
  assert counts.keys() == {200, 503} and counts[200] >= WAITING, counts
  for i, (status, answer) in enumerate(answers):
    if status == 503:
      assert 'Queue is full' in answer['detail']
    else:
      assert answer['success'] and page.pixels(answer).shape == (3, *before.shape[1:]), i
  assert_draws_as(page, before)


def test_a_thousand_broken_files_leave_it_as_it_was(page, before):
  files = [*none().values(), *damaged(1000 - len(none()), seed=1)]
  assert len(files) == 1000
  odd = page.put(encoded(pixels(1, 11, 13)))  # of a size that no other one has

  def give(i, content):
    if not content:  # a browser sends none
      return ''
    place = page.put(content)
    # Where it can be read, something else is wrong: nothing is to be drawn.
    if i % 3:
      background, layer = (place, odd) if i % 3 == 1 else (odd, place)
      drawing = {'background': background, 'layers': [layer], 'composite': None, 'id': None}
      status, answer = page.ask('Paint', drawing, APPLE, 1, 0, 10)
    else:
      status, answer = page.ask('Interpolate', place, None, 'inverted', 0, 10)
    assert status == 200
    return 'drawn' if answer['success'] else answer['output'].get('error')

  memory = page.memory()  # after a picture that was drawn, and before any file
  with ThreadPoolExecutor(WAITING) as pool:
    told = collections.Counter(pool.map(give, range(len(files)), files))
  print(f'{memory:,} KiB before, {page.memory():,} KiB after;', told)
  assert not {None, 'drawn'} & told.keys() and all('/' not in message for message in told)
  assert page.memory() < 1.1 * memory
  assert page.get('').status_code == 200
  assert_draws_as(page, before)


def test_files_of_the_server_cannot_be_read(page):
  here = Path(__file__).resolve()
  paths = [
    '/etc/passwd',
    str(here),
    'setup.cfg',
    os.path.relpath(here),
    f'/proc/{os.getpid()}/environ',
  ]
  paths += ['//etc/passwd', '%2Fetc%2Fpasswd', '/etc/../etc/passwd', 'file:///etc/passwd']
  kept = page.put(encoded(pixels(1)))['path']
  assert page.get(f'gradio_api/file={kept}').content == encoded(pixels(1))
  up = '/..' * kept.count('/')
  paths += [f'{kept}/{up}/etc/passwd', f'{Path(kept).parent}{up}/etc/passwd']
  for path in paths:
    for quoted in (path, path.replace('..', '%2e%2e'), path.replace('/', '%2F')):
      assert page.get(f'gradio_api/file={quoted}').status_code in (403, 404), quoted
  for path in paths:
    place = {'path': path, 'meta': {'_type': 'gradio.FileData'}}
    status, _ = page.ask('Vary', place, 1, 1.0, 0, 10)
    assert status == 400, path
  for name in ('/etc/passwd', '../../../etc/passwd', '.bashrc'):
    kept = page.put(encoded(pixels(1)), name)['path']
    assert page.get(f'gradio_api/file={kept}').content == encoded(pixels(1))


def test_what_is_too_large_is_refused(page):
  with pytest.raises((httpx.HTTPStatusError, httpx.NetworkError, httpx.RemoteProtocolError)):
    page.put(bytes(MOST_BYTES + 2**20))
  status, _ = page.ask('Generate', 'a' * 2**17, '', 1, 0, 10, 2, 128)
  assert status == 413
  status, answer = page.ask('Generate', 'a' * 1000, '', 1, 0, 10, 2, 128)
  assert status == 200 and not answer['success']
  assert 'take at most' in answer['output']['error']


def test_it_is_bound_to_this_machine_alone_and_its_port_is_its_own(page, tmp_path):
  port = page.url.rstrip('/').rpartition(':')[2]
  listening = [
    fields[1]
    for table in ('/proc/net/tcp', '/proc/net/tcp6')
    for fields in map(str.split, Path(table).read_text().splitlines()[1:])
    if fields[3] == '0A' and fields[1].endswith(f':{int(port):04X}')
  ]
  assert listening == [f'0100007F:{int(port):04X}']
  command = [sys.executable, '-m', 'unclip_jax', 'demo', '--port', port]
  model = write_tiny_model(tmp_path / 'model')
  other = subprocess.run([*command, '--model', model], capture_output=True, text=True)
  assert other.returncode == 1 and other.stdout == ''
  assert other.stderr.splitlines()[-1].endswith('cannot be had: take another --port')
