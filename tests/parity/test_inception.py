"""The Inception of FID against its twin in torch, from its file to its features."""

import copy
import functools

import jax
import numpy as np
import pytest
import torch
import twins
from etils import epath
from inception_twin import OF_TORCHVISION, Twin
from PIL import Image

from unclip_jax.nn.inception import Inception
from unclip_jax.stages import inception
from unclip_jax.weights.inception import read_inception, rules
from unclip_jax.weights.safetensors import named_leaves

SHRINK = 16
TOLERANCE = 1e-5


@functools.cache
def expected_shapes(shrink):
  return jax.eval_shape(functools.partial(inception.init, shrink=shrink), jax.random.key(0))


def make_images(n, size, seed):
  """uint8, of one colour and noise, or the features of such images are all alike."""
  draw = np.random.default_rng(seed)
  noise = draw.uniform(0, 255, (n, size, size, 3))
  return np.uint8(0.4 * noise + 0.6 * draw.uniform(0, 255, (n, 1, 1, 3)))


def to_torch(images):
  """[b, 3, h, w] in [-1, 1]."""
  return torch.from_numpy(np.moveaxis(np.float32(images) / 127.5 - 1, -1, 1).copy())


@functools.cache
def make_twin(size=97):
  """For images of about this size: the last grid is 1 x 1 of 97 pixels, 2 x 2 of 107."""
  return Twin(SHRINK).randomise(to_torch(make_images(16, size, 1)), seed=0)


@functools.partial(jax.jit, static_argnums=0)
def run_ours(shrink, params, images):
  return Inception(shrink).apply({'params': params}, images)


def test_features_are_those_of_the_twin_and_not_those_of_another_pooling():
  twin, images = make_twin(107), make_images(3, 107, 2)
  x = np.float32(images) / 127.5 - 1
  exact = copy.deepcopy(twin).double()(to_torch(images).double())
  assert exact.std(dim=0).mean() > 0.03  # images of a batch differ
  shapes = expected_shapes(SHRINK)
  params = twins.convert(twin.tensors(), rules(shapes), shapes)
  found = run_ours(SHRINK, params, x)
  unit = exact.std()  # of random weights it is anything

  def error(features, of=exact):
    return twins.deviation(np.asarray(features, np.float64) / unit.item(), of / unit)

  ours, own = error(found), error(twin(to_torch(images)))
  print(f'{ours:.1e}, float32 of torch {own:.1e}')
  # 94 normalised layers of random weights enlarge what float32 rounds, there as here.
  assert ours < max(TOLERANCE, 3 * own) < 1e-3
  other = Twin(SHRINK, OF_TORCHVISION)
  other.load_state_dict(twin.state_dict())
  another = other.eval().requires_grad_(False)(to_torch(images))
  assert error(found, of=another) > 0.01


def test_every_tensor_matters():
  twin, images = make_twin(), make_images(2, 81, 3)
  shapes, x = expected_shapes(SHRINK), np.float32(images) / 127.5 - 1
  ours = rules(shapes)

  def run(tensors):
    # What changes a variance must leave it one.
    tensors = {k: np.abs(v) if k.endswith('running_var') else v for k, v in tensors.items()}
    return [run_ours(SHRINK, twins.lay_out(tensors, ours, shapes), x)]

  expected = [twin(to_torch(images))]
  twins.check_each_tensor_matters(twin.tensors(), run, expected, TOLERANCE)


@pytest.mark.parametrize('is_zip', [True, False])
def test_the_file_that_pytorch_fid_downloads_is_read(tmp_path, is_zip):
  twin, path = make_twin(), epath.Path(tmp_path / 'pt_inception.pth')
  torch.save(twin.state_dict(), path, _use_new_zipfile_serialization=is_zip)
  shapes = expected_shapes(SHRINK)
  params = named_leaves(read_inception(path, shapes))
  wanted = named_leaves(twins.lay_out(twin.tensors(), rules(shapes), shapes))
  assert params.keys() == wanted.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(params[name], array, name)


def test_the_published_network_has_the_shapes_of_ours():
  with torch.device('meta'):
    theirs = {k: tuple(v.shape) for k, v in Twin(1).state_dict().items()}
  shapes = expected_shapes(1)
  named = named_leaves(shapes)
  ours = {}
  for rule in rules(shapes):
    (name,), (source,) = rule.ours, rule.theirs
    shape = named[name].shape
    ours[source] = tuple(shape[i] for i in (3, 2, 0, 1)) if len(shape) == 4 else shape
  counted = {name for name in theirs if name.startswith('fc.') or name.endswith('_tracked')}
  assert ours == {name: theirs[name] for name in theirs.keys() - counted}
  # As Keras counts its own without a classifier: 21,768,352, which has no scales in its norms.
  learned = [s for name, s in ours.items() if 'running' not in name]
  assert sum(np.prod(s, dtype=int) for s in learned) == 21_768_352 + 17_216


@pytest.mark.parametrize(('height', 'width'), [(64, 51), (400, 317), (299, 299)])
def test_pictures_are_prepared_as_by_each_program(height, width):
  images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
  size = inception.SIZE
  made = {
    name: np.asarray(inception.prepare(images, how)) for name, how in inception.PREPARATIONS.items()
  }
  x = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).float() / 255
  resized = torch.nn.functional.interpolate(x, (size, size), mode='bilinear', align_corners=False)
  centred = np.moveaxis((2 * resized - 1).numpy(), 1, -1)
  # Torch has the places of pixels in float32, which may be off by 3e-5 of a pixel.
  np.testing.assert_allclose(made['pytorch-fid'], centred, atol=1e-4)

  def row(values, length):
    """A row of pixels as TensorFlow 1 resized it, one pixel after the other."""
    found = []
    for i in range(size):
      place = i * length / size
      low = int(place)
      high = min(low + 1, length - 1)
      found.append(values[low] + (place - low) * (values[high] - values[low]))
    return np.stack(found)

  cornered = row(np.moveaxis(row(images[0].astype('d'), height), 1, 0), width)
  cornered = (np.moveaxis(cornered, 1, 0) - 128) / 128
  np.testing.assert_allclose(made['torch-fidelity'][0], cornered, atol=2e-5)

  def cubic(channel):
    picture = Image.fromarray(channel.astype(np.float32))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))

  clean = np.stack([cubic(images[1, ..., c]) for c in range(3)], axis=-1)
  np.testing.assert_allclose(made['clean-fid'][1], (clean - 128) / 128, atol=2e-4)
