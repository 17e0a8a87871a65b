"""The experiment that compares samplers: it measures, continues where it stopped, and refuses."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_model import CONFIG, write_tiny_model

from experiments import sampler_tradeoff
from experiments.emoji import samplers
from unclip_jax import load
from unclip_jax.types import UnclipError
from unclip_jax.weights.folder import write_eps_power

OPTIONS = '{"styles": ["flat"], "groups": ["food-drink"], "labels": [], "jitter": 0.0}'
CAPTIONS = ['--num-captions=12', '--gallery=14']
T = CONFIG.decoder.diffusion.num_steps
# The tiny model reads twelve tokens.
pytestmark = pytest.mark.filterwarnings('ignore:the prompt .* is longer than:UserWarning')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = write_tiny_model(tmp_path_factory.mktemp('tiny') / 'model')
  (folder / 'options.json').write_text(OPTIONS)
  return folder


def run(folder, out, *options):
  sampler_tradeoff.main(
    [f'--run={folder}', f'--judge={folder}', f'--out={out}', *CAPTIONS, *options]
  )
  return json.loads(out.read_text())


def test_it_measures_what_is_missing_and_times_all(folder, tmp_path, capsys, monkeypatch):
  out, picture = tmp_path / 'a.json', tmp_path / 'a.webp'
  first = run(folder, out, '--samplers', 'ddim', '--steps', '2', '--rounds=0')
  assert first['rows'].keys() == {'ddim, strided, 2'}
  (row,) = first['rows'].values()
  assert row['evaluations'] == 2 and 'seconds' not in row and len(row['hits']) == 12
  assert row['R@1 same ground'][0] == pytest.approx(np.mean([hit == '1' for hit in row['hits']]))
  # A number that no measurement gives: what is there is not measured again.
  first['rows']['ddim, strided, 2']['background'] = [2.5, 2.5, 2.5]
  out.write_text(json.dumps(first))
  capsys.readouterr()
  words = ['--samplers', 'plms', 'ddim', '--steps', '2', '--rounds=1', f'--picture={picture}']
  second = run(folder, out, *words)
  assert list(second['rows']) == ['ddim, strided, 2', 'plms, strided, 2']
  assert second['rows']['ddim, strided, 2']['background'] == [2.5, 2.5, 2.5]
  assert second['rows']['plms, strided, 2']['evaluations'] == 3
  for row in second['rows'].values():
    median, least, most = row['seconds']
    assert 0 < least <= median <= most
  table = capsys.readouterr().out
  assert '| ddim, strided, 2 | ' in table and '2.5000 [2.5000, 2.5000]' in table
  with Image.open(picture) as image:
    assert image.format == 'WEBP' and np.asarray(image).std() > 5
  # Nothing is missing: no model is needed.
  monkeypatch.setattr(sampler_tradeoff.unclip_jax, 'load', None)
  assert run(folder, out, *words) == second


def test_its_pictures_are_those_of_the_model(folder):
  """Step by step from the host, with the settings of `Unclip.sample` and the same noise."""
  model = load(folder)
  captions = ['a red apple, flat style', 'two cats beside a tree']
  subject = samplers.Subject(model, captions, 3)
  plan, sampler = subject.resolve('unipc, trailing, 3')
  drawn = subject.draw(np.arange(2), plan, sampler)
  asked = samplers.Sampling(num_steps=3, sampler='unipc', spacing='trailing')
  whole = model.sample(captions, 3, decoder=asked, size=16).images
  assert np.abs(drawn.astype(int) - whole).max() <= 1 and whole.std() > 5


def test_the_distance_is_none_for_the_real_pictures():
  class Real:
    """A bench whose judge sees the mean colours of a picture's quarters."""

    def __init__(self, n):
      self.images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)
      self.sprites = self.asked = None

    def judge_images(self, images):
      return images.reshape(len(images), 2, 4, 2, 4, 3).mean(axis=(2, 4, 5)).reshape(-1, 4)

  real = Real(60)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(samplers.held_out, 'real_pictures', lambda *_: real.images)
    same, low, high = samplers.distance(real, real.images)
    assert same == pytest.approx(0, abs=1e-6) and low == 0 and high < 1e-3
    shifted = np.clip(real.images.astype(int) + 20, 0, 255).astype(np.uint8)
    far, low, high = samplers.distance(real, shifted)
    assert 0 < low < far < high


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--num-captions=11'], '--num-captions 11: take 12'),
    (['--num-captions=20'], '--num-captions 20: take 12 to the 14'),
    (['--rounds=-1'], '--rounds'),
    (['--samplers', 'euler'], 'euler'),
    (['--spacings', 'fast27', '--steps', '4'], 'fast27 has 27 steps'),
    (['--steps', '0'], 'steps'),
    (['--steps', str(T + 1)], f'at most {T}'),
    (['--samplers', 'analytic', '--steps', '2'], 'analytic needs statistics'),
  ],
)
def test_what_makes_no_sense_is_said_before_anything_is_measured(
  folder, tmp_path, options, message
):
  with pytest.raises(UnclipError, match=message):
    run(folder, tmp_path / 'a.json', *options)
  assert not (tmp_path / 'a.json').exists()


def test_what_was_measured_of_something_else_is_left_alone(folder, tmp_path):
  out = tmp_path / 'a.json'
  before = json.dumps({'about': {'run': 'other'}, 'rows': {}})
  for text, message in ((before, 'measured with run other'), ('{"rows"', 'is damaged')):
    out.write_text(text)
    with pytest.raises(UnclipError, match=message):
      run(folder, out)
    assert out.read_text() == text


def test_analytic_is_measured_where_there_are_statistics(tmp_path):
  model = write_tiny_model(tmp_path / 'model')
  write_eps_power(model, {'decoder': np.full(T, 0.5, 'f')})
  plan, _ = samplers.resolve(load(model), 'analytic, strided, 4')
  np.testing.assert_array_equal(plan.eps_power, 0.5)
