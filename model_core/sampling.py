"""Sampling without a server: many specs through a model in batches, and cascades."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from model_core.batch import SampleBatch
from model_core.denoiser import Denoiser, SampleSpec


def sample(
    denoiser: Denoiser,
    specs: Sequence[SampleSpec],
    *,
    batch_size: int = 8,
    start: Tensor | None = None,
    low_res: Tensor | None = None,
    progress: Callable[[int], None] = lambda steps: None,
) -> Tensor:
    """Make one picture per spec.

    Args:
        denoiser: the model.
        specs: the samples; they need not be alike.
        batch_size: samples per forward pass. It does not change the pictures beyond rounding.
        start: (B, C, H, W) to start from instead of noise.
        low_res: (B, C, h, w) in [-1, 1], for an upsampler.
        progress: called with the number of sample-steps just done.

    Returns:
        (B, C, H, W) float32 on the CPU, in about [-1, 1] (for encoding: the latents).

    Raises:
        ValueError: for a spec the model cannot make.
    """
    for spec in specs:
        denoiser.check(spec)
    finished = torch.empty(len(specs), *denoiser.shape)
    for first in range(0, len(specs), batch_size):
        part = slice(first, first + batch_size)
        batch = SampleBatch(
            denoiser,
            specs[part],
            start=None if start is None else start[part],
            low_res=None if low_res is None else low_res[part],
        )
        owner = list(range(len(specs)))[part]
        while owner:
            batch.step()
            progress(len(owner))
            left = batch.steps_left
            for i, index in enumerate(owner):
                if not left[i]:
                    finished[index] = batch.x[i].cpu()
            going = [i for i in range(len(owner)) if left[i]]
            if len(going) < len(owner):
                batch = batch.select(going)
                owner = [owner[i] for i in going]
    return finished
