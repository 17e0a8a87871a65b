"""Every configuration as a frozen dataclass.

The presets are in `presets.py`, the way to and from JSON in `config_json.py`. A config is hashable,
so that it can be a static argument of jit.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """A Transformer over caption tokens."""

  vocab_size: int
  context_length: int
  width: int
  depth: int
  num_heads: int
  mlp_activation: str = 'gelu'  # OpenAI's CLIP: quick_gelu
  mlp_width: int | None = None  # 4 * width


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """The Vision Transformer of CLIP."""

  image_size: int
  patch_size: int
  width: int
  depth: int
  num_heads: int
  mlp_activation: str = 'gelu'
  mlp_width: int | None = None  # 4 * width; open_clip's bigG has less than 5 times


@dataclasses.dataclass(frozen=True)
class ConvTowerConfig:
  """A convolutional image tower, each width at half the resolution of the one before."""

  image_size: int
  widths: tuple[int, ...]
  depth: int


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
  """The ResNet of CLIP, which projects into the space of embeddings itself."""

  image_size: int
  width: int  # of the bottlenecks of the first level; each level has twice that of the last
  depths: tuple[int, ...]  # bottlenecks, for each level; public models have four levels
  num_heads: int  # of the attention that pools the last grid

  @property
  def factor(self) -> int:
    """Pixels a side that one of the last grid stands for."""
    return 2 ** (len(self.depths) + 1)

  @property
  def pooled_width(self) -> int:
    """Channels of the last grid."""
    return 2 ** (len(self.depths) + 1) * self.width


@dataclasses.dataclass(frozen=True)
class ClipConfig:
  """CLIP: two towers into one space."""

  text: TextConfig | None  # None: the model came without it
  vision: ViTConfig | ConvTowerConfig | ResNetConfig | None
  embed_dim: int
  unit_norm: bool = True  # Karlo and Kandinsky use the projections as they are
  pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
  """The noise schedule and what the network predicts."""

  schedule: str = 'cosine'  # or 'linear', 'scaled_linear'
  num_steps: int = 1000
  betas: tuple[float, float] | None = (
    None  # first and last, where not the schedule's own; not of cosine
  )
  prediction: str = 'eps'  # or 'x_0', 'v'
  learned_variance: bool = False
  clip_x_0: float | None = None
  dynamic_threshold: float | None = None  # a percentile; bounds x_0 in place of clip_x_0
  threshold_max: float | None = None  # the most that it divides by
  keep_eps: bool = False  # eps stays as predicted where x_0 is bounded, as in diffusers' DDIM
  min_snr_gamma: float | None = None
  noise_power: float = 0.0  # the loss is weighted by sigma_t ** noise_power


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How a stage is sampled unless the caller asks otherwise."""

  num_steps: int
  sampler: str = 'ddpm'  # or another of stages.common.SAMPLERS: 'ddim', 'dpmpp_2m', 'unipc', ...
  spacing: str = 'strided'  # or another of stages.common.SPACINGS: 'karlo', 'trailing', ...
  variance: str = 'fixed_small'  # of ddpm: or 'fixed_large', 'learned'
  eta: float = 0.0  # of ddim and analytic
  offset: int = 0  # of leading and inner: added to each timestep
  to_x_0: bool = True  # whether the last step ends without noise; else at that of timestep 0
  guidance_scale: float = 1.0
  guidance_rescale: float = 0.0  # the share of the contrast that guidance adds which is taken back
  guidance_interval: tuple[float, float] | None = None  # in shares of the schedule; None: all


@dataclasses.dataclass(frozen=True)
class PriorConfig:
  """The diffusion prior (section 2.2)."""

  embed_dim: int
  text_width: int
  context_length: int
  width: int
  depth: int
  num_heads: int
  diffusion: DiffusionConfig
  sampling: SamplingConfig
  unit_norm: bool = True  # sampled embeddings are put back on CLIP's unit sphere
  num_candidates: int = 2  # drawn for each image; the one nearest to z_t is kept
  text_drop: float = 0.1


@dataclasses.dataclass(frozen=True)
class ArSamplingConfig:
  """How the autoregressive prior is sampled unless the caller asks otherwise."""

  guidance_scale: float = 1.0
  temperature: float = 1.0  # below 1 likely buckets are drawn more often than the network says
  dot_share: float = 0.5  # z_i . z_t is drawn from so much of its distribution, the highest values


