"""Training of the diffusion model (paper, Section 2) and of upsamplers (Section 2.1 and Appendix)."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_core.bundle import Part
from model_core.config import UpsamplerConfig
from model_core.pictures import grid, to_pixels
from model_core.training.config import DiffusionTraining, UpsamplerTraining
from model_core.training.data import centred
from model_core.training.process import ForwardProcess
from model_core.training.sources import Source
from model_core.training.task import Draw, Judgement, Network, autocast
from model_core.training.timesteps import LossSecondMomentSampler, TimestepSampler, UniformSampler
from model_core.unet import build_unet

SAMPLERS: dict[str, type[UniformSampler] | type[LossSecondMomentSampler]] = {
    "uniform": UniformSampler,
    "loss_second_moment": LossSecondMomentSampler,
}


class DiffusionTask:
    """The configured objective at timesteps drawn by the configured sampler.

    Args:
        config: of a diffusion model or an upsampler.
        val: pictures that an upsampler's grids enlarge; a diffusion model needs none.
    """

    part: Part = "unet"

    def __init__(self, config: DiffusionTraining | UpsamplerTraining, val: Source | None = None) -> None:
        self.config, self.val = config, val
        self.model: nn.Module = build_unet(config.unet)
        self.process = ForwardProcess(config.diffusion, config.compute.device)
        self.sampler: TimestepSampler = SAMPLERS[config.timestep_sampler](self.process.steps)

    def low_res(self, x: Tensor) -> Tensor | None:
        """What an upsampler is shown of pictures (B, C, H, W): their means over areas, (B, C, h, w)."""
        unet = self.config.unet
        return F.interpolate(x, unet.low_res_size, mode="area") if isinstance(unet, UpsamplerConfig) else None

    def _network(self, network: Network, y: Tensor, low_res: Tensor | None) -> Network:
        labels = y if self.config.unet.num_classes is not None else None
        more = {} if low_res is None else {"low_res": low_res}
        return lambda x_t, time: network(x_t, time, labels, **more)

    def losses(self, network: Network, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        network = self._network(network, draw.y, self.low_res(draw.x))
        found = self.process.losses(network, draw.x, draw.t, draw.noise)
        terms = {"mse": found.mse, "vb": found.vb}
        return found.loss, {name: term.detach() for name, term in terms.items() if term is not None}

    def _share(self) -> int:
        """Pictures a pass of a training step holds: what there is memory for."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        return max(1, self.config.batch_size // processes // self.config.compute.microbatches)

    def evaluate(self, model: nn.Module) -> Judgement:
        """A grid of samples, always from the same noise: a row per class, or of enlarged pictures."""
        unet, sample = self.config.unet, self.config.sample
        device = next(model.parameters()).device
        columns, low_res = sample.per_class, None
        if isinstance(unet, UpsamplerConfig):
            if self.val is None:
                return Judgement()
            batch = next(centred(self.val, self.config.data, unet.image_size, columns))
            y, low_res = batch.y.to(device), self.low_res(batch.x.to(device))
            columns = len(y)
        else:
            y = torch.arange(unet.num_classes or 1, device=device).repeat_interleave(columns)
        generator = torch.Generator().manual_seed(self.config.seed)
        x = torch.randn((len(y), unet.in_channels, unet.image_size, unet.image_size), generator=generator).to(device)
        if self.config.compute.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        parts, size = [], self._share()
        for at in range(0, len(y), size):
            part = slice(at, at + size)
            given = None if low_res is None else low_res[part]
            with autocast(self.config):
                parts.append(self.process.preview(self._network(model, y[part], given), x[part], sample.steps))
        samples = torch.cat(parts)
        if low_res is not None:
            samples = torch.cat([F.interpolate(low_res, unet.image_size, mode="bilinear"), samples])
        return Judgement(picture=grid(to_pixels(samples), columns, gap=2, zoom=2, background="#d0d0d0"))
