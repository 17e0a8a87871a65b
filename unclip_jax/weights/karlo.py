"""Karlo (kakaobrain) as diffusers saves it: `UnCLIPPipeline` and `UnCLIPImageVariationPipeline`.

The step counts and guidance scales are those that the pipelines default to; all else is read from
the files.
"""

from typing import Any

from unclip_jax.configs import (
  ClipConfig,
  DecoderConfig,
  SamplingConfig,
  UnclipConfig,
  UpsamplerConfig,
)
from unclip_jax.types import UnclipError
from unclip_jax.weights import diffusers_prior, diffusers_unet, layouts, transformers_clip
from unclip_jax.weights.diffusers_schedulers import read_unclip_scheduler, write_unclip_scheduler
from unclip_jax.weights.foreign_folder import (
  CONFIG_NAME,
  INDEX_NAME,
  SCHEDULER_CONFIG_NAME,
  Components,
  read_component_config,
)
from unclip_jax.weights.preprocessor import PREPROCESSOR_NAME, write_preprocessor_config
from unclip_jax.weights.rules import Rule, dense, layer_norm, same

TEXT_TO_IMAGE, VARIATION = 'UnCLIPPipeline', 'UnCLIPImageVariationPipeline'
NAMES = (TEXT_TO_IMAGE, VARIATION)
# Where both pipelines lie in one folder, the index names the components of one.
EXTRA = ('image_encoder', 'feature_extractor')
TOKENIZER, DECODER_TOKENIZER = 'tokenizer', None

# Components that transformers writes, by another file name.
OF_TRANSFORMERS = ('text_encoder', 'image_encoder')
IGNORED = (*transformers_clip.IGNORED, *diffusers_prior.IGNORED)
# Where diffusers has it from 0.34 on. By 'unclip', as the public folders have it, 0.42 finds it no
# more, nor by what it writes itself.
_TEXT_PROJ_MODULE = 'diffusers.pipelines.deprecated.unclip.text_proj'


def read_config(folders: Components) -> UnclipConfig:
  """The config from the folders of components; without prior or image tower where there is none.

  Raises:
    UnclipError: a file is missing, or a field asks for what ours does not do.
  """
  clip = _read_clip(folders)
  decoder = _read_decoder(folders)
  return UnclipConfig(
    clip=clip,
    prior=diffusers_prior.read_config(folders['prior'], folders['prior_scheduler'])
    if 'prior' in folders
    else None,
    decoder=decoder,
    upsamplers=(_read_upsampler(folders, decoder.image_size),),
  )


def rules(config: UnclipConfig) -> dict[str, tuple[tuple[str, ...], list[Rule]]]:
  """For each stage the components that hold it and its rules, their names after the component's."""
  clip = config.clip
  towers = transformers_clip.text_rules(clip, 'text_encoder/')
  towers.append(transformers_clip.no_log_scale())
  if clip.vision is not None:
    towers += transformers_clip.vision_rules(clip, 'image_encoder/')
  result = {
    'clip': (('text_encoder', *(['image_encoder'] if clip.vision is not None else [])), towers),
    'decoder': (('text_proj', 'decoder'), decoder_rules(config.decoder)),
    'upsampler_0': (
      ('super_res_first', 'super_res_last'),
      [
        *diffusers_unet.rules(config.upsamplers[0].unet, 'unet.', 'super_res_first/'),
        *diffusers_unet.rules(config.upsamplers[0].unet, 'final_unet.', 'super_res_last/'),
      ],
    ),
  }
  if config.prior is not None:
    result['prior'] = (('prior',), diffusers_prior.rules(config.prior, 'prior/'))
  return result