@dataclasses.dataclass(frozen=True)
class ArPriorConfig:
  """The autoregressive prior (section 2.2): it predicts z_i one principal component at a time.

  With `text` its own Transformer reads the caption (the paper); without, the states of CLIP's text
  encoder are projected.
  """

  embed_dim: int
  context_length: int  # of captions
  width: int
  depth: int
  num_heads: int
  num_components: int  # that are predicted, of embed_dim
  num_buckets: int = 1024  # that each is quantised into, and z_i . z_t as well
  text: TextConfig | None = None
  text_width: int | None = None  # of CLIP's states, where they are read
  sampling: ArSamplingConfig = ArSamplingConfig()
  unit_norm: bool = True  # sampled embeddings are put back on CLIP's unit sphere
  num_candidates: int = 1  # drawn for each image; the one nearest to z_t is kept
  text_drop: float = 0.1


@dataclasses.dataclass(frozen=True)
class UNetConfig:
  """The ADM U-Net."""

  in_channels: int
  out_channels: int
  channels: int
  multipliers: tuple[int, ...]
  num_res_blocks: int
  attention_levels: tuple[int, ...] = ()  # 0 is the highest resolution; also in the middle if any
  head_dim: int = 64
  context_dim: int | None = None  # width of the context that attention sees, if it sees one
  condition_channels: int = 0  # of the image that an upsampler or a draft gives
  scale_shift: bool = True  # the timestep scales and shifts; False: it is added
  patch_size: int = 1  # pixels folded into channels at both ends
  dropout: float = 0.0
  num_groups: int = 32

  @property
  def emb_dim(self) -> int:
    """Width of the timestep embedding."""
    return 4 * self.channels


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """The decoder (section 2.1): a GLIDE U-Net that also sees z_i.

  With `text` its own Transformer reads the caption (the paper); without, the states and the
  embedding of CLIP's text encoder are projected (Karlo).
  """

  image_size: int
  embed_dim: int
  unet: UNetConfig
  diffusion: DiffusionConfig
  sampling: SamplingConfig
  text: TextConfig | None = None
  clip_text_width: int | None = None
  num_image_tokens: int = 4
  embed_scale: float = 1.0  # z_i is multiplied by it; sqrt(embed_dim) for embeddings of unit norm
  image_drop: float = 0.1
  text_drop: float = 0.5
  z_i_noise: float = 0.0  # length of the noise that training adds to z_i, over that of z_i
  # Pixels a side of a first guess that the U-Net is given (its condition_channels: 3); 0: no guess.
  draft_size: int = 0
  draft_width: int = 512  # of the hidden layers that guess
  inpaints: bool = False  # it may be given a picture to complete, as GLIDE's are


@dataclasses.dataclass(frozen=True)
class UpsamplerConfig:
  """A diffusion upsampler (section 2.1), unconditional but for the small image."""

  image_size: int
  low_size: int
  unet: UNetConfig
  diffusion: DiffusionConfig
  sampling: SamplingConfig
  crop_fraction: float = 0.25
  degradation: str = 'blur'  # or 'bsr'
  blur_sigma: float = 0.6
  blur_fraction: float = 1.0  # of the crops; what is always blurred in training is sharpened twice
  low_noise: float = 0.0  # most noise (of [-1, 1]) that training adds: a decoder leaves some too
  keep_low: int = 0  # small pixels over whose means colours are brought back to the small image
  final_unet: bool = False  # Karlo: a second network takes the last step
  residual: bool = False  # the network predicts what the enlarged small image lacks of x_0


@dataclasses.dataclass(frozen=True)
class LatentUNetConfig:
  """The U-Net of Stable Diffusion, over latents: Transformers between its convolutions.

  What is given for each level begins at 0, the highest resolution; the middle is as the last level,
  and always has attention.
  """

  in_channels: int
  out_channels: int
  channels: int
  multipliers: tuple[int, ...]
  num_res_blocks: int
  attention_levels: tuple[int, ...]
  num_heads: tuple[int, ...]  # for each level: 8, or as many as leave them 64 channels
  depths: tuple[int, ...]  # Transformer blocks in an attention layer, for each level
  context_dim: int  # width of the text's states
  class_dim: int = 0  # width of an embedding that is added to that of the timestep; 0: none
  # How public files hold the projections at both ends of a Transformer: as linear layers
  # (Stable Diffusion 2) or as 1x1 convolutions (1). What they compute is the same.
  linear_projection: bool = True
  dropout: float = 0.0
  num_groups: int = 32

  @property
  def emb_dim(self) -> int:
    """Width of the timestep embedding."""
    return 4 * self.channels


