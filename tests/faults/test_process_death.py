"""A process of several that dies: the other ends, says which, and a new start goes on."""

import signal
import time

from processes import environment, free_address, start_function
from trained_processes import by_hand, losses, train_until_killed

SECONDS = 10


def test_the_rest_stop_and_say_which_has_died(tmp_path):
  address, env = free_address(), environment(tmp_path / 'cache', level=0)
  heartbeat = f'--heartbeat-seconds={SECONDS}'
  started = [
    start_function(train_until_killed, tmp_path, heartbeat, *by_hand(number, address), env=env)
    for number in (0, 1)
  ]
  checkpoints = tmp_path / 'clip' / 'checkpoints'
  while not (checkpoints / '4').exists():
    ended = [process.communicate()[1] for process in started if process.poll() is not None]
    assert not ended, ended
    time.sleep(0.05)
  started[1].send_signal(signal.SIGKILL)
  _, said = started[0].communicate(timeout=300)
  started[1].communicate()
  assert started[0].returncode not in (0, None)
  assert f'ends the others within about {SECONDS} s and gives its number' in said
  assert 'process 1 of 2 is ' not in said  # that is in its own log
  died = said.partition('JAX distributed service detected fatal errors')[2]
  assert 'stopped sending heartbeats):\n1\n' in died, said
  assert max(losses(tmp_path, 'clip')) >= 4
