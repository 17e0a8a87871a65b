"""The files of GLIDE's release: sizes, names, what is said of those that are not of it."""

import dataclasses

import glide_twin
import gpt2_files
import jax
import numpy as np
import pytest
import torch
import twins
from etils import epath
from test_glide import NETWORKS, PAIRS, expected_of, parts_of, tensors

from unclip_jax.systems import glide_format
from unclip_jax.types import UnclipError
from unclip_jax.weights import glide as release
from unclip_jax.weights.foreign_folder import Joined
from unclip_jax.weights.rules import read_params


class Fakes(twins.Tensors):
  """Tensors of which there are only shapes."""

  def read(self, name):
    raise EOFError(name)


# --- Sizes.


def full_size(pair):
  """Names and shapes of the release, of networks that hold no numbers."""
  sizes = {
    'base': {'sizes': ((1, 2, 3, 4), (1, 2, 3)), 'num_res_blocks': 3},
    'upsample': {'sizes': ((1, 1, 2, 2, 4, 4), (3, 4, 5)), 'num_res_blocks': 2},
  }
  parts = {}
  for part, name in zip(sizes, PAIRS[pair], strict=True):
    with torch.device('meta'):
      twin = glide_twin.Twin(
        NETWORKS[name][0],
        channels=192,
        width=512,
        depth=16,
        vocab_size=50257,
        length=128,
        **sizes[part],
      )
      named = glide_twin.original_tensors(twin)
    shapes = {key: jax.ShapeDtypeStruct(tuple(x.shape), 'f') for key, x in named.items()}
    parts[part] = Fakes(shapes)
  return parts


def open_fakes(parts):
  """Looks at names and shapes, up to where a tensor is read."""
  config = release.read_config(parts, 'twin')
  for stage_name, rules in release.rules(config).items():
    stage = config.decoder if stage_name == 'decoder' else config.upsamplers[0]
    joined = Joined({part: parts[part] for part in release.STAGE_PARTS[stage_name]})
    with pytest.raises(EOFError):
      read_params(joined, rules, expected_of(stage), 'twin')
  return config


def test_shapes_of_the_full_size_are_those_of_the_release():
  assert open_fakes(full_size('plain')) == release.GLIDE


def test_weights_that_inpaint_are_sampled_as_in_their_notebook():
  config = open_fakes(full_size('inpaint'))
  (upsampler,), (plain,) = config.upsamplers, release.GLIDE.upsamplers
  assert [stage.inpaints for stage in (config.decoder, upsampler, plain)] == [True, True, False]
  assert config.decoder.sampling.guidance_scale == 5.0
  assert upsampler.sampling == dataclasses.replace(plain.sampling, sampler='ddpm')


def test_the_upsampler_may_be_absent():
  config = release.read_config({'base': tensors('base')}, 'twin')
  assert config.upsamplers == ()
  assert config.decoder.image_size == 16
  assert [*release.rules(config)] == ['decoder']


# --- Errors of tensors.


def message(parts):
  with pytest.raises(UnclipError) as caught:
    open_fakes({part: Fakes(named) for part, named in parts.items()})
  assert '\n' not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize('part', ['base', 'upsample'])
def test_a_tensor_that_is_missing_or_not_known_is_named(part):
  parts = parts_of('plain')
  for index, name in enumerate(parts[part]):
    changed = dict(parts[part])
    tensor = changed.pop(name)
    if index % 2:
      changed[f'other.{name}'] = tensor
    said = message({**parts, part: changed})
    assert name in said and part in said, (name, said)
  said = message({**parts, part: {**parts[part], 'ema.decay': np.ones(1)}})
  assert f'{part}/ema.decay is not known' in said


# What a shape tells by itself is right by itself: named is what is not of that size.
SIZES_TOLD = {
  ('base', 'token_embedding.weight', 0): 'it reads 9 tokens out of 23, the base 9 out of 24',
  ('base', 'token_embedding.weight', 1): 'its Transformer is 129 wide, no multiple of the 64',
  ('base', 'positional_embedding', 0): 'the base 10 out of 23: take the upsampler of that base',
  ('base', 'input_blocks.0.0.weight', 1): 'takes 4 channels: it must be 3, or 7 to inpaint',
  ('upsample', 'input_blocks.0.0.weight', 1): 'takes 7 channels: it must be 6, or 10 to inpaint',
  ('base', 'out.2.weight', 0): 'has 7 rows: it must have 6, of the noise and of its variance',
  ('base', 'time_embed.0.weight', 0): 'has 257 rows, not 4 times its 64 columns',
}


