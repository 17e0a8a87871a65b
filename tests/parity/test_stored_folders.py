"""Folders that diffusers wrote, opened where they lie in a store."""

import json
from pathlib import Path

import jax
import karlo_twin
import numpy as np
import torch
from fake_store import BUCKET, serve
from safetensors.numpy import load_file, save_file

import unclip_jax

NET = 'diffusion_pytorch_model.safetensors'


def to_pickle(folder: Path) -> None:
  tensors = {name: torch.from_numpy(x) for name, x in load_file(folder / NET).items()}
  torch.save(tensors, folder / 'diffusion_pytorch_model.bin')
  (folder / NET).unlink()


def to_shards(folder: Path) -> None:
  tensors = load_file(folder / NET)
  places = {name: f'{i % 2}.safetensors' for i, name in enumerate(tensors)}
  for file in set(places.values()):
    save_file({name: x for name, x in tensors.items() if places[name] == file}, folder / file)
  (folder / f'{NET}.index.json').write_text(json.dumps({'weight_map': places}))
  (folder / NET).unlink()


def test_a_pipeline_of_safetensors_shards_and_pickles(tmp_path, monkeypatch):
  karlo_twin.make_pipelines(tmp_path)
  here = unclip_jax.load(tmp_path / 'text')
  to_pickle(tmp_path / 'text' / 'decoder')
  to_shards(tmp_path / 'text' / 'prior')
  store = serve(tmp_path, monkeypatch)
  there = unclip_jax.load(f'{BUCKET}/text')
  assert there.config == here.config
  jax.tree.map(np.testing.assert_array_equal, dict(there.params), dict(here.params))
  assert store.num_fetched > sum(leaf.nbytes for leaf in jax.tree.leaves(dict(here.params)))
