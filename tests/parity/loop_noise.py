"""The noise that our sampling loops draw after their start, for the pipelines of diffusers."""

import karlo_twin
import numpy as np
import torch

from unclip_jax.diffusion import samplers
from unclip_jax.stages import common
from unclip_jax.systems import programs


def of_stage(samples, seed, stage, part, shape):
  """One array a step, as torch has it; the last step adds none.

  Args:
    samples: of ours.
    seed: of theirs.
    stage: of `programs`.
    part: the stage's config, with the settings that it was sampled by.
    shape: of one sample.
  """
  keys = programs.image_keys(np.uint32(seed), samples.indices.astype(np.uint32))
  keys = programs.stage_keys(keys, stage=stage)
  if stage in (programs.PRIOR, programs.NEGATIVE_PRIOR):
    keys = programs.candidate_keys(keys, num_candidates=1)[:, 0]
  plan = common.make_plan(part.diffusion, part.sampling)
  rows = [type(plan)(*row) for row in zip(*plan, strict=True)]
  noise = (np.asarray(samplers.step_noise(keys, row, shape)) for row in rows[:-1])
  return [karlo_twin.to_torch(x) for x in noise]


def start_of_prior(samples, seed, stage, width):
  """What the prior begins from, [n, width]."""
  keys = programs.image_keys(np.uint32(seed), samples.indices.astype(np.uint32))
  keys = programs.candidate_keys(programs.stage_keys(keys, stage=stage), num_candidates=1)
  return torch.from_numpy(np.asarray(programs.draw_start(keys, shape=(width,)))[:, 0].copy())


def give(monkeypatch, module, noise):
  """Lets a scheduler draw these arrays, one after the other."""
  left = iter(noise)
  monkeypatch.setattr(module, 'randn_tensor', lambda *args, **kwargs: next(left))
  return left
