"""Networks of diffusers under the names and in the layouts of Karlo's own files.

What the original fuses is fused here head by head in plain loops, and its entries are numbered by
walking through the modules of diffusers in the order in which they run: nothing is taken from the
rules that are tested. `attention` and `prior_attention` are the sums of ADM and GLIDE, written out
on the fused weights, so that the order of rows is not assumed but shown to give the same numbers.
"""

import math

import torch

FILES = {
  'clip': 'ViT-L-14.pt',
  'prior': 'prior-ckpt-step=01000000-of-01000000.ckpt',
  'statistics': 'ViT-L-14_stats.th',
  'decoder': 'decoder-ckpt-step=01000000-of-01000000.ckpt',
  'super_res': 'improved-sr-ckpt-step=1.2M.ckpt',
}


def original_tensors(parts):
  """The tensors of each file by their names; those of the statistics are a pair without names."""
  first, last = parts['super_res_first'], parts['super_res_last']
  return {
    'clip': clip(parts['text_encoder'], parts['image_encoder']),
    'prior': prior(parts['prior']),
    'statistics': (parts['prior'].clip_mean[0].detach(), parts['prior'].clip_std[0].detach()),
    'decoder': decoder(parts['decoder'], parts['text_proj']),
    'super_res': unet(first, 'model_first_steps.') | unet(last, 'model_last_step.'),
  }


def save_release(folder, tensors):
  """Files as Lightning and OpenAI leave them."""
  folder.mkdir(parents=True, exist_ok=True)
  for part, name in FILES.items():
    content = tensors[part]
    if name.endswith('.ckpt'):
      content = {'epoch': 3, 'global_step': 10**6, 'state_dict': content, 'callbacks': {}}
    torch.save(content, folder / name)


# --- Names.


def plain(name, module):
  """A layer's weight and bias."""
  tensors = {'weight': module.weight.detach()}
  if module.bias is not None:
    tensors['bias'] = module.bias.detach()
  return {f'{name}.{key}': tensor for key, tensor in tensors.items()}


def fused(name, layers, num_heads, of_sequence):
  """Layers side by side in each head; as a convolution of sequences, [out, in, 1]."""
  tensors = {}
  for key in ('weight', 'bias'):
    pieces = []
    for head in range(num_heads):
      for layer in layers:
        rows = getattr(layer, key).detach()
        size = rows.shape[0] // num_heads
        pieces.append(rows[head * size : (head + 1) * size])
    tensors[f'{name}.{key}'] = torch.cat(pieces)
  if of_sequence:
    tensors[f'{name}.weight'] = tensors[f'{name}.weight'][:, :, None]
  return tensors


def prior(net, prefix='model.'):
  tensors = {
    f'{prefix}positional_embedding': net.positional_embedding.detach(),
    f'{prefix}prd_emb': net.prd_embedding.detach(),
    **plain(f'{prefix}time_embed.0', net.time_embedding.linear_1),
    **plain(f'{prefix}time_embed.2', net.time_embedding.linear_2),
    **plain(f'{prefix}text_enc_proj', net.encoder_hidden_states_proj),
    **plain(f'{prefix}text_emb_proj', net.embedding_proj),
    **plain(f'{prefix}clip_img_proj', net.proj_in),
    **plain(f'{prefix}out_proj', net.proj_to_clip_embeddings),
    **plain(f'{prefix}final_ln', net.norm_out),
  }
  for i, block in enumerate(net.transformer_blocks):
    name, attn = f'{prefix}transformer.resblocks.{i}', block.attn1
    layers = (attn.to_q, attn.to_k, attn.to_v)
    tensors |= fused(f'{name}.attn.c_qkv', layers, attn.heads, of_sequence=False)
    tensors |= plain(f'{name}.attn.c_proj', attn.to_out[0])
    tensors |= plain(f'{name}.ln_1', block.norm1)
    tensors |= plain(f'{name}.mlp.c_fc', block.ff.net[0].proj)
    tensors |= plain(f'{name}.mlp.c_proj', block.ff.net[2])
    tensors |= plain(f'{name}.ln_2', block.norm3)
  return tensors


