"""Both towers of CLIP against transformers, with the exact GELU and with OpenAI's quick one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
import transformers
import twins
from PIL import Image, ImageFilter
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import unclip_jax
from unclip_jax.configs import ClipConfig, TextConfig, ViTConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.nn.clip import ClipNetwork
from unclip_jax.stages import clip
from unclip_jax.systems import convert as systems_convert
from unclip_jax.systems import programs
from unclip_jax.types import UnclipError
from unclip_jax.weights import preprocessor, transformers_clip

TOLERANCE = 1e-5
END = 5  # the end-of-text token

CONFIGS = {
  'quick_gelu, three heads': ClipConfig(
    text=TextConfig(
      vocab_size=37,
      context_length=9,
      width=21,
      depth=3,
      num_heads=3,
      mlp_activation='quick_gelu',
    ),
    vision=ViTConfig(
      image_size=15, patch_size=5, width=30, depth=2, num_heads=5, mlp_activation='quick_gelu'
    ),
    embed_dim=13,
    unit_norm=False,
    pixel_mean=(0.48145466, 0.4578275, 0.40821073),
    pixel_std=(0.26862954, 0.26130258, 0.27577711),
  ),
  'gelu, one head': ClipConfig(
    text=TextConfig(vocab_size=37, context_length=5, width=11, depth=1, num_heads=1),
    vision=ViTConfig(image_size=28, patch_size=4, width=27, depth=3, num_heads=1),
    embed_dim=17,
    unit_norm=False,
  ),
}


def make_twin(config, seed, end_id=END):
  text, vision = config.text, config.vision
  common = {'projection_dim': config.embed_dim, 'layer_norm_eps': 1e-5}
  twin = transformers.CLIPModel(
    transformers.CLIPConfig(
      text_config={
        'vocab_size': text.vocab_size,
        'hidden_size': text.width,
        'intermediate_size': text.mlp_width or 4 * text.width,
        'num_hidden_layers': text.depth,
        'num_attention_heads': text.num_heads,
        'max_position_embeddings': text.context_length,
        'hidden_act': text.mlp_activation,
        'bos_token_id': 1,
        'eos_token_id': end_id,
        **common,
      },
      vision_config={
        'hidden_size': vision.width,
        'intermediate_size': 4 * vision.width,
        'num_hidden_layers': vision.depth,
        'num_attention_heads': vision.num_heads,
        'image_size': vision.image_size,
        'patch_size': vision.patch_size,
        'hidden_act': vision.mlp_activation,
        **common,
      },
      projection_dim=config.embed_dim,
    )
  )
  twins.randomise(twin, seed).logit_scale.fill_(1.5)  # for logits of a deviation near 1
  return twin


def make_inputs(config, batch):
  """Captions that end early, late and in the middle, and as many images in [-1, 1]."""
  rng = np.random.default_rng(batch)
  length = config.text.context_length
  ends = np.array([length - 1, 1, length // 2, 2, 3])[:batch, None]
  positions = np.arange(length)[None]
  words = rng.integers(END + 1, config.text.vocab_size, size=(batch, length))
  ids = np.where(positions < ends, words, np.where(positions == ends, END, 0)).astype(np.int32)
  ids[:, 0] = 1
  size = config.vision.image_size
  images = rng.uniform(-1, 1, size=(batch, size, size, 3))
  # Of one colour and noise, or the embeddings of such images are all alike.
  images = (0.3 * images + 0.7 * images[:, :1, :1]).astype('f')
  return images, ids, positions <= ends


def run_twins(config, twin, images, ids):
  """States, both embeddings, the logits, and every block's keys."""
  key_layers = [module for name, module in twin.named_modules() if name.endswith('k_proj')]
  keys = {}
  hooks = [
    layer.register_forward_hook(lambda layer, x, y: keys.update({layer: y})) for layer in key_layers
  ]
  text_twin = transformers.CLIPTextModelWithProjection(twin.config.text_config).eval()
  image_twin = transformers.CLIPVisionModelWithProjection(twin.config.vision_config).eval()
  weights = twin.state_dict()
  text_twin.load_state_dict({k: weights[k] for k in text_twin.state_dict()})
  image_twin.load_state_dict({k: weights[k] for k in image_twin.state_dict()})
  pixels = ((images + 1) / 2 - np.float32(config.pixel_mean)) / np.float32(config.pixel_std)
  pixels = torch.from_numpy(np.moveaxis(pixels, -1, 1))
  ids = torch.from_numpy(ids).long()
  with torch.no_grad():
    # The mask of `forward` only reaches padding, which nothing before it sees.
    both = twin(input_ids=ids, pixel_values=pixels)
    text, image = text_twin(ids), image_twin(pixels)
  for hook in hooks:
    hook.remove()
  return [
    text.last_hidden_state,
    text.text_embeds,
    image.image_embeds,
    both.logits_per_text,
    *(keys[k] for k in key_layers),
  ]


