"""The upsampler that learns from degraded crops (BSR): its data, its training and its measures."""

import csv
import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_model import CONFIG, TEXTS, write_tiny_model

import unclip_jax
from experiments.emoji import common, evaluate_upsampler, train_upsampler
from experiments.emoji.compose import SHIPPED
from experiments.emoji.enlarge import psnr
from experiments.emoji.pool import captioned_emoji, make_crops
from unclip_jax.config_json import override, to_json
from unclip_jax.data.pictures import PictureConfig, make_picture
from unclip_jax.presets import preset
from unclip_jax.stages import common as stage_common
from unclip_jax.stages import upsampler
from unclip_jax.types import UnclipError
from unclip_jax.weights.folder import read_manifest

# As 32 -> 128 -> 1024, at sizes that the emoji of the repository have.
FIRST = preset('tiny').upsamplers[0]
UNET = dataclasses.replace(FIRST.unet, multipliers=(1,))
FIRST = dataclasses.replace(FIRST, low_size=4, image_size=8, unet=UNET)
SECOND = dataclasses.replace(
  preset('emoji_small').upsamplers[1],
  low_size=8,
  image_size=64,
  crop_fraction=0.5,
  unet=dataclasses.replace(UNET, patch_size=4),
)
TINY = [
  '--preset=tiny',
  '--set=decoder.image_size=4',
  f'--set=upsamplers={json.dumps([to_json(FIRST), to_json(SECOND)])}',
  '--set=default_size=8',
  '--set=optimizer.warmup_steps=2',
  '--stage=1',
  '--styles=flat',
  '--groups=food-drink',
  '--pool-size=20',
  '--batch-size=4',
  '--chunk=1',
  '--save-every=2',
]
CUT = PictureConfig(64, crop=32, random_crop=True, bsr_factor=8)


class Examples:
  """Composed examples, counted as they are composed."""

  def __init__(self, num):
    self.source, self.composed = captioned_emoji(64, num, seed=0), []

  def __len__(self):
    return len(self.source)

  def __getitem__(self, index):
    self.composed.append(index)
    return self.source[index]


def test_crops_are_cut_and_degraded_one_picture_at_a_time():
  examples = Examples(3)
  crops = make_crops(examples, 7, CUT, seed=5)
  assert crops.images.shape == (7, 32, 32, 3) and crops.low.shape == (7, 4, 4, 3)
  assert examples.composed == [0, 1, 2]
  for i, place in enumerate((0, 0, 0, 1, 1, 1, 2)):
    image = examples.source[place].image
    assert crops.captions[i] == examples.source[place].caption
    found = make_picture(image, '', CUT, np.random.default_rng((5, i)))
    np.testing.assert_array_equal(crops.images[i], found.image)
    # Of the crop: what lies beside it leaves no trace.
    np.testing.assert_array_equal(crops.low[i], found.low)
    whole = np.lib.stride_tricks.sliding_window_view(image, (32, 32, 3))
    assert (whole == crops.images[i]).all(axis=(3, 4, 5)).any()


def test_crops_depend_on_their_seed_and_index_alone():
  source = captioned_emoji(64, 4, seed=0)
  some, more = (make_crops(source, num, CUT, seed=5) for num in (4, 4))
  np.testing.assert_array_equal(some.low, more.low)
  other = make_crops(source, 4, CUT, seed=6)
  assert (some.images != other.images).any() and (some.low != other.low).any()


