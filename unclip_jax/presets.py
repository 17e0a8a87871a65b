"""Presets: `tiny` for tests, `emoji_small` (32 -> 128 -> 1024 px), `emoji` (64 -> 256), `paper`.

Those that end in `_ar` have the autoregressive prior in place of the diffusion prior.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from unclip_jax.configs import (
  ArPriorConfig,
  ClipConfig,
  ConvTowerConfig,
  DecoderConfig,
  DiffusionConfig,
  PriorConfig,
  SamplingConfig,
  TextConfig,
  UnclipConfig,
  UNetConfig,
  UpsamplerConfig,
  ViTConfig,
)
from unclip_jax.types import UnclipError

TINY = UnclipConfig(
  clip=ClipConfig(
    text=TextConfig(vocab_size=300, context_length=12, width=24, depth=2, num_heads=2),
    vision=ViTConfig(image_size=16, patch_size=4, width=24, depth=2, num_heads=2),
    embed_dim=16,
  ),
  prior=PriorConfig(
    embed_dim=16,
    text_width=24,
    context_length=12,
    width=32,
    depth=2,
    num_heads=2,
    diffusion=DiffusionConfig(prediction='x_0'),
    sampling=SamplingConfig(num_steps=3),
  ),
  decoder=DecoderConfig(
    image_size=16,
    embed_dim=16,
    embed_scale=4.0,
    unet=UNetConfig(
      in_channels=3,
      out_channels=6,
      channels=16,
      multipliers=(1, 2),
      num_res_blocks=1,
      attention_levels=(1,),
      head_dim=16,
      context_dim=24,
      num_groups=8,
    ),
    diffusion=DiffusionConfig(learned_variance=True, clip_x_0=1.0),
    sampling=SamplingConfig(num_steps=4, variance='learned', guidance_scale=2.0),
    text=TextConfig(vocab_size=300, context_length=12, width=24, depth=1, num_heads=2),
  ),
  upsamplers=(
    UpsamplerConfig(
      image_size=32,
      low_size=16,
      unet=UNetConfig(
        in_channels=3,
        out_channels=3,
        channels=16,
        multipliers=(1, 2),
        num_res_blocks=1,
        condition_channels=3,
        patch_size=2,
        num_groups=8,
      ),
      diffusion=DiffusionConfig(clip_x_0=1.0),
      sampling=SamplingConfig(num_steps=3, sampler='ddim'),
      crop_fraction=0.5,
    ),
  ),
)

_EMOJI_TEXT = TextConfig(vocab_size=2048, context_length=32, width=128, depth=2, num_heads=4)

EMOJI_SMALL = UnclipConfig(
  clip=ClipConfig(
    text=_EMOJI_TEXT,
    vision=ConvTowerConfig(image_size=32, widths=(32, 64, 128), depth=2),
    embed_dim=128,
  ),
  prior=PriorConfig(
    embed_dim=128,
    text_width=128,
    context_length=32,
    width=192,
    depth=4,
    num_heads=4,
    diffusion=DiffusionConfig(prediction='x_0'),
    sampling=SamplingConfig(num_steps=25),
  ),
  decoder=DecoderConfig(
    image_size=32,
    embed_dim=128,
    embed_scale=128**0.5,
    # Two cores for two hours learn where things are only with a first guess to refine.
    draft_size=16,
    # With 0.4 the decoder takes z_t for a z_i, and the prior is worth nothing (docs/emoji.md).
    z_i_noise=0.15,
    unet=UNetConfig(
      in_channels=3,
      out_channels=6,
      channels=48,
      multipliers=(1, 2, 4),
      num_res_blocks=1,
      attention_levels=(1, 2),
      head_dim=32,
      context_dim=128,
      condition_channels=3,
      patch_size=2,
      num_groups=16,
    ),
    # No min-SNR: on v its weights all but vanish at both ends of the schedule, and a short run
    # leaves speckles (t near 0) and vague shapes (t near T).
    # Much of an even v loss comes from the least noise, which no picture shows.
    diffusion=DiffusionConfig(prediction='v', learned_variance=True, clip_x_0=1.0, noise_power=1.0),
    # By docs/emoji.md: more steps bring nothing, and more guidance takes the background's colour.
    # Eight trailing steps draw what 25 strided ones do: docs/benchmarks.md.
    sampling=SamplingConfig(8, 'ddim', 'trailing', 'learned', guidance_scale=1.5),
    text=_EMOJI_TEXT,
  ),
  upsamplers=(
    UpsamplerConfig(
      image_size=128,
      low_size=32,
      unet=UNetConfig(
        in_channels=3,
        out_channels=3,
        channels=32,
        multipliers=(1, 2, 3),
        num_res_blocks=1,
        condition_channels=3,
        patch_size=2,
        num_groups=16,
      ),
      # The small image leaves little open: x_0 is soon learned, where v leaves a residue of noise.
      diffusion=DiffusionConfig(prediction='x_0', clip_x_0=1.0),
      sampling=SamplingConfig(num_steps=15, sampler='ddim'),
      blur_fraction=0.25,
      low_noise=0.1,
      # Trained on crops, it moves the colours of whole pictures: by docs/emoji.md half of the
      # backgrounds.
      keep_low=4,
    ),
    UpsamplerConfig(
      image_size=1024,
      low_size=128,
      # One level, of as many cells as the small picture has pixels: a CPU has no time for more.
      unet=UNetConfig(3, 3, 40, (1,), 1, condition_channels=3, patch_size=8, num_groups=8),
      diffusion=DiffusionConfig(prediction='x_0', clip_x_0=1.0),
      sampling=SamplingConfig(num_steps=4, sampler='ddim', spacing='trailing'),
      degradation='bsr',
      keep_low=4,
      # From nothing, it takes as long to learn to copy the small picture as all the rest.
      residual=True,
    ),
  ),
  # 1024 px take a CPU longer than all stages before.
  default_size=128,
)

# On an accelerator; in bfloat16 it stays below 28 MiB, to come with the package.
EMOJI = UnclipConfig(
  clip=dataclasses.replace(
    EMOJI_SMALL.clip,
    vision=ConvTowerConfig(image_size=64, widths=(32, 64, 96, 128), depth=2),
  ),
  prior=dataclasses.replace(EMOJI_SMALL.prior, sampling=SamplingConfig(num_steps=64)),
  decoder=dataclasses.replace(
    EMOJI_SMALL.decoder,
    image_size=64,
    draft_size=0,
    unet=dataclasses.replace(
      EMOJI_SMALL.decoder.unet,
      multipliers=(1, 2, 3, 3),
      attention_levels=(2, 3),
      head_dim=48,
      condition_channels=0,
      patch_size=1,
      dropout=0.1,
    ),
    sampling=SamplingConfig(num_steps=100, variance='learned', guidance_scale=2.0),
  ),
  upsamplers=(
    dataclasses.replace(
      EMOJI_SMALL.upsamplers[0],
      image_size=256,
      low_size=64,
      unet=dataclasses.replace(EMOJI_SMALL.upsamplers[0].unet, patch_size=1),
      sampling=SamplingConfig(num_steps=27, sampler='ddim', spacing='fast27'),
    ),
  ),
)

# 49,408 is the vocabulary of CLIP's byte-pair encoding; the paper's text contexts are 256 long.
_PAPER_TEXT = TextConfig(vocab_size=49408, context_length=256, width=2048, depth=24, num_heads=32)

PAPER = UnclipConfig(
  clip=ClipConfig(
    text=dataclasses.replace(_PAPER_TEXT, width=1024, num_heads=16),
    vision=ViTConfig(image_size=256, patch_size=16, width=1280, depth=32, num_heads=16),
    embed_dim=1024,
  ),
  prior=PriorConfig(
    embed_dim=1024,
    text_width=1024,
    context_length=256,
    width=2048,
    depth=24,
    num_heads=32,
    diffusion=DiffusionConfig(prediction='x_0'),
    sampling=SamplingConfig(num_steps=64),
  ),
  decoder=DecoderConfig(
    image_size=64,
    embed_dim=1024,
    embed_scale=32.0,
    unet=UNetConfig(
      in_channels=3,
      out_channels=6,
      channels=512,
      multipliers=(1, 2, 3, 4),
      num_res_blocks=3,
      attention_levels=(1, 2, 3),
      head_dim=64,
      context_dim=2048,
      dropout=0.1,
    ),
    diffusion=DiffusionConfig(learned_variance=True, clip_x_0=1.0),
    sampling=SamplingConfig(num_steps=250, variance='learned', guidance_scale=1.25),
    text=_PAPER_TEXT,
  ),
  upsamplers=(
    UpsamplerConfig(
      image_size=256,
      low_size=64,
      unet=UNetConfig(
        in_channels=3,
        out_channels=3,
        channels=320,
        multipliers=(1, 2, 3, 4),
        num_res_blocks=3,
        condition_channels=3,
        dropout=0.1,
      ),
      diffusion=DiffusionConfig(clip_x_0=1.0),
      sampling=SamplingConfig(num_steps=27, sampler='ddim', spacing='fast27'),
    ),
    UpsamplerConfig(
      image_size=1024,
      low_size=256,
      unet=UNetConfig(
        in_channels=3,
        out_channels=3,
        channels=192,
        multipliers=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        condition_channels=3,
      ),
      diffusion=DiffusionConfig(schedule='linear', clip_x_0=1.0),
      sampling=SamplingConfig(num_steps=15, sampler='ddim'),
      degradation='bsr',
    ),
  ),
)

# Karlo v1 (kakaobrain): 1,022M prior, 885M decoder, 2 x 692M super-resolution, CLIP ViT-L/14; what
# is trained with it can be written for diffusers' UnCLIPPipeline.
KARLO = UnclipConfig(
  clip=ClipConfig(
    text=TextConfig(
      vocab_size=49408,
      context_length=77,
      width=768,
      depth=12,
      num_heads=12,
      mlp_activation='quick_gelu',
    ),
    vision=ViTConfig(
      image_size=224,
      patch_size=14,
      width=1024,
      depth=24,
      num_heads=16,
      mlp_activation='quick_gelu',
    ),
    embed_dim=768,
    unit_norm=False,
    pixel_mean=(0.48145466, 0.4578275, 0.40821073),
    pixel_std=(0.26862954, 0.26130258, 0.27577711),
  ),
  prior=PriorConfig(
    embed_dim=768,
    text_width=768,
    context_length=77,
    width=2048,
    depth=20,
    num_heads=32,
    diffusion=DiffusionConfig(prediction='x_0', clip_x_0=5.0),  # 10 in the original code
    sampling=SamplingConfig(num_steps=25, spacing='karlo', guidance_scale=4.0),
    unit_norm=False,
    num_candidates=1,
  ),
  decoder=DecoderConfig(
    image_size=64,
    embed_dim=768,
    unet=dataclasses.replace(PAPER.decoder.unet, channels=320, context_dim=1536, dropout=0.0),
    diffusion=DiffusionConfig(learned_variance=True, clip_x_0=1.0),
    sampling=SamplingConfig(num_steps=25, spacing='karlo', variance='learned', guidance_scale=8.0),
    clip_text_width=768,
  ),
  upsamplers=(
    UpsamplerConfig(
      image_size=256,
      low_size=64,
      unet=dataclasses.replace(PAPER.upsamplers[0].unet, scale_shift=False, dropout=0.0),
      diffusion=DiffusionConfig(clip_x_0=1.0),
      sampling=SamplingConfig(num_steps=7, spacing='karlo'),
      final_unet=True,
    ),
  ),
)

TINY_AR = dataclasses.replace(
  TINY,
  prior=ArPriorConfig(
    embed_dim=16,
    context_length=12,
    width=32,
    depth=2,
    num_heads=2,
    num_components=6,
    num_buckets=32,
    text_width=24,
  ),
)

EMOJI_SMALL_AR = dataclasses.replace(
  EMOJI_SMALL,
  prior=ArPriorConfig(
    embed_dim=128,
    context_length=32,
    width=192,
    depth=4,
    num_heads=4,
    num_components=64,
    # Thousands of pictures fill no 1024 buckets. A hundredth of a range is less than what PCA
    # leaves.
    num_buckets=128,
    text_width=128,
    num_candidates=2,
  ),
)

PAPER_AR = dataclasses.replace(
  PAPER,
  # Table 3 has a context of 384 for the Transformer over components, which 256 positions of a
  # caption and 319 components exceed: how it reads them is not said. Here each has a position.
  prior=ArPriorConfig(
    embed_dim=1024,
    context_length=256,
    width=1664,
    depth=24,
    num_heads=26,
    num_components=319,
    text=_PAPER_TEXT,
  ),
)

PRESETS: Mapping[str, UnclipConfig] = MappingProxyType(
  {
    'tiny': TINY,
    'emoji_small': EMOJI_SMALL,
    'emoji': EMOJI,
    'paper': PAPER,
    'karlo': KARLO,
    'tiny_ar': TINY_AR,
    'emoji_small_ar': EMOJI_SMALL_AR,
    'paper_ar': PAPER_AR,
  }
)


def preset(name: str) -> UnclipConfig:
  """The preset of that name.

  Raises:
    UnclipError: there is none; names those that exist.
  """
  if name not in PRESETS:
    raise UnclipError(f'there is no preset {name!r}: take one of {", ".join(PRESETS)}')
  return PRESETS[name]
