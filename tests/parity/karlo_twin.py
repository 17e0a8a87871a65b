"""Tiny Karlos of diffusers with random weights, and the folders that it saves them in."""

import gzip
import json

import diffusers
import torch
import transformers
import twins
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

from unclip_jax.data import clip_vocabulary
from unclip_jax.data.tokenizer import Tokenizer

diffusers.utils.logging.set_verbosity_error()
VOCAB_SIZE = 49408
# Outputs of deviation 1 and tables of float32: a tiny net is as sensitive as one may be.
PREPROCESSOR = {
  'crop_size': 20,
  'do_center_crop': True,
  'do_normalize': True,
  'do_resize': True,
  'feature_extractor_type': 'CLIPFeatureExtractor',
  'image_mean': [0.48145466, 0.4578275, 0.40821073],
  'image_std': [0.26862954, 0.26130258, 0.27577711],
  'resample': 3,
  'size': 20,
}


def make_tokenizer(folder, pad_token='!'):
  """transformers' tokenizer of CLIP's own vocabulary, as Karlo pads it."""
  folder.mkdir(parents=True)
  merges = gzip.decompress(clip_vocabulary.MERGES_FILE.read_bytes()).decode()
  (folder / 'merges.txt').write_text('#version: 0.2\n' + merges)
  vocab = Tokenizer.clip()._bpe.get_vocab()
  (folder / 'vocab.json').write_text(json.dumps(vocab, ensure_ascii=False))
  return transformers.CLIPTokenizer(
    vocab=str(folder / 'vocab.json'),
    merges=str(folder / 'merges.txt'),
    pad_token=pad_token,
    model_max_length=77,
  )


def make_parts(
  embed_dim=24,
  text_layers=1,
  text_heads=2,
  prior_heads=(2, 6),
  prior_layers=2,
  channels=6,
  multipliers=(1, 2),
  num_res_blocks=1,
  head_dim=3,
  context_dim=10,
  groups=3,
  num_tokens=3,
  size=8,
  up_channels=5,
  up_groups=5,
  up_multipliers=(1, 2),
  up_size=16,
  up_scale_shift='default',
  clip_range=5.0,
  seed=0,
):
  """The networks of both pipelines, with weights drawn anew."""
  clip = {
    'hidden_size': embed_dim,
    'intermediate_size': 4 * embed_dim,
    'num_hidden_layers': text_layers,
    'num_attention_heads': text_heads,
    'projection_dim': embed_dim,
  }
  widths = tuple(channels * m for m in multipliers)
  levels = len(widths)
  up_widths = tuple(up_channels * m for m in up_multipliers)
  upsampler = {
    'sample_size': up_size,
    'in_channels': 6,
    'out_channels': 3,
    'block_out_channels': up_widths,
    'layers_per_block': num_res_blocks,
    'down_block_types': ('ResnetDownsampleBlock2D',) * len(up_widths),
    'up_block_types': ('ResnetUpsampleBlock2D',) * len(up_widths),
    'add_attention': False,
    'norm_num_groups': up_groups,
    'resnet_time_scale_shift': up_scale_shift,
  }
  parts = {
    'text_encoder': transformers.CLIPTextModelWithProjection(
      transformers.CLIPTextConfig(vocab_size=VOCAB_SIZE, **clip)
    ),
    'image_encoder': transformers.CLIPVisionModelWithProjection(
      transformers.CLIPVisionConfig(image_size=20, patch_size=5, **clip)
    ),
    'prior': diffusers.PriorTransformer(
      num_attention_heads=prior_heads[0],
      attention_head_dim=prior_heads[1],
      num_layers=prior_layers,
      embedding_dim=embed_dim,
    ),
    'text_proj': UnCLIPTextProjModel(
      clip_extra_context_tokens=num_tokens,
      clip_embeddings_dim=embed_dim,
      time_embed_dim=4 * channels,
      cross_attention_dim=context_dim,
    ),
    'decoder': diffusers.UNet2DConditionModel(
      sample_size=size,
      in_channels=3,
      out_channels=6,
      block_out_channels=widths,
      layers_per_block=num_res_blocks,
      down_block_types=('ResnetDownsampleBlock2D', *['SimpleCrossAttnDownBlock2D'] * (levels - 1)),
      mid_block_type='UNetMidBlock2DSimpleCrossAttn',
      up_block_types=(*['SimpleCrossAttnUpBlock2D'] * (levels - 1), 'ResnetUpsampleBlock2D'),
      attention_head_dim=head_dim,
      cross_attention_dim=context_dim,
      class_embed_type='identity',
      resnet_time_scale_shift='scale_shift',
      norm_num_groups=groups,
    ),
    'super_res_first': diffusers.UNet2DModel(**upsampler),
    'super_res_last': diffusers.UNet2DModel(**upsampler),
  }
  for i, part in enumerate(parts.values()):
    twins.randomise(part, 10 * seed + i)
  schedulers = {
    'prior_scheduler': {'prediction_type': 'sample', 'clip_sample_range': clip_range},
    'decoder_scheduler': {'variance_type': 'learned_range'},
    'super_res_scheduler': {},
  }
  return parts | {name: diffusers.UnCLIPScheduler(**kw) for name, kw in schedulers.items()}


def make_pipelines(folder, **sizes):
  """Both pipelines with the same networks, saved to `folder`/text and `folder`/variation."""
  parts = make_parts(**sizes)
  parts['tokenizer'] = make_tokenizer(folder / 'clip_tokenizer')
  prior = ('prior', 'prior_scheduler')
  text = diffusers.UnCLIPPipeline(**{k: v for k, v in parts.items() if k != 'image_encoder'})
  text.save_pretrained(folder / 'text')
  # transformers' processors of images want torchvision: the file is all that we read.
  variation = folder / 'variation'
  index = {'_class_name': 'UnCLIPImageVariationPipeline', '_diffusers_version': '0.12.0.dev0'}
  for name, part in parts.items():
    if name not in prior:
      part.save_pretrained(variation / name)
      library = type(part).__module__.partition('.')[0]
      index[name] = [library, type(part).__name__]
  index['feature_extractor'] = ['transformers', 'CLIPFeatureExtractor']
  (variation / 'feature_extractor').mkdir()
  (variation / 'feature_extractor' / 'preprocessor_config.json').write_text(
    json.dumps(PREPROCESSOR)
  )
  (variation / 'model_index.json').write_text(json.dumps(index))
  text.set_progress_bar_config(disable=True)
  return text, parts


def to_torch(x):
  """NHWC or a matrix, as torch has it."""
  x = torch.from_numpy(x.copy())
  return x.movedim(-1, 1) if x.ndim == 4 else x