def test_a_tensor_of_another_shape_is_named():
  parts = parts_of('plain')
  cases = [('base', name, 0) for name in parts['base']]
  for part, name, axis in {*cases, *SIZES_TOLD}:
    tensor = parts[part][name]
    larger = np.concatenate([tensor, tensor.take([0], axis)], axis)
    said = message({**parts, part: {**parts[part], name: larger}})
    assert SIZES_TOLD.get((part, name, axis), name) in said, (name, said)


def test_networks_of_two_pairs_are_an_error():
  plain, inpaint = parts_of('plain'), parts_of('inpaint')
  for parts in ({**plain, 'base': inpaint['base']}, {**inpaint, 'base': plain['base']}):
    assert 'one inpaints, the other does not' in message(parts)
  # Of as many levels as the base, but with the channels of an upsampler.
  wide = glide_twin.original_tensors(glide_twin.make(6, glide_twin.BASE, seed=0))
  assert 'it paints 16 pixels a side, the base 16' in message({**plain, 'upsample': wide})


# --- Folders.


VOCABULARY_SIZE = len(gpt2_files.make_vocab())


def save(folder, names):
  for name in names:
    twin = glide_twin.make(*NETWORKS[name], seed=1, vocab_size=VOCABULARY_SIZE)
    torch.save(glide_twin.original_tensors(twin), folder / f'{name}.pt')


@pytest.fixture
def folder(tmp_path):
  """A release of the base alone, and its vocabulary."""
  folder = gpt2_files.write(tmp_path / 'release', names=('encoder.json', 'vocab.bpe'))
  save(folder, ['base'])
  return epath.Path(folder)


def test_a_release_is_opened(folder):
  save(folder, ['upsample'])
  assert glide_format.is_release(folder)
  config, tokenizer, stages = glide_format.open_release(folder)
  assert (tokenizer.vocab_size, tokenizer.context_length) == (VOCABULARY_SIZE, 9)
  assert config.clip is config.prior is None
  assert [*stages] == ['decoder', 'upsampler_0']
  for name, stage in zip(stages, (config.decoder, *config.upsamplers), strict=True):
    read, paths = stages[name]
    params = read(expected_of(stage))
    file = 'base' if name == 'decoder' else 'upsample'
    assert [path.name for path in paths] == [f'{file}.pt']
    saved = torch.load(paths[0])
    found = params['text_encoder']['tokens']['embedding']
    np.testing.assert_array_equal(found, saved['token_embedding.weight'])
    np.testing.assert_array_equal(
      params['unet']['conv_in']['kernel'],
      saved['input_blocks.0.0.weight'][:, :3].permute(2, 3, 1, 0),
    )


def test_a_folder_of_something_else_is_no_release(tmp_path):
  gpt2_files.write(tmp_path)
  (tmp_path / 'model.pt').write_bytes(b'')
  assert not glide_format.is_release(epath.Path(tmp_path))


@pytest.mark.parametrize('other', ['base_inpaint', 'upsample_inpaint'])
def test_both_pairs_in_a_folder_are_an_error(folder, other):
  (folder / f'{other}.pt').write_bytes(b'')
  with pytest.raises(UnclipError, match=rf'base\.pt and {other}\.pt: keep the pair that inpaints'):
    glide_format.open_release(folder)


@pytest.mark.parametrize('ending', ['', '_inpaint'])
def test_an_upsampler_without_its_base_is_an_error(folder, ending):
  (folder / 'base.pt').rename(folder / f'upsample{ending}.pt')
  assert glide_format.is_release(folder)
  with pytest.raises(UnclipError, match=rf'has no base{ending}\.pt: GLIDE needs it'):
    glide_format.open_release(folder)


def test_no_vocabulary_beside_the_weights_is_an_error(folder):
  (folder / 'encoder.json').unlink()
  with pytest.raises(UnclipError, match=r'put the vocab\.json and merges\.txt of GPT-2 there'):
    glide_format.open_release(folder)


def test_a_file_of_another_model_is_named(folder):
  torch.save({'weight': torch.ones(3)}, folder / 'base.pt')
  with pytest.raises(
    UnclipError, match=r'base: token_embedding\.weight is missing: it is no GLIDE'
  ):
    glide_format.open_release(folder)