@dataclasses.dataclass(frozen=True)
class XlmRobertaConfig:
  """The multilingual text encoder of Kandinsky 2.1's decoder."""

  vocab_size: int
  context_length: int
  width: int
  depth: int
  num_heads: int
  mlp_width: int
  num_positions: int  # the first pad_id + 1 are of no token
  pad_id: int
  embed_dim: int  # of the projected mean of the states
  num_token_types: int = 1  # captions are of the first
  epsilon: float = 1e-5  # of the norms


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
  """The autoencoder whose latents a decoder paints: Kandinsky's MoVQ, or Stable Diffusion's."""

  channels: int
  multipliers: tuple[int, ...]
  num_res_blocks: int
  latent_channels: int
  kind: str = 'kl'  # the encoder gives mean and log-variance; or 'vq': it gives the latent
  scaling: float = 0.18215  # latents are multiplied by it before they are noised; Kandinsky's never
  image_channels: int = 3
  attention_levels: tuple[int, ...] = ()  # 0 is the highest resolution; the middle always has it
  num_groups: int = 32
  codebook_size: int = 0  # of 'vq'
  spatial_norm: bool = False  # the latent scales and shifts the decoder's norms (MoVQ)

  @property
  def factor(self) -> int:
    """Pixels a side that one of the latent stands for."""
    return 2 ** (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class KandinskyDecoderConfig:
  """Kandinsky's decoder of latents: an ADM U-Net that sees z_i, and in 2.1 the caption too.

  What stands for no z_i is CLIP's embedding of a picture of zeros.
  """

  image_size: int  # of the latent
  embed_dim: int
  unet: UNetConfig
  diffusion: DiffusionConfig
  sampling: SamplingConfig
  num_image_tokens: int
  text_width: int | None = None  # of the states of the decoder's own text encoder (2.1); None: 2.2
  text_embed_dim: int | None = None  # of what it pools them to


@dataclasses.dataclass(frozen=True)
class StableUnclipDecoderConfig:
  """Stable unCLIP's decoder of latents: Stable Diffusion's U-Net, given a noised z_i as a class.

  What stands for no z_i is a class embedding of zeros.
  """

  image_size: int  # of the latent
  embed_dim: int
  unet: LatentUNetConfig
  diffusion: DiffusionConfig
  sampling: SamplingConfig
  z_i_diffusion: DiffusionConfig  # how z_i is noised
  noise_level: int = 0  # the timestep that z_i is noised to unless the caller asks otherwise


@dataclasses.dataclass(frozen=True)
class GlideDecoderConfig:
  """GLIDE's base network: the caption alone, and where it inpaints a masked picture."""

  image_size: int
  unet: UNetConfig  # condition_channels: 4 to inpaint (the picture and its mask)
  diffusion: DiffusionConfig
  sampling: SamplingConfig
  text: TextConfig

  @property
  def inpaints(self) -> bool:
    """Whether it has channels for a picture to complete and its mask."""
    return self.unet.condition_channels > 0


@dataclasses.dataclass(frozen=True)
class GlideUpsamplerConfig:
  """GLIDE's upsampler, which reads the caption as well."""

  image_size: int
  low_size: int
  unet: UNetConfig  # condition_channels: 3 of the small picture, and 4 more to inpaint
  diffusion: DiffusionConfig
  sampling: SamplingConfig
  text: TextConfig
  temperature: float = 0.997  # of the noise that it starts from

  @property
  def inpaints(self) -> bool:
    """Whether it has channels for a picture to complete and its mask."""
    return self.unet.condition_channels > self.unet.in_channels


AnyPriorConfig = PriorConfig | ArPriorConfig
AnyDecoderConfig = (
  DecoderConfig | KandinskyDecoderConfig | StableUnclipDecoderConfig | GlideDecoderConfig
)
AnyUpsamplerConfig = UpsamplerConfig | GlideUpsamplerConfig


@dataclasses.dataclass(frozen=True)
class UnclipConfig:
  """The whole system; public weights may come without some of its stages."""

  clip: ClipConfig | None  # None: GLIDE knows no CLIP
  prior: AnyPriorConfig | None
  decoder: AnyDecoderConfig | None
  upsamplers: tuple[AnyUpsamplerConfig, ...] = ()
  # Of a decoder whose captions are read by neither CLIP nor itself.
  decoder_text: XlmRobertaConfig | TextConfig | None = None
  autoencoder: AutoencoderConfig | None = None  # where the decoder paints latents
  # Of the pictures of a call that names no size, in pixels; None: as the last stage makes them.
  default_size: int | None = None
