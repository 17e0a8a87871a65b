"""Stable unCLIP as diffusers saves it: `StableUnCLIPPipeline` and `StableUnCLIPImg2ImgPipeline`.

The first leads from captions to pictures; the second, without a prior, from pictures to variations.
Step counts, guidance scales and the level of noise are those that the pipelines default to; all
else is read from the files.
"""

import functools
from collections.abc import Callable, Collection, Iterable
from typing import Any

from unclip_jax.configs import (
  AutoencoderConfig,
  ClipConfig,
  PriorConfig,
  StableUnclipDecoderConfig,
  TextConfig,
  UnclipConfig,
)
from unclip_jax.types import UnclipError
from unclip_jax.weights import (
  diffusers_autoencoder,
  diffusers_latent_unet,
  diffusers_prior,
  diffusers_schedulers,
  layouts,
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
from unclip_jax.weights.rules import Rule

TEXT_TO_IMAGE, VARIATION = 'StableUnCLIPPipeline', 'StableUnCLIPImg2ImgPipeline'
NAMES = (TEXT_TO_IMAGE, VARIATION)
_OF_PRIOR = ('prior_tokenizer', 'prior_text_encoder', 'prior', 'prior_scheduler')
_OF_PICTURES = ('image_encoder', 'feature_extractor')
# Where both pipelines lie in one folder, the index names the components of one.
EXTRA = (*_OF_PRIOR, *_OF_PICTURES)
TOKENIZER, DECODER_TOKENIZER = 'prior_tokenizer', 'tokenizer'  # variations have the second alone

# Components that transformers writes, by another file name.
OF_TRANSFORMERS = ('prior_text_encoder', 'image_encoder', 'text_encoder')
IGNORED = (*transformers_clip.IGNORED, *diffusers_prior.IGNORED)
_NUM_STEPS, _GUIDANCE_SCALE = 20, 10.0
_NORMALIZER = 'StableUnCLIPImageNormalizer'

# The rules of a stage, or what makes them of the names of its tensors, which depend on the version
# of diffusers or transformers that wrote them. Of no names it makes those that all of them read.
Rules = list[Rule] | Callable[[Collection[str]], list[Rule]]


def read_config(folders: Components) -> UnclipConfig:
  """The config from the folders of components; without prior or towers where there are none.

  Raises:
    UnclipError: a file is missing, or a field asks for what ours does not do.
  """
  path = folders['text_encoder'] / CONFIG_NAME
  decoder_text, _ = transformers_clip.read_text_config(read_json(path), str(path))
  return UnclipConfig(
    clip=_read_clip(folders),
    prior=_read_prior(folders) if 'prior' in folders else None,
    decoder=_read_decoder(folders),
    decoder_text=decoder_text,
    autoencoder=_read_autoencoder(folders),
  )


def rules(config: UnclipConfig) -> dict[str, tuple[tuple[str, ...], Rules]]:
  """For each stage the components that hold it and its rules, their names after the component's."""
  clip = config.clip
  components, towers = [], [transformers_clip.no_log_scale()]
  if clip.text is not None:
    components.append('prior_text_encoder')
    towers += transformers_clip.text_rules(clip, 'prior_text_encoder/')
  if clip.vision is not None:
    components.append('image_encoder')
    towers += transformers_clip.vision_rules(clip, 'image_encoder/')
  result: dict[str, tuple[tuple[str, ...], Rules]] = {
    'clip': (tuple(components), towers),
    'decoder_text': (('text_encoder',), functools.partial(_text_rules, config.decoder_text)),
    'decoder': (('unet', 'image_normalizer'), decoder_rules(config.decoder)),
    'autoencoder': (('vae',), functools.partial(_autoencoder_rules, config.autoencoder)),
  }
  if config.prior is not None:
    result['prior'] = (('prior',), diffusers_prior.rules(config.prior, 'prior/'))
  return result


def decoder_rules(config: StableUnclipDecoderConfig) -> list[Rule]:
  """The U-Net and the statistics of z_i, their names after `unet/` and `image_normalizer/`."""
  statistics = [
    Rule((f'normalizer.{name}',), (f'image_normalizer/{name}',), layouts.first_row())
    for name in ('mean', 'std')
  ]
  unet = diffusers_latent_unet.rules(config.unet)
  return [*_within(unet, 'network.unet.', 'unet/'), *statistics]


def write_configs(
  config: UnclipConfig,
  tokenizer_class: str,
  end_id: int,
  decoder_tokenizer_class: str | None = None,
) -> dict[str, dict[str, Any]]:
  """The JSON files of a folder that diffusers opens, by their paths in it.

  The pipeline is the one for captions where there is a prior, else that for variations. With both a
  prior and an image tower all components are there, and `StableUnCLIPImg2ImgPipeline` opens the
  folder as well.

  Args:
    config: of the model.
    tokenizer_class: of transformers.
    end_id: of the tokenizer's end of text, where transformers reads a caption's embedding.
    decoder_tokenizer_class: of the decoder's own tokenizer; None is as that of the prior.

  Raises:
    UnclipError: Stable unCLIP has no such model; names what is different.
  """
  _check(config)
  clip, decoder, prior = config.clip, config.decoder, config.prior
  unet = diffusers_latent_unet.write_config(decoder.unet)
  files = {
    'text_encoder': {
      **transformers_clip.write_text_config(_text_alone(config.decoder_text), end_id),
      'architectures': ['CLIPTextModel'],
    },
    'unet': {**unet, 'sample_size': decoder.image_size},
    'image_normalizer': {'_class_name': _NORMALIZER, 'embedding_dim': decoder.embed_dim},
    'vae': diffusers_autoencoder.write_config(config.autoencoder),
  }
  schedulers = {
    'scheduler': diffusers_schedulers.write_scheduler(
      'decoder', decoder.diffusion, decoder.sampling
    ),
    'image_noising_scheduler': diffusers_schedulers.write_noising_scheduler(
      'decoder.z_i_diffusion', decoder.z_i_diffusion
    ),
  }
  others = {}
  if clip.text is not None:
    files['prior_text_encoder'] = transformers_clip.write_text_config(clip, end_id)
  if prior is not None:
    files['prior'] = diffusers_prior.write_config(prior)
    schedulers['prior_scheduler'] = diffusers_schedulers.write_scheduler(
      'prior', prior.diffusion, prior.sampling
    )
  if clip.vision is not None:
    files['image_encoder'] = transformers_clip.write_vision_config(clip)
    path = f'feature_extractor/{PREPROCESSOR_NAME}'
    others[path] = write_preprocessor_config(clip)
  index = {
    'tokenizer': ['transformers', decoder_tokenizer_class or tokenizer_class],
    **{name: _index_entry(values) for name, values in {**files, **schedulers}.items()},
  }
  if prior is None:  # a text tower alone is of neither pipeline
    index = {name: entry for name, entry in index.items() if name not in _OF_PRIOR}
  else:
    index['prior_tokenizer'] = ['transformers', tokenizer_class]
  if clip.vision is not None:
    index['feature_extractor'] = ['transformers', 'CLIPImageProcessor']
  return {
    **{f'{name}/{CONFIG_NAME}': values for name, values in files.items()},
    **{f'{name}/{SCHEDULER_CONFIG_NAME}': values for name, values in schedulers.items()},
    **others,
    INDEX_NAME: {'_class_name': VARIATION if prior is None else TEXT_TO_IMAGE, **index},
  }


def _index_entry(values: dict[str, Any]) -> list[str]:
  """Where the class of a component is to be found."""
  if '_class_name' not in values:
    return ['transformers', values['architectures'][0]]
  name = values['_class_name']
  return ['stable_diffusion' if name == _NORMALIZER else 'diffusers', name]


def _read_clip(folders: Components) -> ClipConfig:
  text, (vision, pixels) = folders.get('prior_text_encoder'), map(folders.get, _OF_PICTURES)
  if text is None:
    vision = folders['image_encoder']  # an error where there is none either
  return transformers_clip.read_components_config(text, vision, pixels)


def _read_prior(folders: Components) -> PriorConfig:
  scheduler = folders['prior_scheduler']
  if read_json(scheduler / SCHEDULER_CONFIG_NAME).get('_class_name') == 'UnCLIPScheduler':
    return diffusers_prior.read_config(folders['prior'], scheduler)  # a prior of Karlo's folder
  diffusion, sampling = diffusers_schedulers.read_scheduler(
    scheduler, diffusers_prior.NUM_STEPS, diffusers_prior.GUIDANCE_SCALE
  )
  return diffusers_prior.read_config_of(folders['prior'], diffusion, sampling)


def _read_autoencoder(folders: Components) -> AutoencoderConfig:
  path = folders['vae'] / CONFIG_NAME
  config = diffusers_autoencoder.read_config(read_json(path), str(path))
  if config.kind != 'kl':
    raise UnclipError(f'{path}: _class_name is not AutoencoderKL: Stable unCLIP has no other')
  return config


def _read_decoder(folders: Components) -> StableUnclipDecoderConfig:
  fields = read_component_config(folders['image_normalizer'], _NORMALIZER)
  embed_dim = fields.take('embedding_dim', 768)
  fields.done()
  path = folders['unet'] / CONFIG_NAME
  values = read_json(path)
  unet, size = diffusers_latent_unet.read_config(values, str(path)), values.get('sample_size')
  if type(size) is not int or size < 1:
    raise UnclipError(f'{path}: sample_size is {size!r}: only a whole number above 0 can be opened')
  if unet.out_channels != unet.in_channels:
    raise UnclipError(f'{path}: out_channels is {unet.out_channels}, not in_channels')
  if unet.class_dim != 2 * embed_dim:
    raise UnclipError(
      f'{path}: projection_class_embeddings_input_dim is {unet.class_dim}: it must be twice the '
      f'{embed_dim} of image_normalizer'
    )
  scheduler = folders['scheduler']
  diffusion, sampling = diffusers_schedulers.read_scheduler(scheduler, _NUM_STEPS, _GUIDANCE_SCALE)
  if diffusion.learned_variance:
    raise UnclipError(f"{scheduler}: variance_type is 'learned_range': the U-Net predicts none")
  return StableUnclipDecoderConfig(
    image_size=size,
    embed_dim=embed_dim,
    unet=unet,
    diffusion=diffusion,
    sampling=sampling,
    z_i_diffusion=diffusers_schedulers.read_noising_scheduler(folders['image_noising_scheduler']),
  )


def _text_rules(config: TextConfig, names: Collection[str]) -> list[Rule]:
  """A `CLIPTextModel`, the tower alone; transformers 5 writes its names without `text_model.`."""
  is_bare = 'text_encoder/final_layer_norm.weight' in names
  return [
    Rule(
      tuple(name.removeprefix('text.') for name in rule.ours),
      tuple(f'text_encoder/{x.removeprefix("text_model." * is_bare)}' for x in rule.theirs),
      rule.layout,
    )
    for rule in transformers_clip.text_rules(_text_alone(config))
    if rule.ours[0].startswith('text.')
  ]


def _text_alone(config: TextConfig) -> ClipConfig:
  """A tower without a projection as that of a CLIP: what there is of it is the same."""
  return ClipConfig(text=config, vision=None, embed_dim=config.width)


def _autoencoder_rules(config: AutoencoderConfig, names: Collection[str]) -> list[Rule]:
  found = [name.removeprefix('vae/') for name in names]
  return _within(diffusers_autoencoder.rules(config, found), '', 'vae/')


def _within(rules: Iterable[Rule], ours: str, theirs: str) -> list[Rule]:
  """Rules whose names stand behind others."""
  return [
    Rule(tuple(ours + name for name in mine), tuple(theirs + name for name in its), layout)
    for mine, its, layout in rules
  ]


def _check(config: UnclipConfig) -> None:
  """Whether a config describes a Stable unCLIP."""
  clip, prior, autoencoder = config.clip, config.prior, config.autoencoder
  needed = {
    'its decoder is of another kind': isinstance(config.decoder, StableUnclipDecoderConfig),
    'its decoder has no text encoder of CLIP': isinstance(config.decoder_text, TextConfig),
    'it has no autoencoder of kind kl': autoencoder is not None and autoencoder.kind == 'kl',
    'it has upsamplers': not config.upsamplers,
    'it has no CLIP': clip is not None,
  }
  if clip is not None:
    what = 'clip.unit_norm is true: Stable unCLIP takes the projections as they are'
    needed[what] = not clip.unit_norm
    if prior is None:
      needed['it has neither a prior nor an image tower'] = clip.vision is not None
    else:
      needed['it has a prior, but no text tower'] = clip.text is not None
      needed['prior.unit_norm is true'] = not prior.unit_norm
  for what, fits in needed.items():
    if not fits:
      raise UnclipError(f'this model cannot be written as {TEXT_TO_IMAGE} of diffusers: {what}')
