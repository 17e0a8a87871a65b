"""Evaluations from folders to figures: the commands, what they say, and bad input."""

import dataclasses
import json
import re

import numpy as np
import pytest
from commands import run
from made_pictures import pixels
from PIL import Image
from processes import environment, start
from tiny_model import TEXTS, write_tiny_model

import unclip_jax
from unclip_jax import Sampling
from unclip_jax.data.folder_source import PictureFolder
from unclip_jax.evaluate import cosines, frechet, kernel, neighbours, retrieval
from unclip_jax.images import save_png
from unclip_jax.sharding import make_mesh
from unclip_jax.systems import evaluation, feature_files, feature_networks, picture_sets
from unclip_jax.systems.feature_networks import FeatureNetwork
from unclip_jax.types import UnclipError

NUM, NUM_REAL = 22, 19
CAPTIONS = [f'{TEXTS[i % 3]} {i // 6}' for i in range(NUM)]


def picture(seed, height=20, width=16):
  """Of one colour and noise."""
  colour = np.random.default_rng(seed).uniform(0, 255, 3)
  return np.uint8(0.3 * pixels(seed, height, width) + 0.7 * colour)


def middle(image):
  """What is looked at of a picture of 20 x 16 pixels."""
  return image[2:18]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Generated pictures with captions, and real ones with others."""
  generated, real = (tmp_path_factory.mktemp(name) for name in ('generated', 'real'))
  for i, caption in enumerate(CAPTIONS):
    Image.fromarray(picture(i)).save(generated / f'{i:02d}.png')
    (generated / f'{i:02d}.txt').write_text(caption)
  for i in range(NUM_REAL):
    Image.fromarray(picture(100 + i)).save(real / f'{i:02d}.png')
    (real / f'{i:02d}.txt').write_text(f'{TEXTS[i % 3]}, number {i}')
  return generated, real


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  return write_tiny_model(tmp_path_factory.mktemp('models') / 'tiny')


@pytest.fixture(scope='module')
def z(model):
  """Unit embeddings of generated and of real pictures, and of captions."""
  loaded = unclip_jax.load(model)
  found = [
    np.asarray(loaded.encode_image(np.stack([middle(picture(i)) for i in seeds])), np.float64)
    for seeds in (range(NUM), range(100, 100 + NUM_REAL))
  ]
  found.append(np.asarray(loaded.encode_text(CAPTIONS), np.float64))
  return [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in found]


def complaint(capsys, *args):
  """The one line that a command that fails says."""
  assert run(*args) == 1
  shown = capsys.readouterr()
  (line,) = shown.err.splitlines()
  assert shown.out == '' and line.startswith('unclip-jax: error: ')
  return line


def means_network(dims=6):
  """Features that are sums of pixels: fast, and far from all alike."""
  weights = np.random.default_rng(0).normal(size=(16 * 16 * 3, dims))
  batches = []

  def encode(images):
    batches.append(images.shape)
    return np.float32(images.reshape(len(images), -1) / 255.0 @ weights)

  return FeatureNetwork('inception', 'sums', dims, 16, '16 px', encode), encode, batches


def test_a_folder_streams_through_in_batches_of_one_shape(folders):
  network, encode, batches = means_network()
  source = PictureFolder(folders[0])
  options = evaluation.Options(batch_size=5, most_kept=9, seed=3)
  told = []
  pictures = picture_sets.read_pictures(source, 16, 'bicubic')
  found = evaluation.look(pictures, len(source), [network, network], options, told.append)
  assert batches == 10 * [(5, 16, 16, 3)]
  assert told == [5, 10, 15, 20, 22]
  rows = encode(np.stack([middle(picture(i)) for i in range(NUM)]))
  for seen in found.seen:
    assert seen.moments.count == NUM
    np.testing.assert_allclose(seen.moments.cov, np.cov(rows.astype('d').T), rtol=1e-5)
    which = [int(np.abs(rows - row).sum(axis=1).argmin()) for row in seen.rows]
    np.testing.assert_allclose(seen.rows, rows[which], rtol=1e-5)
    assert len(set(which)) == 9 and which == sorted(which)
  assert [captions[0] for captions in found.captions] == [CAPTIONS[i] for i in which]


def test_the_command_says_what_the_functions_do(folders, model, z, tmp_path, capsys):
  generated, real = folders
  out = tmp_path / 'figures.json'
  options = ('--kid-size', 7, '--kid-subsets', 4, '--recall-at', '1,3', '--seed', 5)
  args = ('--reference', real, '--clip', model, '--json', out, '--batch-size', 8, *options)
  assert run('evaluate', generated, *args) == 0
  shown = capsys.readouterr()
  figures = {entry['figure']: entry for entry in json.loads(out.read_text())['figures']}

  z_i, z_real, z_t = z
  names, groups = np.unique(CAPTIONS, return_inverse=True)
  own = z_t[[CAPTIONS.index(name) for name in names]]
  subsets = kernel.draw_subsets(NUM, NUM_REAL, 7, 4, seed=5)
  shares = neighbours.precision_recall(z_i, z_real)
  found = retrieval.recall_at(z_i, own, groups, np.arange(len(names)), (1, 3))
  moments = map(frechet.moments_of, (z_i, z_real))
  wanted = {
    'FD': frechet.distance_of_moments(*moments),
    'KD': kernel.kid(z_i, z_real, subsets).mean,
    'CMMD': kernel.cmmd(z_i, z_real),
    'precision': shares.precision,
    'recall': shares.recall,
    'CLIP score': cosines.clip_score(z_i, z_t).mean,
    'R@1': found[1],
    'R@3': found[3],
    'diversity': cosines.diversity(z_i, groups).mean,
  }
  assert list(figures) == list(wanted)
  for name, value in wanted.items():
    # Networks are of float32, and their batches here of another size.
    assert figures[name]['value'] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert f'{figures[name]["value"]:.4f}' in shown.out
    assert {'resolution': 16, 'resize': 'bicubic'}.items() <= figures[name].items()
    assert re.fullmatch(r'CLIP tiny [0-9a-f]{8}', figures[name]['features'])
    assert figures[name]['generated'] == NUM or name == 'diversity'
    assert (figures[name].get('reference') == NUM_REAL) == (name in list(wanted)[:5])
  assert f'{figures["FD"]["features"]}: 16 dimensions; pictures at 16 px, bicubic' in shown.out
  assert '19 images are few for a Fréchet distance on 16 dimensions' in shown.err
  assert 'take at least 160' in figures['FD']['warning']


def test_batches_are_split_over_devices(folders, model, tmp_path):
  generated, real = folders
  files = [tmp_path / 'one.json', tmp_path / 'two.json']
  args = ['evaluate', generated, '--reference', real, '--clip', model, '--batch-size', 11]
  assert run(*args, '--json', files[0]) == 0
  env = environment(tmp_path / 'cache', num_devices=2, level=0)
  child = start([*args, '--devices', 2, '--json', files[1]], env)
  said = child.communicate()[1]
  assert child.returncode == 0, said
  one, two = (json.loads(file.read_text())['figures'] for file in files)
  for ours, theirs in zip(one, two, strict=True):
    assert theirs['value'] == pytest.approx(ours['value'], rel=1e-3, abs=1e-5)


def test_what_generate_wrote_is_read_and_its_grid_left_out(tmp_path, model):
  text = {'Software': 'unclip_jax 0', 'settings': '{}', 'prompt': TEXTS[0]}
  save_png(tmp_path / 'a.png', picture(0, 16), {**text, 'index': '0'})
  save_png(tmp_path / 'grid.png', picture(1, 40, 40), text)
  # Of another program: a picture like any other, and no caption.
  save_png(tmp_path / 'z.png', picture(2, 16), {'prompt': '{"3": {}}', 'Software': 'other'})
  found = list(picture_sets.read_pictures(PictureFolder(tmp_path), 16, 'area'))
  assert [(p.id, p.captions) for p in found] == [('a.png', (TEXTS[0],)), ('z.png', ())]
  np.testing.assert_array_equal(found[0].image, picture(0, 16))
  judge = feature_networks.open_clip(model, make_mesh(1))
  options = evaluation.Options(16, batch_size=2)
  parts = feature_files.open_parts([tmp_path])
  seen = feature_files.gather(parts, [judge.network], options)
  (score,) = evaluation.evaluate(seen, None, None, judge, options)
  assert (score['figure'], score['generated']) == ('CLIP score', 1)
  assert score['warning'] == '1 pictures have no caption, and are left out'


def test_parts_that_were_seen_before_are_one_set(folders, model, tmp_path, capsys):
  generated, real = folders
  whole, parts = tmp_path / 'whole.json', tmp_path / 'parts.json'
  how = ('--clip', model, '--batch-size', 8)
  assert run('evaluate', generated, '--reference', real, *how, '--json', whole) == 0
  halves = [tmp_path / 'first', tmp_path / 'second']
  for i, half in enumerate(halves):
    half.mkdir()
    for path in sorted(generated.iterdir())[24 * i :][:24]:
      (half / path.name).symlink_to(path)
  first, reference = tmp_path / 'first.npz', tmp_path / 'reference.npz'
  assert run('evaluate', halves[0], *how, '--save', first) == 0
  assert run('evaluate', real, *how, '--save', reference) == 0
  assert str(reference) in capsys.readouterr().out
  args = ('--reference', reference, *how, '--json', parts)
  assert run('evaluate', first, halves[1], *args) == 0
  wanted, found = (json.loads(path.read_text())['figures'] for path in (whole, parts))
  for ours, theirs in zip(found, wanted, strict=True):
    assert ours['value'] == pytest.approx(theirs['value'], rel=1e-4, abs=1e-6)
    for name in ('figure', 'generated', 'features', 'preparation', 'resolution', 'resize'):
      assert ours[name] == theirs[name]
    assert ours.get('reference') == theirs.get('reference')


def test_files_of_features_of_something_else_are_refused(folders, tmp_path):
  network, *_ = means_network()
  options = evaluation.Options(16, batch_size=5)
  path = tmp_path / 'some.npz'
  seen = feature_files.gather(feature_files.open_parts(folders[:1]), [network], options)
  feature_files.write(path, seen, [network], options)
  assert feature_files.resolution_of(path) == 16
  parts = feature_files.open_parts([path, path])
  twice = feature_files.gather(parts, [network], dataclasses.replace(options, most_kept=30))
  assert twice.seen[0].moments.count == 2 * NUM
  assert len(twice.seen[0].rows) == len(twice.captions) == 30
  for change, message in (
    ({'resolution': 8}, 'resolution 16, wanted is 8: give --resolution 16'),
    ({'resize': 'area'}, 'resize bicubic, wanted is area'),
  ):
    with pytest.raises(UnclipError, match=message):
      feature_files.gather(parts, [network], dataclasses.replace(options, **change))
  other = network._replace(name='other')
  with pytest.raises(UnclipError, match='no features of other at 16 px, only of sums at 16 px'):
    feature_files.gather(parts, [other], options)
  with pytest.raises(UnclipError, match=r'x.bin: files of features end in .npz'):
    feature_files.write(tmp_path / 'x.bin', seen, [network], options)
  with pytest.raises(UnclipError, match=r'there is no file .*none.npz'):
    feature_files.open_parts([tmp_path / 'none.npz'])
  content = path.read_bytes()
  np.savez(tmp_path / 'foreign.npz', mu=np.zeros(3))
  broken = {'cut.npz': content[: len(content) // 2], 'text.npz': b'no numbers', 'empty.npz': b''}
  for name, some in broken.items():
    (tmp_path / name).write_bytes(some)
  for name in (*broken, 'foreign.npz'):
    with pytest.raises(UnclipError, match=f'{name} is not a file of features'):
      feature_files.open_parts([tmp_path / name])


def test_a_picture_is_reduced_from_all_of_its_pixels(tmp_path):
  # A JPEG that is decoded at a quarter of its size would have other pixels.
  large = Image.fromarray(pixels(0, 128, 128))
  large.save(tmp_path / 'large.jpg', quality=95)
  (found,) = picture_sets.read_pictures(PictureFolder(tmp_path), 16, 'bicubic')
  with Image.open(tmp_path / 'large.jpg') as image:
    wanted = image.resize((16, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(found.image, np.asarray(wanted))


def test_guidance_is_swept_over_the_same_noise(folders, model, tmp_path, capsys):
  out, plot = tmp_path / 'sweep.json', tmp_path / 'sweep.png'
  args = ('--model', model, '--guidance', '1,3', '--num', 6, '--resolution', 16, '--seed', 9)
  assert run('sweep', folders[1], *args, '--json', out, '--plot', plot) == 0
  shown = capsys.readouterr()
  results = json.loads(out.read_text())
  assert [row['guidance'] for row in results['rows']] == [1.0, 3.0]
  loaded = unclip_jax.load(model)
  # Of all parts of the list.
  captions = [f'{TEXTS[i % 3]}, number {i}' for i in (k * NUM_REAL // 6 for k in range(6))]
  assert '6 captions: CLIP score' in shown.out
  with pytest.warns(UserWarning, match='longer than the 12 tokens'):
    z_t = loaded.encode_text(captions)
    for row in results['rows']:
      sampling = Sampling(guidance_scale=row['guidance'])
      drawn = loaded.sample(captions, [9 + i for i in range(6)], decoder=sampling, batch_size=4)
      small = [image.resize((16, 16), 3) for image in map(Image.fromarray, drawn.images)]
      z_i = loaded.encode_image(np.stack(list(map(np.asarray, small))))
      score = cosines.clip_score(z_i, z_t).mean
      assert row['clip_score']['value'] == pytest.approx(score, abs=2e-3)
      assert row['distance']['figure'] == 'FD'
      assert (row['distance']['generated'], row['distance']['reference']) == (6, NUM_REAL)
      assert f'{row["distance"]["value"]:.4f}' in shown.out
  values = [row['distance']['value'] for row in results['rows']]
  assert abs(values[0] - values[1]) > 1e-4
  assert 'the judge is the CLIP of the model itself' in shown.err
  with Image.open(plot) as image:
    assert len(np.unique(np.asarray(image.convert('L')))) > 20


# --- Bad input.


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (('--kid-size', 20), 'over subsets of 20 images needs 20 in each set, there are 19'),
    (('--neighbours', 19), 'need at least 20 images in each set, there are 19'),
    (('--recall-at', 40), 'R@40 needs .* at least 41'),
    (('--resolution', 17), r'00.png has 16x20 pixels, .* at 17: take --resolution 16'),
    (('--resize', 'nearest'), "kernel 'nearest': choose one of area"),
    (('--most-kept', 1), 'most kept'),
    (('--devices', 99), '99 devices'),
    (('--inception', 'none.pth'), 'there is no weights file none.pth'),
    (('--inception', 'none.pth', '--inception-as', 'mine'), "no preparation 'mine'.*clean-fid"),
    (('--json', 'no/such/folder/x.json'), 'cannot be written'),
  ],
)
def test_what_cannot_be_evaluated_is_named(folders, model, capsys, args, message):
  generated, real = folders
  line = complaint(capsys, 'evaluate', generated, '-r', real, '--clip', model, *args)
  assert re.search(message, line), line


def test_pictures_that_cannot_be_compared_are_named(folders, model, tmp_path, capsys):
  for i in range(3):
    Image.fromarray(picture(i)).save(tmp_path / f'{i}.png')
  few = complaint(capsys, 'evaluate', tmp_path, '-r', folders[1], '--clip', model)
  assert 'need at least 4 images in each set, there are 3' in few
  alone = complaint(capsys, 'evaluate', tmp_path, '--clip', model)
  assert 'nothing to compare with: give --reference, or captions' in alone
  (tmp_path / '2.png').write_bytes((tmp_path / '1.png').read_bytes()[:90])
  broken = complaint(capsys, 'evaluate', tmp_path, '-r', folders[1], '--clip', model)
  assert '2.png is not a picture that can be read' in broken
  assert 'no folder' in complaint(capsys, 'evaluate', tmp_path / 'none', '--clip', model)
  clip = model / 'clip.safetensors'
  wrong = complaint(capsys, 'evaluate', folders[0], '-r', folders[1], '--inception', clip)
  assert 'is not the Inception of FID' in wrong
  assert run('evaluate', folders[0]) == 2
  assert 'give --inception, --clip or both' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('args', 'message'),
  [
    (('--stage', 'upsampler'), 'upsampler has no guidance to sweep'),
    (('--num', 1), 'number of pictures'),
    (('--plot', 'sweep.txt'), 'no plots of this kind'),
    (('--prompts', 'none.txt'), 'none.txt'),
  ],
)
def test_sweeps_that_cannot_be_are_named(folders, model, capsys, args, message):
  assert message in complaint(capsys, 'sweep', folders[1], '--model', model, *args)


def test_scales_of_a_sweep_are_numbers(folders, capsys):
  assert run('sweep', folders[1], '--guidance', '1,two') == 2
  assert "--guidance '1,two': give numbers" in capsys.readouterr().err


def test_inception_gives_its_own_figures_and_needs_real_pictures(folders):
  network, *_ = means_network()
  options = evaluation.Options(16, batch_size=5)
  seen = feature_files.gather(feature_files.open_parts(folders[:1]), [network], options)
  with pytest.raises(UnclipError, match='give their folder by --reference'):
    evaluation.evaluate(seen, None, network, None, options)
  with pytest.raises(UnclipError, match='no network to look with'):
    evaluation.evaluate(seen, seen, None, None, options)
  found = evaluation.evaluate(seen, seen, network, None, options)
  values = {entry['figure']: entry['value'] for entry in found}
  assert values.keys() == {'FID', 'KID', 'precision', 'recall'}
  assert values['FID'] == pytest.approx(0, abs=1e-6)
  assert values['precision'] == values['recall'] == 1
