"""Training of the diffusion model (paper, Section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_core.bundle import Part
from model_core.training.config import DiffusionTraining
from model_core.training.data import Batches, load_folder
from model_core.training.loop import Network, autocast, train
from model_core.training.pictures import save_grid
from model_core.training.process import ForwardProcess
from model_core.training.timesteps import LossSecondMomentSampler, TimestepSampler, UniformSampler
from model_core.unet import UNet


class DiffusionTask:
    """The configured objective at timesteps drawn by the configured sampler."""

    part: Part = "unet"

    def __init__(self, config: DiffusionTraining) -> None:
        self.config = config
        self.model: nn.Module = UNet(config.unet)
        self.process = ForwardProcess(config.diffusion, config.compute.device)
        samplers = {"uniform": UniformSampler, "loss_second_moment": LossSecondMomentSampler}
        self.memory: nn.Module = samplers[config.timestep_sampler](self.process.steps)

    def loss(
        self, network: Network, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sampler: TimestepSampler = self.memory  # type: ignore[assignment]  # a module that is also a sampler
        t, weights = sampler.sample(len(x), generator)
        noise = torch.randn(x.shape, generator=generator).to(x)
        labels = y if self.config.unet.num_classes is not None else None
        losses = self.process.losses(lambda x_t, time: network(x_t, time, labels), x, t.to(x.device), noise)
        sampler.update(t, losses.loss.detach().cpu())
        terms = {"mse": losses.mse, "vb": losses.vb}
        details = {name: term.detach().mean() for name, term in terms.items() if term is not None}
        return (losses.loss * weights.to(x)).mean(), details

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Draw a grid of samples, always from the same noise: a row per class."""
        unet, sample = self.config.unet, self.config.sample
        device = next(model.parameters()).device
        y = torch.arange(unet.num_classes or 1, device=device).repeat_interleave(sample.per_class)
        labels = y if unet.num_classes is not None else None
        generator = torch.Generator().manual_seed(self.config.seed)
        shape = (len(y), unet.in_channels, unet.image_size, unet.image_size)
        x = torch.randn(shape, generator=generator).to(device)
        if self.config.compute.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with autocast(self.config):
            samples = self.process.preview(lambda x_t, time: model(x_t, time, labels), x, sample.steps)
        save_grid(samples, sample.per_class, self.config.run_dir / "samples" / f"{step:08d}.png")
        return {}


def train_diffusion(config: DiffusionTraining) -> bool:
    """Train, or go on training, a diffusion model; whether it is complete.

    Raises:
        ValueError: if the data does not have as many classes as the network.
    """
    folder = load_folder(config.data.train)
    if config.unet.num_classes not in (None, len(folder.classes)):
        raise ValueError(
            f"unet.num_classes: {config.unet.num_classes} classes, but "
            f"{config.data.train} has {len(folder.classes)}: {', '.join(folder.classes)}"
        )
    batches = Batches(folder, config.data, config.unet.image_size, config.batch_size, config.seed)
    return train(config, DiffusionTask(config), batches)
