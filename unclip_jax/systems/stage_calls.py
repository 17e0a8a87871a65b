"""The stages of a batch one by one: each one's programs and arguments, to be run again and again.

What a stage is given is noted while a batch goes through all of them without any running: what one
would give the next are normal numbers of the same shapes, which take as long to work on.
"""

import inspect
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import UnclipConfig
from unclip_jax.nn.clip import TextFeatures
from unclip_jax.sharding import Mesh, place_batch
from unclip_jax.systems import pipeline
from unclip_jax.systems.loading import expected_params
from unclip_jax.systems.samples import OF_ROWS, Request
from unclip_jax.types import Array, Params

_IMAGE_AXES = 4


class Call(NamedTuple):
  """A program and what it is called with, but for the parameters of its stage.

  Attributes:
    program: one of `programs`.
    args: by their names, in their order; parameters, which come first, are left out.
    static: what the program is made for.
  """

  program: Callable[..., Any]
  args: Mapping[str, Any]
  static: Mapping[str, Any]

  def lower(self, params: Params) -> jax.stages.Lowered:
    """The program, before it is compiled."""
    return self.program.lower(params, *self.args.values(), **self.static)

  def is_compiled_by(self, other: 'Call') -> bool:
    """Whether both run one compiled program."""
    same = self.program is other.program and dict(self.static) == dict(other.static)
    return same and _shapes(dict(self.args)) == _shapes(dict(other.args))


def record(
  config: UnclipConfig, request: Request, dtype: Any, mesh: Mesh | None
) -> dict[str, list[Call]]:
  """The calls of each stage that a request runs, in their order.

  Args:
    config: of the model.
    request: of b images.
    dtype: of the networks.
    mesh: the devices that b is spread over, a multiple of their number; None for the default one.
  """
  params = expected_params(config, dtype)
  stages = {id(tree): name for name, tree in params.items()}
  calls: dict[str, list[Call]] = {}
  rng = np.random.default_rng(0)
  if mesh is not None:
    rows = {
      name: place_batch(getattr(request, name), mesh) for name in OF_ROWS if _has(request, name)
    }
    request = request._replace(**rows)

  def note(program: Callable[..., Any], *args: Any, **static: Any) -> Any:
    stage = stages.get(id(args[0]))
    if stage is None:
      return program(*args, **static)
    names = list(inspect.signature(program).parameters)[1 : len(args)]
    calls.setdefault(stage, []).append(
      Call(program, dict(zip(names, args[1:], strict=True)), static)
    )
    given = jax.eval_shape(lambda own: program(own, *args[1:], **static), args[0])
    made = jax.tree.map(lambda leaf: _draw(rng, leaf), given)
    if isinstance(given, TextFeatures):
      made = made._replace(ids=args[1], mask=args[2])
    return made if mesh is None else place_batch(made, mesh)

  pipeline.draw_batch(config, params, request, dtype, run=note)
  return calls


def random_params(config: UnclipConfig, stage: str, dtype: Any) -> Params:
  """Parameters of one stage, none of them zero, with outputs of the order of 1.

  Numbers repeat: to draw a billion takes longer than to use them.
  """
  block = np.random.default_rng(0).standard_normal(1_000_003, np.float32)

  def draw(path: Any, leaf: Any) -> Array:
    name = path[-1].key
    scale = math.prod(leaf.shape[:-1]) ** -0.5 if name == 'kernel' else 0.1
    mean = 1.0 if name in ('scale', 'std') else 0.0
    # Each from another place of the block: two leaves of a shape are not equal.
    start = zlib.crc32(jax.tree_util.keystr(path).encode()) % len(block)
    numbers = np.roll(block, start) * np.float32(scale) + np.float32(mean)
    return jax.device_put(np.resize(numbers, leaf.shape).astype(leaf.dtype, copy=False))

  return jax.tree_util.tree_map_with_path(draw, expected_params(config, dtype)[stage])


def _has(request: Request, name: str) -> bool:
  return bool(jax.tree.leaves(getattr(request, name)))


def _draw(rng: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> Array:
  values = rng.standard_normal(leaf.shape, np.float32)
  if len(leaf.shape) == _IMAGE_AXES:
    values = np.clip(values, -1, 1)
  return jnp.asarray(values).astype(leaf.dtype)


def _shapes(tree: Any) -> Any:
  return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
