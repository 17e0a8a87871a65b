"""Several processes draw what one draws, each a share, and none of it twice."""

import signal
import subprocess
import sys
import time

import pytest
from processes import assert_same, environment, free_address, pictures, start
from tiny_model import TEXTS, write_tiny_model

from unclip_jax.cli import main

HEARTBEAT = 'from unclip_jax import processes\nprocesses.HEARTBEAT_SECONDS = 10'
DIED = 'This most likely indicates that another task died'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return write_tiny_model(tmp_path_factory.mktemp('model'))


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture(scope='module')
def undisturbed(folder, tmp_path_factory):
  """A file of many prompts, and their pictures by one process that nothing happens to."""
  place = tmp_path_factory.mktemp('undisturbed')
  (place / 'prompts.txt').write_text('\n'.join([*TEXTS] * 40))
  assert draw(*command(folder, place / 'prompts.txt', place / 'out')) == 0
  return place / 'prompts.txt', pictures(place / 'out')


def draw(*args: object) -> int:
  """The exit status of a command, in this process."""
  with pytest.raises(SystemExit) as stop:
    main([*map(str, args), '--no-cache'])
  return stop.value.code


def command(folder, prompts, out) -> list[object]:
  fixed = ('--model', folder, '--size', 16, '--batch-size', 3)
  return ['generate', '--prompts', prompts, '--out', out, *fixed]


def by_hand(number: int, address: str) -> list[object]:
  return ['--coordinator', address, '--num-processes', 2, '--process-id', number]


def of_slurm(number: int, address: str) -> dict[str, str]:
  """What srun tells the tasks of a job on this machine."""
  host, _, port = address.partition(':')
  return {
    'SLURM_JOB_ID': '4242',
    'SLURM_STEP_NODELIST': host,
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': str(number),
    'SLURM_LOCALID': str(number),
    'SLURM_STEP_NUM_NODES': '1',
    'JAX_COORDINATOR_PORT': port,
  }


def test_two_processes_of_two_devices_draw_what_one_does(folder, cache, tmp_path):
  """Three pictures at a time do not divide over two devices: four are drawn, and one is dropped."""
  prompts, out, one = tmp_path / 'prompts.txt', tmp_path / 'out', tmp_path / 'one'
  prompts.write_text('\n'.join(TEXTS))
  address = free_address()
  args = [*command(folder, prompts, out), '--num-images', 3, '--devices', 2, '--distributed']
  started = [start(args, environment(cache, 2, **of_slurm(number, address))) for number in (0, 1)]
  said = [process.communicate() for process in started]
  assert [process.returncode for process in started] == [0, 0], said
  assert said[0][0].splitlines() == [str(out)] and said[1][0] == ''
  assert 'process 0: done, 5 drawn' in said[0][1]
  assert 'process 1: done, 4 drawn' in said[1][1]
  assert f'9 pictures in {out}, by 2 processes' in said[0][1]
  assert draw(*command(folder, prompts, one), '--num-images', 3) == 0
  assert_same(out, pictures(one))


@pytest.mark.parametrize('killed', [0, 1])
def test_a_process_that_dies_ends_the_other_and_nothing_is_lost(
  folder, cache, undisturbed, tmp_path, killed
):
  (prompts, expected), out = undisturbed, tmp_path / 'out'
  address = free_address()
  args = command(folder, prompts, out)
  started = [
    start([*args, *by_hand(number, address)], environment(cache), HEARTBEAT) for number in (0, 1)
  ]
  # Of line n, from 1, process (n - 1) % 2 draws the picture.
  while len([name for name in out.glob('*.png') if int(name.name[:5]) % 2 != killed]) < 4:
    assert started[killed].poll() is None
    time.sleep(0.01)
  started[killed].send_signal(signal.SIGKILL)
  (_, lost), (_, said) = (started[i].communicate(timeout=300) for i in (killed, 1 - killed))
  assert started[killed].returncode == -signal.SIGKILL, lost
  assert started[1 - killed].returncode not in (0, None)
  assert 'should one die, JAX ends the others within 10 s: start again' in said
  assert DIED in said
  before = {path.name: path.stat().st_mtime_ns for path in out.glob('*.png')}
  assert 4 <= len(before) < len(expected)
  # Another number of processes finds what is missing as well.
  assert draw(*args) == 0
  after = {path.name: path.stat().st_mtime_ns for path in out.glob('*.png')}
  assert {name: after[name] for name in before} == before
  assert_same(out, expected)


def test_a_process_that_fails_leaves_the_other_to_its_share(folder, cache, tmp_path):
  prompts, out = tmp_path / 'prompts.txt', tmp_path / 'out'
  prompts.write_text('\n'.join(TEXTS))
  (tmp_path / 'file').write_text('')
  address = free_address()
  started = [
    start([*command(folder, prompts, place), *by_hand(number, address)], environment(cache))
    for number, place in enumerate((out, tmp_path / 'file'))
  ]
  (_, whole), (_, failed) = (process.communicate() for process in started)
  assert [process.returncode for process in started] == [1, 1]
  assert f'cannot write to the folder {tmp_path / "file"}' in failed
  assert 'process 0: done, 2 drawn' in whole
  *_, line = whole.splitlines()
  assert line.startswith(f'unclip-jax: error: 1 of 3 pictures are missing in {out}')
  assert 'start again' in line
  assert len(list(out.glob('*.png'))) == 2


def test_without_a_launcher_it_says_what_to_give(folder, cache, tmp_path):
  (tmp_path / 'prompts.txt').write_text(TEXTS[0])
  env = environment(cache)
  env.pop('KUBERNETES_SERVICE_HOST', None)
  args = [*command(folder, tmp_path / 'prompts.txt', tmp_path / 'out'), '--distributed']
  process = start(args, env)
  _, said = process.communicate()
  assert process.returncode == 1
  *_, line = said.splitlines()
  assert line.startswith('unclip-jax: error: no launcher of several processes is found')
  assert '--coordinator' in line
  assert not (tmp_path / 'out').exists()


def test_the_package_is_a_program():
  command = [sys.executable, '-m', 'unclip_jax', '--version']
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert done.stdout.startswith('unclip-jax ')
