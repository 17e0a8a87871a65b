"""Writes model_v1/, a whole model as the first version of the package stores it.

Run once, with that version; the output is committed and never written again, so that a later
version that renames a parameter or a field of a config is found out when it cannot open it.
"""

from pathlib import Path

import jax
import numpy as np

from unclip_jax.config_json import override, to_json
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.presets import preset
from unclip_jax.systems.loading import expected_params
from unclip_jax.weights.folder import write_model

FOLDER = Path(__file__).parent / 'model_v1'
SMALLER = (
  *('clip.text.vocab_size=260', 'clip.text.width=8', 'clip.text.depth=1', 'clip.embed_dim=4'),
  *('clip.vision.width=8', 'clip.vision.depth=1', 'prior.embed_dim=4', 'prior.text_width=8'),
  *('prior.width=8', 'prior.depth=1', 'decoder.embed_dim=4', 'decoder.unet.channels=8'),
  *('decoder.unet.num_groups=4', 'decoder.unet.head_dim=8', 'decoder.unet.context_dim=8'),
  *('decoder.text.vocab_size=260', 'decoder.text.width=8', 'upsamplers.0.unet.channels=8'),
  'upsamplers.0.unet.num_groups=4',
)


def main() -> None:
  config = override(preset('tiny'), SMALLER)
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: draw.normal(0, 0.1, leaf.shape).astype(np.float32), expected_params(config)
  )
  params['prior']['statistics']['std'] = np.full(4, 0.5, np.float32)
  text = config.clip.text
  FOLDER.mkdir(exist_ok=True)
  tokenizer = FOLDER / 'tokenizer.json'
  Tokenizer.train(['a red apple'], text.vocab_size, text.context_length).save(tokenizer)
  write_model(FOLDER, to_json(config), params, tokenizer, 'bfloat16', 'unclip_jax 0.1.0')


if __name__ == '__main__':
  main()
