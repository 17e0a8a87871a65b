"""The loss of a model folder on what its run was trained on, for the tests of fine-tuning."""

import functools

import jax
import numpy as np

from experiments.emoji import common
from experiments.emoji.options import parse_options
from unclip_jax.stages import decoder, diffusion_prior
from unclip_jax.systems.unclip import load
from unclip_jax.train.state import OptimizerConfig

NUM_DRAWS = 8


def training_loss(folder, stage, options):
  """Mean over draws of noise that are the same for all models; as training, but for the EMA."""
  arguments = [f'--run={folder}', f'--init={folder}', '--chunk=1', *options]
  train = parse_options(arguments, '', OptimizerConfig(), 1, 4)
  model, null_text = load(folder), common.null_text(train, train.tokenizer)
  pool = common.compose(train, model.config.clip.vision.image_size, train.pool_size)
  rows = common.encode_pool(train, train.tokenizer, pool.captions, pool.images)
  text, params = common.text_features(rows), model.params[stage]
  if stage == 'prior':
    statistics = diffusion_prior.Statistics(**params['statistics'])
    params, given = params['network'], (statistics, rows['z_i'])
    loss_fn = functools.partial(diffusion_prior.loss, model.config.prior)
  else:
    images = common.compose(train, model.config.decoder.image_size, train.pool_size).images
    images = common.to_float(jax.numpy.asarray(images))
    given = (images, rows['z_i'])
    loss_fn = functools.partial(decoder.loss, model.config.decoder)
    if model.config.decoder.text is not None:
      text, null_text = (t._replace(states=None, z_t=None) for t in (text, null_text))
  loss = jax.jit(lambda params, key: loss_fn(params, *given, text, null_text, key)[0])
  return np.mean([loss(params, jax.random.key(i)) for i in range(NUM_DRAWS)])
