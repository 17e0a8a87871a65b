"""Tiny Kandinskys of diffusers with random weights, and the folders that it saves them in."""

import dataclasses
import json

import diffusers
import karlo_twin
import transformers
import twins
from diffusers.models.embeddings import (
  ImageProjection,
  ImageTimeEmbedding,
  TextImageProjection,
  TextImageTimeEmbedding,
)
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from unclip_jax.configs import (
  AutoencoderConfig,
  ClipConfig,
  DiffusionConfig,
  KandinskyDecoderConfig,
  PriorConfig,
  SamplingConfig,
  TextConfig,
  UnclipConfig,
  UNetConfig,
  ViTConfig,
  XlmRobertaConfig,
)

diffusers.utils.logging.set_verbosity_error()
SPECIAL = ('<s>', '<pad>', '</s>', '<unk>')
WORDS = ('▁a', '▁red', '▁cat', '▁the', 'er', 'ing', '▁')
LETTERS = 'abcdefghijklmnopqrstuvwxyz,'
BETAS = (0.00085, 0.012)
PREPROCESSOR = {
  **karlo_twin.PREPROCESSOR,
  'crop_size': {'height': 20, 'width': 20},
  'size': {'shortest_edge': 20},
  'do_rescale': True,
  'rescale_factor': 1 / 255,
  'image_processor_type': 'CLIPImageProcessor',
}


def _make_config(embed_dim, decoder, decoder_text=None):
  """Sizes of which no two that could be taken for each other are the same."""
  return UnclipConfig(
    clip=ClipConfig(
      text=TextConfig(
        vocab_size=karlo_twin.VOCAB_SIZE,
        context_length=77,
        width=embed_dim,
        depth=1,
        num_heads=2,
        mlp_activation='quick_gelu',
      ),
      vision=ViTConfig(
        image_size=20,
        patch_size=5,
        width=21,
        depth=2,
        num_heads=3,
        mlp_activation='gelu',
        mlp_width=35,
      ),
      embed_dim=embed_dim,
      unit_norm=False,
      pixel_mean=tuple(PREPROCESSOR['image_mean']),
      pixel_std=tuple(PREPROCESSOR['image_std']),
    ),
    prior=PriorConfig(
      embed_dim=embed_dim,
      text_width=embed_dim,
      context_length=77,
      width=12,
      depth=2,
      num_heads=2,
      diffusion=DiffusionConfig(prediction='x_0', clip_x_0=10.0),
      sampling=SamplingConfig(num_steps=25, spacing='karlo', guidance_scale=4.0),
      unit_norm=False,
      num_candidates=1,
    ),
    decoder=decoder,
    decoder_text=decoder_text,
    # Of less than 64 channels, the 32 groups of its spatial norms would have one each.
    autoencoder=AutoencoderConfig(
      channels=32,
      multipliers=(2, 3),
      num_res_blocks=1,
      latent_channels=4,
      kind='vq',
      scaling=1.0,
      attention_levels=(1,),
      num_groups=16,
      codebook_size=7,
      spatial_norm=True,
    ),
  )


CONFIGS = {
  '2.1': _make_config(
    embed_dim=24,
    decoder=KandinskyDecoderConfig(
      image_size=8,
      embed_dim=24,
      unet=UNetConfig(
        in_channels=4,
        out_channels=8,
        channels=6,
        multipliers=(1, 2),
        num_res_blocks=1,
        attention_levels=(1,),
        head_dim=3,
        context_dim=24,
        num_groups=3,
      ),
      diffusion=DiffusionConfig('linear', betas=BETAS, learned_variance=True),
      sampling=SamplingConfig(
        num_steps=100,
        sampler='ddim',
        spacing='leading',
        offset=1,
        to_x_0=False,
        guidance_scale=4.0,
      ),
      num_image_tokens=10,
      text_width=15,
      text_embed_dim=24,
    ),
    decoder_text=XlmRobertaConfig(
      vocab_size=len(SPECIAL) + len(WORDS) + len(LETTERS) + 1,
      context_length=77,
      width=15,
      depth=2,
      num_heads=5,
      mlp_width=31,
      num_positions=79,
      pad_id=1,
      embed_dim=24,
    ),
  ),
  '2.2': _make_config(
    embed_dim=18,
    decoder=KandinskyDecoderConfig(
      image_size=12,
      embed_dim=18,
      unet=UNetConfig(
        in_channels=4,
        out_channels=8,
        channels=10,
        multipliers=(1, 2, 3),
        num_res_blocks=1,
        attention_levels=(1, 2),
        head_dim=10,
        context_dim=14,
        num_groups=5,
      ),
      diffusion=DiffusionConfig('linear', betas=BETAS, learned_variance=True, clip_x_0=2.0),
      sampling=SamplingConfig(
        num_steps=100, spacing='leading', variance='learned', guidance_scale=4.0
      ),
      num_image_tokens=32,
    ),
  ),
}


