"""Names and shapes of CLIP's tensors as OpenAI has them, written down apart from our rules."""

import dataclasses

from unclip_jax.configs import (
  ClipConfig,
  ResNetConfig,
  TextConfig,
)

TEXT = TextConfig(vocab_size=49408, context_length=5, width=64, depth=1, num_heads=1)
TINY = ResNetConfig(image_size=64, width=4, depths=(1, 2, 1, 1), num_heads=2)
CLIP = ClipConfig(
  text=dataclasses.replace(TEXT, mlp_activation='quick_gelu'),
  vision=TINY,
  embed_dim=7,
  pixel_mean=(0.48145466, 0.4578275, 0.40821073),
  pixel_std=(0.26862954, 0.26130258, 0.27577711),
)


class ReadError(Exception):
  """Shapes are all that there is."""


class Shapes(dict):
  """Tensors of which nothing but the shapes is known."""

  def names(self):
    return set(self)

  def shape(self, name):
    return self[name]

  def read(self, name):
    raise ReadError(name)


def transformer_shapes(prefix, width, depth, mlp_width):
  shapes = {}
  for i in range(depth):
    block = f'{prefix}transformer.resblocks.{i}'
    linear = {
      'attn.in_proj_': (3 * width, width),
      'attn.out_proj.': (width, width),
      'mlp.c_fc.': (mlp_width, width),
      'mlp.c_proj.': (width, mlp_width),
    }
    shapes |= {f'{block}.{name}weight': shape for name, shape in linear.items()}
    shapes |= {f'{block}.{name}bias': shape[:1] for name, shape in linear.items()}
    shapes |= {f'{block}.ln_{n}.{kind}': (width,) for n in (1, 2) for kind in ('weight', 'bias')}
  return shapes


def norm_shapes(name, width, kinds=('weight', 'bias')):
  return {f'{name}.{kind}': (width,) for kind in kinds}


def resnet_shapes(size, width, depths, embed_dim):
  def conv(name, norm, channels, shape):
    kinds = ('weight', 'bias', 'running_mean', 'running_var')
    found = {f'{name}.weight': (channels, *shape), **norm_shapes(norm, channels, kinds)}
    return {**found, f'{norm}.num_batches_tracked': ()}

  half = width // 2
  shapes = {
    **conv('visual.conv1', 'visual.bn1', half, (3, 3, 3)),
    **conv('visual.conv2', 'visual.bn2', half, (half, 3, 3)),
    **conv('visual.conv3', 'visual.bn3', width, (half, 3, 3)),
  }
  channels, planes = width, width
  for level, depth in enumerate(depths, start=1):
    for i in range(depth):
      name, wide = f'visual.layer{level}.{i}', 4 * planes
      shapes |= conv(f'{name}.conv1', f'{name}.bn1', planes, (channels, 1, 1))
      shapes |= conv(f'{name}.conv2', f'{name}.bn2', planes, (planes, 3, 3))
      shapes |= conv(f'{name}.conv3', f'{name}.bn3', wide, (planes, 1, 1))
      if i == 0:
        shapes |= conv(f'{name}.downsample.0', f'{name}.downsample.1', wide, (channels, 1, 1))
      channels = wide
    planes *= 2
  pool = 'visual.attnpool'
  shapes[f'{pool}.positional_embedding'] = ((size // 32) ** 2 + 1, channels)
  for name, out in (('q', channels), ('k', channels), ('v', channels), ('c', embed_dim)):
    shapes |= {f'{pool}.{name}_proj.weight': (out, channels), f'{pool}.{name}_proj.bias': (out,)}
  return shapes


def vit_shapes(size, patch, width, depth, embed_dim, mlp_width):
  return {
    'visual.class_embedding': (width,),
    'visual.positional_embedding': ((size // patch) ** 2 + 1, width),
    'visual.proj': (width, embed_dim),
    'visual.conv1.weight': (width, 3, patch, patch),
    **norm_shapes('visual.ln_pre', width),
    **transformer_shapes('visual.', width, depth, mlp_width or 4 * width),
    **norm_shapes('visual.ln_post', width),
  }


def clip_shapes(config):
  """The names and shapes of a file, of both kinds of towers."""
  text, vision, embed_dim = config.text, config.vision, config.embed_dim
  if isinstance(vision, ResNetConfig):
    tower = resnet_shapes(vision.image_size, vision.width, vision.depths, embed_dim)
  else:
    v = vision
    tower = vit_shapes(v.image_size, v.patch_size, v.width, v.depth, embed_dim, v.mlp_width)
  return Shapes(
    {
      **tower,
      **transformer_shapes('', text.width, text.depth, 4 * text.width),
      'logit_scale': (),
      'positional_embedding': (text.context_length, text.width),
      'text_projection': (text.width, embed_dim),
      'token_embedding.weight': (text.vocab_size, text.width),
      **norm_shapes('ln_final', text.width),
    }
  )


def archive_shapes(config):
  marks = {'input_resolution': (), 'context_length': (), 'vocab_size': ()}
  return Shapes({**clip_shapes(config), **marks})
