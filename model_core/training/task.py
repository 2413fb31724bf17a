"""What the loop needs of the things it trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from model_core.bundle import Part
from model_core.training.config import TrainingConfig
from model_core.training.timesteps import TimestepSampler

Network = Callable[..., Tensor]
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Draw:
    """A batch of pictures and everything random about a step of it."""

    x: Tensor
    """x_0: (B, C, H, W) in [-1, 1]."""
    y: Tensor
    """Labels (B,)."""
    t: Tensor
    """Timesteps (B,)."""
    weights: Tensor
    """Importance weights of the timesteps (B,)."""
    noise: Tensor
    """Standard normal, as x."""

    def split(self, parts: int) -> list[Draw]:
        """Equal parts, in order."""
        fields = (self.x, self.y, self.t, self.weights, self.noise)
        return [Draw(*part) for part in zip(*(tensor.chunk(parts) for tensor in fields), strict=True)]


@dataclass(frozen=True)
class Judgement:
    """What looking at the model found."""

    values: dict[str, float] = field(default_factory=dict)
    picture: Image.Image | None = None


class Task(Protocol):
    """What the loop trains."""

    part: Part
    """What the network is in a bundle."""

    @property
    def model(self) -> nn.Module:
        """The network."""
        ...

    @property
    def sampler(self) -> TimestepSampler:
        """Which timesteps a batch sees."""
        ...

    def losses(self, network: Network, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (B,) and other values (B,) to log; ``network`` is the model, compiled or shared perhaps."""
        ...

    def evaluate(self, model: nn.Module) -> Judgement:
        """Look at the model, which has its average's weights if there is one."""
        ...


def autocast(config: TrainingConfig) -> AbstractContextManager[Any]:
    """The precision of the forward pass."""
    device, precision = torch.device(config.compute.device).type, config.compute.precision
    return torch.autocast(device, dtype=PRECISIONS[precision], enabled=precision != "fp32")