def decoder_rules(config: DecoderConfig) -> list[Rule]:
  """`UnCLIPTextProjModel` and the U-Net, their names after `text_proj/` and `decoder/`."""
  proj, tokens = 'text_proj/', 'clip_extra_context_tokens_proj'
  # Karlo's reshape (B, 1536, 4) makes the token the fastest axis of the output.
  layout = layouts.tokens_out(config.num_image_tokens, token_major=False)
  return [
    same('null_z_i', f'{proj}learned_classifier_free_guidance_embeddings'),
    *dense('z_i_to_emb', f'{proj}clip_image_embeddings_project_to_time_embeddings'),
    Rule(('z_i_to_tokens.kernel',), (f'{proj}{tokens}.weight',), layout),
    Rule(('z_i_to_tokens.bias',), (f'{proj}{tokens}.bias',), layout),
    *dense('text_to_emb', f'{proj}embedding_proj'),
    *dense('text_to_context', f'{proj}encoder_hidden_states_proj'),
    *layer_norm('context_norm', f'{proj}text_encoder_hidden_states_norm'),
    *diffusers_unet.rules(config.unet, 'unet.', 'decoder/'),
  ]


def write_configs(
  config: UnclipConfig,
  tokenizer_class: str,
  end_id: int,
  decoder_tokenizer_class: str | None = None,
) -> dict[str, dict[str, Any]]:
  """The JSON files of a folder that diffusers opens, by their paths in it.

  The pipeline is the one for captions where there is a prior, else that for variations. With both a
  prior and an image tower all components are there, and `UnCLIPImageVariationPipeline` opens the
  folder as well.

  Args:
    config: of the model.
    tokenizer_class: of transformers.
    end_id: of the tokenizer's end of text, where transformers reads a caption's embedding.
    decoder_tokenizer_class: of other families; Karlo's decoder has no tokenizer of its own.

  Raises:
    UnclipError: Karlo has no such model; names what is different.
  """
  _check(config)
  clip, decoder, up = config.clip, config.decoder, config.upsamplers[0]
  files = {
    'text_encoder': transformers_clip.write_text_config(clip, end_id),
    'text_proj': {
      '_class_name': 'UnCLIPTextProjModel',
      'clip_extra_context_tokens': decoder.num_image_tokens,
      'clip_embeddings_dim': decoder.embed_dim,
      'time_embed_dim': decoder.unet.emb_dim,
      'cross_attention_dim': decoder.unet.context_dim,
    },
    'decoder': {
      **diffusers_unet.write_config(decoder.unet, decoder.image_size),
      'class_embed_type': 'identity',
    },
    'super_res_first': diffusers_unet.write_config(up.unet, up.image_size),
    'super_res_last': diffusers_unet.write_config(up.unet, up.image_size),
  }
  schedulers = {
    'decoder_scheduler': write_unclip_scheduler('decoder', decoder.diffusion),
    'super_res_scheduler': write_unclip_scheduler('upsamplers.0', up.diffusion),
  }
  others = {}
  if config.prior is not None:
    files['prior'] = diffusers_prior.write_config(config.prior)
    schedulers['prior_scheduler'] = write_unclip_scheduler('prior', config.prior.diffusion)
  if clip.vision is not None:
    files['image_encoder'] = transformers_clip.write_vision_config(clip)
    path = f'feature_extractor/{PREPROCESSOR_NAME}'
    others[path] = write_preprocessor_config(clip)
  result = {f'{name}/{CONFIG_NAME}': values for name, values in files.items()}
  result |= {f'{name}/{SCHEDULER_CONFIG_NAME}': values for name, values in schedulers.items()}
  index: dict[str, Any] = {'_class_name': VARIATION if config.prior is None else TEXT_TO_IMAGE}
  for name, values in {**files, **schedulers}.items():
    if '_class_name' in values:
      library = _TEXT_PROJ_MODULE if name == 'text_proj' else 'diffusers'
      index[name] = [library, values['_class_name']]
    else:
      index[name] = ['transformers', values['architectures'][0]]
  index['tokenizer'] = ['transformers', tokenizer_class]
  if clip.vision is not None:
    index['feature_extractor'] = ['transformers', 'CLIPImageProcessor']
  return {**result, **others, INDEX_NAME: index}


