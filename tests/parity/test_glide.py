"""GLIDE's networks, its sampling and the files of its release, against torch."""

import dataclasses
import functools

import diffusers
import glide_twin
import gpt2_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from etils import epath

from unclip_jax.diffusion import samplers
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.nn.glide import GlideNetwork
from unclip_jax.stages import common, glide
from unclip_jax.systems import glide_format
from unclip_jax.types import UnclipError
from unclip_jax.weights import glide as release
from unclip_jax.weights.foreign_folder import Joined
from unclip_jax.weights.rules import read_params

diffusers.utils.logging.set_verbosity_error()
TOLERANCE = 1e-5
# x_0 is the network's noise over the root of alpha_bar, 0.006 and less where a loop begins: so much
# larger are its errors there.
LOOP_TOLERANCE = 1e-4
# Channels that the first convolution sees, and sizes.
NETWORKS = {
  'base': (3, glide_twin.BASE),
  'upsample': (6, glide_twin.UPSAMPLE),
  'base_inpaint': (7, glide_twin.BASE),
  'upsample_inpaint': (10, glide_twin.UPSAMPLE),
}
PAIRS = {'plain': ('base', 'upsample'), 'inpaint': ('base_inpaint', 'upsample_inpaint')}
LENGTHS = np.array([[9], [4], [0]])  # of captions: the last is empty
LOW, HIGH = (8, 12), (16, 24)  # pixels; the networks are convolutional


class Fakes(twins.Tensors):
  """Tensors of which there are only shapes."""

  def read(self, name):
    raise EOFError(name)


@functools.cache
def make_twin(name):
  return glide_twin.make(*NETWORKS[name], seed=len(name))


@functools.cache
def tensors(name):
  """Of a file, as conversions read them."""
  named = glide_twin.original_tensors(make_twin(name))
  return twins.Tensors({key: x.numpy() for key, x in named.items()})


def parts_of(pair):
  return {part: tensors(name) for part, name in zip(('base', 'upsample'), PAIRS[pair], strict=True)}


def stage_of(config, name):
  return config.decoder if name.startswith('base') else config.upsamplers[0]


@functools.cache
def expected_of(stage):
  return jax.eval_shape(functools.partial(glide.init, stage), jax.random.key(0))


@functools.cache
def load(name):
  """Config, rules and parameters of one network; names are those of the file."""
  pair = 'inpaint' if 'inpaint' in name else 'plain'
  part, stage_name = ('base', 'decoder') if 'base' in name else ('upsample', 'upsampler_0')
  config = release.read_config(parts_of(pair), 'twin')
  stage = stage_of(config, name)
  rules = [
    rule._replace(theirs=tuple(key.removeprefix(f'{part}/') for key in rule.theirs))
    for rule in release.rules(config)[stage_name]
  ]
  return stage, rules, twins.convert(tensors(name), rules, expected_of(stage))


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype('f')


def to_torch(image):
  return torch.from_numpy(np.array(image)).movedim(-1, 1)


def from_torch(image):
  return image.movedim(1, -1)


def make_text(seed=0):
  shape = (len(LENGTHS), glide_twin.CONTEXT_LENGTH)
  ids = np.random.default_rng(seed).integers(0, glide_twin.VOCAB_SIZE, shape)
  return TextFeatures(jnp.asarray(ids), jnp.asarray(np.arange(shape[1]) < LENGTHS), None, None)


def empty_text():
  shape = (len(LENGTHS), glide_twin.CONTEXT_LENGTH)
  ids = jnp.full(shape, glide_twin.VOCAB_SIZE - 1)
  return TextFeatures(ids, jnp.zeros(shape, bool), None, None)


def of_torch(text):
  return torch.from_numpy(np.array(text.ids)), torch.from_numpy(np.array(text.mask))


# --- Networks.


def make_inputs(name):
  size = LOW if name.startswith('base') else HIGH
  seen = normal(len(LENGTHS), *size, NETWORKS[name][0])
  return seen, np.array([3, 500, 999])


