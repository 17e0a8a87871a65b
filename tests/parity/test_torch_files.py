"""Files that torch, diffusers and transformers write, read without torch: bit for bit theirs."""

import json
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers

from unclip_jax.types import UnclipError
from unclip_jax.weights.tensor_files import open_tensors


class Block(torch.nn.Module):
  def __init__(self, width: int) -> None:
    super().__init__()
    self.conv = torch.nn.Conv2d(3, width, 3, padding=1)
    self.norm = torch.nn.BatchNorm2d(width)
    self.padding = [2, 1]
    self.names = {'a': 1}

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.norm(self.conv(x)).relu()


class Net(torch.nn.Module):
  """As OpenAI's CLIP: half precision in part, numbers as buffers, modules in lists."""

  def __init__(self) -> None:
    super().__init__()
    self.visual = torch.nn.Sequential(Block(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 1))
    self.blocks = torch.nn.ModuleList([torch.nn.Linear(5, 2, bias=at > 0) for at in range(3)])
    self.logit_scale = torch.nn.Parameter(torch.tensor(2.5))
    self.table = torch.nn.Parameter(torch.randn(7, 3)[:, ::2].bfloat16())
    self.register_buffer('input_resolution', torch.tensor(224))
    self.register_buffer('mask', torch.rand(3, 3) > 0.5)
    self.blocks.half()

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.visual(x) * self.logit_scale


@pytest.fixture(scope='module')
def net() -> Net:
  torch.manual_seed(0)
  net = Net().eval()
  with torch.no_grad():
    for tensor in [*net.parameters(), *net.buffers()]:
      if tensor.is_floating_point():
        tensor.copy_(torch.randn(tensor.shape))
  return net


def assert_same(array: np.ndarray, tensor: torch.Tensor) -> None:
  assert str(array.dtype) == str(tensor.dtype).removeprefix('torch.')
  assert array.shape == tuple(tensor.shape)
  assert array.flags.c_contiguous
  content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
  assert array.tobytes() == content


def assert_reads(path: Path, tensors: dict[str, torch.Tensor]) -> None:
  with open_tensors(path) as file:
    assert file.names() == set(tensors)
    for name, tensor in tensors.items():
      assert file.shape(name) == tuple(tensor.shape)
      assert str(file.dtype(name)) == str(tensor.dtype).removeprefix('torch.')
      assert_same(file.read(name), tensor)


def make_tensors() -> dict[str, torch.Tensor]:
  torch.manual_seed(1)
  base = torch.randn(6, 5)
  floats = ('float64', 'float32', 'float16', 'bfloat16')
  others = ('int64', 'int32', 'int16', 'int8', 'uint8', 'bool')
  return {
    **{name: (base * 9).abs().to(getattr(torch, name)) for name in (*floats, *others)},
    'base': base,
    'base again': base,
    'transposed': base.T,
    'part': base[1:4, ::2],
    'row': base[3],
    'spread': base[:, :1].expand(6, 4),
    'scalar': torch.tensor(-1.5),
    'element': base[2, 3],
    'nothing': torch.zeros(0, 3),
    'channels last': torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    'brain transposed': torch.randn(3, 4).bfloat16().T,
    'parameter': torch.nn.Parameter(torch.randn(3)),
  }


@pytest.mark.parametrize('is_zip', [True, False])
@pytest.mark.parametrize('protocol', [2, 3, 4, 5])
def test_what_torch_saves(tmp_path, is_zip, protocol):
  tensors = make_tensors()
  path = tmp_path / 'model.pth'
  torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
  if is_zip or protocol == 2:
    assert_reads(path, tensors)
  else:  # Of the old format, only what torch itself has ever written is known.
    with pytest.raises(UnclipError, match='not a file of tensors'):
      open_tensors(path)


@pytest.mark.parametrize('is_zip', [True, False])
def test_state_dicts_and_checkpoints(tmp_path, net, is_zip):
  tensors = net.state_dict()
  assert len(tensors) == 18
  path = tmp_path / 'model.ckpt'
  torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
  assert_reads(path, tensors)
  optimizer = torch.optim.Adam(net.parameters()).state_dict()
  wrapped = {'epoch': 3, 'global_step': 1.5, 'optimizer_states': [optimizer], 'hub': None}
  wrapped['state_dict'] = tensors
  torch.save(wrapped, path, _use_new_zipfile_serialization=is_zip)
  assert_reads(path, tensors)
  del wrapped['state_dict']
  torch.save(wrapped, path, _use_new_zipfile_serialization=is_zip)
  with pytest.raises(UnclipError, match='epoch is a int, not a tensor'):
    open_tensors(path)


