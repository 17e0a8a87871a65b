"""The page as people start it, with the embedded model, and Chromium (Debian's)."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright
from processes import free_address
from served_page import SECONDS, WAITING, Page

# A shell in the background makes its children ignore interrupts.
START = (
  'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); '
  'from unclip_jax.cli import main; main()'
)
COMMAND = [sys.executable, '-c', START, 'demo', '--waiting', str(WAITING)]


@pytest.fixture(scope='session')
def page(tmp_path_factory):
  folder = tmp_path_factory.mktemp('server')
  (folder / 'tmp').mkdir()
  port = free_address().rpartition(':')[2]
  # Compiled as for people, as most of the time is drawing here.
  env = {name: os.environ[name] for name in os.environ if 'OPTIMIZATIONS' not in name}
  env.setdefault('JAX_COMPILATION_CACHE_DIR', str(folder / 'programs'))
  env['TMPDIR'] = str(folder / 'tmp')
  with contextlib.ExitStack() as stack:
    errors = stack.enter_context(open(folder / 'errors', 'w'))
    process = stack.enter_context(
      subprocess.Popen(
        [*COMMAND, '--port', port], env=env, stdout=subprocess.PIPE, stderr=errors, text=True
      )
    )
    stack.callback(process.kill)
    line = process.stdout.readline()
    found = re.match(r'the page is at (http://127\.0\.0\.1:\d+/) ', line)
    assert found, (folder / 'errors').read_text()
    with contextlib.closing(Page(found[1], process.pid)) as page:
      yield page
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert 'Traceback' not in (folder / 'errors').read_text()
    # All that people put in is gone.
    assert list((folder / 'tmp').glob('unclip_jax_demo_*')) == []


@pytest.fixture(scope='session')
def browser():
  with sync_playwright() as playwright:
    path = shutil.which('chromium')
    assert path, 'there is no Chromium: apt-get install chromium'
    chromium = playwright.chromium.launch(executable_path=path, args=['--no-sandbox'])
    yield chromium
    chromium.close()


@pytest.fixture
def tab(page, browser):
  """Opens the page at a tab; gives the page in the browser, and that tab."""
  contexts = []

  def open_at(name):
    context = browser.new_context(viewport={'width': 1200, 'height': 1000})
    contexts.append(context)
    shown = context.new_page()
    shown.set_default_timeout(SECONDS * 1000)
    shown.goto(page.url)
    shown.get_by_role('tab', name=name).click()
    place = shown.get_by_role('tabpanel').filter(visible=True)
    expect(place).to_have_count(1)
    return shown, place

  yield open_at
  for context in contexts:
    context.close()


@pytest.fixture(scope='session')
def shots(tmp_path_factory):
  """Where screenshots go: UNCLIP_JAX_SHOTS, for who wants to look at them."""
  folder = os.environ.get('UNCLIP_JAX_SHOTS')
  if folder is None:
    return tmp_path_factory.mktemp('shots')
  Path(folder).mkdir(parents=True, exist_ok=True)
  return Path(folder)


@pytest.fixture(scope='session')
def pictures(page, tmp_path_factory):
  """Files of two pictures that the model drew."""
  folder = tmp_path_factory.mktemp('pictures')
  paths = []
  for prompt in ('a red apple, flat style', 'a rocket on a blue background'):
    status, answer = page.generate(prompt)
    assert status == 200 and answer['success'], answer
    paths.append(folder / f'{len(paths)}.png')
    Image.fromarray(page.pixels(answer)[0]).save(paths[-1])
  return paths