@functools.partial(jax.jit, static_argnums=0)
def run_ours(config, params, images, ids, mask):
  network, variables = ClipNetwork(config), {'params': params}
  (z_i, z_t, log_scale), captured = network.apply(
    variables, images, ids, mask, capture_intermediates=lambda module, _: module.name == 'qkv'
  )
  states = network.apply(variables, ids, mask, method='encode_text').states
  z_i_unit, z_t_unit = (z / jax.numpy.linalg.norm(z, axis=1, keepdims=True) for z in (z_i, z_t))
  logits = jax.numpy.exp(log_scale) * z_t_unit @ z_i_unit.T
  keys = [
    captured['intermediates'][tower]['blocks'][f'block_{i}']['qkv']['__call__'][0][:, :, 1]
    for tower, depth in (('text', config.text.depth), ('vision', config.vision.depth))
    for i in range(depth)
  ]
  # Nothing depends on the bias of the keys, which softmax cancels: the keys are compared too.
  return [states, z_t, z_i, logits, *(k.reshape(*k.shape[:2], -1) for k in keys)]


@functools.cache
def expected_shapes(config):
  return jax.eval_shape(lambda key: clip.init(config, key), jax.random.key(0))


def convert(tensors, config):
  return twins.convert(tensors, transformers_clip.rules(config), expected_shapes(config))


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('batch', [3, 5])
def test_towers_agree_with_transformers(name, batch):
  config = CONFIGS[name]
  twin = make_twin(config, seed=batch)
  params = convert(twins.tensors_of(twin), config)
  inputs = make_inputs(config, batch)
  worst = twins.worst_deviation(
    run_ours(config, params, *inputs), run_twins(config, twin, *inputs[:2])
  )
  print(f'{name} {worst:.1e}')
  assert worst < TOLERANCE


@pytest.mark.parametrize('name', CONFIGS)
def test_towers_use_every_tensor_of_transformers(name):
  config = CONFIGS[name]
  twin = make_twin(config, seed=0)
  inputs = make_inputs(config, 3)
  rules = transformers_clip.rules(config)

  def run(tensors):
    return run_ours(config, twins.lay_out(tensors, rules, expected_shapes(config)), *inputs)

  expected = run_twins(config, twin, *inputs[:2])
  twins.check_each_tensor_matters(twins.tensors_of(twin), run, expected, TOLERANCE)


@pytest.mark.parametrize('shape', [(20, 20), (37, 53), (64, 23), (9, 31)])
def test_images_are_prepared_as_by_transformers(shape):
  image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
  image = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))
  sizes = {'size': {'shortest_edge': 20}, 'crop_size': {'height': 20, 'width': 20}}
  expected = CLIPImageProcessorPil(**sizes)(Image.fromarray(image), return_tensors='np')
  mean, std = (np.float32(each) for each in (preprocessor.OPENAI_MEAN, preprocessor.OPENAI_STD))
  ours = (np.asarray(programs.prepare(image[None], 20)) + 1) / 2
  levels = 255 * (ours - (np.moveaxis(expected.pixel_values, 1, -1) * std + mean))
  assert np.abs(levels).max() <= 1.5  # Pillow rounds to whole levels after each axis


def test_a_folder_of_transformers_opens_and_is_written_back(tmp_path):
  config = dataclasses.replace(
    CONFIGS['quick_gelu, three heads'],
    text=dataclasses.replace(
      CONFIGS['quick_gelu, three heads'].text, vocab_size=49408, context_length=9, mlp_width=50
    ),
  )
  twin = make_twin(config, seed=0, end_id=49407)
  twin.save_pretrained(tmp_path / 'theirs')
  tokenizer = Tokenizer.clip(context_length=9, pad_id=49407)
  tokenizer.save_transformers(tmp_path / 'theirs')
  model = unclip_jax.load(tmp_path / 'theirs')
  prompts = ['a cat', 'a very long caption of nine tokens and more words']
  images = make_inputs(config, 3)[0]
  ids = torch.from_numpy(tokenizer.encode(prompts).ids).long()
  pixels = ((images + 1) / 2 - np.float32(config.pixel_mean)) / np.float32(config.pixel_std)
  with torch.no_grad():
    both = twin(input_ids=ids, pixel_values=torch.from_numpy(np.moveaxis(pixels, -1, 1)))
  with pytest.warns(UserWarning, match='cut off'):
    z_t = model.encode_text(prompts)
  for ours, theirs in ((z_t, both.text_embeds), (model.encode_image(images), both.image_embeds)):
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), atol=1e-5)
  with pytest.raises(UnclipError, match='this model has no decoder'):
    model.generate('a cat')
  systems_convert.convert(tmp_path / 'theirs', tmp_path / 'ours', 'unclip')
  systems_convert.convert(tmp_path / 'ours', tmp_path / 'again', 'transformers')
  again = transformers.CLIPModel.from_pretrained(tmp_path / 'again')
  for name, tensor in twin.state_dict().items():
    assert torch.equal(again.state_dict()[name], tensor), name
  assert again.config.text_config.eos_token_id == 49407
