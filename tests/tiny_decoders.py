"""Tiny configs of the decoders of others: Kandinsky's, Stable unCLIP's, GLIDE's."""

import dataclasses

from tiny_model import TWO_LEVELS as CONFIG

from unclip_jax.configs import (
  AutoencoderConfig,
  DiffusionConfig,
  GlideDecoderConfig,
  GlideUpsamplerConfig,
  KandinskyDecoderConfig,
  LatentUNetConfig,
  StableUnclipDecoderConfig,
  UnclipConfig,
)

UNET = dataclasses.replace(CONFIG.decoder.unet, condition_channels=0, patch_size=1)
TEXT = CONFIG.clip.text
# Latents of 8 make pictures of 16.
KANDINSKY = dataclasses.replace(
  CONFIG,
  decoder=KandinskyDecoderConfig(
    image_size=8,
    embed_dim=CONFIG.clip.embed_dim,
    unet=dataclasses.replace(UNET, in_channels=4, out_channels=8),
    diffusion=dataclasses.replace(CONFIG.decoder.diffusion, learned_variance=True),
    sampling=CONFIG.decoder.sampling,
    num_image_tokens=2,
  ),
  upsamplers=(),
  autoencoder=AutoencoderConfig(
    channels=4, multipliers=(1, 2), num_res_blocks=1, latent_channels=4, num_groups=2
  ),
)
STABLE = dataclasses.replace(
  KANDINSKY,
  decoder=StableUnclipDecoderConfig(
    image_size=8,
    embed_dim=CONFIG.clip.embed_dim,
    unet=LatentUNetConfig(
      in_channels=4,
      out_channels=4,
      channels=8,
      multipliers=(1, 2),
      num_res_blocks=1,
      attention_levels=(0,),
      num_heads=(2, 2),
      depths=(1, 1),
      context_dim=TEXT.width,
      class_dim=2 * CONFIG.clip.embed_dim,
      num_groups=4,
    ),
    diffusion=DiffusionConfig(prediction='v'),
    sampling=CONFIG.decoder.sampling,
    z_i_diffusion=DiffusionConfig(),
  ),
  decoder_text=TEXT,
)
GLIDE = UnclipConfig(
  clip=None,
  prior=None,
  decoder=GlideDecoderConfig(
    image_size=8,
    unet=dataclasses.replace(UNET, out_channels=6, context_dim=TEXT.width, condition_channels=4),
    diffusion=dataclasses.replace(CONFIG.decoder.diffusion, learned_variance=True),
    sampling=CONFIG.decoder.sampling,
    text=TEXT,
  ),
  upsamplers=(
    GlideUpsamplerConfig(
      image_size=16,
      low_size=8,
      temperature=0.5,
      unet=dataclasses.replace(UNET, out_channels=6, context_dim=TEXT.width, condition_channels=7),
      diffusion=dataclasses.replace(CONFIG.decoder.diffusion, learned_variance=True),
      sampling=CONFIG.decoder.sampling,
      text=TEXT,
    ),
  ),
)