def decoder(net, text_proj, prefix='model.'):
  null_z_i = text_proj.learned_classifier_free_guidance_embeddings
  return {
    **unet(net, prefix),
    f'{prefix}cf_param': null_z_i.detach(),
    **plain(f'{prefix}clip_emb', text_proj.clip_image_embeddings_project_to_time_embeddings),
    **plain(f'{prefix}clip_tok_proj', text_proj.clip_extra_context_tokens_proj),
    **plain(f'{prefix}text_feat_proj', text_proj.embedding_proj),
    **plain(f'{prefix}text_seq_proj.0', text_proj.encoder_hidden_states_proj),
    **plain(f'{prefix}text_seq_proj.1', text_proj.text_encoder_hidden_states_norm),
  }


def unet(net, prefix):
  entries = [[net.conv_in]]
  for block in net.down_blocks:
    entries += with_attention(block)
    entries += [[sampler] for sampler in block.downsamplers or []]
  tensors = numbered(f'{prefix}input_blocks', entries)
  middle = [net.mid_block.resnets[0], *net.mid_block.attentions, net.mid_block.resnets[1]]
  for i, module in enumerate(module for module in middle if module is not None):
    tensors |= layer(f'{prefix}middle_block.{i}', module)
  entries = []
  for block in net.up_blocks:
    entries += with_attention(block)
    entries[-1] += block.upsamplers or []
  tensors |= numbered(f'{prefix}output_blocks', entries)
  return {
    **tensors,
    **plain(f'{prefix}time_embed.0', net.time_embedding.linear_1),
    **plain(f'{prefix}time_embed.2', net.time_embedding.linear_2),
    **plain(f'{prefix}out.0', net.conv_norm_out),
    **plain(f'{prefix}out.2', net.conv_out),
  }


def with_attention(block):
  """Residual blocks, each with the attention that follows it."""
  attentions = getattr(block, 'attentions', [])
  return [[net, *attentions[i : i + 1]] for i, net in enumerate(block.resnets)]


def numbered(name, entries):
  tensors = {}
  for i, entry in enumerate(entries):
    for j, module in enumerate(entry):
      tensors |= layer(f'{name}.{i}.{j}', module)
  return tensors


def layer(name, module):
  """A convolution, a residual block or an attention layer."""
  if isinstance(module, torch.nn.Conv2d):
    return plain(name, module)
  if hasattr(module, 'to_q'):
    return {
      **plain(f'{name}.norm', module.group_norm),
      **fused(f'{name}.qkv', (module.to_q, module.to_k, module.to_v), module.heads, True),
      **fused(f'{name}.encoder_kv', (module.add_k_proj, module.add_v_proj), module.heads, True),
      **fused(f'{name}.proj_out', module.to_out[:1], 1, True),
    }
  tensors = {
    **plain(f'{name}.in_layers.0', module.norm1),
    **plain(f'{name}.in_layers.2', module.conv1),
    **plain(f'{name}.emb_layers.1', module.time_emb_proj),
    **plain(f'{name}.out_layers.0', module.norm2),
    **plain(f'{name}.out_layers.3', module.conv2),
  }
  if module.conv_shortcut is not None:
    tensors |= plain(f'{name}.skip_connection', module.conv_shortcut)
  return tensors


def clip(text, image):
  """OpenAI's archive, with the numbers that it holds as tensors."""
  text_model, vision = text.text_model, image.vision_model
  words, patches = text_model.embeddings, vision.embeddings
  return {
    'token_embedding.weight': words.token_embedding.weight.detach(),
    'positional_embedding': words.position_embedding.weight.detach(),
    **tower('transformer', text_model.encoder),
    **plain('ln_final', text_model.final_layer_norm),
    'text_projection': text.text_projection.weight.detach().T,
    'logit_scale': torch.tensor(math.log(100)),
    'visual.conv1.weight': patches.patch_embedding.weight.detach(),
    'visual.class_embedding': patches.class_embedding.detach(),
    'visual.positional_embedding': patches.position_embedding.weight.detach(),
    **plain('visual.ln_pre', vision.pre_layrnorm),
    **tower('visual.transformer', vision.encoder),
    **plain('visual.ln_post', vision.post_layernorm),
    'visual.proj': image.visual_projection.weight.detach().T,
    'input_resolution': torch.tensor(patches.image_size),
    'context_length': torch.tensor(words.position_embedding.num_embeddings),
    'vocab_size': torch.tensor(words.token_embedding.num_embeddings),
  }