@pytest.mark.parametrize('trace', [True, False])
def test_torchscript(tmp_path, net, trace):
  path = tmp_path / 'ViT-L-14.pt'
  with warnings.catch_warnings():
    warnings.filterwarnings('ignore', r'`torch\.jit\.\w+` is (deprecated|not supported)')
    x = torch.ones(1, 3, 6, 6)
    script = torch.jit.trace(net, x) if trace else torch.jit.script(net)
    script.save(path)
  assert script.state_dict().keys() == net.state_dict().keys()
  assert_reads(path, net.state_dict())


def test_archives_are_read_without_torch(tmp_path, net):
  torch.save(net.state_dict(), tmp_path / 'model.pt')
  script = """
import sys
sys.modules['torch'] = None
from unclip_jax.weights.tensor_files import open_tensors
with open_tensors(sys.argv[1]) as file:
  print(sum(file.read(name).size for name in file.names()))
"""
  command = (sys.executable, '-c', script, str(tmp_path / 'model.pt'))
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  assert int(done.stdout) == sum(tensor.numel() for tensor in net.state_dict().values())


@pytest.mark.parametrize('ending', ['safetensors', 'bin'])
def test_the_shards_of_diffusers(tmp_path, ending):
  model = diffusers.PriorTransformer(
    num_attention_heads=2,
    attention_head_dim=4,
    num_layers=3,
    embedding_dim=8,
    num_embeddings=7,
    additional_embeddings=4,
  )
  is_safe = ending == 'safetensors'
  model.save_pretrained(tmp_path, max_shard_size='4KB', safe_serialization=is_safe)
  index = tmp_path / f'diffusion_pytorch_model.{ending}.index.json'
  assert len(set(json.loads(index.read_text())['weight_map'].values())) > 2
  assert_reads(index, model.state_dict())


def test_the_shards_of_transformers(tmp_path):
  config = transformers.CLIPTextConfig(
    vocab_size=50,
    hidden_size=8,
    intermediate_size=16,
    projection_dim=8,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=7,
  )
  model = transformers.CLIPTextModelWithProjection(config).half()
  model.save_pretrained(tmp_path, max_shard_size='2KB')
  index = tmp_path / 'model.safetensors.index.json'
  assert len(set(json.loads(index.read_text())['weight_map'].values())) > 2
  assert_reads(index, dict(model.named_parameters()))


class Payload:
  """Unpickled, it makes a file."""

  def __init__(self, target: Path) -> None:
    self.target = target

  def __reduce__(self):
    return (shutil.copyfile, (__file__, str(self.target)))


@pytest.mark.parametrize('is_zip', [True, False])
@pytest.mark.parametrize('wrap', [lambda x: {'w': x}, lambda x: {'state_dict': {}, 'x': [x]}])
def test_a_payload_does_not_run(tmp_path, is_zip, wrap):
  target, path = tmp_path / 'made', tmp_path / 'model.pt'
  torch.save(wrap(Payload(target)), path, _use_new_zipfile_serialization=is_zip)
  with pytest.raises(UnclipError, match=r"is refused: it would run 'shutil\.copyfile'") as caught:
    open_tensors(path)
  assert '\n' not in str(caught.value)
  assert not target.exists()
  pickle.loads(pickle.dumps(Payload(target)))
  assert target.exists(), 'it is no payload'


@pytest.mark.parametrize('is_zip', [True, False])
@pytest.mark.parametrize(
  ('make', 'match'),
  [
    (lambda: torch.nn.Linear(2, 2), "refused: it would run 'torch.nn.modules.linear.Linear'"),
    (lambda: {'w': torch.eye(3).to_sparse()}, r"_rebuild_sparse_tensor'|w is not a plain tensor"),
    (lambda: [torch.ones(2)], 'holds a list, not tensors'),
    (lambda: {3: torch.ones(2)}, 'holds 3 in place of a name'),
    (lambda: {'model': {'w': torch.ones(2)}}, 'model is a dict, not a tensor'),
  ],
)
def test_what_is_no_state_dict_is_named(tmp_path, is_zip, make, match):
  path = tmp_path / 'model.pt'
  torch.save(make(), path, _use_new_zipfile_serialization=is_zip)
  with pytest.raises(UnclipError, match=match) as caught:
    open_tensors(path)
  assert str(path) in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('is_zip', [True, False])
@pytest.mark.parametrize('part', [0.05, 0.3, 0.6, 0.9, 0.999])
def test_a_file_cut_short_is_named(tmp_path, net, is_zip, part):
  path = tmp_path / 'model.pt'
  torch.save(net.state_dict(), path, _use_new_zipfile_serialization=is_zip)
  whole = path.read_bytes()
  path.write_bytes(whole[: int(len(whole) * part)])
  # A cut within the name of a class, where it falls in the old format, leaves a name nobody knows.
  said = r'model\.pt is cut short' if is_zip else r'model\.pt is (cut short|refused)'
  with pytest.raises(UnclipError, match=said) as caught:
    open_tensors(path)
  assert '\n' not in str(caught.value)