def build_unet(config):
  """The U-Net of a decoder; its projections may be of sizes that its own config cannot tell."""
  unet, text_width = config.unet, config.text_width
  levels = range(len(unet.multipliers))
  attention = [level in unet.attention_levels for level in levels]
  down = {False: 'ResnetDownsampleBlock2D', True: 'SimpleCrossAttnDownBlock2D'}
  up = {False: 'ResnetUpsampleBlock2D', True: 'SimpleCrossAttnUpBlock2D'}
  model = diffusers.UNet2DConditionModel(
    sample_size=config.image_size,
    in_channels=unet.in_channels,
    out_channels=unet.out_channels,
    block_out_channels=tuple(unet.channels * m for m in unet.multipliers),
    layers_per_block=unet.num_res_blocks,
    down_block_types=tuple(down[has] for has in attention),
    mid_block_type='UNetMidBlock2DSimpleCrossAttn',
    up_block_types=tuple(up[has] for has in reversed(attention)),
    attention_head_dim=unet.head_dim,
    cross_attention_dim=unet.context_dim,
    encoder_hid_dim=config.embed_dim if text_width is None else text_width,
    encoder_hid_dim_type='image_proj' if text_width is None else 'text_image_proj',
    addition_embed_type='image' if text_width is None else 'text_image',
    resnet_time_scale_shift='scale_shift' if unet.scale_shift else 'default',
    norm_num_groups=unet.num_groups,
  )
  sizes = config.embed_dim, unet.context_dim, config.num_image_tokens
  if text_width is None:
    model.encoder_hid_proj = ImageProjection(*sizes)
    model.add_embedding = ImageTimeEmbedding(config.embed_dim, unet.emb_dim)
  else:
    model.encoder_hid_proj = TextImageProjection(text_width, *sizes)
    model.add_embedding = TextImageTimeEmbedding(
      config.text_embed_dim, config.embed_dim, unet.emb_dim
    )
  return model


def make_unet(config, seed):
  """`build_unet`, with weights drawn anew."""
  return twins.randomise(build_unet(config), seed)


def make_text_tokenizer():
  """transformers' tokenizer of 2.1's decoder, of a few pieces."""
  pieces = [*WORDS, *LETTERS]
  scores = [-1.0 - i / 8 for i in range(len(pieces))]
  vocab = [(word, 0.0) for word in SPECIAL] + list(zip(pieces, scores, strict=True))
  return transformers.XLMRobertaTokenizer([*vocab, ('<mask>', 0.0)])


