"""Random numbers that belong to a sample, not to a batch.

A sample with seed ``s`` draws its noise from a counter-based generator (Threefry 2x32, 20 rounds:
Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). Draw ``k`` is a function of
(s, stage, k) alone: no state to keep while a sample is parked, no Python loop over samples, the
same numbers on every device and in every batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model_core.seeds import MAX_SEED

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def _rotate(x: Tensor, bits: int) -> Tensor:
    """Rotate 32-bit words, held as int32, to the left."""
    return (x << bits) | ((x >> (32 - bits)) & ((1 << bits) - 1))


def threefry2x32(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Threefry-2x32-20 on int32 tensors (two's complement words) that broadcast together."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    x0, x1 = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = _rotate(x1, bits) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + (group + 1)
    return x0, x1


def _word(value: int) -> int:
    """The low 32 bits of ``value`` as a signed number."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def noise_keys(seeds: Sequence[int], stages: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Keys of the samples' random streams: (B, 2) int32.

    Args:
        seeds: the samples' seeds, 0 to ``MAX_SEED``.
        stages: 0 for the base model, 1 for an upsampler after it.
        device: where the keys go.

    Raises:
        ValueError: for a seed out of range.
    """
    for seed in seeds:
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed: {seed} is not between 0 and {MAX_SEED}")

    def words(values: Sequence[int]) -> Tensor:
        return torch.tensor([_word(v) for v in values], dtype=torch.int32)

    key = (words(seeds), words([seed >> 32 for seed in seeds]))
    counter = (torch.zeros(len(seeds), dtype=torch.int32), words(stages))
    return torch.stack(threefry2x32(key, counter), dim=1).to(device)


def normal(keys: Tensor, draw: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise: keys (B, 2) and draw numbers (B,) int -> (B, *shape) float32.

    Draw 0 is x_T; draw k belongs to a sample's k-th step. Pairs of words become pairs of normals
    by the Box-Muller transform.
    """
    size = math.prod(shape)
    pairs = torch.arange((size + 1) // 2, dtype=torch.int32, device=keys.device)
    a, b = threefry2x32((keys[:, :1], keys[:, 1:]), (draw.to(torch.int32)[:, None], pairs[None]))
    # 24 random bits each: u in (0, 1], so that its logarithm is finite, and an angle in [0, 2 pi).
    u = (((a >> 8) & 0xFFFFFF) + 1).float() * 2.0**-24
    angle = ((b >> 8) & 0xFFFFFF).float() * (2.0**-24 * 2 * math.pi)
    radius = (-2 * u.log()).sqrt()
    flat = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :size]
    return flat.reshape(-1, *shape)
