"""Costs read off compiled programs: closed forms, and XLA's count where there is no loop."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tiny_stages import CONFIG, STATISTICS, keys, make_text, normal, random_params

from unclip_jax.config_json import override
from unclip_jax.configs import TextConfig
from unclip_jax.diffusion import samplers
from unclip_jax.measure import analytic
from unclip_jax.measure.hlo import loop_collectives, program_cost
from unclip_jax.nn import convolution
from unclip_jax.stages import common, decoder, diffusion_prior, upsampler
from unclip_jax.types import UnclipError

NHWC = ('NHWC', 'HWIO', 'NHWC')
MATMUL = 2 * 37 * 41 * 41


def compiled(fn, *args):
  return jax.jit(fn).lower(*args).compile()


def cost(fn, *args):
  return program_cost(compiled(fn, *args).as_text())


def convolve(stride, padding, groups=1, image_dilation=(1, 1), dilation=(1, 1)):
  return functools.partial(
    lax.conv_general_dilated,
    window_strides=stride,
    padding=padding,
    lhs_dilation=image_dilation,
    rhs_dilation=dilation,
    feature_group_count=groups,
    dimension_numbers=NHWC,
  )


def repeated(x, w, *lengths):
  """x @ w as often as the product of the lengths, in loops within loops."""
  if not lengths:
    return jnp.tanh(x @ w)
  first, *others = lengths
  return lax.scan(lambda c, _: (repeated(c, w, *others), None), x, None, length=first)[0]


def seven_times(x, w):
  return repeated(x, w, 7)


@pytest.mark.cpu_program
@pytest.mark.parametrize(
  ('fn', 'shapes', 'expected'),
  [
    (jnp.matmul, [(37, 41), (41, 53)], 2 * 37 * 41 * 53),
    (functools.partial(jnp.einsum, 'btnh,bsnh->bnts'), [(3, 37, 5, 7), (3, 11, 5, 7)], 2 * 42735),
    (convolve((1, 1), 'VALID'), [(2, 9, 11, 8), (3, 3, 8, 16)], 2 * 2 * 7 * 9 * 9 * 8 * 16),
    # At a border one tap of three meets padding: 3 n - 2 of them along an axis of n.
    (convolve((1, 1), 'SAME'), [(2, 9, 11, 8), (3, 3, 8, 16)], 2 * 2 * 25 * 31 * 8 * 16),
    (convolve((3, 3), 'VALID', 4), [(2, 9, 12, 8), (3, 3, 2, 16)], 2 * 2 * 12 * 9 * 2 * 16),
    # Each number is met by each weight once.
    (
      convolve((1, 1), [(2, 2)] * 2, 1, (3, 3)),
      [(2, 9, 11, 8), (3, 3, 8, 16)],
      2 * 2 * 99 * 9 * 128,
    ),
    (
      convolve((1, 1), 'VALID', 1, (1, 1), (2, 4)),
      [(2, 9, 11, 8), (3, 3, 8, 16)],
      4 * 5 * 3 * 9 * 128,
    ),
  ],
)
def test_products_and_convolutions(fn, shapes, expected):
  program = compiled(fn, *(normal(*shape) for shape in shapes))
  found = program_cost(program.as_text())
  assert found.matmul_flops == expected
  theirs = program.cost_analysis()
  assert found.matmul_flops == theirs['flops']
  assert found.bytes == theirs['bytes accessed']


@pytest.mark.parametrize(
  'fn',
  [
    jax.nn.softmax,
    functools.partial(jax.nn.gelu, approximate=False),
    lambda x: x - x.mean(axis=-1, keepdims=True),
    functools.partial(jnp.sort, axis=None),
    lambda x: lax.reduce_window(x, 0.0, lax.add, (3, 3), (2, 2), 'SAME'),
    lambda x: lax.dynamic_slice_in_dim(x, 5 + jnp.argmax(x[0]), 3) * 2,
    lambda x: jnp.where(x > 0, x, jnp.exp(x)) @ x.T,
  ],
)
def test_what_has_no_loop_costs_what_xla_says(fn):
  program = compiled(fn, normal(64, 33))
  found, theirs = program_cost(program.as_text()), program.cost_analysis()
  assert found.flops == theirs['flops'] + theirs.get('transcendentals', 0)
  assert found.bytes == pytest.approx(theirs['bytes accessed'])


def test_reading_rows_of_a_table_does_not_count_the_table():
  table, rows = normal(6400, 32), jnp.arange(5)
  assert cost(lambda t, i: t[i], table, rows).bytes < table.nbytes / 100


@pytest.mark.parametrize('lengths', [(7,), (7, 5), (2, 3, 4)])
def test_loops_count_as_often_as_they_run(lengths):
  x, w = normal(37, 41), normal(41, 41)
  found = cost(lambda x, w: repeated(x, w, *lengths), x, w)
  times = np.prod(lengths)
  assert found.matmul_flops == times * MATMUL
  # A step reads x and w, writes their product, and reads and writes it for the tanh; loops count
  # their turns, and copy x at most once each time that they begin.
  step = x.nbytes * 4 + w.nbytes
  assert times * step <= found.bytes < 1.02 * times * (step + 2 * x.nbytes)
  assert found.flops == pytest.approx(times * (MATMUL + x.size), rel=0.02)


def test_a_loop_without_a_note_of_its_length_says_it_in_its_condition():
  text = compiled(seven_times, normal(37, 41), normal(41, 41)).as_text()
  assert text.count('known_trip_count') == 1
  assert program_cost(text.replace('known_trip_count', 'else')) == program_cost(text)


def test_a_loop_that_counts_by_two_runs_half_as_often():
  text = compiled(seven_times, normal(37, 41), normal(41, 41)).as_text()
  assert text.count('s32[] constant(1)') == 1  # what its count is added
  text = text.replace('known_trip_count', 'else').replace('s32[] constant(1)', 's32[] constant(2)')
  assert program_cost(text).matmul_flops == 4 * MATMUL


def test_a_loop_that_ends_when_it_likes_is_an_error():
  def run(x):
    return lax.while_loop(lambda x: x.sum() > 1, lambda x: x * 0.9, x)

  with pytest.raises(UnclipError, match='how often it runs: take a scan'):
    cost(run, normal(5))


def test_of_the_branches_the_dearest_counts():
  def run(x, w):
    return lax.cond(x[0, 0] > 0, lambda x: repeated(x, w, 3), lambda x: x + 1, x)

  assert cost(run, normal(37, 41), normal(41, 41)).matmul_flops == 3 * MATMUL


@pytest.mark.parametrize('text', ['', 'no program', 'HloModule empty\n'])
def test_other_text_is_an_error(text):
  with pytest.raises(UnclipError, match='no HLO'):
    program_cost(text)
  with pytest.raises(UnclipError, match='no HLO'):
    loop_collectives(text)


# What only other devices' compilers write, in their notation.
GPU = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(bf16[37,41]{1,0})->f32[2]{0}}

%body (arg: (s32[], bf16[37,53])) -> (s32[], bf16[37,53]) {
  %arg = (s32[], /*index=1*/bf16[37,53]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[37,53]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[41,53]{1,0} constant({...})
  %gemm.1 = (bf16[37,41]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/dot{a}(b" source_line=1}, backend_config={"force_earliest_schedule":false,"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
  %start = (bf16[37,53]{1,0}, bf16[74,53]{1,0}) all-gather-start(%x), channel_id=1, dimensions={0}
  %done = bf16[74,53]{1,0} all-gather-done(%start)
  %wrapped = ((bf16[37,53]{1,0}), bf16[37,53]{1,0}) async-start(%x), calls=%scatter
  ROOT %out = (s32[], bf16[37,53]{1,0}) tuple(%i, %x)
}

%scatter (p: bf16[37,53]) -> bf16[37,53] {
  %p = bf16[37,53]{1,0} parameter(0)
  ROOT %exchange.3 = bf16[37,53]{1,0} all-to-all(%p), dimensions={0}
}

%condition (arg.1: (s32[], bf16[37,53])) -> pred[] {
  %arg.1 = (s32[], bf16[37,53]{1,0}) parameter(0)
  %limit = s32[] constant(9)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (x: bf16[37,53], image: bf16[2,9,11,8], kernel: bf16[16,3,3,8], q: bf16[2,6,3,64], k: bf16[2,10,3,64]) -> (s32[], bf16[37,53]) {
  %image = bf16[2,9,11,8]{3,2,1,0} parameter(1)
  %kernel = bf16[16,3,3,8]{3,2,1,0} parameter(2)
  %q = bf16[2,6,3,64]{3,2,1,0} parameter(3)
  %k = bf16[2,10,3,64]{3,2,1,0} parameter(4)
  %conv = (bf16[2,9,11,16]{3,2,1,0}, u8[99]{0}) custom-call(%image, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward", backend_config={"cudnn_conv_backend_config":{"conv_result_scale":1}}
  %sum = bf16[37,53]{1,0} all-reduce(%x.1), to_apply=%adder
  %fmha = (bf16[2,3,6,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"fmha_scale":0.125,"bmm1_dot_dimension_numbers":{"lhs_contracting_dimensions":["3"],"rhs_contracting_dimensions":["3"],"lhs_batch_dimensions":["0","2"],"rhs_batch_dimensions":["0","2"]},"bmm2_dot_dimension_numbers":{"lhs_contracting_dimensions":["3"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0","1"],"rhs_batch_dimensions":["0","2"]}}}
  %x.1 = bf16[37,53]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start.1 = (s32[], bf16[37,53]{1,0}) tuple(%zero, %x.1)
  ROOT %while.1 = (s32[], bf16[37,53]{1,0}) while(%start.1), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"9"},"known_induction_variable":{"tuple_index":"0"}}
}
"""  # noqa: E501

