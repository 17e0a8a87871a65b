"""All stages of a model as one program, for benchmarks and for export.

Its arguments are the parameters and a flat dict of arrays: tokens, plans, guidance scales, etas,
seed and indices of the images. What makes another program (sizes, steps, samplers, whether there is
guidance) is settled when it is made.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unclip_jax.configs import KandinskyDecoderConfig, UnclipConfig
from unclip_jax.data.tokenizer import Tokenizer
from unclip_jax.sharding import Mesh, filled_size, place_batch, replicated
from unclip_jax.systems import by_columns, pipeline, requests, settings
from unclip_jax.systems.samples import OF_ROWS, Request, check_finite, of_stages
from unclip_jax.systems.settings import Sampling
from unclip_jax.systems.unclip import Unclip
from unclip_jax.types import Array, Params, UnclipError

_AS_MADE = Sampling()
# Names of inputs end so; what they are called in messages.
_WORDS = {
  '.guidance_scale': 'guidance',
  '.guidance_scale.is_on': 'a guidance interval',
  '.guidance_scale.rescale': 'guidance rescale',
}
_NOTHING = requests.Given(None, None, None, None, None, None)

Inputs = Mapping[str, Array | np.ndarray]
# uint8 [b, h, w, 3], and for each stage whether all that it made is finite: bool scalars
Drawn = tuple[Array, dict[str, Array]]


@functools.partial(jax.jit, static_argnames=('config', 'how', 'dtype'))
def draw(
  params: Mapping[str, Params], inputs: Inputs, *, config: UnclipConfig, how: Request, dtype: Any
) -> Drawn:
  """Images of a batch through all stages, those of `Unclip.sample`.

  Args:
    params: of the stages.
    inputs: the arrays of a request by their names, as `split` gives them.
    config: of the model.
    how: the rest of the request, as `split` gives it.
    dtype: of the networks.
  """
  samples = pipeline.draw_batch(config, params, _joined(inputs, how), dtype)
  made = of_stages(samples)
  return samples.images, {name: jnp.isfinite(array).all() for name, array in made.items()}


def split(request: Request) -> tuple[dict[str, Array | np.ndarray], Request]:
  """The arrays of a request by their names ('decoder.plan.t'), and the rest, which is hashable."""
  bare = request._replace(captions=())
  named = jax.tree_util.tree_leaves_with_path(bare)
  inputs = {_name(path): leaf for path, leaf in named if _is_array(leaf)}
  return inputs, jax.tree.map(lambda leaf: None if _is_array(leaf) else leaf, bare)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Fused:
  """All stages of a model as one program, for batches of one size; made by `fuse`.

  Attributes:
    config: of the model.
    params: of its stages; the prior's kernels may be by columns (`nn.columns`).
    tokenizer: of its captions, None where the decoder alone reads them.
    decoder_tokenizer: of a decoder with a text encoder of its own.
    dtype: what the networks compute in.
    batch_size: images that are drawn at once; the program draws some more, which nobody asked for,
      where that is no multiple of the number of devices.
    samplings: how stages are sampled, where not as the model says.
    num_candidates: embeddings that the prior draws for each image; None takes the model's.
    size: in pixels, of the images; None is the model's own.
    program: (params, inputs) -> Drawn.
    mesh: the devices that a batch is spread over, None for the default one.
    eps_power: of stages, what the sampler analytic needs.
  """

  config: UnclipConfig
  params: Mapping[str, Params]
  tokenizer: Tokenizer | None
  decoder_tokenizer: Tokenizer | None
  dtype: Any
  batch_size: int
  samplings: requests.Samplings
  num_candidates: int | None
  size: int | None
  program: Callable[[Mapping[str, Params], Inputs], Drawn]
  mesh: Mesh | None = None
  eps_power: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def generate(
    self,
    prompts: str | Sequence[str],
    seed: int = 0,
    num_images: int = 1,
    *,
    first_image: int = 0,
    negative_prompt: str | None = None,
    prior: Sampling = _AS_MADE,
    decoder: Sampling = _AS_MADE,
    upsampler: Sampling = _AS_MADE,
  ) -> np.ndarray:
    """Pictures of captions: uint8 [len(prompts) * num_images, h, w, 3], a prompt's together.

    They are those of `Unclip.generate`, and so are the arguments. Samplings may ask for other
    guidance scales, etas and timesteps.

    Raises:
      UnclipError: as `Unclip.generate`, or what is asked for needs another program.
    """
    asked = requests.Samplings(prior, decoder, upsampler)
    request = self._request(prompts, seed, num_images, first_image, negative_prompt, asked)
    drawn, n = [], len(request.captions)
    for start in range(0, n, self._num_rows):
      rows = np.arange(start, min(n, start + self._num_rows))
      images, is_finite = jax.device_get(self.program(self.params, self._inputs(request, rows)))
      in_order = requests.stages(self.config, request)
      check_finite({name: is_finite[name] for name in in_order if name in is_finite})
      drawn.append(images[: len(rows)])
    return np.concatenate(drawn)

  def inputs(self, prompts: str | Sequence[str], seed: int = 0) -> dict[str, Array | np.ndarray]:
    """What the program is given for one image of each prompt; the last one fills up the batch.

    Raises:
      UnclipError: as `generate`, or there are more prompts than images in a batch.
    """
    asked = requests.Samplings(_AS_MADE, _AS_MADE, _AS_MADE)
    request = self._request(prompts, seed, 1, 0, None, asked)
    n = len(request.captions)
    if n > self.batch_size:
      raise UnclipError(f'{n} prompts do not fit into a batch of {self.batch_size}: give fewer')
    return self._inputs(request, np.arange(n))

  def lower(self) -> jax.stages.Lowered:
    """The program as JAX lowers it, to be compiled apart from its first run."""
    return jax.jit(self.program).lower(self.params, self.inputs(['a']))

  @functools.cached_property
  def made_for(self) -> tuple[dict[str, jax.ShapeDtypeStruct], Request]:
    """Names, shapes and types of the inputs, and what of a request is settled."""
    asked = requests.Samplings(_AS_MADE, _AS_MADE, _AS_MADE)
    request = self._request(['a'] * self._num_rows, 0, 1, 0, None, asked)
    inputs, how = split(request)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs), how

  @property
  def _num_rows(self) -> int:
    return filled_size(self.batch_size, self.mesh)

  def _request(
    self,
    prompts: Any,
    seed: Any,
    num_images: Any,
    first_image: Any,
    negative_prompt: Any,
    asked: requests.Samplings,
  ) -> Request:
    request = requests.make(
      self.config,
      self.tokenizer,
      self.decoder_tokenizer,
      prompts,
      seed,
      num_images,
      first_image,
      negative_prompt,
      requests.Samplings(*map(_merge, self.samplings, asked)),
      self.num_candidates,
      self.size,
      _NOTHING,
      False,
      None,
      self.eps_power,
    )
    if isinstance(self.config.decoder, KandinskyDecoderConfig):
      return request
    # Only where it has to become a z_i is a negative caption the work of another program.
    return request._replace(is_negative=False)

  def _inputs(self, request: Request, rows: np.ndarray) -> dict[str, Array | np.ndarray]:
    """The inputs of some of a request's images, placed, if the program takes such."""
    filled = np.pad(rows, (0, self._num_rows - len(rows)), mode='edge')
    inputs, how = split(request.take(filled))
    expected, settled = self.made_for
    _check_settled(how, settled)
    _check_inputs(inputs, expected)
    if self.mesh is None:
      return inputs
    of_rows = {name for name in inputs if name.partition('.')[0] in OF_ROWS}
    whole = {name: inputs[name] for name in inputs.keys() - of_rows}
    spread = place_batch({name: inputs[name] for name in of_rows}, self.mesh)
    return spread | jax.device_put(whole, replicated(self.mesh))


