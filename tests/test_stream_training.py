"""Training on any captioned pictures: by any number of processes, on at the exact example."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_pictures import encoded, pixels, write_shard, write_tar
from processes import environment, free_address, start_function
from trained_processes import SHORT, by_hand, losses, measure_nothing, train_twice

from experiments.emoji import train_clip, train_decoder, train_upsampler
from experiments.emoji.options import parse_options
from unclip_jax.systems.bad_step import read_bad_step
from unclip_jax.systems.unclip import load
from unclip_jax.train.log import RunLog
from unclip_jax.train.state import OptimizerConfig
from unclip_jax.types import UnclipError
from unclip_jax.weights.folder import read_manifest

NUM_TRAINED = 19


@pytest.fixture(scope='module')
def shards(tmp_path_factory) -> Path:
  """Pictures of which the last five are held out."""
  folder = tmp_path_factory.mktemp('shards')
  write_shard(folder / '0.tar', 0, 10)
  write_shard(folder / '1.tar', 10, NUM_TRAINED - 10 + 5)
  return folder


@pytest.fixture(scope='module', autouse=True)
def _few_are_held_out():
  with pytest.MonkeyPatch.context() as patch:
    for module, name in (
      (train_clip, 'NUM_RETRIEVAL'),
      (train_decoder, 'NUM_HELD_OUT'),
      (train_upsampler, 'NUM_HELD_OUT'),
    ):
      patch.setattr(module, name, 5)
    patch.setattr(train_clip, 'make_evaluation', lambda *_: measure_nothing)
    yield


@pytest.fixture(scope='module')
def whole(shards, tmp_path_factory) -> Path:
  """A run of one process on one device, without a break."""
  run = tmp_path_factory.mktemp('whole')
  train_twice(run, shards)
  return run


def test_two_processes_train_as_one(shards, whole, tmp_path):
  address, env = free_address(), environment(tmp_path / 'cache', level=0)
  started = [
    start_function(train_twice, tmp_path, shards, *by_hand(number, address), env=env)
    for number in (0, 1)
  ]
  said = [process.communicate() for process in started]
  assert [process.returncode for process in started] == [0, 0], said
  for number, (_, err) in enumerate(said):
    assert f'process {number} of 2 is ' in err
  assert 'step 4/4' in said[0][1] and 'step 4/4' not in said[1][1]
  for data in ('', 'emoji'):
    ours, wanted = losses(tmp_path / data, 'clip'), losses(whole / data, 'clip')
    assert [*ours] == [1, 2, 3, 4]
    np.testing.assert_allclose([*ours.values()], [*wanted.values()], rtol=1e-5, err_msg=data)
    assert [*read_manifest(tmp_path / data).stages] == ['clip']
  assert json.loads((tmp_path / 'clip' / 'options.json').read_text())['distributed'] is True


class Killed(Exception):
  pass


def copied(shards: Path) -> Path:
  """As many examples, which need not be the same."""
  return Path(shutil.copytree(shards, shards.parent / 'copy', dirs_exist_ok=True))


def until_killed(monkeypatch):
  """Ends a script an update after a checkpoint: it is made again."""
  write = RunLog.write

  def write_until_killed(log, step, metrics, num_examples=0):
    write(log, step, metrics, num_examples)
    if step == 3:
      raise Killed

  monkeypatch.setattr(RunLog, 'write', write_until_killed)


def test_a_killed_run_continues_at_the_exact_example(shards, whole, tmp_path, monkeypatch):
  """With workers in other processes this time."""
  arguments = [f'--run={tmp_path}', f'--shards={shards}', *SHORT]
  with monkeypatch.context() as patch:
    until_killed(patch)
    with pytest.raises(Killed):
      train_clip.main(arguments)
  state = json.loads((tmp_path / 'clip' / 'pipeline.json').read_text())
  assert state['num_examples'] == NUM_TRAINED and state['source'] == f'shards {shards}'
  train_clip.main([*arguments, '--workers=1'])
  assert losses(tmp_path, 'clip') == losses(whole, 'clip')
  file = 'clip.safetensors'
  assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()
  with pytest.raises(UnclipError, match='had batch_size 8 before and has 4 now: take what it had'):
    train_clip.main([*arguments, '--batch-size=4'])
  options = (tmp_path / 'clip' / 'options.json').read_text()
  for given, found in (
    ([a for a in arguments if 'shards' not in a] + ['--pool-size=16'], 'emoji'),
    ([a for a in arguments if 'shards' not in a] + [f'--shards={copied(shards)}'], 'shards .*copy'),
  ):
    with pytest.raises(UnclipError, match=f'was trained on shards .*, and is given {found} now'):
      train_clip.main(given)
  assert (tmp_path / 'clip' / 'options.json').read_text() == options
  (tmp_path / 'clip' / 'options.json').write_text(options[:40])  # as a killed process left it
  train_clip.main([*arguments, '--workers=1'])
  assert (tmp_path / 'clip' / 'options.json').read_text() == options
  (tmp_path / 'clip' / 'pipeline.json').unlink()
  with pytest.raises(UnclipError, match=r'has checkpoints, but no pipeline\.json that can be read'):
    train_clip.main(arguments)


@pytest.mark.parametrize('degradation', ['blur', 'bsr'])
def test_an_upsampler_learns_from_pictures_of_a_folder(degradation, tmp_path):
  folder = tmp_path / 'pictures'
  folder.mkdir()
  for i in range(14):
    side = 20 if i == 3 else 40  # which is too small for a target
    (folder / f'{i:02d}.png').write_bytes(encoded(pixels(i, side, 48)))
  run = tmp_path / 'run'
  degraded = f'--set=upsamplers.0.degradation={degradation}'
  train_upsampler.main([f'--run={run}', f'--folder={folder}', *SHORT, degraded])
  assert [*losses(run, 'upsampler_0')] == [1, 2, 3, 4]
  broken = (run / 'upsampler_0' / 'broken_0.jsonl').read_text().splitlines()
  assert [json.loads(line)['reason'] for line in broken] == ['48x20 pixels, too few']
  assert list((run / 'upsampler_0' / 'samples').glob('*.png'))


def test_a_decoder_learns_from_what_clip_sees_of_them(shards, whole, tmp_path):
  arguments = [f'--run={whole}', f'--shards={shards}', *SHORT, '--draft-steps=0']
  small = ['--set=decoder.image_size=8', '--set=upsamplers.0.low_size=8']
  small += ['--set=decoder.unet.multipliers=[1]', '--set=decoder.unet.attention_levels=[0]']
  train_decoder.main([*arguments, *small, '--set=decoder.sampling.num_steps=1'])
  assert [*losses(whole, 'decoder')] == [1, 2, 3, 4]
  model = load(whole)
  assert model.vocabulary is None  # it knows no bounds of what they show
  assert model.config.decoder.image_size == 8


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--styles=flat'], '--styles: it chooses emoji'),
    (['--workers=-1'], '--workers -1: take 0 or more'),
  ],
)
def test_what_makes_no_sense_with_pictures_is_named(arguments, message, shards, tmp_path):
  with pytest.raises(UnclipError, match=message):
    train_clip.main([f'--run={tmp_path}', f'--shards={shards}', *SHORT, *arguments])


def test_a_source_that_is_too_small_is_named(tmp_path):
  write_shard(tmp_path / '0.tar', 0, 5)
  with pytest.raises(UnclipError, match=r'5 examples, of which 5 are held out: take more'):
    train_clip.main([f'--run={tmp_path / "run"}', f'--shards={tmp_path / "0.tar"}', *SHORT])


def test_a_model_keeps_its_tokenizer_and_a_preset_takes_another(tmp_path):
  def parse(*options):
    return parse_options([f'--run={tmp_path}', '--chunk=1', *options], '', OptimizerConfig(), 1, 1)

  with pytest.raises(UnclipError, match='--tokenizer: --init default has its own'):
    parse('--init=default', '--tokenizer=clip')
  train = parse('--preset=tiny', '--tokenizer=clip')
  assert train.tokenizer.vocab_size == train.config.clip.text.vocab_size == 49408
  train.tokenizer.save(tmp_path / 'tokenizer.json')
  assert parse('--preset=tiny').tokenizer.vocab_size == 49408  # the run's own


def test_a_bad_step_on_pictures_is_kept_with_the_names_of_its_examples(tmp_path):
  """Of the updates between two lines of the log those after it are not made."""
  large = {
    f'{number:09d}.png': encoded(np.asarray(pixels(number)).repeat(2, 0).repeat(2, 1))
    for number in range(24)
  }
  shards = write_tar(tmp_path / 'large.tar', large)
  options = [*SHORT, '--chunk=4', '--set=optimizer.learning_rate=1e30']
  with pytest.raises(UnclipError, match=r'is (nan|inf) at step 1: '):
    train_upsampler.main([f'--run={tmp_path}', f'--shards={shards}', *options])
  bad_step = read_bad_step(tmp_path / 'upsampler_0' / 'bad_step_1')
  examples = bad_step.about['examples']
  assert len(examples) == 8 and all('.tar/' in example['id'] for example in examples)
  assert int(bad_step.inputs['state.step']) == 1
  metrics = bad_step.run()
  assert not np.isfinite([metrics['loss'], metrics['grad_norm']]).all()
