"""Tiny Stable unCLIPs of diffusers with random weights, and the folders that it saves them in."""

import json

import diffusers
import karlo_twin
import transformers
import twins
from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

PREPROCESSOR = karlo_twin.PREPROCESSOR
# As in public models 'l' leads from captions to pictures by a prior, and 'h' varies pictures.
KINDS = ('l', 'h')
EMBED_DIMS = {'l': 24, 'h': 18}
SCHEDULERS = {
  'l': diffusers.DDIMScheduler(
    beta_schedule='scaled_linear',
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type='v_prediction',
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
  ),
  'h': diffusers.DDIMScheduler(
    prediction_type='v_prediction', clip_sample_range=3.0, timestep_spacing='trailing'
  ),
}


def make_decoder(embed_dim, seed):
  """What both kinds have, with weights drawn anew."""
  text = transformers.CLIPTextConfig(
    vocab_size=karlo_twin.VOCAB_SIZE,
    hidden_size=14,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=2,
    hidden_act='gelu',
    projection_dim=512,
  )
  parts = {
    'text_encoder': transformers.CLIPTextModel(text),
    'unet': diffusers.UNet2DConditionModel(
      sample_size=6,
      block_out_channels=(10, 30),
      layers_per_block=1,
      down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
      up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
      attention_head_dim=[2, 3],
      cross_attention_dim=14,
      class_embed_type='projection',
      projection_class_embeddings_input_dim=2 * embed_dim,
      use_linear_projection=True,
      norm_num_groups=5,
    ),
    'vae': diffusers.AutoencoderKL(
      block_out_channels=(6, 12),
      down_block_types=('DownEncoderBlock2D',) * 2,
      up_block_types=('UpDecoderBlock2D',) * 2,
      norm_num_groups=3,
    ),
    'image_normalizer': StableUnCLIPImageNormalizer(embed_dim),
  }
  for i, part in enumerate(parts.values()):
    twins.randomise(part, 10 * seed + i)
  std = parts['image_normalizer'].std
  std.copy_(0.5 + std.abs())
  return parts


def make_clip(embed_dim, seed):
  """A text tower with its prior, and an image tower; none of its layers is as wide as another's."""
  text = transformers.CLIPTextConfig(
    vocab_size=karlo_twin.VOCAB_SIZE,
    hidden_size=embed_dim,
    intermediate_size=4 * embed_dim,
    num_hidden_layers=2,
    num_attention_heads=3,
    projection_dim=embed_dim,
  )
  vision = transformers.CLIPVisionConfig(
    image_size=20,
    patch_size=5,
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    hidden_act='gelu',
    projection_dim=embed_dim,
  )
  parts = {
    'prior_text_encoder': transformers.CLIPTextModelWithProjection(text),
    'prior': diffusers.PriorTransformer(
      num_attention_heads=2, attention_head_dim=6, num_layers=2, embedding_dim=embed_dim
    ),
    'image_encoder': transformers.CLIPVisionModelWithProjection(vision),
  }
  for i, part in enumerate(parts.values()):
    twins.randomise(part, 10 * seed + 5 + i)
  return parts


def make_pipelines(folder, kind, seed=0):
  """A pipeline of a kind, saved to `folder`/`kind`; and its parts."""
  embed_dim, out = EMBED_DIMS[kind], folder / kind
  parts = make_decoder(embed_dim, seed) | make_clip(embed_dim, seed)
  parts |= {
    'scheduler': SCHEDULERS[kind],
    'image_noising_scheduler': diffusers.DDPMScheduler(beta_schedule='squaredcos_cap_v2'),
    'tokenizer': karlo_twin.make_tokenizer(folder / f'{kind}_tokenizer'),
  }
  if kind == 'l':
    del parts['image_encoder']
    parts['prior_tokenizer'] = karlo_twin.make_tokenizer(
      folder / f'{kind}_prior_tokenizer', '<|endoftext|>'
    )
    # Karlo's, by way of `from_config`.
    parts['prior_scheduler'] = diffusers.DDPMScheduler(
      beta_schedule='squaredcos_cap_v2',
      variance_type='fixed_small_log',
      prediction_type='sample',
      clip_sample_range=5.0,
    )
    pipeline = diffusers.StableUnCLIPPipeline(**parts)
    pipeline.save_pretrained(out)
  else:
    del parts['prior_text_encoder'], parts['prior']
    # transformers' processors of images want torchvision: the file is all that we read.
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline(**parts, feature_extractor=None)
    pipeline.save_pretrained(out)
    (out / 'feature_extractor').mkdir()
    (out / 'feature_extractor' / 'preprocessor_config.json').write_text(json.dumps(PREPROCESSOR))
    index = json.loads((out / 'model_index.json').read_text())
    index['feature_extractor'] = ['transformers', 'CLIPFeatureExtractor']
    (out / 'model_index.json').write_text(json.dumps(index))
  pipeline.set_progress_bar_config(disable=True)
  return pipeline, parts
