"""Models of a hub: the cache, and what is said where it does not work.

A server on this machine stands in for the hub. What talks to it is a process of its own, as
huggingface_hub reads its variables when it is imported.
"""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from tiny_model import write_tiny_model

ROOT = Path(__file__).parent.parent
TOKEN, SIGNATURE = 'hf_OpenSesameOpenSesame', 'X-Signature-AliBaba'


# --- A hub.


class Request(NamedTuple):
  method: str
  path: str
  authorization: str | None


class Hub(ThreadingHTTPServer):
  """What huggingface_hub asks of a hub, for the repositories of `acme`.

  Attributes:
    commits: repository -> commit -> file -> content.
    refs: repository -> branch or tag -> commit.
    requests: that were made.
    stalled: set where a file has begun that does not end.
    over: set in the end.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(('127.0.0.1', 0), Handler)
    self.commits, self.refs, self.requests = {}, {}, []
    self.stalled, self.over = threading.Event(), threading.Event()
    self.url = f'http://127.0.0.1:{self.server_port}'

  def publish(self, repo: str, files: dict[str, bytes], ref: str = 'main') -> str:
    """Makes a commit and returns its name."""
    text = json.dumps({name: content.hex() for name, content in files.items()})
    commit = hashlib.sha1(text.encode()).hexdigest()
    self.commits.setdefault(repo, {})[commit] = files
    self.refs.setdefault(repo, {})[ref] = commit
    return commit

  def asked(self, repo: str) -> list[str]:
    """The paths asked for of a repository, without its name."""
    return [path.split(repo)[1] for _, path, _ in self.requests if repo in path]


class Handler(BaseHTTPRequestHandler):
  server: Hub

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path = unquote(urlsplit(self.path).path)
    self.server.requests.append(Request(self.command, path, self.headers['Authorization']))
    if match := re.fullmatch('/api/models/(acme/[^/]+)(?:/revision/(.+))?', path):
      self.list_files(*match.groups('main'))
    elif match := re.fullmatch('/api/models/(acme/[^/]+)/tree/(.+)', path):
      files = self.server.commits[match[1]][match[2]]
      entries = [
        {'type': 'file', 'path': name, 'size': len(content), 'oid': tag(content)}
        for name, content in files.items()
      ]
      self.reply(200, json.dumps(entries).encode())
    elif match := re.fullmatch('/(acme/[^/]+)/resolve/([^/]+)/(.+)', path):
      self.send_file(*match.groups())
    else:
      self.reply(403 if path == '/store' else 404)

  def list_files(self, repo: str, revision: str):
    known, refs = self.server.commits.get(repo, {}), self.server.refs.get(repo, {})
    commit = refs.get(revision, revision)
    if repo == 'acme/broken':
      self.reply(500)
    elif repo == 'acme/odd':
      self.reply(200, b'<html>Welcome to our network</html>')
    elif repo == 'acme/private':
      self.reply(401, b'', {'X-Error-Code': 'RepoNotFound'})
    elif repo == 'acme/closed':
      self.reply(403)
    elif not known:
      self.reply(404, b'', {'X-Error-Code': 'RepoNotFound'})
    elif commit not in known:
      self.reply(404, b'', {'X-Error-Code': 'RevisionNotFound'})
    else:
      siblings = [{'rfilename': name} for name in known[commit]]
      self.reply(200, json.dumps({'id': repo, 'sha': commit, 'siblings': siblings}).encode())
    if repo == 'acme/moving':
      refs[revision] = next(other for other in known if other != commit)

  def send_file(self, repo: str, commit: str, name: str):
    content = self.server.commits[repo][commit][name]
    headers = {'ETag': f'"{tag(content)}"', 'X-Repo-Commit': commit}
    if repo == 'acme/gated':
      self.reply(403, b'', {'X-Error-Code': 'GatedRepo', 'X-Error-Message': f'not for {TOKEN}'})
    elif repo == 'acme/expired':
      # Of another name, so another host to huggingface_hub, as the stores of large files are.
      store = f'http://localhost:{self.server.server_port}/store?{SIGNATURE}=1'
      self.reply(302, b'', {**headers, 'Location': store, 'X-Linked-Size': '9'})
    elif repo == 'acme/half' and name == 'decoder.safetensors' and self.command == 'GET':
      self.reply(503)
    elif repo == 'acme/endless' and self.command == 'GET':
      self.server.stalled.set()
      self.server.over.wait(60)
    else:
      self.reply(200, content, headers)

  def reply(self, status: int, content: bytes = b'', headers: dict[str, str] | None = None):
    self.send_response(status)
    for name, value in {**(headers or {}), 'Content-Length': str(len(content))}.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)

  def log_message(self, *_: object):
    pass


def tag(content: bytes) -> str:
  return hashlib.sha1(content).hexdigest()


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  """The files of a model."""
  folder = write_tiny_model(tmp_path_factory.mktemp('model'))
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope='module')
def server(tiny):
  other = tiny | {'unclip.json': tiny['unclip.json'].replace(b'unclip_jax', b'a friend')}
  assert other != tiny
  extra = {'README.md': b'Hello', 'old/state.ckpt': b'1', 'flax_model.msgpack': b'2'}
  with Hub() as server:
    server.publish('acme/tiny', {**tiny, **extra})
    server.publish('acme/tiny', other, 'v1')
    server.publish('acme/moving', other, 'later')
    server.publish('acme/moving', tiny)
    server.publish('acme/gated', tiny)
    server.publish('acme/expired', tiny)
    server.publish('acme/half', tiny)
    server.publish('acme/endless', tiny)
    server.publish('acme/large', tiny)
    server.publish('acme/full', tiny)
    server.publish('acme/escaping', tiny | {'../evil': b'3'})
    server.publish('acme/pictures', {'README.md': b'Hello', 'images/1.png': b'4'})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()


# Each argument is a step, its answer a line of JSON. `info` and `load` are of acme/tiny.
CLIENT = """
import contextlib, io, json, resource, sys, tempfile, warnings
import unclip_jax
from unclip_jax.cli import main
from unclip_jax.systems.loading import find_folder