@pytest.mark.parametrize('name', NETWORKS)
def test_network_is_that_of_the_twin(name):
  seen, t = make_inputs(name)
  stage, _, params = load(name)
  condition = jnp.asarray(seen[..., 3:]) if seen.shape[-1] > 3 else None
  ours = GlideNetwork(stage).apply(
    {'params': params}, seen[..., :3], t, make_text(), condition, True, method='predict'
  )
  expected = make_twin(name)(to_torch(seen), torch.from_numpy(t), *of_torch(make_text()))
  assert twins.deviation(ours, from_torch(expected)) < TOLERANCE


@pytest.mark.parametrize('name', ['base', 'upsample_inpaint'])
def test_each_tensor_matters(name):
  seen, t = make_inputs(name)
  stage, rules, params = load(name)

  @jax.jit
  def predict(params):
    network, condition = GlideNetwork(stage), jnp.asarray(seen[..., 3:])
    given = (seen[..., :3], t, make_text(), condition if condition.size else None, True)
    return network.apply({'params': params}, *given, method='predict')

  def run(changed):
    return [predict(twins.lay_out(changed, rules, params))]

  expected = [torch.from_numpy(np.array(predict(params)))]
  twins.check_each_tensor_matters(tensors(name), run, expected, TOLERANCE)


def test_each_tensor_is_in_one_rule():
  for pair in PAIRS:
    parts = parts_of(pair)
    rules = release.rules(release.read_config(parts, 'twin'))
    used = sorted(name for stage in rules.values() for rule in stage for name in rule.theirs)
    assert used == sorted(Joined(parts).names())
  for name in NETWORKS:  # what is read is written as it was
    load(name)


# --- Conditions.


@pytest.mark.parametrize('sides', [(8, 32), (5, 20), (7, 18), (6, 6)])
def test_small_pictures_are_enlarged_as_by_torch(sides):
  low, high = sides
  image = np.random.default_rng(0).uniform(-1, 1, (2, low, low, 3)).astype('f')
  levels = ((to_torch(image) + 1) * 127.5).round() / 127.5 - 1
  expected = torch.nn.functional.interpolate(
    levels, (high, high), mode='bilinear', align_corners=False
  )
  ours = np.asarray(glide.enlarge(jnp.asarray(image), high))
  np.testing.assert_allclose(ours, from_torch(expected), atol=1e-6)
  # The rounding is felt.
  assert np.abs(glide.enlarge(jnp.asarray(image) + 0.004, high) - ours).max() > 0.003


# --- Loops.


def give(name, **fields):
  """A network with another config of its stage."""
  stage, _, params = load(name)
  return dataclasses.replace(stage, **fields), params


def draws(plan, key_b, shape):
  """What our loop draws, one array a step."""
  rows = [type(plan)(*row) for row in zip(*plan, strict=True)]
  return [to_torch(samplers.step_noise(key_b, row, shape)) for row in rows]


