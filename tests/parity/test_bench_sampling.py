"""The benchmark against diffusers: that both sides do the same, at the smallest size of a Karlo."""

import json

import numpy as np
import pytest
import torch

from experiments import bench_sampling, karlo_peer
from unclip_jax.measure import peaks
from unclip_jax.systems import bench_subject
from unclip_jax.weights.rules import write_tensors

TINY = ['--preset', 'tiny-karlo', '--peer', 'diffusers', '--threads', '1', '--rounds', '2']
TOLERANCE = 1e-4


@pytest.fixture(scope='module', autouse=True)
def _small_peaks():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(peaks, '_SIDE', {'cpu': 64})
    patch.setattr(peaks, '_BYTES', {'cpu': 2**16})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(path, *args):
  bench_sampling.main([*TINY, '--json', str(path), *args])
  return json.loads(path.read_text())


def peers(results):
  return {entry['stage']: entry['peer'] for entry in results['stages']}


def test_all_stages_of_both_sides_give_the_same(tmp_path, capsys):
  results = run(tmp_path / 'a.json', '--no-compile', '--steps', '4', '3', '3')
  found = peers(results)
  assert list(found) == ['clip', 'prior', 'decoder', 'upsampler_0']
  for stage, peer in found.items():
    (contender,) = peer['contenders'].values()
    assert contender['rms_error'] <= contender['largest_error'] < TOLERANCE, stage
    assert len(contender['ratio']['values']) == 2
  for stage in ('decoder', 'upsampler_0'):
    assert found[stage]['notes']['memory_format'] in karlo_peer.FORMATS
  (whole,) = results['end_to_end']
  own = [entry['seconds']['values'] for entry in results['stages']]
  assert whole['sum_of_stages']
  np.testing.assert_allclose(whole['seconds']['values'], np.sum(own, axis=0))
  theirs = [peer['contenders']['eager']['seconds']['values'] for peer in found.values()]
  ratio = whole['peer']['contenders']['eager']['ratio']
  np.testing.assert_allclose(ratio['values'], np.sum(theirs, axis=0) / np.sum(own, axis=0))
  assert set(results['about']['peer']['versions']) == {'torch', 'diffusers', 'transformers'}
  for name in ('largest_error', 'rms_error', 'sum_of_stages', 'contenders', 'notes', 'ratio'):
    assert name in bench_sampling.__doc__
  text = capsys.readouterr().out
  assert max(map(len, text.splitlines())) <= 100
  assert f'torch {torch.__version__}' in text and 'max error' in text


def test_unguided_batches_agree_and_a_compiled_peer_is_one_more(tmp_path, monkeypatch):
  compiled = []
  monkeypatch.setattr(torch, 'compile', lambda module, **_: compiled.append(module) or module)
  args = ('--unguided', '--stages', 'prior', 'decoder', '--batch-sizes', '3', '--steps', *'222')
  for stage, peer in peers(run(tmp_path / 'a.json', *args)).items():
    assert list(peer['contenders']) == ['eager', 'compiled'], stage
    for contender in peer['contenders'].values():
      assert contender['largest_error'] < TOLERANCE
    assert 'the first run took' in peer['notes']['torch.compile']
  assert len(compiled) == 3  # the decoder has two networks


def test_a_peer_that_cannot_be_compiled_is_said_to_be(tmp_path, monkeypatch, capsys):
  def fail(module, **_):
    def run(*args, **kwargs):
      raise RuntimeError('no compiler\nand more')

    return run

  monkeypatch.setattr(torch, 'compile', fail)
  (peer,) = peers(run(tmp_path / 'a.json', '--stages', 'clip')).values()
  assert list(peer['contenders']) == ['eager']
  assert 'clip: torch.compile does not work here: no compiler\n' in capsys.readouterr().out


def test_another_weight_is_noticed(tmp_path, monkeypatch):
  def written(params, rules):
    tensors = write_tensors(params, rules)
    name = next(name for name in tensors if name.endswith('proj_in.weight'))
    tensors[name] = tensors[name] * 2
    return tensors

  monkeypatch.setattr(karlo_peer, 'write_tensors', written)
  (peer,) = peers(run(tmp_path / 'a.json', '--no-compile', '--stages', 'prior')).values()
  assert peer['contenders']['eager']['largest_error'] > 100 * TOLERANCE


def test_a_network_holds_our_parameters_and_none_of_its_own():
  config = bench_subject.of_preset('', bench_sampling.TINY_KARLO_CONFIG).config
  params = bench_subject.of_preset('', config).read('decoder', 'float32')
  peer = karlo_peer.Karlo(try_compile=False, num_threads=1)
  stage = peer.open(config, 'decoder', params, 'bfloat16')
  for module in stage.modules.values():
    for parameter in module.parameters():
      assert parameter.dtype == torch.bfloat16 and not parameter.is_meta
      assert parameter.count_nonzero() == parameter.numel()


@pytest.mark.parametrize(
  ('args', 'said'),
  [
    (['--sampler', 'ddim'], 'its prior is sampled by ddpm, not ddim'),
    (['--steps', '3', '1', '3'], 'its decoder takes 2 steps or more, not 1'),
    (['--stages', 'end_to_end'], "no stage 'end_to_end' here: take clip"),
    (['--preset', 'tiny'], 'decoder.text is set'),
    (['--preset', 'emoji'], 'this model cannot be written as UnCLIPPipeline'),
  ],
)
def test_what_the_peer_cannot_do_is_said_before(args, said):
  with pytest.raises(SystemExit, match=said):
    bench_sampling.main([*TINY, *args])


def test_a_device_that_torch_has_not_is_named(monkeypatch):
  for backend, said in (('tpu', "no device 'tpu'"), ('gpu', 'torch sees no GPU')):
    monkeypatch.setattr(karlo_peer.jax, 'default_backend', lambda backend=backend: backend)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match=said):
      bench_sampling.main(TINY)
