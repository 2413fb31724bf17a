"""What training needs of the diffusion process: noised pictures, the objective and previews."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model_core.config import DiffusionConfig
from model_core.losses import Losses, q_sample, training_losses
from model_core.samplers import CoefficientBank, ddim_step, predict
from model_core.schedule import respaced_timesteps

Network = Callable[[Tensor, Tensor], Tensor]
"""From (x_t, timesteps as the network is shown them) to the network's output."""


class ForwardProcess:
    """q(x_t given x_0) and the objective, for one configuration on one device."""

    def __init__(self, config: DiffusionConfig, device: str = "cpu") -> None:
        self.config = config
        self.steps = config.diffusion_steps
        self.bank = CoefficientBank(config, device)
        self.bank.offset("")  # row i of the bank is timestep i

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of pictures x_0 (B, C, H, W) at timesteps (B,) with standard normal noise (DDPM, equation 4)."""
        return q_sample(self.bank.gather(t).per_pixel(), x, noise)

    def network_time(self, t: Tensor) -> Tensor:
        """The timesteps as the network is shown them."""
        return self.bank.gather(t).model_t

    def losses(self, network: Network, x: Tensor, t: Tensor, noise: Tensor) -> Losses:
        """The objective at timesteps (B,), in float32 whatever the network computes in."""

        def output(x_t: Tensor, time: Tensor) -> Tensor:
            return network(x_t, time).float()

        return training_losses(self.bank, output, x, t, noise)

    @torch.no_grad()
    def preview(self, network: Network, x: Tensor, steps: int) -> Tensor:
        """Deterministic DDIM samples from noise x_T (B, C, H, W) in evenly strided steps (paper, Section 4.2)."""
        stride = max(self.steps // steps, 1)
        respacing = f"ddim{len(range(0, self.steps, stride))}"
        offset = self.bank.offset(respacing)
        clip = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for position in reversed(range(len(respaced_timesteps(self.steps, respacing)))):
            row = self.bank.gather(torch.full((len(x),), offset + position, device=x.device))
            p = predict(self.config, row.per_pixel(), x, network(x, row.model_t).float(), clip)
            x = ddim_step(row.per_pixel(), x, p, None, torch.zeros_like(x), torch.zeros_like(row.model_t)).x
        return x
