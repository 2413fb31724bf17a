"""Guard of the numerics: what serves is compared with the model's own float32 networks on fixed inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_core.bundle import Bundle, atomic
from model_core.compilation import AccelerationError, source_hash
from model_core.denoiser import Denoiser, Functions
from model_core.noise import noise_keys, normal
from model_core.schedule import step_table
from model_core.weights import load

LIMITS = {"predict": 0.06, "gradient": 0.25}
"""Largest relative error (root mean square) against float32 that is accepted of half precision."""
FLOAT32_LIMIT = 1e-3
"""The same for float32 code."""


@dataclass(frozen=True)
class Probe:
    """Fixed inputs: noise at three timesteps of the process."""

    x_t: Tensor
    model_t: Tensor
    label: Tensor
    low_res: Tensor | None

    @classmethod
    def of(cls, denoiser: Denoiser) -> Probe:
        """For a model, on its device."""
        device, config = denoiser.device, denoiser.diffusion
        keys, zero = noise_keys([1, 2, 3], [0, 0, 0], device), torch.zeros(3, dtype=torch.int64, device=device)
        shown = step_table(config).model_t[[config.diffusion_steps * part // 8 for part in (1, 4, 7)]]
        small = denoiser.low_res_shape
        return cls(
            x_t=normal(keys, zero, denoiser.shape),
            model_t=torch.tensor(shown, dtype=torch.float32, device=device),
            label=torch.arange(3, device=device) % (denoiser.num_classes or 1),
            low_res=None if small is None else normal(keys, zero + 1, small).clamp(-1, 1),
        )


@torch.no_grad()
def answers(denoiser: Denoiser, functions: Functions) -> dict[str, Tensor]:
    """What functions make of the fixed inputs, on the CPU."""
    probe = Probe.of(denoiser)
    found = {"predict": functions.predict(probe.x_t, probe.model_t, denoiser.shown(probe.label), probe.low_res)}
    if denoiser.classifier is not None:
        found["gradient"] = functions.gradient(probe.x_t, probe.model_t, probe.label)
    return {name: answer.float().cpu().contiguous() for name, answer in found.items()}


def reference(bundle: Bundle, device: torch.device, cache: Path) -> dict[str, Tensor]:
    """What the model's own float32 networks make of the fixed inputs; computed once per weights.

    Args:
        bundle: the model.
        device: where to compute it; memory for the weights in float32 is needed for a moment.
        cache: folder of earlier answers.
    """
    weights = ",".join(bundle.digest(part) for part in bundle.parts)
    networks = bundle.config.model_dump_json(include={"unet", "classifier", "diffusion"})
    key = hashlib.sha256(f"{weights} {networks} {source_hash()}".encode()).hexdigest()[:32]
    path = cache / f"{key}.safetensors"
    with suppress(SafetensorError, OSError):  # not there, or damaged: computed anew
        return load_file(path)
    denoiser = load(bundle, device, torch.float32)
    found = answers(denoiser, denoiser.functions)
    with suppress(SafetensorError, OSError):  # no room: computed anew next time
        cache.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            save_file(found, temporary)
    return found


def errors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of each answer: root mean square of the difference over that of what is expected."""
    tiny = torch.finfo(torch.float32).tiny
    return {
        name: ((actual[name] - value).norm() / value.norm().clamp(min=tiny)).item() for name, value in expected.items()
    }


def check(denoiser: Denoiser, functions: Functions, expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Compare functions with the float32 reference.

    Raises:
        AccelerationError: if an error is beyond its limit, or not a number.
    """
    found = errors(answers(denoiser, functions), expected)
    half = denoiser.unet.torso_dtype != torch.float32
    for name, error in found.items():
        limit = LIMITS[name] if half else FLOAT32_LIMIT
        if not error <= limit:
            raise AccelerationError(f"{name}: differs from float32 by {error:.2%}; accepted are {limit:.2%}")
    return found
