"""A loaded model, and one step of a batch through it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from model_core.classifier import Classifier
from model_core.config import DiffusionConfig, UpsamplerConfig
from model_core.guidance import classifier_gradient
from model_core.samplers import (
    CoefficientBank,
    Coefficients,
    Guidance,
    Sampler,
    StepOutput,
    predict,
    sampler_step,
)
from model_core.schedule import respaced_timesteps
from model_core.unet import UNet

MODEL_T = [field.name for field in fields(Coefficients)].index("model_t")
"""Column of the coefficients that the networks are shown."""


@dataclass(frozen=True)
class SampleSpec:
    """Everything that decides one picture, given the model."""

    seed: int = 0
    """Names the sample's random stream."""
    stage: int = 0
    """0 for a base model, 1 for the upsampler after it: another stream of the same sample."""
    respacing: str = ""
    sampler: Sampler = Sampler.DDPM
    eta: float = 0.0
    guidance_scale: float = 0.0
    guidance_interval: tuple[int, int] | None = None
    """Guide only at timesteps of the original process within these bounds, both included."""
    guidance_every: int = 1
    """Compute the classifier's gradient at every so many guided steps, and use it again at those between."""
    label: int | None = None
    clip_denoised: bool = True


@dataclass(frozen=True)
class StepBatch:
    """Per-sample inputs of one step, each (B,) on the model's device."""

    row: Tensor
    """Row in the model's :class:`CoefficientBank`, int64."""
    sampler: Tensor
    eta: Tensor
    guidance_scale: Tensor
    """0 where a sample is not guided at this step."""
    label: Tensor
    clip: Tensor
    guided: Tensor
    """Indices (G,) of the samples that get a classifier pass at this step."""
    gradient: Tensor | None = None
    """(B, C, H, W): each sample's last gradient, used where it gets no new one; ``None``: zero."""
    previous_x0: Tensor | None = None
    """(B, C, H, W): what the step before gave as ``pred_x0``; ``None``: zero."""


class UpdateInputs(NamedTuple):
    """What :func:`update` reads; all but ``gradient`` are tensors on the model's device."""

    rows: Tensor
    """(B, K) coefficients, see :meth:`CoefficientBank.rows`."""
    x_t: Tensor
    """(B, C, H, W)."""
    output: Tensor
    """Of the UNet."""
    gradient: Tensor | None
    """(B, C, H, W) of log p(y | x_t), or ``None`` if no sample is guided."""
    scale: Tensor
    """(B,) guidance scale, 0 where a sample is not guided."""
    previous_x0: Tensor
    """(B, C, H, W)."""
    noise: Tensor
    """Standard normal, broadcastable to x_t."""
    sampler: Tensor
    """(B,) int64."""
    eta: Tensor
    """(B,)."""
    clip: Tensor
    """(B,) bool."""


def update(config: DiffusionConfig, of: UpdateInputs) -> tuple[Tensor, Tensor]:
    """From the networks' outputs to the next x and the predicted x_0, by each sample's own rule."""
    c = Coefficients(*of.rows.unbind(1)).per_pixel()
    p = predict(config, c, of.x_t, of.output, of.clip)
    guidance = None
    if of.gradient is not None:
        weight = of.scale[:, None, None, None]
        guidance = Guidance(weight != 0, of.gradient * weight)
    out = sampler_step(of.sampler, c, of.x_t, p, guidance, of.noise, of.eta, of.previous_x0, of.clip)
    return out.x, out.pred_x0


class Functions(Protocol):
    """What a step computes: here as the networks are, in :mod:`model_core.acceleration` compiled."""

    def predict(self, x_t: Tensor, model_t: Tensor, y: Tensor | None, low_res: Tensor | None) -> Tensor:
        """The UNet's output."""

    def gradient(self, x_t: Tensor, model_t: Tensor, label: Tensor) -> Tensor:
        """Gradient of log p(label | x_t)."""

    def update(self, of: UpdateInputs) -> tuple[Tensor, Tensor]:
        """See :func:`update`."""


class Eager:
    """The networks, run operation by operation."""

    def __init__(self, unet: UNet, classifier: Classifier | None, diffusion: DiffusionConfig) -> None:
        self._unet, self._classifier = unet, classifier
        self.update = partial(update, diffusion)

    def predict(self, x_t: Tensor, model_t: Tensor, y: Tensor | None, low_res: Tensor | None) -> Tensor:
        """The UNet's output."""
        out: Tensor = self._unet(x_t, model_t, y) if low_res is None else self._unet(x_t, model_t, y, low_res=low_res)
        return out

    def gradient(self, x_t: Tensor, model_t: Tensor, label: Tensor) -> Tensor:
        """Gradient of log p(label | x_t)."""
        assert self._classifier is not None  # SampleSpecs are checked on the way in
        return classifier_gradient(self._classifier, x_t, model_t, label)


