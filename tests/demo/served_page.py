"""Requests to the page by hand, as a browser makes them."""

import io
import json
import re
import uuid
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

WAITING = 5  # requests that the page lets wait
SECONDS = 300  # that an answer may take, with programs that are compiled first


class Page:
  """What a browser does, by hand.

  Args:
    url: of the page.
    pid: of its process.
  """

  def __init__(self, url: str, pid: int) -> None:
    self.url, self._pid = url, pid
    self._client = httpx.Client(base_url=url, timeout=SECONDS)
    config = self._client.get('config').json()
    names = {one['id']: one['props'].get('value') for one in config['components']}
    self._calls = {
      names[target]: call['id']
      for call in config['dependencies']
      for target, event in call['targets']
      if event == 'click' and call['backend_fn']
    }

  def close(self) -> None:
    self._client.close()

  def get(self, path: str) -> httpx.Response:
    return self._client.get(path)

  def put(self, content: bytes, name: str = 'picture.png') -> dict:
    """Puts a file in; what Gradio calls it."""
    answer = self._client.post('gradio_api/upload', files={'files': (name, content)})
    answer.raise_for_status()
    return {
      'path': answer.json()[0],
      'orig_name': name,
      'meta': {'_type': 'gradio.FileData'},
    }

  def ask(self, button: str, *asked) -> tuple[int, dict]:
    """Presses a button: the status of the answer, and what came of it in the end."""
    session = uuid.uuid4().hex
    body = {'data': list(asked), 'fn_index': self._calls[button], 'session_hash': session}
    joined = self._client.post('gradio_api/queue/join', json=body)
    if joined.status_code != 200:
      return joined.status_code, joined.json()
    with self._client.stream(
      'GET', 'gradio_api/queue/data', params={'session_hash': session}
    ) as lines:
      for line in lines.iter_lines():
        message = json.loads(line.removeprefix('data:')) if line.startswith('data:') else {}
        if message.get('msg') == 'process_completed':
          return 200, message
    raise AssertionError('the page left a request without an answer')

  def generate(self, prompt: str, seed: int = 0, n: int = 1) -> tuple[int, dict]:
    return self.ask('Generate', prompt, '', n, seed, 10, 2, 128)

  def pixels(self, answer: dict) -> np.ndarray:
    """The pictures that were drawn, uint8 [n, h, w, 3]."""
    files = [one['image']['path'] for one in answer['output']['data'][0]]
    contents = [self.get(f'gradio_api/file={path}').content for path in files]
    return np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in contents])

  def memory(self) -> int:
    """Of the page's process, in KiB."""
    status = Path(f'/proc/{self._pid}/status').read_text()
    return int(re.search(r'VmRSS:\s+(\d+) kB', status)[1])
