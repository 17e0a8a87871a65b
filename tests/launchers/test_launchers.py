"""What is in experiments/launch: run by Open MPI (Debian's openmpi-bin) where that is possible.

Asked for by name, as it needs a program that pip does not install.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from processes import assert_same, environment, free_address, pictures, start
from tiny_model import TEXTS, write_tiny_model

LAUNCH = Path(__file__).parent.parent.parent / 'experiments' / 'launch'
SCRIPTS = sorted(path.name for path in LAUNCH.glob('*.sh'))
# Without a network; and as root, who the checks may be run by.
OPEN_MPI = {
  'OMPI_ALLOW_RUN_AS_ROOT': '1',
  'OMPI_ALLOW_RUN_AS_ROOT_CONFIRM': '1',
  'OMPI_MCA_oob_tcp_if_include': 'lo',
  'OMPI_MCA_btl_tcp_if_include': 'lo',
}


def test_mpirun_draws_what_one_process_does(tmp_path):
  model = write_tiny_model(tmp_path / 'model')
  prompts, out, one = tmp_path / 'prompts.txt', tmp_path / 'out', tmp_path / 'one'
  prompts.write_text('\n'.join(TEXTS))
  given = ['--prompts', prompts, '--model', model, '--size', 16, '--batch-size', 2]
  env = environment(
    tmp_path / 'cache', COORDINATOR=free_address(), PYTHON=sys.executable, **OPEN_MPI
  )
  launch = [LAUNCH / 'mpirun.sh', '-n', 2, '--oversubscribe', '--', *given, '--out', out]
  done = subprocess.run([*map(str, launch)], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines() == [str(out)]
  assert f'3 pictures in {out}, by 2 processes' in done.stderr
  alone = start(['generate', *given, '--out', one], env)
  alone.communicate()
  assert alone.returncode == 0
  assert_same(out, pictures(one))
  (out / '00002-0-a-rocket-on-a-blue-background.png').unlink()
  done = subprocess.run([*map(str, launch)], env=env, capture_output=True, text=True)
  assert 'process 0: done, 0 drawn' in done.stderr
  assert 'process 1: done, 1 drawn' in done.stderr
  assert_same(out, pictures(one))


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_are_read_by_bash_and_say_how_they_are_used(script):
  path = LAUNCH / script
  subprocess.run(['bash', '-n', path], check=True)
  assert f'experiments/launch/{script}' in path.read_text()
  if script != 'slurm.sh':  # all of whose arguments are those of generate
    done = subprocess.run(['/bin/bash', path], env={'PATH': ''}, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search('usage|the name of the TPU', done.stderr)


@pytest.mark.parametrize(
  ('script', 'program', 'env', 'wanted'),
  [
    (
      'slurm.sh',
      'srun',
      {},
      '--kill-on-bad-exit=1 --label python3 -u -m unclip_jax generate --distributed '
      '--prompts a b.txt',
    ),
    (
      'tpu_vm.sh',
      'gcloud',
      {'TPU': 'mine', 'ZONE': 'here'},
      'compute tpus tpu-vm ssh mine --zone here --worker=all --command '
      r'cd . && python3 -u -m unclip_jax generate --distributed --devices 4 --prompts a\ b.txt',
    ),
    (
      'tpu_vm.sh',
      'gcloud',
      {'TPU': 'mine', 'ZONE': 'here', 'PROGRAM': 'experiments.emoji.train_clip', 'CLONE': 'clone'},
      'compute tpus tpu-vm ssh mine --zone here --worker=all --command '
      r'cd clone && python3 -u -m experiments.emoji.train_clip --distributed --prompts a\ b.txt',
    ),
  ],
)
def test_what_other_scripts_start(tmp_path, script, program, env, wanted):
  """A program that only repeats its arguments stands in for the launcher."""
  (tmp_path / program).write_text('#!/bin/bash\necho "$@"\n')
  (tmp_path / program).chmod(0o755)
  done = subprocess.run(
    ['/bin/bash', LAUNCH / script, '--prompts', 'a b.txt'],
    env={'PATH': f'{tmp_path}:/usr/bin:/bin', **env},
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == wanted


def test_the_jobset_has_a_pod_for_each_process():
  jobset = yaml.safe_load((LAUNCH / 'jobset.yaml').read_text())
  assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
  (job,) = jobset['spec']['replicatedJobs']
  pods = job['template']['spec']
  assert pods['completionMode'] == 'Indexed'
  (container,) = pods['template']['spec']['containers']
  options = dict(word[2:].split('=') for word in container['command'] if word.startswith('--'))
  assert pods['parallelism'] == pods['completions'] == int(options['num-processes'])
  name = jobset['metadata']['name']
  host, port = options['coordinator'].split(':')
  assert host == f'{name}-{job["name"]}-0-0.{name}'
  assert {'containerPort': int(port)} in container['ports']
  assert options['process-id'] == '$(JOB_COMPLETION_INDEX)'
