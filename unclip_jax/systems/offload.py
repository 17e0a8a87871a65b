"""Parameters that wait in the host's memory, for devices that do not hold all stages at once."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np

from unclip_jax.sharding import Mesh, shard_params
from unclip_jax.types import Params


class Offloaded(Mapping[str, Params]):
  """Stages by their names; looking one up brings its parameters to the devices.

  They stay there as long as the caller, or a program that runs, holds on to them.
  """

  def __init__(self, params: Mapping[str, Params], mesh: Mesh | None = None):
    """Takes hold of the parameters.

    Args:
      params: of the stages.
      mesh: the devices that get them, each all or a part; None for the default one.
    """
    self._host = {name: jax.tree.map(np.asarray, tree) for name, tree in params.items()}
    self._mesh = mesh

  def __getitem__(self, name: str) -> Params:
    host, mesh = self._host[name], self._mesh
    return jax.device_put(host) if mesh is None else shard_params(host, mesh)

  def __contains__(self, name: object) -> bool:
    return name in self._host

  def __iter__(self) -> Iterator[str]:
    return iter(self._host)

  def __len__(self) -> int:
    return len(self._host)