class Denoiser:
    """A UNet, perhaps a classifier, and the process they were trained for.

    Networks are put into eval mode and their parameters frozen.
    """

    def __init__(self, unet: UNet, classifier: Classifier | None, diffusion: DiffusionConfig) -> None:
        self.unet = unet.eval().requires_grad_(False)
        self.classifier = classifier.eval().requires_grad_(False) if classifier is not None else None
        self.diffusion = diffusion
        self.device = next(unet.parameters()).device
        self.bank = CoefficientBank(diffusion, self.device)
        self.functions: Functions = Eager(self.unet, self.classifier, diffusion)
        """May be exchanged between steps."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture."""
        config = self.unet.config
        return config.in_channels, config.image_size, config.image_size

    @property
    def low_res_shape(self) -> tuple[int, int, int] | None:
        """(C, h, w) of the pictures an upsampler starts from."""
        config = self.unet.config
        if not isinstance(config, UpsamplerConfig):
            return None
        return config.in_channels, config.low_res_size, config.low_res_size

    @property
    def num_classes(self) -> int | None:
        """Classes a label may name, if the model knows any."""
        if self.unet.config.num_classes is not None:
            return self.unet.config.num_classes
        return self.classifier.config.num_classes if self.classifier is not None else None

    def shown(self, label: Tensor) -> Tensor | None:
        """What the UNet is shown of the labels: nothing, unless it is class-conditional."""
        return label if self.unet.config.num_classes is not None else None

    def check(self, spec: SampleSpec) -> None:
        """Check that this model can make the sample.

        Raises:
            ValueError: naming the field and the allowed range.
        """
        respaced_timesteps(self.diffusion.diffusion_steps, spec.respacing)
        if not 0.0 <= spec.eta <= 1.0:
            raise ValueError(f"eta: {spec.eta} is not between 0 and 1")
        if not np.isfinite(spec.guidance_scale):
            raise ValueError(f"guidance_scale: {spec.guidance_scale} is not a finite number")
        if spec.guidance_scale and self.classifier is None:
            raise ValueError("guidance_scale: this model has no classifier, so only 0 is possible")
        if spec.guidance_scale and spec.sampler == Sampler.DDIM_ENCODE:
            raise ValueError("guidance_scale: encoding is not guided, so only 0 is possible")
        if spec.guidance_interval is not None and spec.guidance_interval[0] > spec.guidance_interval[1]:
            raise ValueError(f"guidance_interval: {spec.guidance_interval} ends before it begins")
        if spec.guidance_every < 1:
            raise ValueError(f"guidance_every: {spec.guidance_every} is less than 1")
        if spec.label is None:
            if self.unet.config.num_classes is not None:
                raise ValueError(
                    f"label: this model is class-conditional and needs one (0 to {self.unet.config.num_classes - 1})"
                )
            if spec.guidance_scale:
                raise ValueError("label: guidance needs a class to guide towards")
        elif self.num_classes is None:
            raise ValueError("label: this model knows no classes")
        elif not 0 <= spec.label < self.num_classes:
            raise ValueError(f"label: {spec.label} is not between 0 and {self.num_classes - 1}")

    @torch.no_grad()
    def step(self, x_t: Tensor, batch: StepBatch, noise: Tensor, low_res: Tensor | None = None) -> StepOutput:
        """One step of every sample: one UNet pass, and one classifier gradient for those that get one.

        Args:
            x_t: (B, C, H, W) float32.
            batch: each sample's position and choices.
            noise: standard normal, broadcastable to x_t.
            low_res: (B, C, h, w), for an upsampler.
        """
        rows = self.bank.rows(batch.row)
        model_t = rows[:, MODEL_T]
        output = self.functions.predict(x_t, model_t, self.shown(batch.label), low_res)
        gradient = batch.gradient
        if len(who := batch.guided):
            fresh = self.functions.gradient(x_t[who], model_t[who], batch.label[who])
            gradient = torch.zeros_like(x_t) if gradient is None else gradient
            gradient = gradient.index_copy(0, who, fresh.to(x_t.dtype))
        inputs = UpdateInputs(
            rows=rows,
            x_t=x_t,
            output=output,
            gradient=gradient,
            scale=batch.guidance_scale,
            previous_x0=torch.zeros_like(x_t) if batch.previous_x0 is None else batch.previous_x0,
            noise=noise,
            sampler=batch.sampler,
            eta=batch.eta,
            clip=batch.clip,
        )
        x, pred_x0 = self.functions.update(inputs)
        return StepOutput(x, pred_x0, gradient)
