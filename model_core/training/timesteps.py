"""Which timesteps a training batch sees (Improved DDPM, Section 3.3; used by the paper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class TimestepSampler(Protocol):
    """Draws timesteps and the weights that keep the expected loss unchanged."""

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps (B,) int64 and weights (B,) float32, on the CPU."""
        ...

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Learn from the unweighted losses (B,) at some timesteps (B,)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was learned."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object:
        """Go on from what was learned."""
        ...


class UniformSampler(nn.Module):
    """Every timestep equally likely."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randint(self.steps, (batch,), generator=generator), torch.ones(batch)

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Nothing to learn."""


class FirstTimestep(nn.Module):
    """Timestep 0 only, for classifiers of clean pictures."""

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.zeros(batch, dtype=torch.int64), torch.ones(batch)

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Nothing to learn."""


class LossSecondMomentSampler(nn.Module):
    """Timesteps in proportion to the root mean square of their last ``history`` losses.

    Uniform until every timestep has a full history; ``uniform_share`` of the probability always
    stays uniform. The history is part of the state dict, so it survives a resume.
    """

    losses: Tensor
    counts: Tensor

    def __init__(self, steps: int, history: int = 10, uniform_share: float = 0.001) -> None:
        super().__init__()
        self.uniform_share = uniform_share
        self.register_buffer("losses", torch.zeros(steps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(steps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """Probability of each timestep: (steps,) float64."""
        steps, history = self.losses.shape
        weights = self.losses.square().mean(dim=1).sqrt()
        if bool((self.counts < history).any()) or not weights.any():
            return torch.full((steps,), 1 / steps, dtype=torch.float64)
        return weights / weights.sum() * (1 - self.uniform_share) + self.uniform_share / steps

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        p = self.probabilities()
        timesteps = torch.multinomial(p, batch, replacement=True, generator=generator)
        return timesteps, (1 / (len(p) * p[timesteps])).float()

    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        history = self.losses.shape[1]
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            self.losses[t, self.counts[t] % history] = loss
            self.counts[t] += 1
