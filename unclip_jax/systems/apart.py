"""Groups of examples that devices take by themselves, side by side, each with all parameters."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax

from unclip_jax.sharding import (
  DATA_AXIS,
  REST_AXIS,
  Mesh,
  NamedSharding,
  PartitionSpec,
  param_sharding,
)
from unclip_jax.train.sam import Parts
from unclip_jax.types import Array


def apart(
  fn: Callable[[Parts, Any, Any], Any], sums: bool, *, mesh: Mesh, fsdp: bool
) -> Callable[[Any, Any], Any]:
  """Inside of a jitted function: `fn(parts, params, groups)`, each device on its own groups.

  Where the groups [n, size, ...] do not divide over the devices fn runs as it is, one group after
  the other, each split over all devices, and a warning says so: that takes far longer on many.

  Args:
    fn: it is given parameters as the device has them, and n / devices of the groups. It returns
      arrays of its groups, [n / devices, ...], or a tree like the parameters.
    sums: whether it returns a tree like the parameters, made by `parts.scattered`. What is not
      split is summed here, once; of arrays of groups those of all devices are put one after the
      other.
    mesh: of `make_mesh`.
    fsdp: whether the parameters are split over its `data` axis.

  Returns:
    (params, groups) -> what fn returns, of all devices.
  """
  num_devices = mesh.shape[DATA_AXIS]
  split = PartitionSpec(DATA_AXIS)

  def own_spec(path: Any, leaf: Any) -> PartitionSpec:
    """Which axis of a parameter is split over `data`."""
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    placed = param_sharding(name, leaf.shape, mesh, fsdp)
    if REST_AXIS in placed.mesh.shape:  # as no part here is one of its, each device is given it all
      return PartitionSpec()
    axes = [axis if isinstance(axis, tuple) else (axis,) for axis in placed.spec]
    return PartitionSpec(*(DATA_AXIS if DATA_AXIS in names else None for names in axes))

  def spread(a: Array) -> Array:
    divides = a.ndim > 1 and a.shape[1] % num_devices == 0
    spec = PartitionSpec(None, DATA_AXIS) if divides else PartitionSpec()
    return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec))

  def call(params: Any, groups: Any) -> Any:
    num_groups = jax.tree.leaves(groups)[0].shape[0]
    if num_groups % num_devices:
      warnings.warn(
        f'{num_groups} groups do not divide over {num_devices} devices, which take one after the '
        'other together: choose a multiple to have them side by side',
        stacklevel=2,
      )
      return fn(Parts(), params, jax.tree.map(spread, groups))
    specs = jax.tree_util.tree_map_with_path(own_spec, params)

    def whole(leaf: Array, spec: PartitionSpec) -> Array:
      if DATA_AXIS not in spec:
        return leaf
      return jax.lax.all_gather(leaf, DATA_AXIS, axis=spec.index(DATA_AXIS), tiled=True)

    def scattered(leaf: Array, spec: PartitionSpec) -> Array:
      if DATA_AXIS not in spec:
        return leaf
      axis = spec.index(DATA_AXIS)
      return jax.lax.psum_scatter(leaf, DATA_AXIS, scatter_dimension=axis, tiled=True)

    def summed(leaf: Array, spec: PartitionSpec) -> Array:
      return leaf if DATA_AXIS in spec else jax.lax.psum(leaf, DATA_AXIS)

    parts = Parts(
      lambda tree: jax.tree.map(whole, tree, specs),
      lambda tree: jax.tree.map(scattered, tree, specs),
    )

    def of_one(params: Any, groups: Any) -> Any:
      results = fn(parts, params, groups)
      return jax.tree.map(summed, results, specs) if sums else results

    return jax.shard_map(
      of_one,
      mesh=mesh,
      in_specs=(specs, split),
      out_specs=specs if sums else split,
      axis_names={DATA_AXIS},
      check_vma=False,
    )(params, groups)

  return call


def make_apart(mesh: Mesh, fsdp: bool) -> Callable[..., Callable[[Any, Any], Any]]:
  """`apart` of a mesh, as `make_sam_grad` takes it."""
  return functools.partial(apart, mesh=mesh, fsdp=fsdp)
