"""The paper's recipes against a copy of its Table 3."""

import jax
import pytest

from experiments.emoji.options import parse_options
from unclip_jax.presets import PAPER as NETWORKS
from unclip_jax.train.presets import PAPER, paper_recipe
from unclip_jax.train.sam import make_sam_grad
from unclip_jax.train.state import OptimizerConfig, make_learning_rate, make_optimizer
from unclip_jax.types import UnclipError

# Ramesh et al. 2022, Table 3, read by columns: AR prior, diffusion prior, 64, 64 -> 256,
# 256 -> 1024.
TABLE_3 = """
                 ar_prior  prior    decoder  upsampler_0  upsampler_1
dropout          -         -        0.1      0.1          -
weight_decay     4.0e-2    6.0e-2   -        -            -
batch_size       4096      4096     2048     1024         512
iterations       1M        600K     800K     1M           1M
learning_rate    1.6e-4    1.1e-4   1.2e-4   1.2e-4       1.0e-4
adam_b2          0.91      0.96     0.999    0.999        0.999
adam_eps         1.0e-10   1.0e-6   1.0e-8   1.0e-8       1.0e-8
ema_decay        0.999     0.9999   0.9999   0.9999       0.9999
diffusion_steps  -         1000     1000     1000         1000
noise_schedule   -         cosine   cosine   cosine       linear
crop_fraction    -         -        -        0.25         0.25
"""


def table():
  """{stage: {row: cell}} of Table 3, numbers as such."""
  header, *lines = TABLE_3.strip().splitlines()
  columns = {stage: {} for stage in header.split()}
  for line in lines:
    name, *cells = line.split()
    for stage, cell in zip(columns, cells, strict=True):
      columns[stage][name] = cell
  return columns


def number(cell):
  if cell == '-':
    return 0.0
  factor = {'K': 1_000, 'M': 1_000_000}.get(cell[-1], 1)
  return float(cell.rstrip('KM')) * factor


@pytest.mark.parametrize('stage', table())
def test_a_recipe_is_its_column(stage):
  column, recipe = table()[stage], PAPER[stage]
  found = {
    'weight_decay': recipe.optimizer.weight_decay,
    'batch_size': recipe.batch_size,
    'iterations': recipe.num_steps,
    'learning_rate': recipe.optimizer.learning_rate,
    'adam_b2': recipe.optimizer.b2,
    'adam_eps': recipe.optimizer.eps,
    'ema_decay': recipe.ema_decay,
  }
  assert found == {name: number(column[name]) for name in found}
  assert recipe.optimizer.b1 == 0.9  # the text's, for all of them
  assert recipe.optimizer.decay == 'constant' and recipe.optimizer.max_grad_norm is None
  assert recipe.sam_rho is None


@pytest.mark.parametrize('stage', ['prior', 'decoder', 'upsampler_0', 'upsampler_1'])
def test_what_networks_know_of_their_training_is_the_tables_too(stage):
  configs = {
    'prior': NETWORKS.prior,
    'decoder': NETWORKS.decoder,
    'upsampler_0': NETWORKS.upsamplers[0],
    'upsampler_1': NETWORKS.upsamplers[1],
  }
  column, config = table()[stage], configs[stage]
  assert config.diffusion.schedule == column['noise_schedule']
  assert config.diffusion.num_steps == number(column['diffusion_steps'])
  if stage != 'prior':
    assert config.unet.dropout == number(column['dropout'])
  if stage.startswith('upsampler'):
    assert config.crop_fraction == number(column['crop_fraction'])


def test_clip_is_trained_as_in_its_own_paper_but_for_the_rate_and_sam():
  recipe = paper_recipe('clip')
  optimizer = recipe.optimizer
  assert (optimizer.learning_rate, recipe.sam_rho, recipe.sam_group) == (3e-4, 0.1, 64)
  # Radford et al. 2021, Tables 18 and 20, of the ViT.
  assert recipe.batch_size == 32768 and optimizer.warmup_steps == 2000
  assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.98, 1e-6)
  assert (optimizer.weight_decay, optimizer.decay) == (0.2, 'cosine')
  assert recipe.num_steps * recipe.batch_size == pytest.approx(32 * 400e6, rel=1e-4)


def test_every_recipe_makes_an_optimizer_and_sam():
  for recipe in PAPER.values():
    rate = make_learning_rate(recipe.optimizer, recipe.num_steps)
    assert float(rate(5000)) == pytest.approx(recipe.optimizer.learning_rate, rel=0.01)
    state = make_optimizer(recipe.optimizer, recipe.num_steps).init({'w': jax.numpy.ones((2, 2))})
    assert jax.tree.leaves(state)
    assert recipe.batch_size % recipe.sam_group == 0
  make_sam_grad(lambda p, b, k: b, lambda p, z: (z.mean(), {}), PAPER['clip'].sam_rho)


def test_a_stage_that_the_paper_has_not_is_named():
  with pytest.raises(UnclipError, match=r"trains no 'autoencoder': take one of clip, ar_prior"):
    paper_recipe('autoencoder')


@pytest.mark.parametrize('stage', ['clip', 'ar_prior', 'prior', 'decoder', 'upsampler_0'])
def test_a_script_takes_its_recipe_for_defaults(stage, tmp_path):
  recipe = PAPER[stage]

  def parse(*options):
    arguments = [f'--run={tmp_path}', '--recipe=paper', *options]
    name = stage.removesuffix('_0')
    has_contrast = stage == 'clip'
    return parse_options(
      arguments, '', OptimizerConfig(), 1, 1, has_contrast=has_contrast, recipe=name
    )

  train = parse()
  found = train.optimizer, train.batch_size, train.steps, train.ema_decay, train.sam_rho
  assert found == (
    recipe.optimizer,
    recipe.batch_size,
    recipe.num_steps,
    recipe.ema_decay,
    recipe.sam_rho,
  )
  assert train.steps % train.chunk == 0
  less = parse('--batch-size=64', '--set=optimizer.b2=0.5')
  assert (less.batch_size, less.optimizer.b2, less.steps) == (64, 0.5, recipe.num_steps)
  assert less.optimizer.learning_rate == recipe.optimizer.learning_rate


def test_a_script_without_a_recipe_says_so(tmp_path):
  with pytest.raises(UnclipError, match='the paper trains no such stage'):
    parse_options([f'--run={tmp_path}', '--recipe=paper'], '', OptimizerConfig(), 1, 1)
