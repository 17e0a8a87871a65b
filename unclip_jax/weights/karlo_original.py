"""Karlo (kakaobrain) as its own code saves it: files of tensors, and no config beside them.

The prior, the decoder and the pair of upsamplers are checkpoints with a `state_dict`, CLIP is
OpenAI's archive, and the statistics of its embeddings are two tensors without names. Sizes are read
from names and shapes. What these do not tell is as in `presets.KARLO`, but for the range that the
original clips the prior's x_0 at.

The U-Nets and the prior's Transformer have the names of `adm`.
"""

import dataclasses
from collections.abc import Mapping

from unclip_jax.configs import DecoderConfig, PriorConfig, UnclipConfig
from unclip_jax.presets import KARLO
from unclip_jax.weights import adm, layouts, openai_clip
from unclip_jax.weights.rules import Rule, Tensors, dense, layer_norm, same

CLIP, PRIOR, STATISTICS, DECODER, SUPER_RES = 'clip', 'prior', 'statistics', 'decoder', 'super_res'
# The files that hold each stage.
STAGE_PARTS: Mapping[str, tuple[str, ...]] = {
  'clip': (CLIP,),
  'prior': (PRIOR, STATISTICS),
  'decoder': (DECODER,),
  'upsampler_0': (SUPER_RES,),
}
# Masks and the empty caption: the original computes them, and keeps them out of its files.
IGNORED = (*openai_clip.IGNORED, 'causal_mask', 'cf_token', 'cf_mask')
_NETWORK = 'model.'  # the attribute of the module around it
_NETWORKS = {'unet.': 'model_first_steps.', 'final_unet.': 'model_last_step.'}
_EXTRA_TOKENS = 4  # of the prior, behind the text: z_t, time, z_i_t, query
_CLIP_X_0 = 10.0  # karlo/models/prior_model.py; diffusers has 5


def read_config(parts: Mapping[str, Tensors], where: str) -> UnclipConfig:
  """The config of a release, by the names and shapes of its tensors.

  Args:
    parts: the tensors of 'clip', 'prior', 'statistics', 'decoder' and 'super_res'.
    where: what they are from, for messages.

  Raises:
    UnclipError: a tensor that tells a size is missing, or is of a shape that it cannot have.
  """
  clip, upsampler = openai_clip.read_config(parts[CLIP], f'{where}: {CLIP}'), KARLO.upsamplers[0]
  # The second of the two has the sizes of the first, or its tensors do not fit.
  super_res = _network(parts, SUPER_RES, _NETWORKS['unet.'], where)
  return UnclipConfig(
    clip=dataclasses.replace(clip, unit_norm=False),
    prior=_read_prior(_network(parts, PRIOR, _NETWORK, where)),
    decoder=_read_decoder(_network(parts, DECODER, _NETWORK, where)),
    upsamplers=(dataclasses.replace(upsampler, unet=adm.read_unet(super_res, upsampler.unet)),),
  )


def rules(config: UnclipConfig) -> dict[str, list[Rule]]:
  """The rules of each stage; the names of tensors are after those of their part and a slash."""
  clip_rules = [
    rule._replace(theirs=tuple(f'{CLIP}/{name}' for name in rule.theirs))
    for rule in openai_clip.rules(config.clip)
  ]
  upsampler_rules = [
    rule
    for ours, theirs in _NETWORKS.items()
    for rule in adm.unet_rules(config.upsamplers[0].unet, ours, f'{SUPER_RES}/{theirs}')
  ]
  return {
    'clip': clip_rules,
    'prior': _prior_rules(config.prior),
    'decoder': _decoder_rules(config.decoder),
    'upsampler_0': upsampler_rules,
  }


# --- Sizes.


def _network(parts: Mapping[str, Tensors], part: str, prefix: str, where: str) -> adm.Network:
  return adm.Network(parts[part], prefix, 'Karlo', f'{where}: {part}/')


def _read_prior(net: adm.Network) -> PriorConfig:
  width, text_width = net.shape('text_enc_proj.weight', 2)
  return dataclasses.replace(
    KARLO.prior,
    embed_dim=net.shape('clip_img_proj.weight', 2)[1],
    text_width=text_width,
    context_length=net.shape('positional_embedding', 3)[1] - _EXTRA_TOKENS,
    width=width,
    depth=net.count(r'transformer\.resblocks\.(\d+)\.'),
    num_heads=width // adm.HEAD_DIM,
    diffusion=dataclasses.replace(KARLO.prior.diffusion, clip_x_0=_CLIP_X_0),
  )


def _read_decoder(net: adm.Network) -> DecoderConfig:
  unet = adm.read_unet(net, KARLO.decoder.unet)
  rows, embed_dim = net.shape('clip_tok_proj.weight', 2)
  context_dim, text_width = net.shape('text_seq_proj.0.weight', 2)
  return dataclasses.replace(
    KARLO.decoder,
    embed_dim=embed_dim,
    unet=dataclasses.replace(unet, context_dim=context_dim),
    clip_text_width=text_width,
    num_image_tokens=rows // context_dim,
  )


# --- Names.


def _prior_rules(config: PriorConfig) -> list[Rule]:
  theirs = f'{PRIOR}/{_NETWORK}'
  return [
    *dense('network.text_proj', f'{theirs}text_enc_proj'),
    *dense('network.z_t_proj', f'{theirs}text_emb_proj'),
    *dense('network.z_i_proj', f'{theirs}clip_img_proj'),
    *dense('network.time_mlp.in_proj', f'{theirs}time_embed.0'),
    *dense('network.time_mlp.out_proj', f'{theirs}time_embed.2'),
    Rule(('network.positions',), (f'{theirs}positional_embedding',), layouts.first_row()),
    Rule(('network.query',), (f'{theirs}prd_emb',), layouts.first_row(2)),
    *layer_norm('network.norm', f'{theirs}final_ln'),
    *dense('network.out_proj', f'{theirs}out_proj'),
    same('statistics.mean', f'{STATISTICS}/mean'),
    same('statistics.std', f'{STATISTICS}/std'),
    *adm.transformer_rules(config.depth, 'network.', theirs),
  ]


def _decoder_rules(config: DecoderConfig) -> list[Rule]:
  theirs = f'{DECODER}/{_NETWORK}'
  # The reshape to (b, 1536, 4) makes the token the fastest axis of the output.
  tokens = layouts.tokens_out(config.num_image_tokens, token_major=False)
  return [
    same('null_z_i', f'{theirs}cf_param'),
    *dense('z_i_to_emb', f'{theirs}clip_emb'),
    Rule(('z_i_to_tokens.kernel',), (f'{theirs}clip_tok_proj.weight',), tokens),
    Rule(('z_i_to_tokens.bias',), (f'{theirs}clip_tok_proj.bias',), tokens),
    *dense('text_to_emb', f'{theirs}text_feat_proj'),
    *dense('text_to_context', f'{theirs}text_seq_proj.0'),
    *layer_norm('context_norm', f'{theirs}text_seq_proj.1'),
    *adm.unet_rules(config.unet, 'unet.', theirs),
  ]