TPU = """HloModule jit_f

fused_computation (p0: f32[128,256], p1: f32[256,512]) -> f32[128,512] {
  p0 = f32[128,256]{1,0:T(8,128)} parameter(0)
  p1 = f32[256,512]{1,0:T(8,128)S(1)} parameter(1)
  ROOT product = f32[128,512]{1,0:T(8,128)} convolution(p0, p1), dim_labels=bf_io->bf
}

ENTRY main (a: f32[128,256], b: f32[256,512], q: bf16[12,8,64], k: bf16[12,16,64]) -> (f32[128,512], bf16[12,8,16]) {
  a = f32[128,256]{1,0:T(8,128)} parameter(0)
  b = f32[256,512]{1,0:T(8,128)} parameter(1)
  q = bf16[12,8,64]{2,1,0:T(8,128)(2,1)} parameter(2)
  k = bf16[12,16,64]{2,1,0:T(8,128)(2,1)} parameter(3)
  fusion = f32[128,512]{1,0:T(8,128)} fusion(f32[128,256]{1,0:T(8,128)} %a, f32[256,512]{1,0:T(8,128)} %b), kind=kOutput, calls=%fused_computation
  batched = bf16[12,8,16]{2,1,0:T(8,128)(2,1)} convolution(q, k), window={size=12 stride=11 lhs_dilate=12}, dim_labels=0bf_0oi->0bf
  ROOT out = (f32[128,512]{1,0:T(8,128)}, bf16[12,8,16]{2,1,0:T(8,128)(2,1)}) tuple(fusion, batched)
}
"""  # noqa: E501


