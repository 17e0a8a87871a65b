"""Which of diffusers' multistep solvers are ours, by what their files say."""

import math
from collections.abc import Mapping
from typing import Any

PNDM = 'PNDMScheduler'
_DPM, _UNIPC = 'DPMSolverMultistepScheduler', 'UniPCMultistepScheduler'
CLASSES = {'plms': PNDM, 'dpmpp_2m': _DPM, 'dpmpp_2m_sde': _DPM, 'unipc': _UNIPC}
# Their strides that begin at x_0 are n + 1 of them, the first left out.
_STRIDES = {'leading': 'inner', 'trailing': 'trailing', 'linspace': 'linspace'}
SPACINGS: Mapping[str, Mapping[str, str]] = {
  'plms': {'leading': 'leading'},
  'dpmpp_2m': _STRIDES,
  'dpmpp_2m_sde': _STRIDES,
  'unipc': _STRIDES,
}
# What each takes for granted where DDIM does not: those that are ours, and those that are not.
_OF_SIGMAS = {'timestep_spacing': 'linspace'}
_OF_KARRAS = {**_OF_SIGMAS, 'beta_start': 8.5e-4, 'beta_end': 0.012}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
  PNDM: {'set_alpha_to_one': False, 'skip_prk_steps': False, 'timestep_spacing': 'leading'},
  _DPM: {**_OF_SIGMAS, 'algorithm_type': 'dpmsolver++'},
  _UNIPC: _OF_SIGMAS,
  'DEISMultistepScheduler': _OF_SIGMAS,
  'DPMSolverSinglestepScheduler': _OF_SIGMAS,
  'EulerAncestralDiscreteScheduler': _OF_SIGMAS,
  'EulerDiscreteScheduler': _OF_SIGMAS,
  'HeunDiscreteScheduler': _OF_KARRAS,
  'KDPM2AncestralDiscreteScheduler': _OF_KARRAS,
  'KDPM2DiscreteScheduler': _OF_KARRAS,
  'LMSDiscreteScheduler': _OF_SIGMAS,
}
# What stays in a file when a pipeline is given another scheduler, which then does not look at it.
LEFTOVERS = (
  'algorithm_type', 'disable_corrector', 'euler_at_final', 'final_sigmas_type', 'flow_shift',
  'interpolation_type', 'lambda_min_clipped', 'lower_order_final', 'predict_x0',
  'set_alpha_to_one', 'sigma_max', 'sigma_min', 'skip_prk_steps', 'solver_order', 'solver_p',
  'solver_type', 'time_shift_type', 'timestep_type', 'use_beta_sigmas',
  'use_exponential_sigmas', 'use_karras_sigmas', 'use_lu_lambdas', 'variance_type',
)  # fmt: skip
_OF_ORDER_2 = {
  'solver_order': 2, 'final_sigmas_type': 'zero', 'thresholding': False,
  'use_karras_sigmas': False, 'use_beta_sigmas': False, 'use_exponential_sigmas': False,
}  # fmt: skip
_OF_DPM = {
  **_OF_ORDER_2, 'solver_type': 'midpoint', 'use_lu_lambdas': False, 'variance_type': None,
  'lambda_min_clipped': -math.inf,
}  # fmt: skip
# The fields that make one of theirs ours; one that a file does not have is so there too.
_FIELDS: Mapping[str, Mapping[str, Any]] = {
  'plms': {'skip_prk_steps': True, 'timestep_spacing': 'leading'},
  'dpmpp_2m': {**_OF_DPM, 'algorithm_type': 'dpmsolver++'},
  'dpmpp_2m_sde': {**_OF_DPM, 'algorithm_type': 'sde-dpmsolver++'},
  'unipc': {**_OF_ORDER_2, 'solver_type': 'bh2', 'predict_x0': True, 'disable_corrector': []},
}


def find(name: str, values: Mapping[str, Any]) -> str | None:
  """The sampler of ours that does what a scheduler's file says; None where none does."""
  for sampler, kind in CLASSES.items():
    # JSON has no infinity: some write it as text.
    same = (str(values.get(k, v)).lower() == str(v).lower() for k, v in _FIELDS[sampler].items())
    if kind == name and all(same):
      return sampler
  return None


def fields(sampler: str) -> dict[str, Any]:
  """What a file says of a sampler beside its noise and its timesteps."""
  names = ('skip_prk_steps', 'algorithm_type', 'solver_order', 'solver_type', 'final_sigmas_type')
  return {name: value for name, value in _FIELDS.get(sampler, {}).items() if name in names}
