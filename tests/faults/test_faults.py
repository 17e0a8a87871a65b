"""Runs that are killed, told to stop, or whose disk fails: each goes on as if nothing had been."""

import csv
import random
import signal
from pathlib import Path

import pytest
from children import Children, Ended, Faults

STEPS = 12
MANY = 60  # where there is much to kill
ARGS = [
  *('--preset=tiny', '--styles=flat', '--groups=food-drink', '--pool-size=16', '--batch-size=4'),
  *('--chunk=1', '--save-every=2', f'--steps={STEPS}', '--set=optimizer.warmup_steps=2'),
  *('--set=upsamplers.0.unet.multipliers=[1]', '--set=upsamplers.0.sampling.num_steps=1'),
]
STAGE, FILE = 'upsampler_0', 'upsampler_0.safetensors'


@pytest.fixture(scope='module')
def children(tmp_path_factory):
  with Children(tmp_path_factory.mktemp('children')) as started:
    yield started


@pytest.fixture(scope='module')
def whole(children, tmp_path_factory) -> Path:
  """A run that nothing happened to."""
  return undisturbed(children, tmp_path_factory.mktemp('whole'), STEPS)[0]


def undisturbed(children: Children, run: Path, steps: int) -> tuple[Path, Ended]:
  ended = children.train([f'--run={run}', *ARGS, f'--steps={steps}'])
  assert ended.status == 0, ended.said
  assert sorted(losses(run)) == list(range(1, steps + 1))
  return run, ended


def losses(run: Path) -> dict[int, str]:
  """Of each step that the log has a whole line of, as it stands there."""
  path = run / STAGE / 'metrics.csv'
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  rows = csv.DictReader(line for line in lines if line.endswith('\n'))
  return {int(row['step']): row['loss'] for row in rows}


def saved(run: Path) -> set[str]:
  folder = run / STAGE / 'checkpoints'
  return {path.name for path in folder.iterdir()} if folder.exists() else set()


def assert_same(run: Path, whole: Path) -> None:
  assert losses(run) == losses(whole)
  assert (run / FILE).read_bytes() == (whole / FILE).read_bytes()


def moments(ended: Ended) -> list[Faults]:
  """Twenty: within saves, at any file of the run, and at any time."""
  draw = random.Random(20)
  operations = ended.in_save * 2 // MANY  # of one save
  found = [Faults(in_save=draw.randint(1, 2 * operations)) for _ in range(8)]
  found += [Faults(in_run=draw.randint(1, 3 * ended.in_run * 2 // MANY)) for _ in range(6)]
  found += [Faults(after=draw.uniform(0, 0.5)) for _ in range(6)]
  draw.shuffle(found)
  return found


def test_a_run_killed_twenty_times_has_the_losses_of_one_that_was_not(children, tmp_path):
  whole, ended = undisturbed(children, tmp_path / 'whole', MANY)
  run = tmp_path / 'run'
  argv = [f'--run={run}', *ARGS, f'--steps={MANY}']
  wanted, in_save, began = losses(whole), 0, []
  for faults in moments(ended):
    killed = children.train(argv, faults)
    assert killed.status == -signal.SIGKILL, killed.said
    found = losses(run)
    assert found.items() <= wanted.items() and sorted(found) == list(range(1, len(found) + 1))
    in_save += any('orbax-checkpoint-tmp' in name for name in saved(run))
    began.append(max([int(name) for name in saved(run) if name.isdecimal()], default=0))
  assert in_save >= 5
  assert began == sorted(began) and 10 < began[-1] < MANY
  last = children.train(argv)
  assert last.status == 0, last.said
  assert_same(run, whole)
  assert saved(run) == {str(MANY - 2), str(MANY)}


def test_sigterm_saves_and_leaves_with_a_status_of_its_own(children, whole, tmp_path):
  argv = [f'--run={tmp_path}', *ARGS, '--chunk=3', '--save-every=30']
  told = children.train(argv, Faults(signals=[['write', 2, signal.SIGTERM]]))
  assert told.status == 143, told.said
  assert saved(tmp_path) == {'6'} and sorted(losses(tmp_path)) == [3, 6]
  assert 'step 6: told to stop (SIGTERM), and saved' in told.said.splitlines()[-1]
  assert not (tmp_path / FILE).exists()
  last = children.train(argv)
  assert last.status == 0, last.said
  assert (tmp_path / FILE).read_bytes() == (whole / FILE).read_bytes()


@pytest.mark.parametrize('second', [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(children, tmp_path, second):
  signals = [['write', 3, signal.SIGTERM], ['save_async', 2, second]]
  ended = children.train([f'--run={tmp_path}', *ARGS], Faults(signals=signals))
  assert ended.status == -second, ended.said
  assert {name for name in saved(tmp_path) if name.isdecimal()} <= {'2'}
  assert sorted(losses(tmp_path)) == [1, 2, 3]


def test_a_full_disk_is_told_and_nothing_is_lost(children, whole, tmp_path):
  argv = [f'--run={tmp_path}', *ARGS]
  first = children.train([*argv, '--steps=4'])
  assert first.status == 0, first.said
  full = children.train(argv, Faults(file_size=60_000))
  assert full.status == 1
  (line,) = [each for each in full.said.splitlines() if 'error' in each]
  assert 'cannot write the checkpoint of step 6 to ' in line and 'free some space' in line
  assert 'Traceback' not in full.said
  assert saved(tmp_path) == {'2', '4'}
  last = children.train(argv)
  assert last.status == 0, last.said
  assert_same(tmp_path, whole)


def test_a_damaged_checkpoint_costs_some_steps(children, whole, tmp_path):
  argv = [f'--run={tmp_path}', *ARGS]
  first = children.train([*argv, '--steps=8'])
  assert first.status == 0, first.said
  path = max((tmp_path / STAGE / 'checkpoints' / '8').rglob('d/*'), key=lambda p: p.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 3] ^= 16
  path.write_bytes(content)
  last = children.train(argv)
  assert last.status == 0, last.said
  assert 'checkpoints/8 is damaged, and called damaged_8 from now on: step 6' in last.said
  assert_same(tmp_path, whole)
  assert 'damaged_8' in saved(tmp_path)


def test_a_kill_within_the_first_save_does_not_lose_the_weights_of_init(children, whole, tmp_path):
  """What such a save leaves looks like no checkpoint of a run that continues."""
  argv = [f'--run={tmp_path}', *ARGS, f'--init={whole}', '--seed=1', '--minutes=0']
  killed = children.train(argv, Faults(in_save=3))
  assert killed.status == -signal.SIGKILL
  assert [name for name in saved(tmp_path) if name.startswith('0.')] == [*saved(tmp_path)]
  last = children.train(argv)
  assert last.status == 0, last.said
  assert (tmp_path / FILE).read_bytes() == (whole / FILE).read_bytes()