def test_text_of_gpus():
  found = program_cost(GPU)
  gemm, conv, attention = 2 * 37 * 53 * 41, 2 * 2 * 25 * 31 * 8 * 16, 4 * 2 * 3 * 6 * 10 * 64
  assert found.matmul_flops == 9 * gemm + conv + attention
  assert loop_collectives(GPU) == ['start', 'exchange.3']
  assert loop_collectives(GPU.replace('body=%body', 'body=%scatter')) == ['exchange.3']


def test_text_of_tpus():
  found = program_cost(TPU)
  # A product of a batch of matrices is written as a convolution along the batch.
  batched = 2 * 12 * 8 * 16 * 64
  assert found.matmul_flops == 2 * 128 * 256 * 512 + batched
  fusion = 4 * (128 * 256 + 256 * 512 + 128 * 512)
  assert found.bytes == fusion + 2 * 12 * (8 * 64 + 16 * 64 + 8 * 16)
  assert loop_collectives(TPU) == []


def test_a_program_without_collectives_has_none():
  assert loop_collectives(compiled(seven_times, normal(3, 5), normal(5, 5)).as_text()) == []


@pytest.mark.cpu_program
@pytest.mark.parametrize(
  ('b', 'scale', 'num_candidates'), [(1, 2.0, 2), (3, 2.0, 1), (3, None, 1), (2, None, 3)]
)
def test_prior_costs_what_its_config_says(b, scale, num_candidates):
  config = override(CONFIG.prior, ['depth=3', 'width=48', 'context_length=12'])
  plan = common.make_plan(config.diffusion, config.sampling)

  def sample(params, text, null_text, key_b):
    guided = None if scale is None else jnp.float32(scale)
    how = (key_b, plan, samplers.ddpm(), guided)
    z_i, _ = diffusion_prior.sample(
      config, params, STATISTICS, text, null_text, *how, num_candidates=num_candidates
    )
    return diffusion_prior.rerank(z_i.reshape(b, num_candidates, -1), text.z_t)

  params = random_params(diffusion_prior, config)
  found = cost(sample, params, make_text(b), make_text(b, seed=5), keys(b * num_candidates))
  expected = analytic.prior_flops(config, b, len(plan.t), scale is not None, num_candidates)
  assert found.matmul_flops == pytest.approx(expected, rel=0.02)
  assert found.matmul_flops < found.flops