def make_known(size, seed):
  known = np.random.default_rng(seed).uniform(-1, 1, (len(LENGTHS), size, size, 3)).astype('f')
  mask = np.zeros((len(LENGTHS), size, size, 1), bool)
  mask[:, : size // 2, : size // 4] = True
  return known, mask


def paste(known, mask):
  known, mask = to_torch(known).double(), to_torch(mask).double()
  return lambda x_0: x_0 * (1 - mask) + known * mask


def channels_of(known, mask):
  mask = to_torch(mask).float()
  return [to_torch(known) * mask, mask]


@pytest.mark.parametrize('name', ['base', 'base_inpaint'])
def test_base_draws_what_the_formulas_do(name):
  size, scale, num_steps = LOW[0], 3.0, 20
  stage, params = give(name, image_size=size)
  sampling = dataclasses.replace(stage.sampling, num_steps=num_steps)
  plan = common.make_plan(stage.diffusion, sampling)
  key_b = jax.random.split(jax.random.key(0), len(LENGTHS))
  known, mask = map(jnp.asarray, make_known(size, 1)) if 'inpaint' in name else (None, None)
  ours, _ = glide.sample_base(
    stage,
    params,
    make_text(),
    empty_text(),
    key_b,
    plan,
    common.make_sampler(sampling.sampler, sampling.variance),
    jnp.float32(scale),
    known=known,
    mask=mask,
  )
  twin, given = make_twin(name), [] if known is None else channels_of(known, mask)

  def evaluate(x, t):
    seen, t = torch.cat([x.float(), *given], dim=1), torch.full((len(LENGTHS),), t)
    cond, uncond = (twin(seen, t, *of_torch(text)) for text in (make_text(), empty_text()))
    eps = uncond[:, :3] + scale * (cond[:, :3] - uncond[:, :3])
    return torch.cat([eps, cond[:, 3:]], dim=1)

  start = to_torch(samplers.start_noise(key_b, (size, size, 3)))
  expected = glide_twin.sample(
    evaluate,
    glide_twin.cosine_betas(),
    np.round(np.linspace(0, 999, num_steps)).astype(int),
    start,
    draws(plan, key_b, (size, size, 3)),
    is_ddim=False,
    edit_x_0=(lambda x_0: x_0) if known is None else paste(known, mask),
  )
  assert twins.deviation(ours, from_torch(expected)) < LOOP_TOLERANCE
  if known is not None:
    np.testing.assert_allclose(ours, np.where(mask, known, ours), atol=1e-6)


@pytest.mark.parametrize('name', ['upsample', 'upsample_inpaint'])
def test_upsampler_draws_what_the_formulas_do(name):
  size = HIGH[0]
  stage, params = give(name, image_size=size, low_size=LOW[0])
  sampling = stage.sampling
  plan = common.make_plan(stage.diffusion, sampling)
  key_b = jax.random.split(jax.random.key(0), len(LENGTHS))
  low, _ = make_known(LOW[0], 2)
  known, mask = map(jnp.asarray, make_known(size, 1)) if 'inpaint' in name else (None, None)
  sampler = common.make_sampler(sampling.sampler, sampling.variance)

  @jax.jit
  def draw(params, x_start):
    given = (jnp.asarray(low), key_b, plan, sampler, x_start, False, jnp.float32, known, mask)
    return glide.sample_upsampler(stage, params, make_text(), *given)[0]

  levels = ((to_torch(low) + 1) * 127.5).round() / 127.5 - 1
  large = torch.nn.functional.interpolate(levels, (size, size), mode='bilinear')
  given = [large] if known is None else [*channels_of(known, mask), large]
  twin = make_twin(name)

  def evaluate(x, t):
    seen = torch.cat([x.float(), *given], dim=1)
    return twin(seen, torch.full((len(LENGTHS),), t), *of_torch(make_text()))

  start = samplers.start_noise(key_b, (size, size, 3))
  expected = glide_twin.sample(
    evaluate,
    glide_twin.linear_betas(),
    np.array(glide_twin.FAST27),
    0.997 * to_torch(start),
    draws(plan, key_b, (size, size, 3)),
    is_ddim=known is None,
    edit_x_0=(lambda x_0: x_0) if known is None else paste(known, mask),
  )
  assert twins.deviation(draw(params, start), from_torch(expected)) < LOOP_TOLERANCE
  # The temperature is felt.
  assert twins.deviation(draw(params, start / 0.997), from_torch(expected)) > 10 * LOOP_TOLERANCE


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
  assert [glide.inpaints(stage) for stage in (config.decoder, upsampler, plain)] == [1, 1, 0]
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
  ('base', 'time_embed.0.weight', 0): 'has 257 rows, not 4 times its 64 columns',
}


def test_a_tensor_of_another_shape_is_named():
  parts = parts_of('plain')
  told_elsewhere = {'out.2.weight', 'out.2.bias'}  # the config's check of the variance
  cases = [('base', name, 0) for name in parts['base'] if name not in told_elsewhere]
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
