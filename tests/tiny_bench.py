"""What benchmarks of the tiny model are tested with."""

import contextlib

import pytest

from unclip_jax.config_json import override
from unclip_jax.measure import peaks
from unclip_jax.presets import preset

# Programs are compiled more than once here.
ONE_LEVEL = [
  'clip.text.depth=1',
  'decoder.unet.multipliers=[1]',
  'decoder.unet.attention_levels=[0]',
  'upsamplers.0.unet.multipliers=[1]',
]
CONFIG = override(preset('tiny'), ONE_LEVEL)
SMALL_PEAKS = {'_SIDE': {'cpu': 64}, '_BYTES': {'cpu': 2**16}}


@contextlib.contextmanager
def small_peaks():
  """Peaks are measured by products and copies that take no time."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in SMALL_PEAKS.items():
      patch.setattr(peaks, name, value)
    yield
