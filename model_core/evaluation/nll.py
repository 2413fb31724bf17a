"""Bits per dimension of pictures under a model: the variational bound (Improved DDPM, Section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model_core.bundle import Bundle
from model_core.config import UpsamplerConfig
from model_core.denoiser import Denoiser
from model_core.losses import variational_bound
from model_core.noise import noise_keys, normal
from model_core.pictures import from_pixels
from model_core.training.data import view
from model_core.training.sources import SUFFIXES, BadPictureError, decode
from model_core.weights import load


@dataclass(frozen=True)
class Likelihood:
    """Means over pictures, in bits per dimension; lower is better."""

    pictures: int
    bits_per_dim: float
    standard_error: float
    prior: float
    """Share of the bound that the end of the noising process costs."""
    decoder: float
    """Share of the last step, which decides the pixels."""
    skipped: tuple[str, ...]
    """Pictures that could not be read."""


def evaluate(
    bundle: Bundle,
    folder: Path,
    *,
    num: int | None = None,
    batch_size: int = 16,
    respacing: str = "",
    seed: int = 0,
    device: str = "cpu",
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Likelihood:
    """Measure the bound of a folder's pictures.

    Args:
        bundle: a diffusion model.
        folder: of pictures; of class folders for a class-conditional model, named like its classes, or by their
            indices where it has no names.
        num: pictures to measure, spread evenly over the folder; default: all.
        batch_size: pictures at once.
        respacing: of the process measured; default: every step.
        seed: of the noise; each picture has its own, whatever the batches.
        device: where to compute.
        on_batch: told of (pictures done, pictures in all).

    Raises:
        ValueError: for an upsampler, an unknown class folder, or no readable picture.
    """
    config = bundle.config
    if isinstance(config.unet, UpsamplerConfig):
        raise ValueError(f"{bundle.name}: an upsampler has no likelihood of pictures alone")
    count = config.unet.num_classes
    files = _files(folder, None if count is None else config.class_names or tuple(map(str, range(count))))
    if num is not None and num < len(files):
        files = [files[i * len(files) // num] for i in range(num)]
    denoiser = load(bundle, device)
    totals: list[Tensor] = []
    priors: list[Tensor] = []
    decoders: list[Tensor] = []
    skipped: list[str] = []
    for x, labels, first in _batches(files, config.unet.image_size, batch_size, skipped):
        bound = variational_bound(
            denoiser.bank,
            _bound_model(denoiser, torch.tensor(labels, device=device)),
            x.to(device),
            _noise(x.to(device), seed + first),
            respacing,
        )
        totals.append(bound.total_bpd)
        priors.append(bound.prior_bpd)
        decoders.append(bound.vb[:, -1])
        on_batch(sum(map(len, totals)), len(files))
    if not totals:
        raise ValueError(f"{folder}: no readable picture")
    total = torch.cat(totals).double()
    error = total.std().item() / math.sqrt(len(total)) if len(total) > 1 else math.nan
    return Likelihood(
        pictures=len(total),
        bits_per_dim=total.mean().item(),
        standard_error=error,
        prior=torch.cat(priors).mean().item(),
        decoder=torch.cat(decoders).mean().item(),
        skipped=tuple(skipped),
    )


def _files(folder: Path, classes: tuple[str, ...] | None) -> list[tuple[Path, int]]:
    """Pictures with their classes; 0 where the model is not shown any."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if classes is None:
        return [(file, 0) for file in sorted(folder.glob("**/*")) if file.suffix.lower() in SUFFIXES]
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if unknown := sorted(set(found) - set(classes)):
        raise ValueError(f"{folder}: {', '.join(unknown)}: not among the model's classes ({', '.join(classes)})")
    return [
        (file, classes.index(name))
        for name in found
        for file in sorted((folder / name).glob("**/*"))
        if file.suffix.lower() in SUFFIXES
    ]


def _batches(
    files: list[tuple[Path, int]], size: int, batch_size: int, skipped: list[str]
) -> Iterator[tuple[Tensor, list[int], int]]:
    """Pictures (B, 3, H, W), their classes, and the number of the first."""
    for first in range(0, len(files), batch_size):
        views, labels = [], []
        for file, label in files[first : first + batch_size]:
            try:
                image = decode(file, str(file))
            except BadPictureError as error:
                skipped.append(str(error))
                continue
            views.append(view(image, size, side=1.0, left=0.5, top=0.5, flip=False))
            labels.append(label)
        if views:
            yield from_pixels(np.stack(views)), labels, first


def _bound_model(denoiser: Denoiser, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    y = denoiser.shown(labels)
    return lambda x_t, t: denoiser.unet(x_t, t, y)


def _noise(x: Tensor, seed: int) -> Callable[[int], Tensor]:
    keys = noise_keys([seed + i for i in range(len(x))], [0] * len(x), x.device)
    return lambda k: normal(keys, torch.full((len(x),), k, dtype=torch.int32, device=x.device), x.shape[1:])
