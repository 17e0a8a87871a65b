"""Plans: their figures are those of the true programs, and what does not fit is said.

TPUs need libtpu, which the tests do not install: `pip install -e '.[plan]'` for those that do.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unclip_jax import sharding
from unclip_jax.cli import main
from unclip_jax.config_json import override
from unclip_jax.measure.chips import Chip, Slice
from unclip_jax.measure.hlo import program_cost
from unclip_jax.presets import TINY
from unclip_jax.stages import diffusion_prior
from unclip_jax.systems import plan, plan_report
from unclip_jax.systems.machines import Machine
from unclip_jax.systems.stage_calls import random_params
from unclip_jax.train.presets import paper_recipe
from unclip_jax.train.state import init_state, make_optimizer, make_train_step

ROOT = Path(__file__).parent.parent
SMALL = override(TINY, ['prior.depth=1', 'prior.diffusion.num_steps=10'])
SETTINGS = plan.Settings(batch_size=4, dtype='float32')
CHIP = Chip('here', 2**30, 2e9, 1e9, 1e9, 0.0)


def this_machine(**about):
  """A CPU as if it were described."""
  return Machine(
    Slice('here:1', CHIP._replace(**about), 1, 0.0), sharding.make_mesh(1), 'cpu', True
  )


def run(*args, **env):
  """The command in a process of its own: its status, what it printed, and what it said."""
  done = subprocess.run(
    [sys.executable, '-m', 'unclip_jax', 'plan', *map(str, args)],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'} | env,
    capture_output=True,
    text=True,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


def test_a_plan_is_of_the_update_that_training_makes():
  found = plan.plan_training(SMALL, 'prior', this_machine(), SETTINGS)
  own, recipe = SMALL.prior, paper_recipe('prior')
  params = random_params(SMALL, 'prior', jnp.float32)
  optimizer = make_optimizer(recipe.optimizer, recipe.num_steps)
  statistics = diffusion_prior.Statistics(**params['statistics'])
  state = init_state(params['network'], optimizer)

  def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))

  def make_text(b):
    length = own.context_length
    ids, mask = jnp.zeros((b, length), jnp.int32), jnp.ones((b, length), bool)
    return diffusion_prior.TextFeatures(ids, mask, draw(b, length, own.text_width), draw(b, 16))

  def loss_fn(params, batch, key):
    given = batch['statistics'], batch['z_i'], batch['text'], batch['null_text'], key
    return diffusion_prior.loss(own, params, *given)

  batch = {'z_i': draw(4, 16), 'text': make_text(4)}
  batch |= {'statistics': statistics, 'null_text': make_text(1)}
  step = make_train_step(loss_fn, optimizer, recipe.ema_decay)
  with jax.default_matmul_precision('highest'):
    program = jax.jit(step, donate_argnums=0).lower(state, batch, jax.random.key(0)).compile()
  memory, cost = program.memory_analysis(), program_cost(program.as_text())
  assert found.memory.arguments == memory.argument_size_in_bytes
  assert found.memory.aliased == memory.alias_size_in_bytes > found.parameters * 16
  assert found.cost.matmul_flops == cost.matmul_flops
  assert found.cost.bytes == pytest.approx(cost.bytes, rel=0.01)
  given = state, batch
  assert found.arguments == sum(leaf.nbytes for leaf in jax.tree.leaves(given))
  assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert found.num_steps == 600_000 and found.fits and found.collectives == {}
  assert found.roofline.products == pytest.approx(cost.matmul_flops / 1e9)
  assert found.roofline.memory == pytest.approx(found.cost.bytes / 1e9)
  assert found.analytic_flops == pytest.approx(cost.matmul_flops, rel=0.1)
  results = plan_report.to_json('small', this_machine(), SETTINGS, [found], 2.0)
  (entry,) = results['stages']
  assert entry['chip_hours'] == pytest.approx(600_000 * found.roofline.seconds / 3600)
  assert entry['dollars'] == 2 * entry['chip_hours']
  assert entry['examples_per_second'] == pytest.approx(4 / found.roofline.seconds)
  json.dumps(results)


def test_a_state_that_is_too_large_is_not_even_compiled(monkeypatch):
  machine = this_machine(memory_bytes=1e5)
  monkeypatch.setattr(plan, '_compiled', None)
  found = plan.plan_training(SMALL, 'prior', machine, SETTINGS)
  assert not found.fits and found.memory is None and found.needed == found.arguments > 1e5
  assert plan.advice(found, machine, SETTINGS) == 'try a larger topology'
  text = plan_report.to_text(plan_report.to_json('small', machine, SETTINGS, [found], None))
  assert 'NO' in text and 'bound by' not in text


@pytest.mark.parametrize(
  ('message', 'with_arguments'),
  [
    (
      'XLA:TPU compile permanent error. Ran out of memory in memory space hbm. '
      'Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.',
      False,
    ),
    (
      'Ran out of memory on HBM, the total memory required for HLO temporaries (21.95G) '
      'exceeds available HBM (15.48G).',
      True,
    ),
  ],
)
def test_what_the_compiler_cannot_place_is_a_figure(monkeypatch, message, with_arguments):
  message = f'RESOURCE_EXHAUSTED: {message}'

  def fail(_):
    raise jax.errors.JaxRuntimeError(message)

  monkeypatch.setattr(plan._Step, 'compile', fail)
  found = plan.plan_training(SMALL, 'prior', this_machine(), SETTINGS)
  assert found.needed == 21.95 * 2**30 + with_arguments * found.arguments
  assert found.available == 15.48 * 2**30
  assert not found.fits and found.memory is None
  advised = plan.advice(found, this_machine(), SETTINGS)
  assert advised == 'try --remat, --accumulate 2, a larger topology'
  message = 'INTERNAL: something else'
  with pytest.raises(jax.errors.JaxRuntimeError, match='something else'):
    plan.plan_training(SMALL, 'prior', this_machine(), SETTINGS)


def test_sampling_is_planned_by_the_programs_that_draw():
  found = plan.plan_sampling(SMALL, 'small', 'prior', this_machine(), SETTINGS)
  assert found.num_steps is None and found.batch_size == 4
  assert found.analytic_flops == pytest.approx(found.cost.matmul_flops, rel=0.05)
  assert found.memory.arguments > found.arguments == 4 * found.parameters


@pytest.fixture(scope='module')
def on_gpus(tmp_path_factory):
  """Plans of a prior on four GPUs: each with the whole state, and split over them."""
  found = []
  for i, more in enumerate([(), ('--fsdp',)]):
    out = tmp_path_factory.mktemp('plan') / f'{i}.json'
    args = ('prior', '--preset', 'tiny', '--gpus', 'h100:4', '--batch-size', 8, '--json', out)
    sizes = ('--set', 'prior.depth=1', '--set', 'prior.width=128')
    flags = f'{os.environ["XLA_FLAGS"]} --xla_backend_optimization_level=0'
    status, text, said = run(*args, *sizes, *more, '--price', 2, XLA_FLAGS=flags)
    assert status == 0, said
    found.append((text, json.loads(out.read_text())))
  return found


def test_what_gpus_would_send_is_seen_on_virtual_devices(on_gpus):
  (whole, split) = (results['stages'][0] for _, results in on_gpus)
  size = 4 * whole['parameters']
  # Each adds up gradients, once; those of the prefix and of the rest may be sent apart.
  assert set(whole['collectives']) == {'all-reduce'}
  sent = sum(each['bytes'] for each in whole['collectives'].values())
  assert 2 * 3 / 4 * size < sent < 2 * (2 * 3 / 4 * size)
  assert {'all-gather'} < set(split['collectives'])
  assert whole['arguments'] > 4 * size > 2.5 * split['arguments']
  for entry in (whole, split):
    assert entry['cost']['matmul_flops'] == entry['analytic_flops'] / 4
    assert entry['cost']['bytes'] == entry['memory']['arguments'] + entry['memory']['outputs']


def test_estimates_are_marked(on_gpus):
  text, results = on_gpus[0]
  assert results['about']['is_estimate'] and 'ESTIMATE' in text and '~' in text
  assert max(map(len, text.splitlines())) <= 100
  assert 'dollars' in text


@pytest.mark.parametrize(
  ('args', 'words'),
  [
    ([], 'give either --topology or --gpus'),
    (['--gpus', 'h100:2', '--topology', 'v5e:2x2'], 'give either'),
    (['--gpus', 'h100:2', '--devices', '1'], 'leave --devices out'),
    (['--gpus', 'h100'], 'how many there are'),
    (['--gpus', 'h100:64'], 'JAX has begun with 1 devices: plan in a process of its own'),
    (['--topology', 'v9:2x2'], "no TPU 'v9'"),
    (['--topology', 'v5e:2x2x2'], 'has 2 dimensions'),
    (['--gpus', 'h100:1', '--preset', 'nano'], "no preset 'nano'"),
    (['--gpus', 'h100:1', '--batch-size', '0'], '--batch-size is 0: take 1 or more'),
    (['--gpus', 'h100:1', '--accumulate', '3', '--batch-size', '4'], 'in 3 parts: take a --batch'),
    (['--gpus', 'h100:1', '--sample', '--remat'], 'are of training'),
    (['--gpus', 'h100:1', '--price', '-1'], '--price -1.0: take 0 or more'),
    (['--gpus', 'h100:1', '--dtype', 'int8'], 'float32, bfloat16 or float16'),
  ],
)
def test_slips_are_one_line(args, words, capsys):
  with pytest.raises(SystemExit) as stop:
    main(['plan', 'prior', '--preset', 'tiny', *args])
  assert stop.value.code in (1, 2)
  assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
  ('stage', 'args', 'words'),
  [
    ('judge', [], "no stage 'judge' here: take all, clip, prior, decoder, upsampler_0"),
    ('upsampler_1', [], "no stage 'upsampler_1' here"),
    ('clip', ['--accumulate', '2'], 'clip: --accumulate is for losses that are means'),
  ],
)
def test_stages_that_there_are_not(stage, args, words, capsys):
  with pytest.raises(SystemExit):
    main(['plan', stage, '--preset', 'tiny', '--gpus', 'h100:1', *args])
  assert words in capsys.readouterr().err.splitlines()[-1]


def test_without_libtpu_there_is_no_plan_for_tpus(monkeypatch, capsys):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name: None if name == 'libtpu' else find(name)
  )
  with pytest.raises(SystemExit):
    main(['plan', 'prior', '--preset', 'tiny', '--topology', 'v5e:2x2'])
  assert "pip install 'unclip-jax[plan]'" in capsys.readouterr().err