assert 'huggingface_hub' not in sys.modules
for step in sys.argv[1:]:
  answer = {}
  out = io.StringIO()
  with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(out):
    warnings.simplefilter('always')
    try:
      if step == 'info':
        with contextlib.suppress(SystemExit):
          main(['info', '--model', 'acme/tiny'])
      elif step == 'load':
        model = unclip_jax.load('acme/tiny')
        answer['shape'] = model.encode_text('a red apple').shape
      else:
        if step == 'acme/large':
          limits = resource.getrlimit(resource.RLIMIT_FSIZE)
          resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        if step == 'acme/full':
          resource.setrlimit(resource.RLIMIT_FSIZE, limits)
          from huggingface_hub import constants
          constants.HF_HUB_CACHE = __file__ + '/cache'
        answer['folder'] = str(find_folder(step))
    except unclip_jax.UnclipError as error:
      answer['error'] = str(error)
  answer['out'], answer['warnings'] = out.getvalue(), [str(each.message) for each in caught]
  print(json.dumps(answer))
"""


def environment(folder: Path, url: str) -> dict[str, str]:
  kept = {name: value for name, value in os.environ.items() if not name.startswith('HF_')}
  return kept | {
    'HF_ENDPOINT': url,
    'HF_HOME': str(folder / 'home'),
    'HF_TOKEN': TOKEN,
    'NO_PROXY': '127.0.0.1,localhost',
    'PYTHONPATH': str(ROOT),
  }


def ask(folder: Path, url: str, *steps: str, **variables: str) -> tuple[dict[str, dict], str]:
  """The answers of a process to steps, and all that it wrote to stderr."""
  script = folder / 'client.py'
  script.write_text(CLIENT)
  done = subprocess.run(
    [sys.executable, script, *steps],
    env=environment(folder, url) | variables,
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  for secret in (TOKEN, SIGNATURE, 'Bearer', 'Sesame'):
    assert secret not in done.stdout + done.stderr
  answers = [json.loads(line) for line in done.stdout.splitlines()]
  return dict(zip(steps, answers, strict=True)), done.stderr


ERRORS = {
  'acme/tiny@v9': "acme/tiny on HOST has no branch, tag or commit 'v9': check its name",
  'acme/missing': 'there is no folder acme/missing, and HOST has no model acme/missing, or not for '
  'you: check the name, or log in with `hf auth login`',
  'acme/private': 'there is no folder acme/private, and HOST has no model acme/private, or not for '
  'you: check the name, or log in with `hf auth login`',
  'acme/closed': 'HOST refuses acme/closed (error 403): log in with `hf auth login`, with a token '
  'that may read it',
  'acme/gated': 'acme/gated is gated: ask for access on its page on HOST, log in with `hf auth '
  'login`, and try again',
  'acme/broken': 'there is no folder acme/broken, HOST answers with the error 500, and the cache '
  'CACHE does not have it: check the name and the network, or give a folder',
  'acme/odd': 'there is no folder acme/odd, HOST does not answer as a hub does, and the cache '
  'CACHE does not have it: check the name and the network, or give a folder',
  'acme/expired': 'HOST refuses acme/expired (error 403): log in with `hf auth login`, with a '
  'token that may read it',
  'acme/escaping': "acme/escaping names the file '../evil': only files inside of the folder are "
  'read',
  'acme/pictures': 'acme/pictures on HOST holds no files of a model: check the name',
  'acme/large': 'cannot write to the cache CACHE (File too large): free some space, or let HF_HOME '
  'name a folder that can be written',
  'acme/full': 'cannot write to the cache HERE/client.py/cache (Not a directory): free some space, '
  'or let HF_HOME name a folder that can be written',
}


class Session(NamedTuple):
  folder: Path
  answers: dict[str, dict]
  stderr: str


@pytest.fixture(scope='module')
def session(server, tmp_path_factory):
  """A process that opens models, and one error after the other."""
  folder = tmp_path_factory.mktemp('client')
  half = f'acme/half@{server.refs["acme/half"]["main"]}'
  steps = ['info', 'load', 'acme/tiny', 'acme/tiny@v1', 'acme/moving', half, *ERRORS]
  return Session(folder, *ask(folder, server.url, *steps))


def test_a_model_of_a_hub_is_downloaded_and_opened(server, session):
  commit = server.refs['acme/tiny']['main']
  folder = session.answers['acme/tiny']['folder']
  assert Path(folder).name == commit
  assert folder.startswith(str(session.folder / 'home'))
  assert session.answers['load']['shape'] == [1, 16]
  shown = session.answers['info']['out']
  assert shown.startswith(f'acme/tiny: {folder}, written by unclip_jax')
  assert 'decoder' in shown
  assert session.stderr == ''
  assert not any(answer['warnings'] for answer in session.answers.values())


def test_only_what_is_read_is_asked_for_and_once(server, session, tiny):
  asked = server.asked('acme/tiny')
  main, v1 = (server.refs['acme/tiny'][ref] for ref in ('main', 'v1'))
  files = [path for path in asked if path.startswith('/resolve')]
  assert sorted(set(files)) == sorted(
    f'/resolve/{ref}/{name}' for ref in (main, v1) for name in tiny
  )
  # `info` looks twice, then come `load` and the step itself.
  assert asked.count('/revision/main') == 1
  assert not (Path(session.answers['acme/tiny']['folder']) / 'README.md').exists()


def test_a_revision_is_pinned(server, session, tiny):
  folder = Path(session.answers['acme/tiny@v1']['folder'])
  assert folder.name == server.refs['acme/tiny']['v1']
  assert b'a friend' in (folder / 'unclip.json').read_bytes()


def test_a_branch_that_moves_meanwhile_gives_one_commit(server, session):
  first, second = (server.refs['acme/moving'][ref] for ref in ('later', 'main'))
  assert first == second  # as it has moved
  folder = Path(session.answers['acme/moving']['folder'])
  assert folder.name != second
  assert not any(second in path for path in server.asked('acme/moving'))


@pytest.mark.parametrize('model', ERRORS)
def test_what_a_hub_refuses_is_one_line(server, session, model):
  answer = session.answers[model]
  places = {
    'HOST': server.url.removeprefix('http://'),
    'CACHE': str(session.folder / 'home' / 'hub'),
    'HERE': str(session.folder),
  }
  expected = re.sub('HOST|CACHE|HERE', lambda match: places[match[0]], ERRORS[model])
  assert answer['error'] == expected


def test_half_a_model_is_none(server, session):
  commit = server.refs['acme/half']['main']
  assert list(session.folder.rglob(f'models--acme--half/snapshots/{commit}/clip.safetensors'))
  assert 'answers with the error 503, ' in session.answers[f'acme/half@{commit}']['error']


def test_nothing_is_asked_of_a_repository_that_names_a_file_outside(server, session):
  assert not any(path.startswith('/resolve') for path in server.asked('acme/escaping'))
  assert not list(session.folder.rglob('evil'))


def test_the_token_goes_to_the_hub_and_nowhere_else(server, session):
  sent = {path == '/store': authorization for _, path, authorization in server.requests}
  assert sent == {False: f'Bearer {TOKEN}', True: None}


def test_offline_the_cache_serves(server, session):
  before = len(server.requests)
  commit = server.refs['acme/tiny']['v1']
  pinned = f'acme/tiny@{commit}'
  steps = ['info', 'load', 'acme/tiny@v1', pinned, 'acme/missing']
  answers, stderr = ask(session.folder, server.url, *steps, HF_HUB_OFFLINE='1')
  assert len(server.requests) == before
  assert stderr == ''
  assert answers['info'] == session.answers['info']
  assert answers['load'] == session.answers['load']
  assert answers['acme/tiny@v1'] == answers[pinned] == session.answers['acme/tiny@v1']
  assert answers['acme/missing']['error'] == (
    f'there is no folder acme/missing, and the cache {session.folder / "home" / "hub"} does not '
    'have it: unset HF_HUB_OFFLINE to download it, or give a folder'
  )


def test_without_a_network_the_cache_serves_with_a_warning(server, session):
  with socket.socket() as unused:
    unused.bind(('127.0.0.1', 0))
    host = f'127.0.0.1:{unused.getsockname()[1]}'
    url = f'http://user:Sesame@{host}'
    answers, stderr = ask(session.folder, url, 'load', 'acme/tiny', 'info', 'acme/missing')
  commit = server.refs['acme/tiny']['main']
  warning = (
    f'{host} cannot be reached (Connection refused): acme/tiny is taken from the cache as of '
    f'commit {commit[:7]}'
  )
  assert answers['load'] == session.answers['load'] | {'warnings': [warning]}
  assert answers['acme/tiny'] == session.answers['acme/tiny']  # one warning is enough
  assert answers['info'] == session.answers['info']
  assert answers['acme/missing']['error'] == (
    f'there is no folder acme/missing, {host} cannot be reached (Connection refused), and the '
    f'cache {session.folder / "home" / "hub"} does not have it: check the name and the network, '
    'or give a folder'
  )
  assert stderr == ''


def test_ctrl_c_ends_a_download_at_once(server, tmp_path):
  # A shell makes what it runs in the background ignore interrupts, and so these tests' children.
  code = (
    'import signal; signal.signal(signal.SIGINT, signal.default_int_handler); '
    "from unclip_jax.weights import hub; hub.download('acme/endless')"
  )
  env = environment(tmp_path, server.url)
  with subprocess.Popen([sys.executable, '-c', code], env=env, stderr=subprocess.PIPE) as process:
    assert server.stalled.wait(60)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
  assert process.returncode == -signal.SIGINT
  assert stderr.endswith(b'KeyboardInterrupt\n')
