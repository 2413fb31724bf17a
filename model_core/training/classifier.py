"""Training of the noisy classifier that guides the samplers (paper, Section 4 and Appendix H)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_core.bundle import Part
from model_core.classifier import Classifier
from model_core.training.config import ClassifierTraining
from model_core.training.data import Batches, ImageFolder, centred, load_folder
from model_core.training.loop import Network, autocast, train
from model_core.training.process import ForwardProcess

QUARTILES = 4
"""Parts of the timesteps for which accuracy is told apart: the first is nearly clean."""


class ClassifierTask:
    """Cross entropy on pictures noised to a uniformly drawn timestep."""

    part: Part = "classifier"

    def __init__(self, config: ClassifierTraining, val: ImageFolder | None) -> None:
        self.config = config
        self.val = val
        self.model: nn.Module = Classifier(config.classifier)
        self.memory: nn.Module = nn.Identity()
        self.process = ForwardProcess(config.diffusion, config.compute.device)

    def noised(self, x: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        """Draw x_t of pictures (B, C, H, W) at timesteps (B,)."""
        return self.process.noised(x, t, torch.randn(x.shape, generator=generator).to(x))

    def loss(
        self, network: Network, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if self.config.noised:
            t = torch.randint(self.config.diffusion.diffusion_steps, t.shape, generator=generator).to(t)
            x = self.noised(x, t, generator)
        logits = network(x, self.process.network_time(t)).float()
        return F.cross_entropy(logits, y), {"top1": hits(logits.detach(), y, 1).mean()}

    @torch.no_grad()
    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Accuracy on the held-out pictures, each noised once to every quartile of the timesteps."""
        if self.val is None:
            return {}
        steps = self.config.diffusion.diffusion_steps
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(self.config.seed)
        found: dict[str, list[Tensor]] = {}
        for x, y in centred(self.val, self.config.data, self.config.classifier.image_size, self.config.batch_size):
            x, y = x.to(device), y.to(device)
            for quartile in range(QUARTILES) if self.config.noised else [0]:
                t = torch.zeros(len(x), dtype=torch.int64, device=device)
                x_t = x
                if self.config.noised:
                    low, high = (steps * (quartile + end) // QUARTILES for end in (0, 1))
                    t = torch.randint(low, high, t.shape, generator=generator).to(t)
                    x_t = self.noised(x, t, generator)
                with autocast(self.config):
                    logits = model(x_t, self.process.network_time(t)).float()
                found.setdefault(f"loss_q{quartile}", []).append(F.cross_entropy(logits, y, reduction="none"))
                for top in (1, 5):
                    found.setdefault(f"top{top}_q{quartile}", []).append(hits(logits, y, top))
        return {name: torch.cat(values).mean().item() for name, values in found.items()}


def hits(logits: Tensor, y: Tensor, top: int) -> Tensor:
    """Whether each label is among the ``top`` largest logits: (B, K), (B,) -> (B,) of 0. and 1."""
    best = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return (best == y[:, None]).any(dim=1).float()


def train_classifier(config: ClassifierTraining) -> bool:
    """Train, or go on training, a classifier; whether it is complete.

    Raises:
        ValueError: if the data does not have as many classes as the classifier.
    """
    folder = load_folder(config.data.train)
    if len(folder.classes) != config.classifier.num_classes:
        raise ValueError(
            f"classifier.out_channels: {config.classifier.num_classes} classes, but "
            f"{config.data.train} has {len(folder.classes)}: {', '.join(folder.classes)}"
        )
    val = load_folder(config.data.val, folder.classes) if config.data.val else None
    batches = Batches(folder, config.data, config.classifier.image_size, config.batch_size, config.seed)
    return train(config, ClassifierTask(config, val), batches)
