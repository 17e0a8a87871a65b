"""Tiny GLIDEs under the names of OpenAI's release, of the classes of torch and of diffusers.

The Transformer is torch's own, the U-Net is diffusers', as for Karlo; what is put together here is
what GLIDE's paper says: padding has learned vectors, attention is not causal, the last state is
added to the timestep embedding, all states are the context of the U-Net. The loops are those of
DDPM and DDIM in float64, from the formulas of their papers.
"""

import math

import diffusers
import karlo_original_twin
import numpy as np
import torch
import twins

VOCAB_SIZE, CONTEXT_LENGTH, TEXT_WIDTH = 23, 9, 128
# With as many channels as a norm has groups, biases before a norm would have no effect.
HEAD_DIM, CHANNELS = 64, 64
# Multipliers, and levels with attention: 16 and 32 pixels a side in full.
BASE = ((1, 2), (1,))
UPSAMPLE = ((1, 1, 2), (1, 2))


class TextTower(torch.nn.Module):
  """Tokens to states, and to what is added to the timestep embedding."""

  def __init__(self, vocab_size, length, width, depth, emb_dim):
    super().__init__()
    self.tokens = torch.nn.Embedding(vocab_size, width)
    self.positions = torch.nn.Parameter(torch.zeros(length, width))
    self.padding = torch.nn.Parameter(torch.zeros(length, width))
    layer = torch.nn.TransformerEncoderLayer(
      width, width // HEAD_DIM, 4 * width, 0.0, 'gelu', batch_first=True, norm_first=True
    )
    self.layers = torch.nn.ModuleList(
      torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).layers
    )
    self.norm = torch.nn.LayerNorm(width)
    self.to_emb = torch.nn.Linear(width, emb_dim)

  def forward(self, ids, mask):
    x = torch.where(mask[..., None], self.tokens(ids) + self.positions, self.padding)
    for layer in self.layers:
      x = layer(x)
    x = self.norm(x)
    return x, self.to_emb(x[:, -1])


class Twin(torch.nn.Module):
  """One network: `sizes` are multipliers and levels with attention."""

  def __init__(
    self,
    in_channels,
    sizes,
    num_res_blocks=1,
    channels=CHANNELS,
    width=TEXT_WIDTH,
    depth=2,
    vocab_size=VOCAB_SIZE,
    length=CONTEXT_LENGTH,
  ):
    super().__init__()
    multipliers, attention = sizes
    sees = [level in attention for level in range(len(multipliers))]
    down = {True: 'SimpleCrossAttnDownBlock2D', False: 'ResnetDownsampleBlock2D'}
    up = {True: 'SimpleCrossAttnUpBlock2D', False: 'ResnetUpsampleBlock2D'}
    self.text = TextTower(vocab_size, length, width, depth, 4 * channels)
    self.unet = diffusers.UNet2DConditionModel(
      in_channels=in_channels,
      out_channels=6,
      block_out_channels=tuple(channels * m for m in multipliers),
      layers_per_block=num_res_blocks,
      down_block_types=tuple(down[x] for x in sees),
      mid_block_type='UNetMidBlock2DSimpleCrossAttn',
      up_block_types=tuple(up[x] for x in reversed(sees)),
      attention_head_dim=HEAD_DIM,
      cross_attention_dim=width,
      class_embed_type='identity',
      resnet_time_scale_shift='scale_shift',
    )

  def forward(self, x, t, ids, mask):
    """x [b, channels, h, w], all that the first convolution sees; t int [b]."""
    states, emb = self.text(ids, mask)
    return self.unet(x, t, states, class_labels=emb).sample


def make(in_channels, sizes, seed, **more):
  """A network with weights drawn anew."""
  twin = twins.randomise(Twin(in_channels, sizes, **more), seed)
  for layer in twin.text.layers:  # which `randomise` takes for no matrix
    layer.self_attn.in_proj_weight.div_(math.sqrt(TEXT_WIDTH))
  return twin


