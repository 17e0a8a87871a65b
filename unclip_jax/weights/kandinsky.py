"""Kandinsky 2.1 and 2.2 (ai-forever) as diffusers saves them, in one folder or in two.

A `KandinskyPriorPipeline` leads from captions to z_i, a `KandinskyPipeline` from z_i to pictures; a
`KandinskyCombinedPipeline` is both, and its names of components are those used here. Step counts,
guidance scales and the size of pictures are those that the pipelines default to; all else is read
from the files.
"""

import dataclasses
from typing import Any

from unclip_jax.configs import (
  AutoencoderConfig,
  ClipConfig,
  KandinskyDecoderConfig,
  UnclipConfig,
  XlmRobertaConfig,
)
from unclip_jax.types import UnclipError
from unclip_jax.weights import (
  diffusers_autoencoder,
  diffusers_prior,
  diffusers_schedulers,
  diffusers_unet,
  layouts,
  multilingual_clip,
  transformers_clip,
)
from unclip_jax.weights.foreign_config import read_json
from unclip_jax.weights.foreign_folder import (
  CONFIG_NAME,
  INDEX_NAME,
  SCHEDULER_CONFIG_NAME,
  Components,
  read_component_config,
)
from unclip_jax.weights.preprocessor import PREPROCESSOR_NAME, write_preprocessor_config
from unclip_jax.weights.rules import Rule, dense, layer_norm

_COMBINED, _COMBINED_V22 = 'KandinskyCombinedPipeline', 'KandinskyV22CombinedPipeline'
NAMES = (
  _COMBINED, 'KandinskyImg2ImgCombinedPipeline',
  'KandinskyPipeline', 'KandinskyImg2ImgPipeline',
  _COMBINED_V22, 'KandinskyV22Img2ImgCombinedPipeline',
  'KandinskyV22Pipeline', 'KandinskyV22Img2ImgPipeline',
)  # fmt: skip
PRIOR_NAMES = (
  'KandinskyPriorPipeline', 'KandinskyV22PriorPipeline', 'KandinskyV22PriorEmb2EmbPipeline',
)  # fmt: skip
# What the components of a prior's pipeline are called in a combined one.
PRIOR_COMPONENTS = {
  f'prior_{name}': name
  for name in (
    'prior', 'text_encoder', 'image_encoder', 'tokenizer', 'scheduler', 'image_processor',
  )
}  # fmt: skip
EXTRA = ()
TOKENIZER = 'prior_tokenizer'
DECODER_TOKENIZER = 'tokenizer'  # of 2.1 alone

# Components that transformers writes, by another file name.
OF_TRANSFORMERS = ('prior_text_encoder', 'prior_image_encoder', 'text_encoder')
IGNORED = (*transformers_clip.IGNORED, *diffusers_prior.IGNORED, *multilingual_clip.IGNORED)
_PICTURE_SIZE = 512
_NUM_STEPS, _GUIDANCE_SCALE = 100, 4.0
# How many tokens z_i becomes: no field tells.
_NUM_IMAGE_TOKENS, _NUM_IMAGE_TOKENS_V22 = 10, 32
# How a U-Net says what it reads: whether also captions.
_EMBEDDINGS = {'text_image': True, 'image': False}
_PROJECTIONS = {True: 'text_image_proj', False: 'image_proj'}


def read_config(folders: Components) -> UnclipConfig:
  """The config from the folders of components; without prior or decoder where there is none.

  Raises:
    UnclipError: a file is missing, or a field asks for what ours does not do.
  """
  clip = prior = decoder = decoder_text = autoencoder = None
  if folders.keys() & PRIOR_COMPONENTS.keys():
    clip = _read_clip(folders)
  if 'prior_prior' in folders:
    prior = diffusers_prior.read_config(folders['prior_prior'], folders['prior_scheduler'])
  if 'unet' in folders or clip is None:
    autoencoder = _read_autoencoder(folders)
    decoder = _read_decoder(folders, autoencoder)
    if decoder.text_width is not None:
      path = folders['text_encoder'] / CONFIG_NAME
      decoder_text = multilingual_clip.read_config(read_json(path), str(path))
  return UnclipConfig(clip, prior, decoder, decoder_text=decoder_text, autoencoder=autoencoder)


