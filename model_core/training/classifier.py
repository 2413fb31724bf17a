"""Training of the noisy classifier that guides the samplers (paper, Section 4 and Appendix H)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_core.bundle import Part
from model_core.classifier import Classifier
from model_core.training.config import ClassifierTraining
from model_core.training.data import centred
from model_core.training.process import ForwardProcess
from model_core.training.sources import Source
from model_core.training.task import Draw, Judgement, Network, autocast
from model_core.training.timesteps import FirstTimestep, TimestepSampler, UniformSampler

QUARTILES = 4
"""Parts of the timesteps for which accuracy is told apart: the first is nearly clean."""


class ClassifierTask:
    """Cross entropy on pictures noised to a uniformly drawn timestep.

    Args:
        config: of the run.
        val: held-out pictures.
    """

    part: Part = "classifier"

    def __init__(self, config: ClassifierTraining, val: Source | None = None) -> None:
        self.config, self.val = config, val
        self.model: nn.Module = Classifier(config.classifier)
        self.process = ForwardProcess(config.diffusion, config.compute.device)
        self.sampler: TimestepSampler = UniformSampler(self.process.steps) if config.noised else FirstTimestep()

    def _seen(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the classifier sees of pictures (B, C, H, W) at timesteps (B,)."""
        return self.process.noised(x, t, noise) if self.config.noised else x

    def losses(self, network: Network, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        logits = network(self._seen(draw.x, draw.t, draw.noise), self.process.network_time(draw.t)).float()
        return F.cross_entropy(logits, draw.y, reduction="none"), {"top1": hits(logits.detach(), draw.y, 1)}

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Judgement:
        """Accuracy on the held-out pictures, each noised once to every quartile of the timesteps."""
        if self.val is None:
            return Judgement()
        steps = self.config.diffusion.diffusion_steps
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(self.config.seed)
        found: dict[str, list[Tensor]] = {}
        for batch in centred(self.val, self.config.data, self.config.classifier.image_size, self.config.batch_size):
            x, y = batch.x.to(device), batch.y.to(device)
            for quartile in range(QUARTILES) if self.config.noised else [0]:
                t = torch.zeros(len(x), dtype=torch.int64, device=device)
                if self.config.noised:
                    low, high = (steps * (quartile + end) // QUARTILES for end in (0, 1))
                    t = torch.randint(low, high, t.shape, generator=generator).to(t)
                noise = torch.randn(x.shape, generator=generator).to(x)
                with autocast(self.config):
                    logits = model(self._seen(x, t, noise), self.process.network_time(t)).float()
                found.setdefault(f"loss_q{quartile}", []).append(F.cross_entropy(logits, y, reduction="none"))
                for top in (1, 5):
                    found.setdefault(f"top{top}_q{quartile}", []).append(hits(logits, y, top))
        return Judgement({name: torch.cat(values).mean().item() for name, values in found.items()})


def hits(logits: Tensor, y: Tensor, top: int) -> Tensor:
    """Whether each label is among the ``top`` largest logits: (B, K), (B,) -> (B,) of 0. and 1."""
    best = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return (best == y[:, None]).any(dim=1).float()
