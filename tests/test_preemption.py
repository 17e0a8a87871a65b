"""SIGTERM while a run trains; what a second one does is in tests/faults."""

import os
import signal
import threading

import pytest

from unclip_jax.train.preemption import STATUS, Preemption


def test_the_first_sigterm_only_asks():
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  said = []
  with pytest.raises(SystemExit) as stop, Preemption() as preemption:
    preemption.leave(said.append, 3)
    assert not preemption.requested() and not said
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.requested()
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    preemption.leave(said.append, 4)
  assert stop.value.code == STATUS == 128 + signal.SIGTERM
  (line,) = said
  assert line.startswith('step 4: told to stop')
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_thread_has_no_signals():
  found = []

  def work():
    with Preemption() as preemption:
      found.append(preemption.requested())

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert found == [False]


def test_a_process_stops_where_another_one_is_asked():
  with Preemption(lambda asked: True) as preemption:
    assert preemption.requested()
    with pytest.raises(SystemExit):
      preemption.leave(print, 4)
