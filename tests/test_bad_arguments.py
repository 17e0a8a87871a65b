"""Arguments of the Python API that cannot be, and what interrupts the command line."""

import contextlib
import signal
from pathlib import Path

import numpy as np
import pytest
from tiny_model import TEXTS, load_tiny, write_tiny_model

import unclip_jax
from unclip_jax import Sampling, StartNoise, UnclipError
from unclip_jax.cli import main
from unclip_jax.systems.samples import Progress

APPLE = TEXTS[0]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return load_tiny(tmp_path_factory.mktemp('model'))


@pytest.mark.parametrize(
  ('arguments', 'match'),
  [
    ({'decoder': None}, 'decoder: give a Sampling, not NoneType'),
    ({'prior': {'num_steps': 2}}, 'prior: give a Sampling, not dict'),
    ({'upsampler': 5}, 'upsampler: give a Sampling, not int'),
    ({'decoder': Sampling(num_steps=True)}, 'decoder: .*whole number, not True'),
    ({'decoder': Sampling(guidance_scale='3')}, "guidance scale must be a number, not '3'"),
    ({'decoder': Sampling(sampler='ddim', eta=True)}, 'eta must be a number, not True'),
    ({'decoder': Sampling(guidance_scale=1e39)}, r'guidance scale is 1e\+39: take a finite'),
    ({'upsampler': Sampling(0), 'size': 16}, 'upsampler 0: .*0 is too few'),
    ({'start_noise': np.zeros((1, 16, 16, 3))}, 'start_noise must be a StartNoise'),
    ({'start_noise': StartNoise(upsamplers=None)}, 'with a tuple for the upsamplers'),
    ({'z_i': [[1.0, 2.0], [3.0]]}, 'z_i must be an array'),
    ({'z_i': np.full((1, 16), 1e300)}, 'z_i must hold finite'),
    ({'progress': 5}, 'progress must be a function, not 5'),
    ({'on_batch': 'save'}, "on_batch must be a function, not 'save'"),
    ({'revise': 5}, 'revise must be a function, not 5'),
    ({'num_images': 10_001}, '10,001 pictures are more than the 10,000 of one call'),
    ({'size': 16.0}, r'no size 16\.0'),
    ({'size': '16'}, "no size '16'"),
  ],
)
def test_an_argument_that_cannot_be_is_named(model, arguments, match):
  with pytest.raises(UnclipError, match=match):
    model.sample(APPLE, 7, **arguments)


@pytest.mark.parametrize(
  ('images', 'match'),
  [
    ([[1.0], [2.0, 3.0]], 'images must be an array'),
    (np.full((1, 16, 16, 3), np.nan), r'\[-1, 1\], without a NaN'),
    (np.full((1, 16, 16, 3), 200.0), '0 to 255 is for uint8'),
  ],
)
def test_images_that_clip_cannot_see_are_refused(model, images, match):
  with pytest.raises(UnclipError, match=match):
    model.encode_image(images)


def test_numbers_of_numpy_are_numbers(model):
  steps = Sampling(num_steps=np.int64(2))
  args = {'size': np.int64(16), 'decoder': steps}
  images = model.generate(APPLE, np.uint32(7), np.int64(2), **args)
  assert images.shape == (2, 16, 16, 3)
  last = model.sample(APPLE, 7, first_image=np.uint32(2**32 - 1), **args)
  assert last.indices.tolist() == [2**32 - 1]


def test_a_model_says_in_a_line_what_it_is(model):
  assert repr(model) == 'Unclip(clip, prior, decoder, upsampler_0; 16 or 32 px, float32)'


@pytest.mark.parametrize('option', ['--out', '--model'])
def test_a_store_that_cannot_be_reached_is_one_line(capsys, tmp_path, option):
  """No protocol of that name is installed anywhere."""
  folder = write_tiny_model(tmp_path / 'model')
  args = {'--model': folder, '--out': tmp_path / 'out', option: 'nowhere://bucket/folder'}
  with pytest.raises(SystemExit) as stop:
    main(['generate', APPLE, *(str(part) for pair in args.items() for part in pair)])
  assert stop.value.code == 1
  line = capsys.readouterr().err
  assert line.count('\n') == 1 and 'nowhere://bucket/folder' in line


def test_a_folder_without_a_name_is_refused(capsys):
  with pytest.raises(SystemExit):
    main(['generate', APPLE, '--out', ''])
  assert 'the output folder has no name' in capsys.readouterr().err
  assert not Path('grid.png').exists()


def test_an_interrupt_that_something_swallows_still_ends_the_command(tmp_path, monkeypatch, model):
  class Swallowing:
    config = model.config

    def sample(self, *args, progress, **options):
      with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
      progress(Progress('clip', 'preparing', 0, 1))
      raise AssertionError('went on after Ctrl-C')

  monkeypatch.setattr(unclip_jax, 'load', lambda *args: Swallowing())
  before = signal.getsignal(signal.SIGINT)
  with pytest.raises(SystemExit) as stop:
    main(['generate', APPLE, '--out', str(tmp_path / 'out'), '--no-cache'])
  assert stop.value.code == 130
  assert not (tmp_path / 'out').exists()
  assert signal.getsignal(signal.SIGINT) is before
