"""What a benchmark measures, says and refuses; no assertion on how long anything takes."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from tiny_bench import CONFIG, small_peaks
from tiny_model import load_tiny

from experiments import bench_sampling
from unclip_jax.measure import peaks, report, timing
from unclip_jax.presets import preset
from unclip_jax.systems import bench, bench_figures, bench_subject, stage_calls
from unclip_jax.systems.loading import expected_params
from unclip_jax.types import UnclipError
from unclip_jax.weights.safetensors import named_leaves


@pytest.fixture(scope='module', autouse=True)
def _small_peaks():
  with small_peaks():
    yield


@pytest.fixture(scope='module')
def results():
  options = bench_subject.Options(batch_sizes=(2,), steps=(4, 3, 2), guided=True, rounds=2)

  def measured(contenders, rounds):
    # Runs of something so small differ by more than half of its steps take.
    results, times = timing.alternate(contenders, rounds)
    if bench._SHORT in times:
      times[bench._SHORT] = [seconds / 2 for seconds in times[bench.OURS]]
    return results, times

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(bench, 'alternate', measured)
    return bench.measure(bench_subject.of_preset('tiny', CONFIG), options)


def field_names(value):
  """Of all dicts, but for those whose keys are names of stages, or of what the user chose."""
  if isinstance(value, dict):
    for key, each in value.items():
      yield key
      if key not in ('steps', 'samplers', 'versions', 'contenders', 'notes'):
        yield from field_names(each)
      elif key == 'contenders':
        for contender in each.values():
          yield from field_names(contender)
  elif isinstance(value, list):
    for each in value:
      yield from field_names(each)


def test_all_stages_and_the_whole_are_measured(results):
  stages = ['clip', 'prior', 'decoder', 'upsampler_0']
  measured = [(e['stage'], e['batch_size'], e['devices']) for e in results['stages']]
  assert measured == [(stage, 2, 1) for stage in stages]
  assert [e['batch_size'] for e in results['end_to_end']] == [2]
  assert [e['steps'] for e in results['stages']] == [None, 4, 3, 2]
  assert results['about']['guided'] == ['prior', 'decoder']
  for entry in [*results['stages'], *results['end_to_end']]:
    times = entry['seconds']
    assert len(times['values']) == 2
    assert 0 < times['least'] <= times['median'] <= times['most']
    assert entry['images_per_second'] == pytest.approx(entry['batch_size'] / times['median'])
  for entry in results['end_to_end']:
    assert entry['first_image_seconds'] > entry['seconds']['most']


@pytest.mark.cpu_program
def test_flops_of_the_programs_are_within_two_percent_of_those_counted_by_hand(results):
  counted = [e for e in results['stages'] if e['analytic_flops'] is not None]
  assert {e['stage'] for e in counted} == {'prior', 'decoder', 'upsampler_0'}
  for entry in counted:
    assert entry['matmul_flops'] == pytest.approx(entry['analytic_flops'], rel=0.02)
    assert entry['flops'] > entry['matmul_flops']


def test_a_step_of_the_prior_takes_what_more_steps_take_longer(results):
  prior = results['stages'][1]
  assert prior['step']['rows'] == 3 * 2 * 2 * 2
  assert prior['step']['seconds']['median'] == pytest.approx(prior['seconds']['median'] / 4)
  read = prior['step']['weights_bytes_per_second']
  share = read / results['peaks']['skinny_bytes_per_second']
  assert prior['step']['share_of_skinny'] == pytest.approx(share)


def test_shares_are_of_the_peaks_of_the_run(results):
  for entry in results['stages']:
    took = entry['seconds']['median']
    for amount, share, peak in (
      ('matmul_flops', 'share_of_matmul_peak', 'flops_per_second'),
      ('bytes', 'share_of_copy', 'bytes_per_second'),
    ):
      expected = entry[amount] / took / results['peaks'][peak]
      assert entry[share] == pytest.approx(expected)
  assert results['peaks']['skinny_rows'] == 3 * 2 * 2 * 2


def test_the_memory_of_a_program_holds_its_parameters(results):
  config = bench_subject.of_preset('tiny', CONFIG).config
  for entry in results['stages']:
    leaves = named_leaves(expected_params(config)[entry['stage']]).values()
    # A program without the image tower, and one that reads no temperature, leave those out.
    assert entry['program_bytes'] > 0.8 * sum(4 * leaf.size for leaf in leaves)
    assert entry['peak_bytes'] > entry['program_bytes']


def test_each_field_is_documented(results):
  names = set(field_names(results))
  assert {'compile_seconds', 'skinny_rows', 'weights_bytes_per_second'} <= names
  missing = {name for name in names if name not in bench_sampling.__doc__}
  assert not missing


def test_json_has_what_was_measured(results, tmp_path):
  report.write_json(tmp_path / 'a.json', results)
  assert json.loads((tmp_path / 'a.json').read_text()) == results


def test_text_fits_into_100_columns_and_begins_with_what_ran_where(results):
  lines = report.to_text(results).splitlines()
  assert max(map(len, lines)) <= 100
  head = '\n'.join(lines[:7])
  for what in ('tiny (random weights), float32', jax.__version__, '2 rounds', 'threads'):
    assert what in head


def test_a_busy_machine_is_told_of(results):
  texts = [
    report.to_text({**results, 'about': {**results['about'], 'load': load}}) for load in (0.1, 3.0)
  ]
  assert 'BUSY' not in texts[0] and 'the load was 3.0' in texts[1]


def test_a_plot_is_a_picture(results, tmp_path):
  report.plot(tmp_path / 'a.png', results)
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


def test_recorded_calls_are_those_of_sampling(tmp_path):
  model = load_tiny(tmp_path / 'model')
  subject = bench_subject.of_model(str(tmp_path / 'model'), 'float32')
  options = bench_subject.Options()
  calls = stage_calls.record(
    model.config, bench_subject.make_request(subject, options, 1), model.dtype, None
  )
  caption = bench_subject.CAPTION
  samples = model.sample(caption, size=model.config.decoder.image_size)
  (clip, null), (prior,) = calls['clip'], calls['prior']
  assert null.is_compiled_by(clip) and not prior.is_compiled_by(clip)
  text, null_text = (
    call.lower(model.params['clip']).compile()(model.params['clip'], *call.args.values())
    for call in (clip, null)
  )
  np.testing.assert_allclose(text.z_t, samples.z_t, rtol=1e-6)
  prior = prior._replace(args={**prior.args, 'text': text, 'null_text': null_text})
  own = model.params['prior']
  drawn = prior.lower(own).compile()(own, *prior.args.values())
  np.testing.assert_allclose(drawn.x_0, samples.z_i, rtol=1e-5, atol=1e-6)


def test_random_parameters_have_the_shapes_and_no_zeros():
  config = preset('tiny')
  made = named_leaves(stage_calls.random_params(config, 'decoder', 'bfloat16'))
  expected = named_leaves(expected_params(config, 'bfloat16')['decoder'])
  assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
    k: (v.shape, v.dtype) for k, v in expected.items()
  }
  again = named_leaves(stage_calls.random_params(config, 'decoder', 'bfloat16'))
  for name, leaf in made.items():
    assert np.count_nonzero(leaf) == leaf.size
    np.testing.assert_array_equal(leaf, again[name])
  same_shape = [a for a in made.values() if a.shape == next(iter(made.values())).shape]
  for a, b in itertools.combinations(same_shape, 2):
    assert not np.array_equal(a, b)


def test_words_of_nobody_end_as_captions_do():
  tokens = bench_subject.AnyWords(300, 12).encode(['a red apple', ''])
  np.testing.assert_array_equal(tokens.mask.sum(axis=1), [9, 2])
  for ids, mask in zip(*tokens, strict=True):
    assert list(np.flatnonzero(ids == 299)) == [mask.sum() - 1]
    assert mask[: mask.sum()].all() and ids.max() < 300


def test_contenders_take_turns():
  seen = []
  contenders = {name: lambda name=name: seen.append(name) or name for name in 'ab'}
  first, times = timing.alternate(contenders, 2)
  assert seen == list('ab' * 3) and first == {'a': 'a', 'b': 'b'}
  assert [len(values) for values in times.values()] == [2, 2]


def test_ratios_are_of_what_was_measured_together():
  found = timing.ratios([3.0, 8.0, 10.0], [1.0, 2.0, 5.0])
  assert found == timing.Spread(3.0, 2.0, 4.0, (3.0, 4.0, 2.0))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_peaks_are_of_all_that_was_asked(dtype):
  found = peaks.measure_peaks(dtype, rows=3)
  assert found.skinny_rows == 3
  assert min(found) > 0 and np.isfinite(found).all()


def test_a_run_that_was_stopped_takes_over_what_was_measured(results, monkeypatch):
  options = bench_subject.Options(
    batch_sizes=(2,), steps=(4, 3, 2), guided=True, rounds=2, stages=('clip', 'prior')
  )
  subject = bench_subject.of_preset('tiny', CONFIG)
  measured = []

  def stage(bench, name):
    measured.append(name)
    return [{**results['stages'][1], 'stage': name}]

  monkeypatch.setattr(bench._Bench, 'stage', stage)
  before = {**results, 'stages': results['stages'][:1]}
  again = bench.measure(subject, options, before=before)
  assert measured == ['prior']
  assert [entry['stage'] for entry in again['stages']] == ['clip', 'prior']
  assert again['stages'][0]['seconds'] == results['stages'][0]['seconds']
  assert again['about']['resumed'] == {'clip': results['about']['date']}
  assert f'before    clip {results["about"]["date"]}' in report.to_text(again)
  other = dataclasses.replace(options, rounds=3)
  with pytest.raises(UnclipError, match='had rounds 2, this one has 3'):
    bench.measure(subject, other, before=before)


def test_what_a_run_before_has_measured_is_kept_though_it_is_not_asked_for(results, monkeypatch):
  options = bench_subject.Options(
    batch_sizes=(2, 4), steps=(4, 3, 2), guided=True, rounds=2, stages=('prior', 'decoder')
  )
  subject, saved = bench_subject.of_preset('tiny', CONFIG), []

  def stage(bench, name):
    if name == 'decoder':
      raise KeyboardInterrupt
    return [{**results['stages'][1], 'batch_size': batch} for batch in (2, 4)]

  monkeypatch.setattr(bench._Bench, 'stage', stage)
  clip, prior, _, upsampler = results['stages']
  before = {**results, 'stages': [upsampler, clip, {**prior, 'batch_size': 8}, prior]}
  with pytest.raises(KeyboardInterrupt):
    bench.measure(subject, options, save=saved.append, before=before)
  (found,) = saved
  places = sorted((entry['stage'], entry['batch_size']) for entry in found['stages'])
  assert places == [('clip', 2), ('prior', 2), ('prior', 4), ('prior', 8), ('upsampler_0', 2)]
  assert found['end_to_end'] == results['end_to_end']
  assert found['about']['resumed'].keys() == {'clip', 'upsampler_0'}


def test_sums_are_of_one_device():
  entry = {
    'stage': 'clip',
    'batch_size': 2,
    'devices': 1,
    'steps': None,
    'compile_seconds': 1.0,
    'seconds': {'values': [2.0, 4.0]},
    'peer': {'name': 'p', 'contenders': {'eager': {'seconds': {'values': [4.0, 12.0]}}}},
  }
  alone = {**entry, 'devices': 2}
  del alone['peer']
  (found,) = bench_figures.sums([entry, alone, {**entry, 'stage': 'prior', 'steps': 3}])
  assert found['seconds']['values'] == [4.0, 8.0]
  assert found['peer']['contenders']['eager']['ratio']['values'] == [2.0, 3.0]


def test_results_of_other_shapes_are_not_compared():
  with pytest.raises(ValueError, match='the peer made'):
    bench_figures.errors(np.zeros((1, 3)), np.zeros((3, 1)))
  found = bench_figures.errors(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
  assert found == {'largest_error': 2 / 1.5, 'rms_error': 2**0.5 / 1.5}
