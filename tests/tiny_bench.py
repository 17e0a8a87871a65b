"""What benchmarks of the tiny model are tested with."""

from unclip_jax.config_json import override
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
