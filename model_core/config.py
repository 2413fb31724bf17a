"""Validated configurations of the networks and of the diffusion process.

Field names are those of the paper and its published implementation. Every refusal names the
field and says why; nothing here imports torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

GROUPS = 32
"""Groups of every GroupNorm: each level's channel count must be a multiple of this."""

Pool = Literal["adaptive", "attention", "spatial", "spatial_v2"]
NoiseSchedule = Literal["linear", "cosine"]
Prediction = Literal["eps", "x_start"]
Variance = Literal["learned_range", "fixed_small", "fixed_large"]
Loss = Literal["mse", "rescaled_mse", "kl", "rescaled_kl"]
SamplerName = Literal["ddpm", "ddim", "dpmpp_2m"]
"""Samplers that requests and options may name."""

Count = Annotated[int, Field(ge=1)]
Multiplier = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class FrozenModel(BaseModel):
    """Base of all configurations: immutable, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TrunkConfig(FrozenModel):
    """What the UNet and the encoder classifier share (paper, Section 3 and Table 4)."""

    image_size: Count
    """Height and width in pixels of the pictures."""
    in_channels: Count = 3
    model_channels: Count
    """Base width; level ``i`` has ``int(channel_mult[i] * model_channels)`` channels."""
    out_channels: Count
    num_res_blocks: Count
    """Residual blocks per resolution."""
    attention_resolutions: tuple[Count, ...]
    """Downsampling factors (1, 2, 4, ...) at which residual blocks are followed by attention."""
    channel_mult: tuple[Multiplier, ...] = Field(min_length=1)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    num_heads: Count = 1
    """Attention heads, where ``num_head_channels`` does not decide."""
    num_head_channels: Count | None = None
    """Channels per head; takes precedence over ``num_heads`` and ``num_heads_upsample``."""
    conv_resample: bool = True
    """Plain resampling layers are convolutions (else average pooling and nearest neighbour)."""
    use_scale_shift_norm: bool = False
    """Adaptive group normalisation (AdaGN); off: the embedding is added."""
    resblock_updown: bool = False
    """BigGAN residual blocks for up- and downsampling."""
    use_new_attention_order: bool = False
    """Split q, k and v before the heads (else after them)."""

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels at each level, finest first."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def time_embed_dim(self) -> int:
        """Width of the timestep (and class) embedding."""
        return 4 * self.model_channels

    def head_count(self, channels: int, *, upsample: bool = False) -> int:
        """Attention heads of a block with ``channels`` channels."""
        if self.num_head_channels is not None:
            return channels // self.num_head_channels
        return self._heads(upsample)

    def _heads(self, upsample: bool) -> int:
        return self.num_heads

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        for level, channels in enumerate(self.level_channels):
            if channels < GROUPS or channels % GROUPS:
                raise ValueError(
                    f"channel_mult: level {level} has {channels} channels "
                    f"({self.channel_mult[level]:g} x model_channels {self.model_channels}), "
                    f"which is not a multiple of {GROUPS} as group normalisation needs"
                )
        coarsest = 2 ** (len(self.channel_mult) - 1)
        if self.image_size % coarsest:
            raise ValueError(
                f"image_size: {self.image_size} cannot be halved {len(self.channel_mult) - 1} times "
                f"(channel_mult has {len(self.channel_mult)} levels); use a multiple of {coarsest}"
            )
        factors = [2**level for level in range(len(self.channel_mult))]
        for factor in self.attention_resolutions:
            if factor not in factors:
                raise ValueError(
                    f"attention_resolutions: {factor} is not a downsampling factor of this model "
                    f"(allowed: {', '.join(map(str, factors))})"
                )
        self._check_heads(factors)
        return self

    def _check_heads(self, factors: list[int]) -> None:
        attended = {
            channels
            for factor, channels in zip(factors, self.level_channels, strict=True)
            if factor in self.attention_resolutions
        }
        attended.add(self.level_channels[-1])  # the middle block always attends
        for channels in sorted(attended):
            if self.num_head_channels is not None:
                if channels % self.num_head_channels:
                    raise ValueError(
                        f"num_head_channels: {self.num_head_channels} does not divide "
                        f"the {channels} channels of an attention block"
                    )
                continue
            for name, heads in (("num_heads", self._heads(False)), ("num_heads_upsample", self._heads(True))):
                if channels % heads:
                    raise ValueError(f"{name}: {heads} does not divide the {channels} channels of an attention block")


class UNetConfig(TrunkConfig):
    """The ADM UNet that predicts eps (or x_0) and, with learned sigma, the variance."""

    num_classes: Count | None = None
    """Classes the network is conditioned on; ``None`` for an unconditional network."""
    num_heads_upsample: Count | None = None
    """Heads in the decoder, where they differ from ``num_heads``."""

    @property
    def input_channels(self) -> int:
        """Channels the first convolution sees."""
        return self.in_channels

    def _heads(self, upsample: bool) -> int:
        return self.num_heads_upsample if upsample and self.num_heads_upsample else self.num_heads

    @model_validator(mode="after")
    def _check_outputs(self) -> Self:
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(
                f"out_channels: {self.out_channels} is neither in_channels ({self.in_channels}) "
                f"nor twice that ({2 * self.in_channels}, with learned sigma)"
            )
        return self


class UpsamplerConfig(UNetConfig):
    """A UNet conditioned on a low-resolution picture, upsampled bilinearly (paper, Section 3.1)."""

    low_res_size: Count
    """Height and width in pixels of the low-resolution pictures."""

    @property
    def input_channels(self) -> int:
        return 2 * self.in_channels

    @model_validator(mode="after")
    def _check_low_res(self) -> Self:
        if self.low_res_size >= self.image_size:
            raise ValueError(f"low_res_size: {self.low_res_size} is not smaller than image_size {self.image_size}")
        return self


class ClassifierConfig(TrunkConfig):
    """The noisy classifier: the encoder half of the UNet and a pooling head (paper, Section 4)."""

    pool: Pool = "attention"

    @property
    def num_classes(self) -> int:
        """Number of classes the logits speak of."""
        return self.out_channels

    @model_validator(mode="after")
    def _check_pool(self) -> Self:
        if self.pool == "attention" and self.num_head_channels is None:
            raise ValueError("num_head_channels: needed with pool 'attention', whose head count follows from it")
        return self


class DiffusionConfig(FrozenModel):
    """The forward process and what the network predicts of it."""

    diffusion_steps: Count = 1000
    noise_schedule: NoiseSchedule = "linear"
    prediction: Prediction = "eps"
    variance: Variance = "learned_range"
    rescale_timesteps: bool = False
    """Show the network timesteps scaled to 0..1000 whatever ``diffusion_steps`` is."""
    loss: Loss = "mse"
    """Training objective; with learned variance ``mse`` is the paper's hybrid objective."""

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        if self.noise_schedule == "linear" and self.diffusion_steps <= 20:
            raise ValueError(
                f"diffusion_steps: the linear schedule needs at least 21 steps, got {self.diffusion_steps} "
                "(its last beta, 20 / diffusion_steps, must stay below 1); use 'cosine' or respacing"
            )
        return self


def check_variance(unet: UNetConfig, diffusion: DiffusionConfig) -> None:
    """Check that the network's outputs fit the variance the process expects.

    Raises:
        ValueError: naming the field, if they do not.
    """
    learned = diffusion.variance == "learned_range"
    expected = unet.in_channels * (2 if learned else 1)
    if unet.out_channels != expected:
        raise ValueError(
            f"out_channels: variance {diffusion.variance!r} needs {expected} output channels, got {unet.out_channels}"
        )


def explain(error: ValidationError) -> str:
    """The first thing wrong, in one line: the field and the reason."""
    first = error.errors()[0]
    tags = (UNetConfig.__name__, UpsamplerConfig.__name__)
    where = ".".join(str(part) for part in first["loc"] if part not in tags)
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