def rules(config: UnclipConfig) -> dict[str, tuple[tuple[str, ...], list[Rule]]]:
  """For each stage the components that hold it and its rules, their names after the component's."""
  result: dict[str, tuple[tuple[str, ...], list[Rule]]] = {}
  clip, text = config.clip, config.decoder_text
  if clip is not None:
    components = ['prior_text_encoder']
    towers = transformers_clip.text_rules(clip, 'prior_text_encoder/')
    towers.append(transformers_clip.no_log_scale())
    if clip.vision is not None:
      components.append('prior_image_encoder')
      towers += transformers_clip.vision_rules(clip, 'prior_image_encoder/')
    result['clip'] = (tuple(components), towers)
  if config.prior is not None:
    result['prior'] = (('prior_prior',), diffusers_prior.rules(config.prior, 'prior_prior/'))
  if isinstance(text, XlmRobertaConfig):
    of_text = multilingual_clip.rules(text, theirs='text_encoder/')
    result['decoder_text'] = (('text_encoder',), of_text)
  if isinstance(config.decoder, KandinskyDecoderConfig):
    result['decoder'] = (('unet',), decoder_rules(config.decoder, 'unet/'))
  if config.autoencoder is not None:
    movq = [
      rule._replace(theirs=tuple(f'movq/{name}' for name in rule.theirs))
      for rule in diffusers_autoencoder.rules(config.autoencoder)
    ]
    result['autoencoder'] = (('movq',), movq)
  return result


def decoder_rules(config: KandinskyDecoderConfig, theirs: str = '') -> list[Rule]:
  """A `UNet2DConditionModel` and the projections in it; `theirs` is put before their names."""
  context, emb = f'{theirs}encoder_hid_proj', f'{theirs}add_embedding'
  layout = layouts.tokens_out(config.num_image_tokens, token_major=True)
  result = [
    Rule(('z_i_to_tokens.kernel',), (f'{context}.image_embeds.weight',), layout),
    Rule(('z_i_to_tokens.bias',), (f'{context}.image_embeds.bias',), layout),
    *dense('z_i_to_emb', f'{emb}.image_proj'),
    *diffusers_unet.rules(config.unet, 'unet.', theirs),
  ]
  if config.text_width is None:
    return [
      *result,
      *layer_norm('context_norm', f'{context}.norm'),
      *layer_norm('emb_norm', f'{emb}.image_norm'),
    ]
  return [
    *result,
    *dense('text_to_context', f'{context}.text_proj'),
    *dense('text_to_emb', f'{emb}.text_proj'),
    *layer_norm('emb_norm', f'{emb}.text_norm'),
  ]


def write_configs(
  config: UnclipConfig,
  tokenizer_class: str,
  end_id: int,
  decoder_tokenizer_class: str | None = None,
) -> dict[str, dict[str, Any]]:
  """The JSON files of a folder that diffusers opens, by their paths in it: a combined pipeline.

  Args:
    config: of the model.
    tokenizer_class: of transformers.
    end_id: of the tokenizer's end of text, where transformers reads a caption's embedding.
    decoder_tokenizer_class: of transformers, of the decoder's own text encoder (2.1).

  Raises:
    UnclipError: Kandinsky has no such model; names what is different.
  """
  _check(config)
  clip, prior, decoder, text = config.clip, config.prior, config.decoder, config.decoder_text
  files = {
    'prior_prior': diffusers_prior.write_config(prior),
    'prior_text_encoder': transformers_clip.write_text_config(clip, end_id),
    'prior_image_encoder': transformers_clip.write_vision_config(clip),
    'unet': _write_unet(decoder),
    'movq': diffusers_autoencoder.write_config(config.autoencoder),
  }
  # The scheduler's config does not tell what the network's output holds, but what is used of it.
  uses_variance = (decoder.sampling.sampler, decoder.sampling.variance) == ('ddpm', 'learned')
  diffusion = dataclasses.replace(decoder.diffusion, learned_variance=uses_variance)
  schedulers = {
    'prior_scheduler': diffusers_schedulers.write_unclip_scheduler('prior', prior.diffusion),
    'scheduler': diffusers_schedulers.write_scheduler('decoder', diffusion, decoder.sampling),
  }
  index: dict[str, Any] = {
    '_class_name': _COMBINED_V22 if text is None else _COMBINED,
    'prior_tokenizer': ['transformers', tokenizer_class],
    'prior_image_processor': ['transformers', 'CLIPImageProcessor'],
  }
  for name, values in {**files, **schedulers}.items():
    if '_class_name' in values:
      index[name] = ['diffusers', values['_class_name']]
    else:
      index[name] = ['transformers', values['architectures'][0]]
  if text is not None:
    files['text_encoder'] = multilingual_clip.write_config(text)
    index['text_encoder'] = ['kandinsky', 'MultilingualCLIP']  # a folder of pipelines there
    index['tokenizer'] = ['transformers', decoder_tokenizer_class]
  preprocessor = f'prior_image_processor/{PREPROCESSOR_NAME}'
  return {
    **{f'{name}/{CONFIG_NAME}': values for name, values in files.items()},
    **{f'{name}/{SCHEDULER_CONFIG_NAME}': values for name, values in schedulers.items()},
    preprocessor: write_preprocessor_config(clip),
    INDEX_NAME: index,
  }