def fuse(
  model: Unclip,
  batch_size: int = 1,
  *,
  prior: Sampling = _AS_MADE,
  decoder: Sampling = _AS_MADE,
  upsampler: Sampling = _AS_MADE,
  num_candidates: int | None = None,
  size: int | None = None,
) -> Fused:
  """All stages of a model as one program; nothing is compiled yet.

  Args:
    model: opened by `load`.
    batch_size: images that are drawn at once; over several devices filled up.
    prior: how the prior is sampled, where not as the model says; so the next two.
    decoder: the same for the decoder.
    upsampler: the same for all upsamplers.
    num_candidates: embeddings that the prior draws for each image; None takes the model's.
    size: in pixels, that of the stage to stop at; None as of `Unclip.sample`.

  Raises:
    UnclipError: an argument is not as of `Unclip.sample`, or the model draws no pictures of
      captions.
  """
  settings.check_count('the batch size', batch_size)
  config = settings.at_size(model.config, size)
  unbound = Fused(
    config,
    model.params,
    model.tokenizer,
    model.decoder_tokenizer,
    model.dtype,
    batch_size,
    requests.Samplings(prior, decoder, upsampler),
    num_candidates,
    size,
    draw,
    model.mesh,
    model.eps_power,
  )
  _, how = unbound.made_for
  names = requests.stages(config, how)
  if missing := [name for name in names if name not in model.params]:
    raise UnclipError(f'this model has no {missing[0]}: take one that has')
  return dataclasses.replace(
    unbound,
    params={name: by_columns.view(model.params[name]) for name in names},
    program=functools.partial(draw, config=config, how=how, dtype=model.dtype),
  )


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='.')