@pytest.mark.parametrize(('own_text', 'b', 'scale'), [(True, 1, 2.0), (False, 3, None)])
def test_decoder_costs_what_its_config_says(own_text, b, scale):
  config = CONFIG.decoder
  if own_text:
    text = TextConfig(vocab_size=300, context_length=12, width=40, depth=2, num_heads=2)
    config = dataclasses.replace(config, text=text)
  else:
    unet = override(config.unet, ['num_res_blocks=2', 'condition_channels=3', 'scale_shift=false'])
    config = dataclasses.replace(config, text=None, clip_text_width=24, unet=unet, draft_size=4)
  plan = common.make_plan(config.diffusion, config.sampling)

  def sample(params, text, null_text, z_i, key_b):
    guided = None if scale is None else jnp.float32(scale)
    how = (key_b, plan, samplers.ddpm('learned'), guided)
    return decoder.sample(config, params, text, null_text, z_i, *how)[0]

  given = (make_text(b), make_text(b, seed=5), normal(b, 16), keys(b))
  found = cost(sample, random_params(decoder, config), *given)
  length = None if own_text else CONFIG.prior.context_length
  expected = analytic.decoder_flops(config, b, len(plan.t), scale is not None, length)
  assert found.matmul_flops == pytest.approx(expected, rel=0.02)


def test_a_decoder_that_reads_clip_has_to_know_how_much():
  with pytest.raises(ValueError, match='text_length'):
    analytic.decoder_flops(dataclasses.replace(CONFIG.decoder, text=None), 1, 4, True)


@pytest.mark.parametrize('tiled', [False, True])
def test_upsampler_costs_what_its_config_says(tiled, monkeypatch):
  options = ['unet.attention_levels=[1]', 'unet.patch_size=1', 'unet.head_dim=16']
  config = override(CONFIG.upsamplers[0], options if tiled else [])
  if tiled:
    monkeypatch.setattr(convolution, 'MIN_CHANNELS', 32)
  plan = common.make_plan(config.diffusion, config.sampling)

  def sample(params, low, key_b):
    return upsampler.sample(config, params, low, key_b, plan, samplers.ddim(0.0))[0]

  params = random_params(upsampler, config)
  found = cost(sample, params, normal(3, 16, 16, 3), keys(3))
  expected = analytic.upsampler_flops(
    config, 3, len(plan.t), convolution.tile_size if tiled else None
  )
  assert found.matmul_flops == pytest.approx(expected, rel=0.02)