def _read_clip(folders: Components) -> ClipConfig:
  vision, pixels = (folders.get(f'prior_image_{name}') for name in ('encoder', 'processor'))
  return transformers_clip.read_components_config(folders['prior_text_encoder'], vision, pixels)


def _read_autoencoder(folders: Components) -> AutoencoderConfig:
  path = folders['movq'] / CONFIG_NAME
  config = diffusers_autoencoder.read_config(read_json(path), str(path))
  if config.kind != 'vq':
    raise UnclipError(
      f'{path}: an autoencoder of the kind {config.kind!r}: Kandinsky has a VQModel'
    )
  # The field that files have is the class's default: the pipelines do not look at it.
  return dataclasses.replace(config, scaling=1.0)


def _read_decoder(folders: Components, autoencoder: AutoencoderConfig) -> KandinskyDecoderConfig:
  fields = read_component_config(folders['unet'], 'UNet2DConditionModel')
  reads_text = fields.choose('addition_embed_type', _EMBEDDINGS)
  fields.choose('encoder_hid_dim_type', {_PROJECTIONS[reads_text]: None})
  unet, size = diffusers_unet.read_condition_config(fields, _PICTURE_SIZE // autoencoder.factor)
  width = fields.take('encoder_hid_dim')
  fields.done()
  c = autoencoder.latent_channels
  if (unet.in_channels, unet.out_channels) != (c, 2 * c):
    raise UnclipError(
      f'{fields.where}: in_channels is {unet.in_channels} and out_channels {unet.out_channels}: '
      f'only {c} of the latent and {2 * c} of noise and variance can be opened'
    )
  diffusion, sampling = diffusers_schedulers.read_scheduler(
    folders['scheduler'], _NUM_STEPS, _GUIDANCE_SCALE
  )
  return KandinskyDecoderConfig(
    image_size=size,
    # With captions diffusers has one width for both embeddings and for the context.
    embed_dim=unet.context_dim if reads_text else width,
    unet=unet,
    # The output holds a variance whether or not the scheduler makes use of it.
    diffusion=dataclasses.replace(diffusion, learned_variance=True),
    sampling=sampling,
    num_image_tokens=_NUM_IMAGE_TOKENS if reads_text else _NUM_IMAGE_TOKENS_V22,
    text_width=width if reads_text else None,
    text_embed_dim=unet.context_dim if reads_text else None,
  )


def _write_unet(config: KandinskyDecoderConfig) -> dict[str, Any]:
  reads_text = config.text_width is not None
  names = {reads: name for name, reads in _EMBEDDINGS.items()}
  return {
    **diffusers_unet.write_config(config.unet, config.image_size),
    'encoder_hid_dim': config.text_width if reads_text else config.embed_dim,
    'encoder_hid_dim_type': _PROJECTIONS[reads_text],
    'addition_embed_type': names[reads_text],
  }


def _check(config: UnclipConfig) -> None:
  """Whether a config describes a Kandinsky."""
  clip, prior, decoder, autoencoder = config.clip, config.prior, config.decoder, config.autoencoder
  _require(
    {
      'its decoder is of another kind': isinstance(decoder, KandinskyDecoderConfig),
      'it has no CLIP': clip is not None,
      'it has no prior': prior is not None,
      'it has no autoencoder': autoencoder is not None,
      'it has upsamplers': not config.upsamplers,
    }
  )
  reads_text, width = decoder.text_width is not None, decoder.unet.context_dim
  tokens = _NUM_IMAGE_TOKENS if reads_text else _NUM_IMAGE_TOKENS_V22
  has_text = isinstance(config.decoder_text, XlmRobertaConfig)
  _require(
    {
      'clip.unit_norm is true: Kandinsky takes the projections as they are': not clip.unit_norm,
      'prior.unit_norm is true': not prior.unit_norm,
      'autoencoder.kind is not vq': autoencoder.kind == 'vq',
      'autoencoder.scaling is not 1': autoencoder.scaling == 1,
      'the U-Net of the decoder has no attention': bool(decoder.unet.attention_levels),
      'decoder.diffusion.learned_variance is false': decoder.diffusion.learned_variance,
      f'decoder.num_image_tokens is not {tokens}': decoder.num_image_tokens == tokens,
      'only one of decoder_text and decoder.text_width is set': has_text == reads_text,
      'decoder.embed_dim, text_embed_dim and unet.context_dim differ': not reads_text
      or (decoder.embed_dim, decoder.text_embed_dim) == (width, width),
    }
  )


def _require(needed: dict[str, bool]) -> None:
  for what, fits in needed.items():
    if not fits:
      raise UnclipError(f'this model cannot be written as {_COMBINED} of diffusers: {what}')
