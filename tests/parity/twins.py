"""Tiny torch twins with random weights; the classes of diffusers and transformers are the oracle.

Their tensors come into our parameter trees, and back, by the rules of `unclip_jax.weights`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import torch

from unclip_jax.weights.rules import Rule, read_params, write_tensors
from unclip_jax.weights.safetensors import named_leaves


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Draws every parameter anew: none is left at zero or at its initial constant."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for module in model.modules():
      for name, p in module.named_parameters(recurse=False):
        noise = torch.randn(p.shape, generator=generator)
        match module:
          case torch.nn.Linear() | torch.nn.Conv2d() if name == 'weight':
            p.copy_(noise / p[0].numel() ** 0.5)
          case torch.nn.LayerNorm() | torch.nn.GroupNorm() if name == 'weight':
            p.copy_(1 + 0.3 * noise)
          case torch.nn.Linear() | torch.nn.Conv2d() | torch.nn.LayerNorm() | torch.nn.GroupNorm():
            p.copy_(0.3 * noise)
          case _:  # embeddings, positions, statistics, learned tokens
            p.copy_(0.8 * noise + 0.2)
  return model.eval().requires_grad_(False)


def tensors_of(*models: torch.nn.Module) -> dict[str, np.ndarray]:
  """The parameters of models whose names do not collide."""
  tensors: dict[str, np.ndarray] = {}
  for model in models:
    named = {k: v.numpy().copy() for k, v in model.named_parameters()}
    assert not set(named) & set(tensors)
    tensors |= named
  return tensors


def deviation(actual: Any, expected: torch.Tensor) -> float:
  """The largest difference over the standard deviation of what is expected."""
  expected = expected.numpy()
  assert actual.shape == expected.shape
  assert 0.3 < expected.std() < 3, (
    f'a twin with outputs of deviation {expected.std()} proves little'
  )
  return float(np.abs(np.asarray(actual, np.float64) - expected).max() / expected.std())


def worst_deviation(actual: Any, expected: Any) -> float:
  """`deviation`, the largest of those of a list of arrays."""
  return max(deviation(a, e) for a, e in zip(actual, expected, strict=True))


class Tensors(dict):
  """The tensors of twins, as conversions read them."""

  def names(self) -> list[str]:
    """Of all tensors."""
    return list(self)

  def shape(self, name: str) -> tuple[int, ...]:
    """Of a tensor."""
    return self[name].shape

  def read(self, name: str) -> np.ndarray:
    """A tensor."""
    return self[name]


def convert(tensors: Mapping[str, np.ndarray], rules: list[Rule], expected: Any) -> Any:
  """Our parameters; each tensor occurs in one rule, and each parameter is made by one."""
  theirs = [name for rule in rules for name in rule.theirs]
  ours = [name for rule in rules for name in rule.ours]
  assert len(theirs) == len(set(theirs)) and len(ours) == len(set(ours))
  params = read_params(Tensors(tensors), rules, expected, 'the twin')
  for name, written in write_tensors(params, rules).items():
    np.testing.assert_array_equal(written, tensors[name], name)
  return params


def lay_out(tensors: Mapping[str, np.ndarray], rules: list[Rule], expected: Any) -> Any:
  """What `convert` makes, without its checks: for loops over tensors."""
  ours: dict[str, Any] = {}
  for rule in rules:
    arrays = rule.layout.read(tuple(tensors[name] for name in rule.theirs))
    ours |= dict(zip(rule.ours, arrays, strict=True))
  return jax.tree.unflatten(jax.tree.structure(expected), [ours[k] for k in named_leaves(expected)])


def check_each_tensor_matters(
  tensors: Mapping[str, np.ndarray],
  run: Callable[[Mapping[str, np.ndarray]], Any],
  expected: Any,
  tolerance: float,
) -> None:
  """A change of any one source tensor, of its own size, is felt: ten times the tolerance."""
  rng = np.random.default_rng(0)
  for name, value in tensors.items():
    changed = value + np.abs(value).mean() * rng.normal(size=value.shape).astype('f')
    worst = worst_deviation(run({**tensors, name: changed}), expected)
    assert worst > 10 * tolerance, f'{name} changes the outputs by {worst:.1e} only'


def tensors_in(folder: Path) -> dict[tuple[str, str], np.ndarray]:
  """All tensors below a folder of diffusers, by their folders and names."""
  return {
    (str(path.parent.relative_to(folder)), name): tensor
    for path in folder.rglob('*.safetensors')
    for name, tensor in safetensors.numpy.load_file(path).items()
  }
