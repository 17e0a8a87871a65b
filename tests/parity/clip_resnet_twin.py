"""CLIP's ResNet in torch, from section 2.4 of the paper, and CLIPs under OpenAI's names.

No class of transformers has that tower. The module names are those of OpenAI's archives, so that a
twin's state_dict is such a file. The Vision Transformer and the text tower are transformers', under
names that are mapped here and not by the rules that are tested.
"""

import numpy as np
import torch
import transformers
import twins
from torch import nn

from unclip_jax.configs import ResNetConfig


class Block(nn.Module):
  def __init__(self, channels_in, width, stride):
    super().__init__()
    self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
    self.bn3 = nn.BatchNorm2d(4 * width)
    self.blur = nn.AvgPool2d(stride)
    self.downsample = nn.Sequential()
    if stride > 1 or channels_in != 4 * width:
      self.downsample.add_module('-1', nn.AvgPool2d(stride))
      self.downsample.add_module('0', nn.Conv2d(channels_in, 4 * width, 1, bias=False))
      self.downsample.add_module('1', nn.BatchNorm2d(4 * width))

  def forward(self, x):
    h = self.bn1(self.conv1(x)).clamp(min=0)
    h = self.bn2(self.conv2(h)).clamp(min=0)
    h = self.bn3(self.conv3(self.blur(h)))
    return (h + self.downsample(x)).clamp(min=0)


class Pool(nn.Module):
  def __init__(self, num_pixels, channels, num_heads, embed_dim):
    super().__init__()
    self.num_heads = num_heads
    self.positional_embedding = nn.Parameter(torch.zeros(num_pixels + 1, channels))
    self.q_proj = nn.Linear(channels, channels)
    self.k_proj = nn.Linear(channels, channels)
    self.v_proj = nn.Linear(channels, channels)
    self.c_proj = nn.Linear(channels, embed_dim)

  def forward(self, x):
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding
    q, k, v = (
      layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
      for layer in (self.q_proj, self.k_proj, self.v_proj)
    )
    weights = (q[:, :, :1] @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1)
    return self.c_proj((weights @ v)[:, :, 0].flatten(1))


