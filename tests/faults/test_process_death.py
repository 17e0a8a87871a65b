"""A process of several that dies: the other ends, says which, and a new start goes on."""

import signal
import time

import pytest
from processes import environment, free_address, start_function
from trained_processes import by_hand, losses, train_until_killed

SECONDS = 10


@pytest.mark.parametrize(('killed', 'named'), [(1, 'task:1'), (0, 'leader')])
def test_the_rest_stop_and_say_which_has_died(killed, named, tmp_path):
  address, env = free_address(), environment(tmp_path / 'cache', level=0)
  heartbeat = f'--heartbeat-seconds={SECONDS}'
  started = [
    start_function(train_until_killed, tmp_path, heartbeat, *by_hand(number, address), env=env)
    for number in (0, 1)
  ]
  checkpoints = tmp_path / 'clip' / 'checkpoints'
  while not (checkpoints / '4').exists():
    assert all(process.poll() is None for process in started)
    time.sleep(0.05)
  started[killed].send_signal(signal.SIGKILL)
  rest = started[1 - killed]
  _, said = rest.communicate(timeout=120)
  started[killed].communicate()
  assert rest.returncode not in (0, None)
  assert f'ends the others within about {SECONDS} s and says which' in said
  assert named in said.partition('JAX distributed service detected fatal errors')[2], said
  assert max(losses(tmp_path, 'clip')) >= 4
