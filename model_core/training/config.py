"""What a training run is: a validated TOML or JSON file, with overrides. Imports no torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from model_core.bundle import SamplingDefaults
from model_core.config import (
    ClassifierConfig,
    DiffusionConfig,
    FrozenModel,
    UNetConfig,
    UpsamplerConfig,
    check_variance,
    explain,
)

Decay = Annotated[float, Field(gt=0.0, lt=1.0)]


class DataConfig(FrozenModel):
    """Where the pictures are, and how they are cropped and flipped.

    A source is a folder of class folders, or WebDataset shards: one or more ``.tar`` paths or fsspec URLs
    with ``{000..127}`` ranges, each sample a picture with its class index in a ``.cls`` file.
    """

    train: str
    """Folder (its classes are the sub-folders in alphabetical order), or shards."""
    val: str | None = None
    """Held-out pictures with the same classes."""
    cache: Path | None = None
    """Folder for copies of remote shards; default: ``shards`` in the run's folder."""
    shuffle_shards: int = Field(default=8, ge=1)
    """Shards whose samples are shuffled among each other; each process keeps as many open."""
    workers: int = Field(default=1, ge=0)
    """Processes that prepare batches; 0: the training process does."""
    prefetch: int = Field(default=2, ge=1)
    """Batches each of them keeps ready."""
    balanced: bool = False
    """Draw every class equally often, whatever its size (else every picture once an epoch)."""
    crop: tuple[float, float] = (1.0, 1.0)
    """Side of the random square crop as a share of the picture's short side, drawn uniformly."""
    flip: bool = True
    """Mirror half of the pictures."""
    no_flip: tuple[str, ...] = ()
    """Classes that are never mirrored."""

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        low, high = self.crop
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop: expected 0 < low <= high <= 1, got {low} and {high}")
        return self


class OptimizerConfig(FrozenModel):
    """AdamW with warm-up and a decay to the end of the run."""

    lr: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    grad_clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; ``None`` leaves it as it is."""
    warmup: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How it falls after the warm-up, to 0 at the last step."""


class ComputeConfig(FrozenModel):
    """Where and how the arithmetic runs; no effect on what is computed but for rounding."""

    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    """Processor threads; ``None`` leaves PyTorch's choice."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """``bf16`` and ``fp16``: autocast, fp16 with loss scaling; weights, optimizer and EMA stay in float32."""
    compile: bool = False
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the work: the batch only, or (FSDP) weights and optimizer, too."""
    channels_last: bool = True
    microbatches: int = Field(default=1, ge=1)
    """Parts the batch is computed in, one after the other, to save memory."""


class PublishConfig(FrozenModel):
    """Where a run's weights are published, and what a bundle says beside them."""

    model: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """Model to publish a new version of; its other network is taken over from the newest version."""
    models_dir: Path = Path("models")
    every: int | None = Field(default=None, ge=1)
    """Steps between publications; the last step always publishes."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Type the weights are stored in."""
    defaults: SamplingDefaults | None = None
    """How the model is sampled when a request does not say; default: as before. Without a classifier the
    guidance scale counts as 0."""
    card: str | None = None
    """Text of the model card; default: what is known of the run."""


class TrainingConfig(FrozenModel):
    """What every run has."""

    run_dir: Path
    """Folder of the run's states, log and sample grids."""
    seed: int = 0
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    init: Path | None = None
    """A bundle's version folder whose weights the run begins with: fine-tuning."""
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    ema: tuple[Decay, ...] = ()
    """Decay rates of the exponential moving averages of the weights; the first is the one judged."""
    log_every: int = Field(default=10, ge=1)
    save_minutes: float = Field(default=5.0, gt=0)
    """Minutes between saved states; the last step and SIGTERM save as well."""
    eval_every: int = Field(default=1000, ge=1)
    """Steps between sample grids (diffusion) or validations (classifier)."""
    tensorboard: bool = True
    """Write scalars and grids for TensorBoard into ``run_dir/tensorboard``."""
    publish: PublishConfig | None = None

    @model_validator(mode="after")
    def _check_precision(self) -> Self:
        if self.compute.precision == "fp16" and self.compute.strategy == "fsdp":
            raise ValueError("compute.precision: fp16 needs a loss scale, which FSDP does not share; use bf16")
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.batch_size % self.compute.microbatches:
            raise ValueError(
                f"compute.microbatches: {self.compute.microbatches} does not divide batch_size {self.batch_size}"
            )
        return self


class SampleConfig(FrozenModel):
    """The grids of samples drawn on the way."""

    per_class: int = Field(default=8, ge=1)
    steps: int = Field(default=25, ge=1)
    """DDIM steps."""


class _DenoiserTraining(TrainingConfig):
    """What diffusion models and upsamplers have in common."""

    diffusion: DiffusionConfig
    timestep_sampler: Literal["uniform", "loss_second_moment"] = "uniform"
    sample: SampleConfig = SampleConfig()


class DiffusionTraining(_DenoiserTraining):
    """Training of a diffusion model."""

    unet: UNetConfig

    @model_validator(mode="after")
    def _check_variance(self) -> Self:
        check_variance(self.unet, self.diffusion)
        return self


class UpsamplerTraining(_DenoiserTraining):
    """Training of an upsampler, on pictures and their area-averaged small versions (published recipe)."""

    unet: UpsamplerConfig

    @model_validator(mode="after")
    def _check_variance(self) -> Self:
        check_variance(self.unet, self.diffusion)
        return self


class ClassifierTraining(TrainingConfig):
    """Training of a classifier on noised pictures."""

    classifier: ClassifierConfig
    diffusion: DiffusionConfig
    """The process whose noise the classifier sees: that of the model it is to guide."""
    noised: bool = True
    """Off: an ordinary classifier of clean pictures, which always sees timestep 0."""


Kind = Literal["diffusion", "classifier", "upsampler"]
KINDS: dict[Kind, type[TrainingConfig]] = {
    "diffusion": DiffusionTraining,
    "classifier": ClassifierTraining,
    "upsampler": UpsamplerTraining,
}

C = TypeVar("C", bound=TrainingConfig)


def parse_override(text: str) -> tuple[list[str], Any]:
    """``a.b=value`` as its path and value; values are JSON, or else strings."""
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise ValueError(f"--set: expected key=value, got {text!r}")
    try:
        return path.split("."), json.loads(value)
    except json.JSONDecodeError:
        return path.split("."), value


def load_config(kind: type[C], file: Path, overrides: Iterable[str] = ()) -> C:
    """Read and check a configuration file.

    Raises:
        ValueError: naming the field, if something is missing, unknown or out of range.
    """
    text = file.read_text()
    try:
        values: dict[str, Any] = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    for override in overrides:
        (*parents, last), value = parse_override(override)
        table = values
        try:
            for key in parents:
                table = table.setdefault(key, {})
            table[last] = value
        except (TypeError, AttributeError):
            raise ValueError(f"--set: {'.'.join(parents)} in {override!r} is not a table") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{file}: {explain(error)}") from None
