"""Pictures of any mode and shape, against arithmetic on the pixels that were put into them."""

import numpy as np
import pytest
from made_pictures import encoded, pixels
from PIL import Image

from unclip_jax.data.degradations import bsr_degrade
from unclip_jax.data.examples import BrokenExample
from unclip_jax.data.pictures import PictureConfig, make_picture
from unclip_jax.types import UnclipError


def made(content, config, seed=0):
  return make_picture(content, 'it', config, np.random.default_rng(seed)).image


def whole(content, size=24):
  """A square picture of the right size as it is."""
  return made(content, PictureConfig(size))


def test_a_picture_of_the_right_size_is_not_resampled():
  image = pixels(0)
  np.testing.assert_array_equal(whole(encoded(image)), image)
  np.testing.assert_array_equal(whole(image), image)
  wide = pixels(1, 24, 41)
  np.testing.assert_array_equal(whole(encoded(wide)), wide[:, 8:32])
  np.testing.assert_array_equal(whole(wide.transpose(1, 0, 2).copy()), wide[:, 8:32].swapaxes(0, 1))


def test_modes():
  image, grey = pixels(0), pixels(1)[..., 0]
  three = np.repeat(grey[..., None], 3, axis=2)
  np.testing.assert_array_equal(whole(encoded(grey)), three)
  np.testing.assert_array_equal(whole(grey[..., None]), three)
  deep = np.uint16(grey.astype(int) * 257)
  np.testing.assert_array_equal(whole(encoded(deep)), three)
  alpha = pixels(2)[..., :1]
  on_white = image * (alpha / 255) + 255 * (1 - alpha / 255)
  rgba = whole(encoded(np.concatenate([image, alpha], axis=2)))
  assert np.abs(rgba - on_white).max() <= 1
  palette = Image.fromarray(image).quantize(16)
  colours = np.array(palette.getpalette()).reshape(-1, 3)
  expected = colours[np.asarray(palette)]
  np.testing.assert_array_equal(whole(encoded(palette)), expected)
  expected[np.asarray(palette) == 3] = 255
  np.testing.assert_array_equal(whole(encoded(palette, transparency=3)), expected)
  bits = Image.fromarray(grey > 127)
  np.testing.assert_array_equal(whole(encoded(bits)), np.where(three > 127, 255, 0))


def test_cmyk():
  """Inks take light away, and black of all."""
  inks = np.full((24, 24, 4), (255, 0, 128, 0), np.uint8)
  inks[12:] = (0, 255, 0, 64)
  image = Image.frombytes('CMYK', (24, 24), inks.tobytes())
  result = whole(encoded(image, 'JPEG', quality=95)).astype(int)
  assert np.abs(result[4] - (0, 255, 127)).max() < 8
  assert np.abs(result[20] - (191, 0, 191)).max() < 8


@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(orientation):
  """What the EXIF numbers mean, spelled out: how rows and columns of the file are shown."""
  image = pixels(0)
  exif = Image.Exif()
  exif[0x0112] = orientation
  turned = {
    1: image,
    2: image[:, ::-1],
    3: image[::-1, ::-1],
    4: image[::-1],
    5: image.swapaxes(0, 1),
    6: image.swapaxes(0, 1)[:, ::-1],
    7: image.swapaxes(0, 1)[::-1, ::-1],
    8: image.swapaxes(0, 1)[::-1],
  }[orientation]
  np.testing.assert_array_equal(whole(encoded(image, exif=exif)), turned)


def test_area_is_the_mean_of_what_a_pixel_covers():
  image = pixels(0, 24, 48)
  blocks = image[:, 12:36].reshape(6, 4, 6, 4, 3).astype(float).mean(axis=(1, 3))
  assert np.abs(made(image, PictureConfig(6)) - blocks).max() <= 1


def test_aspect_is_kept():
  """A disc in a picture of any shape stays round, and in the middle."""
  for height, width in ((40, 90), (90, 40), (61, 61)):
    y, x = np.mgrid[:height, :width]
    radius = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2)
    disc = np.repeat(np.uint8(255 * (radius < 15))[..., None], 3, axis=2)
    for kernel in ('area', 'bilinear', 'bicubic', 'lanczos'):
      image = made(disc, PictureConfig(20, kernel=kernel))[..., 0] / 255
      rows, columns = image.sum(axis=1), image.sum(axis=0)
      scale = 20 / min(height, width)
      assert abs(image.sum() - np.pi * (15 * scale) ** 2) < 0.1 * image.sum()
      assert abs((rows * np.arange(20)).sum() / rows.sum() - 9.5) < 0.6
      assert abs((columns * np.arange(20)).sum() / columns.sum() - 9.5) < 0.6
      np.testing.assert_allclose(rows.max(), columns.max(), atol=1)