def tower(name, encoder):
  tensors = {}
  for i, block in enumerate(encoder.layers):
    theirs, attn = f'{name}.resblocks.{i}', block.self_attn
    for key in ('weight', 'bias'):  # one under the other, not head by head
      rows = [getattr(proj, key).detach() for proj in (attn.q_proj, attn.k_proj, attn.v_proj)]
      tensors[f'{theirs}.attn.in_proj_{key}'] = torch.cat(rows)
    tensors |= plain(f'{theirs}.attn.out_proj', attn.out_proj)
    tensors |= plain(f'{theirs}.ln_1', block.layer_norm1)
    tensors |= plain(f'{theirs}.mlp.c_fc', block.mlp.fc1)
    tensors |= plain(f'{theirs}.mlp.c_proj', block.mlp.fc2)
    tensors |= plain(f'{theirs}.ln_2', block.layer_norm2)
  return tensors


# --- Sums.


def attention(tensors, name, x, context, is_seen, num_heads, groups):
  """What an attention layer of ADM adds its input to, after GLIDE: keys begin with the context's.

  Args:
    tensors: of the original.
    name: of the layer.
    x: [b, c, pixels].
    context: [b, context_dim, s].
    is_seen: bool [b, s]; pixels always are.
    num_heads: of equal sizes.
    groups: of the norm.
  """
  start = f'{name}.'
  weight = {key.removeprefix(start): w for key, w in tensors.items() if key.startswith(start)}
  normed = torch.nn.functional.group_norm(
    x, groups, weight['norm.weight'], weight['norm.bias'], eps=1e-5
  )
  qkv = torch.einsum('oi,bip->bop', weight['qkv.weight'][:, :, 0], normed)
  qkv = qkv + weight['qkv.bias'][:, None]
  kv = torch.einsum('oi,bis->bos', weight['encoder_kv.weight'][:, :, 0], context)
  kv = kv + weight['encoder_kv.bias'][:, None]
  size = x.shape[1] // num_heads
  heads = []
  for head in range(num_heads):
    q, k, v = qkv[:, 3 * size * head : 3 * size * (head + 1)].split(size, dim=1)
    context_k, context_v = kv[:, 2 * size * head : 2 * size * (head + 1)].split(size, dim=1)
    k, v = torch.cat([context_k, k], dim=2), torch.cat([context_v, v], dim=2)
    # Each side is scaled by the fourth root, as half precision needs.
    scores = torch.einsum('bcp,bck->bpk', q * size**-0.25, k * size**-0.25)
    seen = torch.nn.functional.pad(is_seen, (0, x.shape[2]), value=True)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    heads.append(torch.einsum('bpk,bck->bcp', scores.softmax(dim=2), v))
  out = torch.einsum('oi,bip->bop', weight['proj_out.weight'][:, :, 0], torch.cat(heads, dim=1))
  return x + out + weight['proj_out.bias'][:, None]


def prior_attention(tensors, name, x, num_heads):
  """Causal self-attention of the prior: [b, t, width] to the same."""
  qkv = x @ tensors[f'{name}.c_qkv.weight'].T + tensors[f'{name}.c_qkv.bias']
  size = x.shape[2] // num_heads
  is_later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
  heads = []
  for one in qkv.split(3 * size, dim=2):
    q, k, v = one.split(size, dim=2)
    scores = (q * size**-0.25) @ (k * size**-0.25).transpose(1, 2)
    heads.append(scores.masked_fill(is_later, -torch.inf).softmax(dim=2) @ v)
  out = torch.cat(heads, dim=2)
  return out @ tensors[f'{name}.c_proj.weight'].T + tensors[f'{name}.c_proj.bias']