def _read_clip(folders: Components) -> ClipConfig:
  vision, pixels = (folders.get(name) for name in EXTRA)
  return transformers_clip.read_components_config(folders['text_encoder'], vision, pixels)


def _read_decoder(folders: Components) -> DecoderConfig:
  fields = read_component_config(folders['decoder'], 'UNet2DConditionModel')
  fields.choose('class_embed_type', {'identity': None})
  unet, size = diffusers_unet.read_condition_config(fields)
  fields.done()
  fields = read_component_config(folders['text_proj'], 'UnCLIPTextProjModel')
  num_tokens, embed_dim = (
    fields.take('clip_extra_context_tokens', 4),
    fields.take('clip_embeddings_dim'),
  )
  fields.expect(time_embed_dim=unet.emb_dim, cross_attention_dim=unet.context_dim)
  fields.done()
  diffusion = read_unclip_scheduler(folders['decoder_scheduler'])
  return DecoderConfig(
    image_size=size,
    embed_dim=embed_dim,
    unet=unet,
    diffusion=diffusion,
    sampling=SamplingConfig(
      num_steps=25,
      spacing='karlo',
      variance='learned' if diffusion.learned_variance else 'fixed_small',
      guidance_scale=8.0,
    ),
    clip_text_width=embed_dim,
    num_image_tokens=num_tokens,
  )


def _read_upsampler(folders: Components, low_size: int) -> UpsamplerConfig:
  nets = []
  for name in ('super_res_first', 'super_res_last'):
    fields = read_component_config(folders[name], 'UNet2DModel')
    nets.append(diffusers_unet.read_unconditional_config(fields, condition_channels=3))
    fields.done()
  if nets[0] != nets[1]:
    raise UnclipError(
      f'{folders["super_res_first"]} and {folders["super_res_last"]} are of different sizes'
    )
  unet, size = nets[0]
  diffusion = read_unclip_scheduler(folders['super_res_scheduler'])
  return UpsamplerConfig(
    image_size=size,
    low_size=low_size,
    unet=unet,
    diffusion=diffusion,
    sampling=SamplingConfig(num_steps=7, spacing='karlo'),
    final_unet=True,
  )


def _check(config: UnclipConfig) -> None:
  """Whether a config describes a Karlo."""
  if config.decoder is None:
    raise UnclipError(f'this model cannot be written as {TEXT_TO_IMAGE}: it has no decoder')
  clip, decoder, ups = config.clip, config.decoder, config.upsamplers
  needed = {
    'decoder.text is set: Karlo reads the states of CLIP': decoder.text is None,
    'decoder.draft_size is set: Karlo has no draft': not decoder.draft_size,
    'decoder.inpaints is true: Karlo completes no pictures': not decoder.inpaints,
    'decoder.diffusion.learned_variance is false': decoder.diffusion.learned_variance,
    'the U-Net of the decoder has no attention': bool(decoder.unet.attention_levels),
    'decoder.embed_scale is not 1': decoder.embed_scale == 1,
    'clip.unit_norm is true: Karlo takes the projections as they are': not clip.unit_norm,
    f'there are {len(ups)} upsamplers: Karlo has one': len(ups) == 1,
    'upsamplers.0.final_unet is false': all(up.final_unet for up in ups),
    'upsamplers.0.keep_low is not 0': not any(up.keep_low for up in ups),
    'clip.text.width is not clip.embed_dim': clip.text.width == clip.embed_dim,
  }
  if config.prior is None:
    needed['it has neither a prior nor an image tower'] = clip.vision is not None
  else:
    needed['prior.unit_norm is true'] = not config.prior.unit_norm
  for what, fits in needed.items():
    if not fits:
      raise UnclipError(f'this model cannot be written as {TEXT_TO_IMAGE} of diffusers: {what}')