def make_parts(config, seed=0):
  """The networks of both pipelines, with weights drawn anew."""
  clip, prior, text, movq = config.clip, config.prior, config.decoder_text, config.autoencoder

  def tower(part, **others):
    return {
      'hidden_size': part.width,
      'intermediate_size': part.mlp_width or 4 * part.width,
      'num_hidden_layers': part.depth,
      'num_attention_heads': part.num_heads,
      'hidden_act': part.mlp_activation,
      'projection_dim': clip.embed_dim,
      **others,
    }

  attention = [i in movq.attention_levels for i in range(len(movq.multipliers))]
  parts = {
    'prior_text_encoder': transformers.CLIPTextModelWithProjection(
      transformers.CLIPTextConfig(**tower(clip.text, vocab_size=clip.text.vocab_size))
    ),
    'prior_image_encoder': transformers.CLIPVisionModelWithProjection(
      transformers.CLIPVisionConfig(
        **tower(clip.vision, image_size=clip.vision.image_size, patch_size=clip.vision.patch_size)
      )
    ),
    'prior_prior': diffusers.PriorTransformer(
      num_attention_heads=prior.num_heads,
      attention_head_dim=prior.width // prior.num_heads,
      num_layers=prior.depth,
      embedding_dim=prior.embed_dim,
    ),
    'movq': diffusers.VQModel(
      block_out_channels=tuple(movq.channels * m for m in movq.multipliers),
      down_block_types=tuple('Attn' * a + 'DownEncoderBlock2D' for a in attention),
      up_block_types=tuple('Attn' * a + 'UpDecoderBlock2D' for a in reversed(attention)),
      layers_per_block=movq.num_res_blocks,
      latent_channels=movq.latent_channels,
      num_vq_embeddings=movq.codebook_size,
      norm_num_groups=movq.num_groups,
      vq_embed_dim=movq.latent_channels,
      norm_type='spatial',
    ),
  }
  if text is not None:
    parts['text_encoder'] = MultilingualCLIP(
      MCLIPConfig(
        transformerDimSize=text.width,
        imageDimSize=text.embed_dim,
        vocab_size=text.vocab_size,
        hidden_size=text.width,
        num_hidden_layers=text.depth,
        num_attention_heads=text.num_heads,
        intermediate_size=text.mlp_width,
        max_position_embeddings=text.num_positions,
        type_vocab_size=text.num_token_types,
        layer_norm_eps=text.epsilon,
        pad_token_id=text.pad_id,
      )
    )
  for i, part in enumerate(parts.values()):
    twins.randomise(part, 10 * seed + i)
  return parts | {'unet': make_unet(config.decoder, 10 * seed + 9)}


def make_schedulers(version):
  """With the fields of the public models."""
  linear = {'beta_schedule': 'linear', 'beta_start': BETAS[0], 'beta_end': BETAS[1]}
  if version == '2.1':
    scheduler = diffusers.DDIMScheduler(
      **linear, clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
  else:
    scheduler = diffusers.DDPMScheduler(
      **linear, variance_type='learned_range', clip_sample=True, clip_sample_range=2.0
    )
  prior = diffusers.UnCLIPScheduler(prediction_type='sample', clip_sample_range=10.0)
  return {'prior_scheduler': prior, 'scheduler': scheduler}


def make_pipelines(folder, version, seed=0, **decoder):
  """A prior's pipeline and a decoder's, saved to `folder`/prior, decoder, and both to combined.

  Args:
    folder: to save to.
    version: '2.1' or '2.2'.
    seed: of the weights.
    **decoder: fields of the decoder's config that are not those of `CONFIGS`.

  Returns:
    Both pipelines, and their components by the names of the combined one.
  """
  config = CONFIGS[version]
  if decoder:
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **decoder))
  parts = make_parts(config, seed) | make_schedulers(version)
  parts['prior_tokenizer'] = karlo_twin.make_tokenizer(folder / 'clip_tokenizer')
  # transformers' processors of images want torchvision: the file is all that we read.
  parts['prior_image_processor'] = None
  if version == '2.1':
    parts['tokenizer'] = make_text_tokenizer()
  of_prior = {k.removeprefix('prior_'): v for k, v in parts.items() if k.startswith('prior_')}
  of_decoder = {k: v for k, v in parts.items() if not k.startswith('prior_')}
  names = {'2.1': 'Kandinsky', '2.2': 'KandinskyV22'}[version]
  pipelines = {
    kind: getattr(diffusers, f'{names}{suffix}Pipeline')(**its_parts)
    for kind, suffix, its_parts in (
      ('prior', 'Prior', of_prior),
      ('decoder', '', of_decoder),
      ('combined', 'Combined', parts),
    )
  }
  for kind, pipeline in pipelines.items():
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / kind)
  for kind, processor in (('prior', 'image_processor'), ('combined', 'prior_image_processor')):
    (folder / kind / processor).mkdir()
    write_json(folder / kind / processor / 'preprocessor_config.json', PREPROCESSOR)
    index = folder / kind / 'model_index.json'
    change_json(index, **{processor: ['transformers', 'CLIPImageProcessor']})
  return pipelines['prior'], pipelines['decoder'], parts


def write_json(path, values):
  """A JSON file."""
  path.write_text(json.dumps(values))


def change_json(path, **changes):
  """Some fields of a JSON file."""
  write_json(path, json.loads(path.read_text()) | changes)
