"""What stands between the network and Gradio: the few addresses that the page needs, and no others.

Gradio also fetches what lies elsewhere, records, and writes files, at addresses of its own, and it
reads all of a request into memory. What comes through here is small, and names no file but those
that people have put in.
"""

import contextlib
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from unclip_jax.demo.limits import MOST_BYTES

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MOST_STORED = 2**30  # bytes of what people have put in, together
_MOST_ASKED = 2**16  # bytes of a request that draws; pictures come before it, by themselves
_MOST_AROUND = 2**14  # bytes around a file
_API = '/gradio_api/'
_READ = re.compile(
  r'/|/config/?|/favicon\.ico|/theme\.css|/robots\.txt|/manifest\.json|/(static|assets|svelte)/.*'
  rf'|{_API}(theme\.css|info/?|app_id/?|startup-events|queue/data|upload_progress|login_check/?'
  r'|heartbeat/[\w-]+|file=.*)'
)
_WRITTEN = re.compile(rf'{_API}(queue/join|upload|cancel|reset)/?')
_FILE = f'{_API}file='


class Gate:
  """ASGI middleware.

  Args:
    app: what is behind it.
    folder: where what people put in is kept; of other files none is named by a request.
  """

  def __init__(self, app: Callable[..., Awaitable[None]], folder: str) -> None:
    self._app, self._folder = app, os.path.realpath(folder)

  async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
    """Passes a request on, or answers it."""
    if scope['type'] == 'lifespan':
      return await self._app(scope, receive, send)
    if scope['type'] != 'http':
      return await send({'type': 'websocket.close'})  # of which the page has none
    if scope['method'] in ('GET', 'HEAD'):
      if not self._may_read(scope['path']):
        return await _answer(send, 404, 'there is no such page')
      return await self._app(scope, receive, send)
    path = scope['path'].rstrip('/')
    if scope['method'] != 'POST' or not _WRITTEN.fullmatch(path):
      return await _answer(send, 404, 'there is no such page')
    has_file = path.endswith('upload')
    most = MOST_BYTES + _MOST_AROUND if has_file else _MOST_ASKED
    length = dict(scope['headers']).get(b'content-length', b'')
    if not length.isdigit():
      return await _answer(send, 411, 'say how long the request is')
    if len(length) > len(str(most)) or int(length) > most:
      return await _answer(send, 413, f'this is larger than the {most:,} bytes that are taken')
    if has_file:
      if _stored(self._folder) > MOST_STORED:
        return await _answer(send, 503, 'too much is stored here: try again in an hour')
      return await self._app(scope, receive, send)
    body = await _read(receive, int(length))
    if not self._names_own_files(body):
      return await _answer(send, 400, 'this is no request of the page')
    return await self._app(scope, _replay(body, receive), send)

  def _may_read(self, path: str) -> bool:
    if path.startswith(_FILE):
      return self._is_own(path.removeprefix(_FILE))
    return _READ.fullmatch(path) is not None

  def _is_own(self, path: object) -> bool:
    """Whether a file is one of those that people have put in, or were given."""
    if not isinstance(path, str):
      return False
    try:
      return os.path.realpath(path).startswith(self._folder + os.sep)
    except ValueError:  # of characters that no name has
      return False

  def _names_own_files(self, body: bytes) -> bool:
    """Whether a request is JSON in which each path is of a file that was put in before."""
    try:
      left = [json.loads(body)]
    except (ValueError, RecursionError):
      return False
    while left:
      value = left.pop()
      if isinstance(value, dict):
        if value.get('path') is not None and not self._is_own(value['path']):
          return False
        left += value.values()
      elif isinstance(value, list):
        left += value
    return True


async def _answer(send: Send, status: int, text: str) -> None:
  body = json.dumps({'detail': text}).encode()
  headers = [
    (b'content-type', b'application/json'),
    (b'content-length', str(len(body)).encode()),
    # What is left of the request is not read.
    (b'connection', b'close'),
  ]
  await send({'type': 'http.response.start', 'status': status, 'headers': headers})
  await send({'type': 'http.response.body', 'body': body})


async def _read(receive: Receive, length: int) -> bytes:
  body = b''
  while len(body) <= length:
    message = await receive()
    body += message.get('body', b'')
    if message['type'] != 'http.request' or not message.get('more_body'):
      break
  return body


def _replay(body: bytes, receive: Receive) -> Receive:
  """A request that was read already, once more."""
  is_given = False

  async def again() -> Message:
    nonlocal is_given
    if is_given:
      return await receive()
    is_given = True
    return {'type': 'http.request', 'body': body, 'more_body': False}

  return again


def _stored(folder: str) -> int:
  """Bytes of all files of a folder."""
  total = 0
  for root, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(OSError):  # it was removed meanwhile
        total += os.path.getsize(os.path.join(root, name))
  return total