class Visual(nn.Module):
  def __init__(self, config, embed_dim):
    super().__init__()
    half, width = config.width // 2, config.width
    self.conv1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False)
    self.bn1 = nn.BatchNorm2d(half)
    self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
    self.bn2 = nn.BatchNorm2d(half)
    self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
    self.bn3 = nn.BatchNorm2d(width)
    channels = width
    for level, depth in enumerate(config.depths):
      blocks = []
      for i in range(depth):
        blocks.append(Block(channels, width * 2**level, 2 if level and not i else 1))
        channels = 4 * width * 2**level
      setattr(self, f'layer{level + 1}', nn.Sequential(*blocks))
    self.num_levels = len(config.depths)
    pixels = (config.image_size // (4 * 2 ** (self.num_levels - 1))) ** 2
    self.attnpool = Pool(pixels, channels, config.num_heads, embed_dim)

  def forward(self, x):
    for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
      x = norm(conv(x)).clamp(min=0)
    x = nn.functional.avg_pool2d(x, 2)
    for level in range(self.num_levels):
      x = getattr(self, f'layer{level + 1}')(x)
    return self.attnpool(x)


class Twin:
  """A CLIP of random weights: `tensors` under OpenAI's names, and what it makes of inputs.

  Attributes:
    tensors: float32; of a ResNet without the counters of its norms.
  """

  def __init__(self, config, seed):
    self.config = config
    text, vision = config.text, config.vision
    self.text = transformers.CLIPTextModelWithProjection(
      transformers.CLIPTextConfig(
        vocab_size=text.vocab_size,
        max_position_embeddings=text.context_length,
        bos_token_id=text.vocab_size - 2,
        eos_token_id=text.vocab_size - 1,
        **_tower(config, text),
      )
    )
    self.is_resnet = isinstance(vision, ResNetConfig)
    if self.is_resnet:
      self.vision = Visual(vision, config.embed_dim)
    else:
      self.vision = transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
          image_size=vision.image_size, patch_size=vision.patch_size, **_tower(config, vision)
        )
      )
    twins.randomise(self.text, seed)
    twins.randomise(self.vision, seed + 1)
    if self.is_resnet:
      _randomise_norms(self.vision, vision.image_size, seed)
    self.logit_scale = torch.tensor(2.0)  # for logits of a deviation near 1
    self.tensors = {name: tensor.numpy().copy() for name, tensor in self._named().items()}

  def round_to_half(self):
    """Rounds what OpenAI's archives hold as half precision; returns the names of those."""
    halves = [name for name in self.tensors if _is_half(name)]
    for model in (self.text, self.vision):
      for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
          for parameter in module.parameters(recurse=False):
            parameter.copy_(parameter.half())
    self.tensors = {name: tensor.numpy().copy() for name, tensor in self._named().items()}
    return halves

  def run(self, images, ids):
    """z_i, z_t, states, logits, and the keys of every layer of attention."""
    config = self.config
    pixels = ((images + 1) / 2 - np.float32(config.pixel_mean)) / np.float32(config.pixel_std)
    pixels = torch.from_numpy(np.moveaxis(pixels, -1, 1))
    keys, hooks = [], []
    for model in (self.text, self.vision):
      for name, layer in model.named_modules():
        if name.endswith('k_proj'):
          hooks.append(layer.register_forward_hook(lambda layer, x, y: keys.append(y)))
    with torch.no_grad():
      text = self.text(torch.from_numpy(ids).long())
      z_i = self.vision(pixels) if self.is_resnet else self.vision(pixels).image_embeds
    for hook in hooks:
      hook.remove()
    unit_i, unit_t = (nn.functional.normalize(z, dim=1) for z in (z_i, text.text_embeds))
    logits = self.logit_scale.exp() * unit_t @ unit_i.T
    return [z_i, text.text_embeds, text.last_hidden_state, logits, *keys]

  def _named(self):
    tensors = {'logit_scale': self.logit_scale, **_text_tensors(self.text.state_dict())}
    vision = self.vision.state_dict()
    if not self.is_resnet:
      return {**tensors, **_vit_tensors(vision)}
    counters = {name for name in vision if name.endswith('num_batches_tracked')}
    return {**tensors, **{f'visual.{k}': v for k, v in vision.items() if k not in counters}}


def save_archive(twin, path):
  """Writes a TorchScript archive as OpenAI's: half in part, with counters and three numbers."""
  halves = set(twin.round_to_half())
  root = nn.Module()
  for name, array in twin.tensors.items():
    tensor = torch.from_numpy(array).half() if name in halves else torch.from_numpy(array)
    _put(root, name, tensor, is_buffer='.running_' in name)
    if name.endswith('.running_var'):
      _put(root, f'{name.removesuffix("running_var")}num_batches_tracked', torch.tensor(7), True)
  text = twin.config.text
  for name, number in (
    ('input_resolution', twin.config.vision.image_size),
    ('context_length', text.context_length),
    ('vocab_size', text.vocab_size),
  ):
    _put(root, name, torch.tensor(number), is_buffer=True)
  mask = torch.full((text.context_length, text.context_length), -torch.inf).triu(1)
  _put(root, 'transformer.resblocks.0.attn_mask', mask, is_buffer=True)
  torch.jit.script(root.eval().requires_grad_(False)).save(path)


def _tower(config, tower):
  return {
    'hidden_size': tower.width,
    'intermediate_size': tower.mlp_width or 4 * tower.width,
    'num_hidden_layers': tower.depth,
    'num_attention_heads': tower.num_heads,
    'hidden_act': tower.mlp_activation,
    'projection_dim': config.embed_dim,
  }