def test_crops():
  image = pixels(0, 24, 48)
  np.testing.assert_array_equal(made(image, PictureConfig(24, crop=8)), image[8:16, 20:28])
  config = PictureConfig(24, crop=8, random_crop=True)
  places = set()
  for seed in range(40):
    crop = made(image, config, seed)
    found = [
      (top, left)
      for top in range(17)
      for left in range(41)
      if (image[top : top + 8, left : left + 8] == crop).all()
    ]
    assert len(found) == 1
    places.add(found[0])
    np.testing.assert_array_equal(made(image, config, seed), crop)
  assert len(places) > 30
  tops, lefts = zip(*places, strict=True)
  assert min(tops) < 3 and max(tops) > 13 and min(lefts) < 5 and max(lefts) > 35


def test_a_jpeg_decoded_at_a_fraction_of_its_size_looks_the_same():
  """Structure of the size of the result's pixels: noise of 8 x 8 blocks."""
  coarse = np.random.default_rng(0).integers(64, 192, (40, 60, 3), dtype=np.uint8)
  large = Image.fromarray(coarse).resize((60 * 16, 40 * 16), Image.Resampling.BICUBIC)
  jpeg = encoded(large, 'JPEG', quality=95)
  full = np.asarray(large)[:, 160:800].reshape(20, 32, 20, 32, 3).astype(float).mean(axis=(1, 3))
  result = made(jpeg, PictureConfig(20))
  assert np.abs(result - full).mean() < 1.5


def test_degradation_is_of_the_crop():
  image = pixels(0, 40, 40)
  config = PictureConfig(40, crop=16, random_crop=True, bsr_factor=4)
  picture = make_picture(image, 'it', config, np.random.default_rng(3))
  assert picture.image.shape == (16, 16, 3) and picture.low.shape == (4, 4, 3)
  again = make_picture(image, 'it', config, np.random.default_rng(3))
  np.testing.assert_array_equal(picture.low, again.low)
  rng = np.random.default_rng(3)
  rng.integers(25), rng.integers(25)
  seed = int(rng.integers(2**63))
  np.testing.assert_array_equal(picture.low, bsr_degrade(picture.image, 4, seed))


@pytest.mark.parametrize('content', [b'', b'not a picture', encoded(pixels(0))[:200]])
def test_what_cannot_be_decoded_is_broken(content):
  with pytest.raises(BrokenExample, match='it: not a picture that can be read') as error:
    whole(content)
  assert '\n' not in str(error.value) and ' at 0x' not in str(error.value)


def test_sixteen_bits_are_sixteen_however_dark():
  dark = encoded(Image.fromarray(np.full((24, 24), 200, np.uint16)))
  assert (whole(dark) == 1).all()


def test_sizes_that_are_broken(monkeypatch):
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 24 * 24 - 1)
  monkeypatch.setattr(Image, '_decompression_bomb_check', lambda size: None)
  with pytest.raises(BrokenExample, match='24x24 pixels, more than Pillow takes for safe'):
    whole(encoded(pixels(0)))
  config = PictureConfig(32, least_side=25)
  with pytest.raises(BrokenExample, match='24x30 pixels, too few'):
    made(pixels(0, 30, 24), config)
  with pytest.raises(BrokenExample, match=r'float64\[4, 4, 3\] is not uint8'):
    whole(np.zeros((4, 4, 3)))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'size': 0}, 'size 0'),
    ({'size': 8, 'crop': 9}, 'crop 9: choose 1 to 8'),
    ({'size': 8, 'kernel': 'box'}, "kernel 'box': choose one of area"),
    ({'size': 8, 'least_side': 9}, 'least_side 9: choose 1 to 8'),
    ({'size': 10, 'bsr_factor': 4}, 'bsr_factor 4: choose one that divides pictures of 10'),
  ],
)
def test_configs_that_are_refused(fields, message):
  with pytest.raises(UnclipError, match=message):
    PictureConfig(**fields)