def original_tensors(twin):
  """Its tensors by the names of the release."""
  text = twin.text
  tensors = {
    'token_embedding.weight': text.tokens.weight.detach(),
    'positional_embedding': text.positions.detach(),
    'padding_embedding': text.padding.detach(),
    **karlo_original_twin.plain('final_ln', text.norm),
    **karlo_original_twin.plain('transformer_proj', text.to_emb),
    **karlo_original_twin.unet(twin.unet, ''),
  }
  for i, layer in enumerate(text.layers):
    name, attn = f'transformer.resblocks.{i}', layer.self_attn
    tensors |= {
      f'{name}.attn.c_qkv.weight': head_by_head(attn.in_proj_weight.detach()),
      f'{name}.attn.c_qkv.bias': head_by_head(attn.in_proj_bias.detach()),
      **karlo_original_twin.plain(f'{name}.attn.c_proj', attn.out_proj),
      **karlo_original_twin.plain(f'{name}.ln_1', layer.norm1),
      **karlo_original_twin.plain(f'{name}.mlp.c_fc', layer.linear1),
      **karlo_original_twin.plain(f'{name}.mlp.c_proj', layer.linear2),
      **karlo_original_twin.plain(f'{name}.ln_2', layer.norm2),
    }
  return tensors


def head_by_head(stacked):
  """Rows of q, then of k, then of v, each of all heads, in the order of the release."""
  width = stacked.shape[0] // 3
  pieces = []
  for head in range(width // HEAD_DIM):
    for kind in range(3):
      start = kind * width + head * HEAD_DIM
      pieces.append(stacked[start : start + HEAD_DIM])
  return torch.cat(pieces)


# --- Sampling.


def cosine_betas(num_steps=1000):
  """Improved DDPM, equation 17, clipped at 0.999."""
  f = [math.cos((i / num_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_steps + 1)]
  return np.array([min(1 - f[i + 1] / f[i], 0.999) for i in range(num_steps)])


def linear_betas(num_steps=1000):
  """DDPM, section 4."""
  return np.array([1e-4 + (0.02 - 1e-4) * i / (num_steps - 1) for i in range(num_steps)])


# Of 1000 timesteps: 10, 10, 3, 2 and 2 out of each fifth, but for the very last.
FAST27 = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199, 200, 222, 244, 266, 288, 311, 333, 355, 377]
FAST27 += [399, 400, 500, 599, 600, 799, 800, 997]


def sample(evaluate, betas, timesteps, x, noises, is_ddim, edit_x_0=lambda x_0: x_0):
  """The whole loop.

  Args:
    evaluate: (x_t, timestep) -> [b, 2 * channels, ...]: the noise, and the range of its variance.
    betas: of all timesteps.
    timesteps: rising; they are gone through from the last.
    x: the noise to start from.
    noises: of the steps in their order, of DDPM.
    is_ddim: with eta 0; else DDPM.
    edit_x_0: what is done to x_0 before it is bounded.
  """
  alpha_bars = np.cumprod(1 - betas)[timesteps]
  befores = np.concatenate([[1.0], alpha_bars[:-1]])
  x = x.double()
  for i in reversed(range(len(timesteps))):
    a, before = alpha_bars[i], befores[i]
    beta = 1 - a / before
    eps, spread = evaluate(x, timesteps[i]).chunk(2, dim=1)
    x_0 = edit_x_0((x - math.sqrt(1 - a) * eps) / math.sqrt(a)).clamp(-1, 1)
    if is_ddim:  # equation 12
      eps = (x - math.sqrt(a) * x_0) / math.sqrt(1 - a)
      x = math.sqrt(before) * x_0 + math.sqrt(1 - before) * eps
      continue
    # DDPM, equations 6 and 7; the variance as in Improved DDPM, equation 15.
    x = (math.sqrt(before) * beta * x_0 + math.sqrt(1 - beta) * (1 - before) * x) / (1 - a)
    if i:
      least = math.log(beta * (1 - before) / (1 - a))
      share = (spread + 1) / 2
      log_var = share * math.log(beta) + (1 - share) * least
      x = x + (0.5 * log_var).exp() * noises[len(timesteps) - 1 - i]
  return x
