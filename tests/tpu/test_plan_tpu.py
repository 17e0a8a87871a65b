"""Plans for TPUs, by their own compiler: libtpu, of the extra `plan`.

Asked for by name, as where libtpu is installed every import of JAX looks for a TPU.
"""

import functools
import json

import pytest
import test_plan

# What is compiled for a TPU takes ten seconds of a core a layer.
TINY = ('--preset', 'tiny', '--set', 'prior.depth=1', '--topology', 'v5e:2x2')

# Those of the tests are for CPUs, and libtpu ends the process where it does not know one.
run = functools.partial(test_plan.run, XLA_FLAGS='')


def planned(folder, *args):
  out = folder / 'plan.json'
  status, text, said = run(*args, '--json', out)
  assert status == 0, said
  return text, json.loads(out.read_text())


def test_a_stage_trains_on_a_small_slice(tmp_path):
  text, results = planned(tmp_path, 'prior', *TINY, '--batch-size', 256, '--fsdp')
  (entry,) = results['stages']
  assert entry['fits'] and entry['available'] == 2**34
  assert entry['needed'] > entry['memory']['temporaries'] > 0
  assert entry['memory']['aliased'] > 0
  # Sizes that TPUs fill up to theirs count as they are.
  flops = 4 * entry['cost']['matmul_flops']
  assert flops == pytest.approx(entry['analytic_flops'], rel=0.3)
  assert sum(each['bytes'] for each in entry['collectives'].values()) > 0
  assert 'v5e:2x2: 4 chips of 16 GiB, bfloat16' in text and 'libtpu' in text


@pytest.mark.parametrize(('topology', 'gib'), [('v5p:2x2x1', 95), ('v6e:2x2', 32)])
def test_other_kinds_of_chips_are_compiled_for(topology, gib, tmp_path):
  chips = (*TINY[:-1], topology)
  _, results = planned(tmp_path, 'prior', *chips, '--batch-size', 256, '--fsdp')
  (entry,) = results['stages']
  assert entry['fits'] and entry['available'] == gib * 2**30
  assert 4 * entry['cost']['matmul_flops'] == pytest.approx(entry['analytic_flops'], rel=0.3)


def test_clip_trains_with_sam_each_chip_its_own_group(tmp_path):
  shallow = ('--set', 'clip.text.depth=1', '--set', 'clip.vision.depth=1')
  chips = ('--preset', 'tiny', *shallow, '--topology', 'v5e:2x2')
  _, results = planned(tmp_path, 'clip', *chips, '--batch-size', 256, '--fsdp')
  (entry,) = results['stages']
  assert entry['fits']
  # Of eleven passes five are made a second time, which of a single group the compiler spares: of
  # three, without SAM, it would be a quarter.
  assert 0.4 < 4 * entry['cost']['matmul_flops'] / entry['analytic_flops'] < 1.1
  assert set(entry['collectives']) <= {'all-gather', 'all-reduce', 'reduce-scatter'}


def test_sampling_on_one_chip_sends_nothing(tmp_path):
  text, results = planned(tmp_path, 'prior', *TINY, '--sample', '--devices', 1)
  (entry,) = results['stages']
  assert entry['batch_size'] == 1 and entry['collectives'] == {}
  assert entry['cost']['matmul_flops'] == pytest.approx(entry['analytic_flops'], rel=0.1)
  assert results['about']['num_chips'] == 1 and 'images/s' in text


def test_what_does_not_fit_says_by_how_much_and_what_to_try(tmp_path):
  out = tmp_path / 'plan.json'
  wide = ('--set', 'prior.width=4096', '--batch-size', 2**16)
  status, text, said = run('prior', *TINY, *wide, '--json', out)
  assert status == 1
  (entry,) = json.loads(out.read_text())['stages']
  assert not entry['fits'] and entry['needed'] > entry['available'] > 15 * 2**30
  assert ' NO' in text
  assert 'prior does not fit v5e:2x2: a device lacks' in said.splitlines()[-1]
  assert 'try --fsdp, --remat, --accumulate 2' in said.splitlines()[-1]


def test_topologies_that_libtpu_has_not_are_a_line():
  status, _, said = run('prior', '--preset', 'tiny', '--topology', 'v5e:3x7')
  assert status == 1
  assert "libtpu has no topology 'v5e:3x7'" in said.splitlines()[-1]