def _is_array(leaf: Any) -> bool:
  return isinstance(leaf, np.ndarray | np.generic | jax.Array)


def _joined(inputs: Inputs, how: Request) -> Request:
  """The inverse of `split`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: inputs.get(_name(path), leaf), how, is_leaf=lambda leaf: leaf is None
  )


def _merge(made: Sampling, asked: Sampling) -> Sampling:
  """What is asked for, and what the program was made with for the rest."""
  if not isinstance(asked, Sampling):
    return asked  # refused with all else that is no Sampling
  values = dataclasses.asdict(asked)
  return dataclasses.replace(made, **{k: v for k, v in values.items() if v is not None})


def _check_settled(asked: Request, made: Request) -> None:
  """Raises UnclipError where what is asked for is settled otherwise in the program; names it."""
  asked_leaves, made_leaves = (
    {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(request)}
    for request in (asked, made)
  )
  for name in sorted({*asked_leaves, *made_leaves}):
    wanted, had = asked_leaves.get(name), made_leaves.get(name)
    if wanted != had:
      stage, _, field = name.rpartition('.')
      what = f'{stage}: the {field}' if stage else name.replace('_', ' ')
      raise UnclipError(
        f'{what} {wanted!r} is asked for, the program was made with {had!r}: make one with it'
      )


def _check_inputs(given: Inputs, expected: Mapping[str, jax.ShapeDtypeStruct]) -> None:
  """Raises UnclipError where a program would not take what it is given; names it."""
  if surplus := sorted(given.keys() - expected.keys()):
    raise UnclipError(
      f'{_in_words(surplus[0])} is asked for, the program was made without: make one with it'
    )
  if missing := sorted(expected.keys() - given.keys()):
    raise UnclipError(
      f'{_in_words(missing[0])} is not asked for, the program was made with it: make one without'
    )
  for name, array in given.items():
    wanted = expected[name]
    if array.shape == wanted.shape and array.dtype == wanted.dtype:
      continue
    stage, is_plan, _ = name.partition('.plan.')
    if is_plan:
      raise UnclipError(
        f'{stage}: {array.size} steps are asked for, the program has {wanted.size}: make one with '
        f'{array.size}'
      )
    raise UnclipError(
      f'{name} is {array.dtype}{list(array.shape)}, the program takes '
      f'{wanted.dtype}{list(wanted.shape)}: make one for that'
    )


def _in_words(name: str) -> str:
  """An input as messages call it."""
  for end, words in _WORDS.items():
    if name.endswith(end):
      return f'{name.removesuffix(end)}: {words}'
  return name