def test_an_untrained_residual_is_the_enlarged_picture():
  """The last convolution is zero at first; what is not residual begins with nothing."""
  draw = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
  config = dataclasses.replace(SECOND, keep_low=0)
  assert config.residual
  params = upsampler.init(config, jax.random.key(0))
  smooth = np.asarray(upsampler.upscale(draw, 64))
  for is_residual in (True, False):
    config = dataclasses.replace(config, residual=is_residual)
    plan = stage_common.make_plan(config.diffusion, config.sampling)
    keys = jax.random.split(jax.random.key(1), 2)
    sampler = stage_common.make_sampler('ddim', 'fixed_small', 0.0)
    sample = jax.jit(lambda *args: upsampler.sample(config, *args, plan, sampler)[0])  # noqa: B023
    drawn = sample(params, draw, keys)
    expected = np.clip(smooth, -1, 1) if is_residual else 0 * smooth
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    _, metrics = upsampler.loss(config, params, 0 * smooth, draw, jax.random.key(2))
    wanted = np.mean(smooth**2) if is_residual else 0
    assert float(metrics['mse']) == pytest.approx(wanted, rel=1e-5, abs=1e-9)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run whose second upsampler was trained, and no other stage."""
  folder = tmp_path_factory.mktemp('run')
  train_upsampler.main([f'--run={folder}', '--steps=4', *TINY])
  return folder


def test_the_second_upsampler_trains_alone(run):
  manifest = read_manifest(run)
  assert set(manifest.stages) == {'upsampler_1'}
  with (run / 'upsampler_1' / 'metrics.csv').open() as file:
    losses = [float(row['loss']) for row in csv.DictReader(file) if row['loss']]
  assert len(losses) == 4 and np.isfinite(losses).all()
  path = max((run / 'upsampler_1' / 'samples').glob('bicubic_ours_real_*.png'))
  with Image.open(path) as sheet:
    # Crops of eight pictures, within gaps of four pixels.
    assert sheet.size == (8 * 36 + 4, 3 * 36 + 4)
  assert unclip_jax.load(run).config.default_size == 8


def test_it_continues_where_it_was_stopped(run, tmp_path, monkeypatch):
  arguments = [f'--run={tmp_path}', '--steps=4', *TINY]
  with monkeypatch.context() as patch:
    checks = iter([False, False, True])
    patch.setattr(common, 'deadline', lambda minutes: lambda: next(checks))
    train_upsampler.main(arguments)
  name = 'upsampler_1.safetensors'
  assert (tmp_path / name).read_bytes() != (run / name).read_bytes()
  train_upsampler.main(arguments)
  assert (tmp_path / name).read_bytes() == (run / name).read_bytes()


def test_it_is_measured_on_what_it_never_saw(tmp_path, capsys, monkeypatch):
  config = override(CONFIG, ['decoder.image_size=4'])
  config = dataclasses.replace(config, upsamplers=(FIRST, SECOND), default_size=8)
  folder = write_tiny_model(tmp_path / 'model', config)
  monkeypatch.setattr(evaluate_upsampler, 'PROMPTS', TEXTS[:2] * 2)
  arguments = [f'--run={folder}', f'--images={tmp_path / "images"}', f'--data={SHIPPED}']
  evaluate_upsampler.main([*arguments, '--pictures=4'])
  lines = [line.split('|')[1:-1] for line in capsys.readouterr().out.splitlines() if '|' in line]
  rows = {(split.strip(), kind.strip()): figures for split, kind, *figures in lines[2:]}
  assert len(rows) == 4
  for split in ('val_pairs', 'val_concepts'):
    clean, degraded = (
      [float(figure.split()[0]) for figure in rows[split, kind]] for kind in ('clean', 'degraded')
    )
    assert clean[0] > degraded[0] > 8  # bicubic
    for bicubic, ours, gain in (clean, degraded):
      assert ours < bicubic - 1  # its weights are random
      assert gain == pytest.approx(ours - bicubic, abs=0.011)
  with Image.open(tmp_path / 'images' / 'upsampled.webp') as sheet:
    assert sheet.size == (5 * 68 + 4, 4 * 68 + 4)
  with pytest.raises(UnclipError, match=r'--stage 2: the model has clip, .*upsampler_1'):
    evaluate_upsampler.main([*arguments, '--stage=2'])


def test_pictures_are_as_near_as_their_error_says():
  black = np.zeros((1, 2, 2, 3), np.uint8)
  assert psnr(black, black + 255) == 0
  two = np.concatenate([black + 255, black + 5])
  np.testing.assert_allclose(evaluate_upsampler.in_dB(two, 0 * two), [0, 34.15], atol=0.01)


def test_the_most_detailed_part_is_shown():
  image = np.zeros((64, 64, 3), np.uint8)
  image[40:44, 8:24] = np.random.default_rng(0).integers(0, 255, (4, 16, 3))
  rows, columns = evaluate_upsampler.most_detailed(image, 32)
  assert (rows.start, columns.start) in {(16, 0), (32, 0)}
