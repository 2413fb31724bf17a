"""Samples in flight: unlike ones (different step counts, samplers, scales, classes) step together.

They may join before any step and leave after any step. Both the command line and the server's engine are
loops around :class:`SampleBatch`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from copy import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model_core.denoiser import Denoiser, SampleSpec, StepBatch
from model_core.noise import noise_keys, normal
from model_core.samplers import Sampler, StepOutput
from model_core.schedule import respaced_timesteps


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
        encode = np.array([s.sampler == Sampler.DDIM_ENCODE for s in specs])
        # On the host: where each sample is, and what decides whether it gets a classifier pass.
        tables = [respaced_timesteps(denoiser.diffusion.diffusion_steps, s.respacing) for s in specs]
        self._total = np.array([len(kept) for kept in tables])
        self._taken = np.zeros(len(self.specs), dtype=np.int64)
        self._direction = np.where(encode, 1, -1)
        self._weight = np.array([s.guidance_scale for s in specs], dtype=np.float32)
        everywhere = (0, denoiser.diffusion.diffusion_steps)
        self._low, self._high = np.array([s.guidance_interval or everywhere for s in specs]).T
        self._noisy = np.array([s.sampler == Sampler.DDPM or s.eta > 0 for s in specs])
        self._every = np.array([s.guidance_every for s in specs])
        # Steps before the interval, from which the k of "every k steps" are counted.
        self._before = np.array([len(kept) - bisect_right(kept, h) for kept, h in zip(tables, self._high, strict=True)])
        self.locate()
        # On the device: what the update rules read.
        self._sampler = torch.tensor([int(s.sampler) for s in specs], device=device)
        self._eta = torch.tensor([s.eta for s in specs], dtype=torch.float32, device=device)
        self._label = torch.tensor([s.label or 0 for s in specs], device=device)
        self._clip = torch.tensor([s.clip_denoised for s in specs], dtype=torch.bool, device=device)
        self._keys = noise_keys([s.seed for s in specs], [s.stage for s in specs], device)
        # Draw 0 of a sample's stream is x_T, draw k belongs to its k-th step.
        draw = torch.zeros(len(self.specs), dtype=torch.int64, device=device)
        self.x = normal(self._keys, draw, denoiser.shape) if start is None else start.to(device, torch.float32)
        """The samples as they are now, (B, C, H, W)."""
        self._gradient = self._x0 = torch.zeros_like(self.x)

    def __len__(self) -> int:
        return len(self.specs)

    def locate(self) -> None:
        """Look up where in the bank the samples' coefficients are; needed again after it was cleared."""
        offsets = np.array([self.denoiser.bank.offset(spec.respacing) for spec in self.specs])
        self._first_row = np.where(self._direction > 0, offsets, offsets + self._total - 1)

    @classmethod
    def join(cls, batches: Sequence[SampleBatch]) -> SampleBatch:
        """The samples of several batches of one model, in order, as one batch."""
        first, *_ = batches
        joined = copy(first)
        joined.specs = [spec for batch in batches for spec in batch.specs]
        if first.low_res is not None:
            joined.low_res = torch.cat([batch.low_res for batch in batches if batch.low_res is not None])
        for name in _HOST_STATE:
            setattr(joined, name, np.concatenate([getattr(batch, name) for batch in batches]))
        for name in _DEVICE_STATE:
            setattr(joined, name, torch.cat([getattr(batch, name) for batch in batches]))
        return joined

    def select(self, indices: Sequence[int]) -> SampleBatch:
        """The named samples as they are now, in this order, as a batch of its own."""
        index = torch.tensor(list(indices), dtype=torch.int64, device=self.denoiser.device)
        selected = copy(self)
        selected.specs = [self.specs[i] for i in indices]
        selected.low_res = None if self.low_res is None else self.low_res[index]
        for name in _HOST_STATE:
            setattr(selected, name, getattr(self, name)[list(indices)])
        for name in _DEVICE_STATE:
            setattr(selected, name, getattr(self, name)[index])
        return selected

    @property
    def steps_left(self) -> list[int]:
        """Steps each sample still has to take."""
        return (self._total - self._taken).tolist()  # type: ignore[no-any-return]

    @property
    def timesteps(self) -> list[int]:
        """The original process's timestep at which each sample will take its next step."""
        return self._next_timestep().tolist()  # type: ignore[no-any-return]

    @property
    def guided(self) -> list[int]:
        """Which samples will get a classifier pass at their next step."""
        new = (self._taken - self._before) % self._every == 0
        return np.flatnonzero((self._scale_now() != 0) & new).tolist()

    def _row(self) -> NDArray[np.int64]:
        row: NDArray[np.int64] = self._first_row + self._direction * self._taken
        return row

    def _next_timestep(self) -> NDArray[np.int64]:
        return self.denoiser.bank.timesteps[self._row()]

    def _scale_now(self) -> NDArray[np.float32]:
        """Guidance scale at the next step: 0 outside the interval."""
        t = self._next_timestep()
        return np.where((self._low <= t) & (t <= self._high), self._weight, np.float32(0))

    def step(self) -> StepOutput:
        """Every sample takes its next step; all must have one left. If it raises, none has taken it."""
        return self._take(self._advance(self.guided))

    def step_padded(self, bucket: Callable[[int], int]) -> StepOutput:
        """As :meth:`step`, in tensors of few different shapes, for compiled networks.

        Args:
            bucket: number of samples -> the batch size to use, at least as large. Both networks'
                batches are filled up with copies of their first sample.
        """
        count = len(self)
        padded = self.select([*range(count), *[0] * (bucket(count) - count)])
        guided = self.guided
        guided += guided[:1] * (bucket(len(guided)) - len(guided)) if guided else []
        out = padded._advance(guided)
        gradient = None if out.gradient is None else out.gradient[:count]
        return self._take(StepOutput(out.x[:count], out.pred_x0[:count], gradient))

    def _take(self, out: StepOutput) -> StepOutput:
        self.x, self._x0 = out.x, out.pred_x0
        if out.gradient is not None:
            self._gradient = out.gradient
        self._taken = self._taken + 1
        return out

    def _advance(self, guided: list[int]) -> StepOutput:
        scale = self._scale_now()
        batch = StepBatch(
            row=self._put(self._row()),
            sampler=self._sampler,
            eta=self._eta,
            guidance_scale=self._put(scale),
            label=self._label,
            clip=self._clip,
            guided=self._put(np.array(guided, dtype=np.int64)),
            gradient=self._gradient if scale.any() else None,
            previous_x0=self._x0,
        )
        if self._noisy.any():
            noise = normal(self._keys, self._put(self._taken + 1), self.denoiser.shape)
        else:
            noise = torch.zeros(1, device=self.denoiser.device)
        return self.denoiser.step(self.x, batch, noise, self.low_res)

    def _put(self, array: NDArray[np.generic]) -> Tensor:
        """To the device; on CUDA from pinned memory, so that the host need not wait."""
        tensor = torch.from_numpy(array)
        if self.denoiser.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.denoiser.device, non_blocking=True)
        return tensor


_HOST_STATE = (
    "_total",
    "_taken",
    "_direction",
    "_weight",
    "_low",
    "_high",
    "_every",
    "_before",
    "_first_row",
    "_noisy",
)
_DEVICE_STATE = ("_sampler", "_eta", "_label", "_clip", "_keys", "x", "_gradient", "_x0")
