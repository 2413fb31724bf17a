"""A loaded model, and batches of samples in flight through it.

:class:`Denoiser` takes one step for a batch; :class:`SampleBatch` holds unlike samples on their way
(different step counts, samplers, scales, classes), which may join before any step and leave after
any step. Both the command line and the server's engine are loops around them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model_core.classifier import Classifier
from model_core.config import DiffusionConfig, UpsamplerConfig
from model_core.guidance import classifier_gradient
from model_core.noise import noise_keys, normal
from model_core.samplers import CoefficientBank, Sampler, StepOutput, predict, sampler_step
from model_core.schedule import respaced_timesteps
from model_core.unet import UNet


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
    label: Tensor
    clip: Tensor
    guided: Tensor
    """Indices (G,) of the samples that get a classifier pass at this step."""


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
        """One step of every sample: one UNet pass, and one classifier gradient for the guided ones.

        Args:
            x_t: (B, C, H, W) float32.
            batch: each sample's position and choices.
            noise: standard normal, broadcastable to x_t.
            low_res: (B, C, h, w), for an upsampler.
        """
        row = self.bank.gather(batch.row)
        c = row.per_pixel()
        y = batch.label if self.unet.config.num_classes is not None else None
        output = self.unet(x_t, row.model_t, y) if low_res is None else self.unet(x_t, row.model_t, y, low_res=low_res)
        p = predict(self.diffusion, c, x_t, output, batch.clip)
        gradient = None
        if len(batch.guided):
            assert self.classifier is not None  # SampleSpecs are checked on the way in
            gradient = self._scaled_gradient(x_t, row.model_t, batch)
        return sampler_step(batch.sampler, c, x_t, p, gradient, noise, batch.eta)

    def _scaled_gradient(self, x_t: Tensor, model_t: Tensor, batch: StepBatch) -> Tensor:
        assert self.classifier is not None
        who = batch.guided
        gradient = classifier_gradient(self.classifier, x_t[who], model_t[who], batch.label[who])
        scaled = gradient * batch.guidance_scale[who, None, None, None]
        return torch.zeros_like(x_t).index_copy_(0, who, scaled.to(x_t.dtype))


class SampleBatch:
    """Samples in flight through one model, each at its own step.

    Args:
        denoiser: the model.
        specs: the samples.
        start: pictures (B, C, H, W) to start from instead of noise; needed for encoding.
        low_res: (B, C, h, w) in [-1, 1], for an upsampler.

    Raises:
        ValueError: for a spec the model cannot make, or missing pictures.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        specs: Sequence[SampleSpec],
        *,
        start: Tensor | None = None,
        low_res: Tensor | None = None,
    ) -> None:
        for spec in specs:
            denoiser.check(spec)
        if (denoiser.low_res_shape is None) != (low_res is None):
            raise ValueError("low_res: needed for an upsampler, and only there")
        if start is None and any(spec.sampler == Sampler.DDIM_ENCODE for spec in specs):
            raise ValueError("start: encoding starts from pictures")
        self.denoiser = denoiser
        self.specs = list(specs)
        device = denoiser.device
        self.low_res = None if low_res is None else low_res.to(device)
        tables = [respaced_timesteps(denoiser.diffusion.diffusion_steps, s.respacing) for s in specs]
        up = [s.sampler == Sampler.DDIM_ENCODE for s in specs]
        # On the host: where each sample is, and what decides whether it is guided or draws noise.
        self._timesteps = [t if u else t[::-1] for t, u in zip(tables, up, strict=True)]
        self._taken = np.zeros(len(self.specs), dtype=np.int64)
        # On the device: what the update rules read.
        self.locate()
        self._direction = torch.tensor([1 if u else -1 for u in up], device=device)
        self._sampler = torch.tensor([int(s.sampler) for s in specs], device=device)
        self._eta = torch.tensor([s.eta for s in specs], dtype=torch.float32, device=device)
        self._scale = torch.tensor([s.guidance_scale for s in specs], dtype=torch.float32, device=device)
        self._label = torch.tensor([s.label or 0 for s in specs], device=device)
        self._clip = torch.tensor([s.clip_denoised for s in specs], dtype=torch.bool, device=device)
        self._keys = noise_keys([s.seed for s in specs], [s.stage for s in specs], device)
        # Draw 0 of a sample's stream is x_T, draw k belongs to its k-th step.
        draw = torch.zeros(len(self.specs), dtype=torch.int64, device=device)
        self.x = normal(self._keys, draw, denoiser.shape) if start is None else start.to(device, torch.float32)
        """The samples as they are now, (B, C, H, W)."""

    def __len__(self) -> int:
        return len(self.specs)

    def locate(self) -> None:
        """Look up where in the bank the samples' coefficients are; needed again after it was cleared."""
        first = []
        for spec, kept in zip(self.specs, self._timesteps, strict=True):
            offset = self.denoiser.bank.offset(spec.respacing)
            first.append(offset if spec.sampler == Sampler.DDIM_ENCODE else offset + len(kept) - 1)
        self._first_row = torch.tensor(first, device=self.denoiser.device)

    @classmethod
    def join(cls, batches: Sequence[SampleBatch]) -> SampleBatch:
        """The samples of several batches of one model, in order, as one batch."""
        first, *_ = batches
        joined = copy(first)
        joined.specs = [spec for batch in batches for spec in batch.specs]
        joined._timesteps = [kept for batch in batches for kept in batch._timesteps]
        joined._taken = np.concatenate([batch._taken for batch in batches])
        if first.low_res is not None:
            joined.low_res = torch.cat([batch.low_res for batch in batches if batch.low_res is not None])
        for name in _DEVICE_STATE:
            setattr(joined, name, torch.cat([getattr(batch, name) for batch in batches]))
        return joined

    def select(self, indices: Sequence[int]) -> SampleBatch:
        """The named samples as they are now, in this order, as a batch of its own."""
        index = torch.tensor(list(indices), dtype=torch.int64, device=self.denoiser.device)
        selected = copy(self)
        selected.specs = [self.specs[i] for i in indices]
        selected._timesteps = [self._timesteps[i] for i in indices]
        selected._taken = self._taken[list(indices)]
        selected.low_res = None if self.low_res is None else self.low_res[index]
        for name in _DEVICE_STATE:
            setattr(selected, name, getattr(self, name)[index])
        return selected

    @property
    def steps_left(self) -> list[int]:
        """Steps each sample still has to take."""
        return [len(t) - int(n) for t, n in zip(self._timesteps, self._taken, strict=True)]

    @property
    def timesteps(self) -> list[int]:
        """The original process's timestep at which each sample will take its next step."""
        return [t[n] for t, n in zip(self._timesteps, self._taken, strict=True)]

    @property
    def guided(self) -> list[int]:
        """Which samples will get a classifier pass at their next step."""
        return [i for i, (s, t) in enumerate(zip(self.specs, self.timesteps, strict=True)) if _is_guided(s, t)]

    def step(self) -> StepOutput:
        """Every sample takes its next step; all must have one left. If it raises, none has taken it."""
        out = self._advance(self.guided)
        self.x = out.x
        self._taken = self._taken + 1
        return out

    def step_padded(self, bucket: Callable[[int], int]) -> StepOutput:
        """As :meth:`step`, in tensors of few different shapes, for compiled networks.

        Args:
            bucket: number of samples -> the batch size to use, at least as large. Both networks'
                batches are filled up with copies of their first sample.
        """
        count = len(self)
        padded = self.select([*range(count), *[0] * (bucket(count) - count)])
        guided = padded.guided
        guided += guided[:1] * (bucket(len(guided)) - len(guided)) if guided else []
        out = padded._advance(guided)
        self.x = out.x[:count]
        self._taken = self._taken + 1
        return StepOutput(self.x, out.pred_x0[:count])

    def _advance(self, guided: list[int]) -> StepOutput:
        taken = torch.as_tensor(self._taken, device=self.denoiser.device)
        batch = StepBatch(
            row=self._first_row + self._direction * taken,
            sampler=self._sampler,
            eta=self._eta,
            guidance_scale=self._scale,
            label=self._label,
            clip=self._clip,
            guided=torch.tensor(guided, dtype=torch.int64, device=self.denoiser.device),
        )
        if any(s.sampler == Sampler.DDPM or s.eta > 0 for s in self.specs):
            noise = normal(self._keys, taken + 1, self.denoiser.shape)
        else:
            noise = torch.zeros(1, device=self.denoiser.device)
        return self.denoiser.step(self.x, batch, noise, self.low_res)


_DEVICE_STATE = ("_first_row", "_direction", "_sampler", "_eta", "_scale", "_label", "_clip", "_keys", "x")


def _is_guided(spec: SampleSpec, timestep: int) -> bool:
    if not spec.guidance_scale:
        return False
    low, high = spec.guidance_interval or (timestep, timestep)
    return low <= timestep <= high
