"""How stages train by their configs: gradients cost what is counted by hand."""

import jax
import pytest

from unclip_jax.config_json import override
from unclip_jax.measure import analytic
from unclip_jax.measure.hlo import program_cost
from unclip_jax.presets import TINY, TINY_AR
from unclip_jax.systems.training import describe_training, make_grad, trained_stages
from unclip_jax.train.presets import paper_recipe
from unclip_jax.types import UnclipError

BATCH = 6
# Blocks enough that what begins and ends a network, which needs no gradient of its input or is not
# computed again, is a small part.
DEEP = [
  'clip.text.depth=4',
  'clip.vision.depth=4',
  'prior.depth=5',
  'decoder.unet.num_res_blocks=2',
]
CONFIGS = {
  'clip': ('clip', TINY),
  'prior': ('prior', TINY),
  'ar_prior': ('prior', TINY_AR),
  'decoder': ('decoder', TINY),
  'upsampler_0': ('upsampler_0', TINY),
}


def gradient_flops(training, recipe):
  """Of the program as it is handed to the compiler, which would join what is computed twice."""
  key = jax.eval_shape(lambda: jax.random.key(0))
  given = training.params, training.constants, training.batch, key

  def run(params, constants, batch, key):
    return make_grad(training, recipe, constants)(params, batch, key)

  lowered = jax.jit(run).lower(*given)
  return program_cost(lowered.compiler_ir('hlo').as_hlo_text()).matmul_flops


@pytest.mark.parametrize('remat', [False, True])
@pytest.mark.parametrize('name', CONFIGS)
def test_gradients_cost_what_is_counted_by_hand(name, remat):
  stage, config = CONFIGS[name]
  config = override(config, DEEP)
  recipe = paper_recipe(name)
  if name == 'clip':
    recipe = recipe.__class__(**{**vars(recipe), 'sam_rho': None})
  training = describe_training(config, stage, BATCH, 'float32', remat)
  length = config.clip.text.context_length
  passes = 4 if remat else 3
  expected = analytic.training_flops(training.config, BATCH, length, passes)
  ratio = gradient_flops(training, recipe) / expected
  # The last product of a block is not needed a second time: half of a residual block's.
  assert (0.85 if remat else 0.93) < ratio < 1.07, ratio


def test_sam_takes_eleven_passes():
  config = override(TINY, DEEP)
  recipe = paper_recipe('clip')
  training = describe_training(config, 'clip', 128, 'float32', False)
  expected = analytic.training_flops(training.config, 128, passes=11)
  assert gradient_flops(training, recipe) == pytest.approx(expected, rel=0.1)


def test_what_cannot_train_is_a_line():
  assert [*trained_stages(TINY)] == ['clip', 'prior', 'decoder', 'upsampler_0']
  with pytest.raises(UnclipError, match="no stage 'judge' to train: take clip, prior"):
    describe_training(TINY, 'judge', 1, 'float32', False)
  training = describe_training(TINY, 'prior', 1, 'float32', False)
  with pytest.raises(UnclipError, match='prior: SAM is for CLIP'):
    make_grad(training, paper_recipe('clip'), {})
