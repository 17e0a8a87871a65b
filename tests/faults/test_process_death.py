"""A process of several that dies: the others end, and a new start goes on as if nothing had been.

The first of them is the leader that the others report to, so that its death is another case.
"""

import signal
import time

import numpy as np
from processes import environment, free_address, start_function
from trained_processes import by_hand, losses, train_until_killed

SECONDS = 10
MORE = 4  # steps after the restart


def start_both(folder, env):
  address, heartbeat = free_address(), f'--heartbeat-seconds={SECONDS}'
  return [
    start_function(train_until_killed, folder, heartbeat, *by_hand(number, address), env=env)
    for number in (0, 1)
  ]


def wait_until(is_there, started):
  while not is_there():
    ended = [process.communicate()[1] for process in started if process.poll() is not None]
    assert not ended, ended
    time.sleep(0.05)


def kill(one, other):
  """Returns what the other says, which has to end by itself."""
  one.send_signal(signal.SIGKILL)
  _, said = other.communicate(timeout=300)
  one.communicate()
  assert other.returncode not in (0, None)
  return said


def test_the_rest_stop_and_a_new_start_goes_on_from_the_last_checkpoint(tmp_path):
  env, run = environment(tmp_path / 'cache', level=0), tmp_path / 'run'
  checkpoints = run / 'clip' / 'checkpoints'
  first, second = start_both(run, env)
  wait_until((checkpoints / '4').exists, (first, second))
  said = kill(second, first)
  assert f'ends the others within about {SECONDS} s and gives its number' in said
  assert 'process 1 of 2 is ' not in said  # that is in its own log
  died = said.partition('JAX distributed service detected fatal errors')[2]
  assert 'stopped sending heartbeats):\n1\n' in died, said
  saved = max(int(folder.name) for folder in checkpoints.iterdir() if folder.name.isdigit())
  speeds = losses(run, 'clip', 'examples_per_s')
  assert 4 <= saved <= max(speeds)

  first, second = start_both(run, env)
  wait_until((checkpoints / str(saved + MORE)).exists, (first, second))
  began = time.monotonic()
  said = kill(first, second)
  # The other one's call to the leader fails at once: it does not wait for a heartbeat.
  assert time.monotonic() - began < 6 * SECONDS
  assert 'Either the leader task was preempted/died' in said, said
  found, again = losses(run, 'clip'), losses(run, 'clip', 'examples_per_s')
  # What was before the checkpoint is not trained again: its rows are those that were there.
  before = range(1, saved + 1)
  assert [again[step] for step in before] == [speeds[step] for step in before]

  undisturbed = tmp_path / 'undisturbed'
  alone = start_function(train_until_killed, undisturbed, f'--steps={saved + MORE}', env=env)
  _, said = alone.communicate()
  assert alone.returncode == 0, said
  wanted = losses(undisturbed, 'clip')
  assert [*wanted] == [*range(1, saved + MORE + 1)]
  np.testing.assert_allclose([found[step] for step in wanted], [*wanted.values()], rtol=1e-4)