def _randomise_norms(model, image_size, seed):
  """Statistics near those of some images, or a deep tower makes the same of any image."""
  generator = torch.Generator().manual_seed(seed)
  norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, nn.BatchNorm2d)}
  shape = (16, 3, image_size, image_size)
  images = torch.randn(16, 3, 1, 1, generator=generator) + torch.randn(shape, generator=generator)
  with torch.no_grad():
    for name, norm in norms.items():
      scale = 0.25 if name.endswith(('bn3', 'downsample.1')) else 1  # sums of blocks grow
      noise = torch.randn((2, norm.num_features), generator=generator)
      norm.weight.copy_(scale * (1 + 0.3 * noise[0]))
      norm.bias.copy_(0.3 * scale * noise[1])
      norm.momentum = 1.0
    model.train()(images)
    for norm in norms.values():
      noise = torch.randn(norm.num_features, generator=generator)
      norm.running_mean.add_(0.3 * noise * norm.running_var.sqrt())
      norm.running_var.mul_(0.5 + torch.rand(norm.num_features, generator=generator))
  model.eval()


def _is_half(name):
  is_norm = any(f'{part}.' in name for part in ('bn1', 'bn2', 'bn3', 'downsample.1'))
  is_norm = is_norm or any(
    f'{p}.' in name for p in ('ln_1', 'ln_2', 'ln_pre', 'ln_post', 'ln_final')
  )
  is_table = 'embedding' in name or name == 'logit_scale'
  return not is_norm and not is_table


def _text_tensors(theirs):
  tower = 'text_model'
  return {
    'token_embedding.weight': theirs[f'{tower}.embeddings.token_embedding.weight'],
    'positional_embedding': theirs[f'{tower}.embeddings.position_embedding.weight'],
    **_block_tensors(theirs, tower, ''),
    'ln_final.weight': theirs[f'{tower}.final_layer_norm.weight'],
    'ln_final.bias': theirs[f'{tower}.final_layer_norm.bias'],
    'text_projection': theirs['text_projection.weight'].T.contiguous(),
  }


def _vit_tensors(theirs):
  tower = 'vision_model'
  return {
    'visual.conv1.weight': theirs[f'{tower}.embeddings.patch_embedding.weight'],
    'visual.class_embedding': theirs[f'{tower}.embeddings.class_embedding'],
    'visual.positional_embedding': theirs[f'{tower}.embeddings.position_embedding.weight'],
    'visual.ln_pre.weight': theirs[f'{tower}.pre_layrnorm.weight'],
    'visual.ln_pre.bias': theirs[f'{tower}.pre_layrnorm.bias'],
    **_block_tensors(theirs, tower, 'visual.'),
    'visual.ln_post.weight': theirs[f'{tower}.post_layernorm.weight'],
    'visual.ln_post.bias': theirs[f'{tower}.post_layernorm.bias'],
    'visual.proj': theirs['visual_projection.weight'].T.contiguous(),
  }


def _block_tensors(theirs, tower, prefix):
  names = {
    'layer_norm1': 'ln_1',
    'layer_norm2': 'ln_2',
    'self_attn.out_proj': 'attn.out_proj',
    'mlp.fc1': 'mlp.c_fc',
    'mlp.fc2': 'mlp.c_proj',
  }
  tensors, i = {}, 0
  while f'{tower}.encoder.layers.{i}.mlp.fc1.bias' in theirs:
    source, target = f'{tower}.encoder.layers.{i}', f'{prefix}transformer.resblocks.{i}'
    for kind in ('weight', 'bias'):
      for old, new in names.items():
        tensors[f'{target}.{new}.{kind}'] = theirs[f'{source}.{old}.{kind}']
      tensors[f'{target}.attn.in_proj_{kind}'] = torch.cat(
        [theirs[f'{source}.self_attn.{part}_proj.{kind}'] for part in 'qkv']
      )
    i += 1
  return tensors


def _put(root, name, tensor, is_buffer):
  *path, leaf = name.split('.')
  for part in path:
    if part not in dict(root.named_children()):
      root.add_module(part, nn.Module())
    root = dict(root.named_children())[part]
  if is_buffer:
    root.register_buffer(leaf, tensor)
  else:
    root.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
