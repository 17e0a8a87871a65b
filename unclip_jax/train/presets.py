"""How the paper trained each of its networks: Table 3, and appendix C for CLIP.

Sizes of networks are in `unclip_jax.presets`; what their training drops, blurs and crops is in
their configs.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from unclip_jax.train.state import OptimizerConfig
from unclip_jax.types import UnclipError


@dataclasses.dataclass(frozen=True)
class Recipe:
  """The training of a stage.

  Attributes:
    optimizer: its optimiser.
    batch_size: examples an update, of all devices together.
    num_steps: updates.
    ema_decay: of the average that is sampled from; 0 keeps none.
    sam_rho: length of the perturbation of `train.sam`; None trains without.
    sam_group: examples that share a perturbation.
  """

  optimizer: OptimizerConfig
  batch_size: int
  num_steps: int
  ema_decay: float
  sam_rho: float | None = None
  sam_group: int = 64


# The paper names no bound of the gradient's norm and no warm-up of the diffusion models.
_ADAM = OptimizerConfig(learning_rate=1.2e-4, max_grad_norm=None)

PAPER: Mapping[str, Recipe] = MappingProxyType(
  {
    # Learning rate and SAM are the paper's; the rest, which it takes over, is that of the ViT in
    # Radford et al. 2021 (appendix F, Tables 18 and 20): 32 epochs of 400M pairs.
    'clip': Recipe(
      OptimizerConfig(
        learning_rate=3e-4,
        b2=0.98,
        eps=1e-6,
        weight_decay=0.2,
        warmup_steps=2000,
        decay='cosine',
        max_grad_norm=None,
      ),
      batch_size=32768,
      num_steps=32 * 400_000_000 // 32768,
      ema_decay=0.0,
      sam_rho=0.1,
    ),
    'ar_prior': Recipe(
      dataclasses.replace(_ADAM, learning_rate=1.6e-4, b2=0.91, eps=1e-10, weight_decay=4e-2),
      batch_size=4096,
      num_steps=1_000_000,
      ema_decay=0.999,
    ),
    'prior': Recipe(
      dataclasses.replace(_ADAM, learning_rate=1.1e-4, b2=0.96, eps=1e-6, weight_decay=6e-2),
      batch_size=4096,
      num_steps=600_000,
      ema_decay=0.9999,
    ),
    'decoder': Recipe(_ADAM, batch_size=2048, num_steps=800_000, ema_decay=0.9999),
    'upsampler_0': Recipe(_ADAM, batch_size=1024, num_steps=1_000_000, ema_decay=0.9999),
    'upsampler_1': Recipe(
      dataclasses.replace(_ADAM, learning_rate=1e-4),
      batch_size=512,
      num_steps=1_000_000,
      ema_decay=0.9999,
    ),
  }
)


def paper_recipe(stage: str) -> Recipe:
  """The paper's training of a stage.

  Raises:
    UnclipError: there is no such stage; names those that exist.
  """
  if stage not in PAPER:
    raise UnclipError(f'the paper trains no {stage!r}: take one of {", ".join(PAPER)}')
  return PAPER[stage]
