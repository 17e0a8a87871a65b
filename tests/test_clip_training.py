"""CLIP's ResNet learns, and its script does as its options say."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_model import CONFIG as MODEL
from tiny_model import write_tiny_model
from tiny_stages import normal

from experiments.emoji import common, origin, train_clip, train_decoder, train_prior
from experiments.emoji.options import parse_options
from unclip_jax import sharding
from unclip_jax.config_json import override
from unclip_jax.configs import ClipConfig, ResNetConfig
from unclip_jax.nn.layers import l2_normalize
from unclip_jax.stages import clip
from unclip_jax.systems.unclip import load
from unclip_jax.train.state import OptimizerConfig, init_state, make_train_step
from unclip_jax.types import UnclipError

DATA = ['--styles=flat', '--groups=food-drink', '--pool-size=16', '--batch-size=4']
TINY = [
  '--preset=tiny',
  '--set=optimizer.warmup_steps=0',
  '--steps=2',
  '--chunk=1',
  *DATA,
]


def test_a_resnet_learns_its_captions_as_the_vit_does_in_test_stage_losses():
  tower = ResNetConfig(image_size=16, width=8, depths=(1, 1), num_heads=2)
  config = ClipConfig(text=None, vision=tower, embed_dim=16)
  corners = normal(8, 2, 2, 3)
  image = jnp.tanh(2 * jax.image.resize(corners, (8, 16, 16, 3), 'linear'))
  z_t = l2_normalize(normal(8, 16, seed=1))

  def loss(params, batch, key):
    z_i = clip.encode_image(config, params, batch)
    return clip.contrastive_loss(z_i, z_t, jnp.log(10.0), chunk_size=4)

  optimizer = optax.adam(5e-3)
  step = jax.jit(make_train_step(loss, optimizer, 0.9))
  params = jax.jit(lambda key: clip.init(config, key))(jax.random.key(0))
  state, losses, key = init_state(params, optimizer), [], jax.random.key(1)
  for _ in range(60):
    state, metrics = step(state, image, key)
    losses.append(float(metrics['loss']))
  assert losses[0] > 1.5  # log 8 is 2.1
  assert np.mean(losses[-5:]) < 0.3
  assert metrics['accuracy'] == 1


def parse(*options):
  return parse_options([*TINY, *options], '', OptimizerConfig(), 4, 4, has_contrast=True)


def test_the_script_takes_the_gradient_that_it_is_asked_for(monkeypatch):
  asked, mesh = [], sharding.make_mesh()

  def make(kind):
    return lambda embed, loss, *args, **settings: asked.append((kind, *args, settings)) or kind

  monkeypatch.setattr(train_clip, 'make_sam_grad', make('sam'))
  monkeypatch.setattr(train_clip, 'make_cached_grad', make('cache'))
  assert (
    train_clip.make_grad(
      parse('--sam-rho=0.5', '--sam-group=2', '--fsdp', '--dtype=bfloat16'), mesh
    )
    == 'sam'
  )
  none = '--sam-rho=0', '--cache-chunk=2', '--loss-chunk=1'
  assert train_clip.make_grad(parse(*none), mesh) == 'cache'
  assert callable(train_clip.make_grad(parse(), mesh))
  (_, sam), cache = asked
  given = sam.pop('apart').keywords
  assert sam == {'rho': 0.5, 'group_size': 2, 'unroll': True, 'dtype': jnp.bfloat16}
  assert given == {'mesh': mesh, 'fsdp': True}
  assert cache == ('cache', 2, True, {})


def test_held_out_pictures_are_classified_without_training_for_it(monkeypatch):
  monkeypatch.setattr(train_clip, 'NUM_RETRIEVAL', 20)
  train = parse('--set=clip.vision.depth=1', '--set=clip.text.depth=1')
  evaluate = train_clip.make_evaluation(train, 16)
  params = jax.jit(lambda key: clip.init(train.config.clip, key))(jax.random.key(0))
  metrics, line = evaluate(params)
  assert set(metrics) == {'val_r_at_1', 'val_top_1', 'val_top_5'}
  assert 0 <= metrics['val_top_1'] <= metrics['val_top_5'] < 1  # of more than five objects
  assert 0 <= metrics['val_r_at_1'] < 1
  assert f'top 5 {metrics["val_top_5"]:.3f}' in line
  # A tower that says nothing of captions finds none of them.
  blank = {**params, 'text_projection': jax.tree.map(jnp.zeros_like, params['text_projection'])}
  assert evaluate(blank)[0] == {'val_r_at_1': 0.0, 'val_top_1': 0.0, 'val_top_5': 0.0}


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (['--sam-rho=-1'], '--sam-rho -1: take 0 or more'),
    (['--sam-rho=0.1'], '--sam-group 64: take a number that divides the 4 of --batch-size'),
    (['--cache-chunk=3'], '--cache-chunk 3: take a number that divides the 4'),
    (['--loss-chunk=0'], '--loss-chunk 0: take a number that divides the 4'),
    (['--sam-rho=0.1', '--sam-group=2', '--cache-chunk=2'], '--cache-chunk: with --sam-rho'),
    (['--accumulate=2'], '--accumulate 2: .* take --cache-chunk in its place'),
  ],
)
def test_options_of_clip_that_make_no_sense_are_named(options, message, tmp_path):
  with pytest.raises(UnclipError, match=message):
    train_clip.main([f'--run={tmp_path}', *TINY, *options])
  assert not (tmp_path / 'clip').exists()


def test_a_fine_tune_drops_captions_as_often_as_it_is_asked_to(tmp_path):
  base, run = write_tiny_model(tmp_path / 'base'), tmp_path / 'run'
  options = [f'--run={run}', f'--init={base}', '--steps=1', '--chunk=1', *DATA]
  options.append('--set=optimizer.warmup_steps=0')
  expected = []
  for stage, main in (('prior', train_prior.main), ('decoder', train_decoder.main)):
    with pytest.raises(UnclipError, match=rf'{stage}\.text_drop is 2: take a fraction'):
      main([*options, '--text-drop=2'])
    arguments = [*options, '--text-drop=0.2']
    train = parse_options(arguments, '', OptimizerConfig(), 1, 4, drops_text=stage)
    assert train.config == override(MODEL, [f'{stage}.text_drop=0.2'])
    origin.begin(train, stage)
    common.export_stage(train, stage, load(base).params[stage])
    expected.append(f'{stage}.text_drop=0.2')
    assert load(run).config == override(MODEL, expected)
