"""Options of the training scripts that make no sense together, or that no number can have."""

import argparse
import math

from unclip_jax.types import UnclipError


def check_numbers(args: argparse.Namespace) -> None:
  positive = ('steps', 'batch_size', 'chunk', 'save_every', 'keep', 'model_devices', 'accumulate')
  for name in positive:
    if getattr(args, name) < 1:
      raise UnclipError(f'--{name.replace("_", "-")} {getattr(args, name)}: take 1 or more')
  if args.steps % args.chunk:
    raise UnclipError(f'--steps {args.steps}: take a multiple of --chunk {args.chunk}')
  if args.spike_factor is not None and not 1 < args.spike_factor < math.inf:
    raise UnclipError(f'--spike-factor {args.spike_factor:g}: take a number above 1')
  if args.draft_steps < 0:
    raise UnclipError(f'--draft-steps {args.draft_steps}: take 0 or more')
  if args.source is None and args.embeddings is None and args.pool_size < args.batch_size:
    raise UnclipError(
      f'--pool-size {args.pool_size}: take at least the {args.batch_size} of --batch-size'
    )
  for name, most in (('scene_fraction', 1), ('ema_decay', 1), ('jitter', 0.5)):
    value = getattr(args, name)
    if not 0 <= value <= most:
      raise UnclipError(f'--{name.replace("_", "-")} {value:g}: take a fraction from 0 to {most:g}')
  if args.dtype not in ('float32', 'bfloat16'):
    raise UnclipError(f'--dtype {args.dtype}: take float32 or bfloat16')
  if args.batch_size % args.accumulate:
    raise UnclipError(
      f'--accumulate {args.accumulate}: take a number that divides the {args.batch_size} of '
      '--batch-size'
    )


def check_lora(args: argparse.Namespace) -> None:
  name = '--lora' if args.init_lora is None else '--init-lora'
  if args.lora is None and args.init_lora is None:
    if args.lora_alpha is not None:
      raise UnclipError('--lora-alpha: it scales the adapters of --lora: give their rank by it')
    return
  if args.lora is not None and args.lora < 1:
    raise UnclipError(f'--lora {args.lora}: take a rank of 1 or more')
  if args.lora_alpha is not None and not 0 < args.lora_alpha < math.inf:
    raise UnclipError(f'--lora-alpha {args.lora_alpha:g}: take a number above 0')
  if args.accumulate > 1:
    raise UnclipError(
      f'{name}: adapters see whole batches: take a smaller --batch-size in place of --accumulate, '
      'or --remat'
    )
  if args.init is None:
    raise UnclipError(f'{name}: adapters change a model that is trained: give it by --init MODEL')
  if args.preset is not None:
    raise UnclipError(f'{name}: adapters are for the networks of --init: leave --preset out')
  if args.init_lora is not None and (args.lora is not None or args.lora_alpha is not None):
    raise UnclipError(
      '--init-lora: its adapters have a rank and a scale: leave --lora and --lora-alpha out'
    )


def check_contrast(args: argparse.Namespace) -> None:
  if args.accumulate > 1:
    raise UnclipError(
      f'--accumulate {args.accumulate}: the contrastive loss compares all of a batch: take '
      '--cache-chunk in its place'
    )
  if args.sam_rho is not None and not 0 <= args.sam_rho < math.inf:
    raise UnclipError(f'--sam-rho {args.sam_rho:g}: take 0 or more')
  if args.sam_rho is not None and args.cache_chunk is not None:
    raise UnclipError(
      '--cache-chunk: with --sam-rho (--recipe paper gives it) the activations of --sam-group '
      'examples are held at a time: leave it out, or train with --sam-rho 0'
    )
  names = ('cache_chunk', 'loss_chunk', *(() if args.sam_rho is None else ('sam_group',)))
  for name in names:
    size = getattr(args, name)
    if size is not None and (size < 1 or args.batch_size % size):
      raise UnclipError(
        f'--{name.replace("_", "-")} {size}: take a number that divides the {args.batch_size} of '
        '--batch-size'
      )


def check_source(args: argparse.Namespace) -> None:
  for name in ('styles', 'groups', 'labels', 'data'):
    if getattr(args, name):
      raise UnclipError(f'--{name}: it chooses emoji, and other examples are given: leave it out')
  if args.workers < 0:
    raise UnclipError(f'--workers {args.workers}: take 0 or more')
