"""The Inception of FID from the file that pytorch-fid and torch-fidelity download.

Both have the same: `pt_inception-2015-12-05-6726825d.pth`, converted from TensorFlow's archive. The
number at its end is how the SHA-256 of its bytes begins.
"""

import hashlib

from etils import epath

from unclip_jax.types import Params, UnclipError
from unclip_jax.weights.rules import Rule, conv, group_norm, read_params, same
from unclip_jax.weights.safetensors import named_leaves
from unclip_jax.weights.tensor_files import open_tensors

PUBLISHED_DIGEST = '6726825d'
_MARK = 'Mixed_7c.branch_pool.conv.weight'
# The classifier, of which FID makes no use, and counters of the norms.
IGNORED = ('fc.weight', 'fc.bias', 'num_batches_tracked')
_KERNEL = '.conv.kernel'


def rules(expected: Params) -> list[Rule]:
  """All tensors of the network, whose modules are called as in the file."""
  layers = [name.removesuffix(_KERNEL) for name in named_leaves(expected) if name.endswith(_KERNEL)]
  return [
    rule
    for layer in layers
    for rule in (
      *conv(f'{layer}.conv', f'{layer}.conv', bias=False),
      *group_norm(f'{layer}.bn', f'{layer}.bn'),
      same(f'{layer}.bn.mean', f'{layer}.bn.running_mean'),
      same(f'{layer}.bn.var', f'{layer}.bn.running_var'),
    )
  ]


def read_inception(path: epath.Path, expected: Params) -> Params:
  """The parameters, from a file of tensors: torch's or safetensors.

  Args:
    path: of the file.
    expected: their shapes and types (`jax.ShapeDtypeStruct`s).

  Raises:
    UnclipError: the file is missing, damaged, or of another network.
  """
  with open_tensors(path) as tensors:
    if _MARK not in tensors.names():
      raise UnclipError(
        f'{path} is not the Inception of FID (it has no {_MARK}): give '
        f'pt_inception-2015-12-05-{PUBLISHED_DIGEST}.pth of pytorch-fid, or that of torch-fidelity'
      )
    return read_params(tensors, rules(expected), expected, str(path), IGNORED)


def file_digest(path: epath.Path) -> str:
  """How the SHA-256 of a file's bytes begins, 8 hexadecimal digits."""
  sha = hashlib.sha256()
  with path.open('rb') as file:
    while block := file.read(1 << 20):
      sha.update(block)
  return sha.hexdigest()[:8]
