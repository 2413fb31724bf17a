"""Images per second of ``guided train`` over a plain PyTorch loop: same network, batch and objective, in one run.

python benchmarks/training.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from model_core.losses import training_losses
from model_core.pictures import from_pixels
from model_core.samplers import CoefficientBank
from model_core.training.config import DiffusionTraining, load_config
from model_core.training.data import Batches, loader
from model_core.training.diffusion import DiffusionTask
from model_core.training.loop import Trainer
from model_core.training.parallel import Processes
from model_core.training.sources import ImageFolder
from model_core.unet import UNet

CONFIG = Path(__file__).parent.parent / "examples" / "emoji" / "diffusion.toml"
Step = Callable[[], None]


class Plain(Dataset[tuple[torch.Tensor, int]]):
    """Pictures resized as anyone would."""

    def __init__(self, folder: ImageFolder, size: int) -> None:
        self.folder, self.size = folder, size

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.folder.read(index)
        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC))
        return from_pixels(pixels[None])[0], label


def endless(data: DataLoader[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from data


def plain(config: DiffusionTraining, folder: ImageFolder) -> Step:
    """A step of the loop one would write first: float32, eager, an average kept parameter by parameter."""
    model = UNet(config.unet)
    averages = [{n: p.detach().clone() for n, p in model.named_parameters()} for _ in config.ema]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, weight_decay=0.0)
    bank = CoefficientBank(config.diffusion)
    data = DataLoader(
        Plain(folder, config.unet.image_size), config.batch_size, shuffle=True, num_workers=1, drop_last=True
    )
    batches = endless(data)

    def step() -> None:
        x, y = next(batches)
        t = torch.randint(config.diffusion.diffusion_steps, (len(x),))
        loss = training_losses(bank, lambda x_t, time: model(x_t, time, y), x, t, torch.randn_like(x)).loss.mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip or 1.0)
        optimizer.step()
        with torch.no_grad():
            for decay, average in zip(config.ema, averages, strict=True):
                for name, parameter in model.named_parameters():
                    average[name].mul_(decay).add_(parameter, alpha=1 - decay)
        loss.item()

    return step


def ours(config: DiffusionTraining, folder: ImageFolder, **compute: Any) -> Step:
    """A step of ``guided train``."""
    config = config.model_copy(update={"compute": config.compute.model_copy(update=compute)})
    batches = Batches(folder, config.data, config.unet.image_size, config.batch_size, config.seed)
    trainer = Trainer(config, DiffusionTask(config), batches, Processes(0, 1, torch.device("cpu")))
    source = loader(batches, 0, config.steps)

    def step() -> None:
        trainer.step(next(source))

    return step


def rate(step: Step, steps: int, images: int) -> float:
    """Images per second of some steps."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return steps * images / (time.perf_counter() - began)


def main(
    steps: Annotated[int, typer.Option(help="Steps per round.")] = 12,
    rounds: Annotated[int, typer.Option(help="Alternating rounds.")] = 5,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 16,
) -> None:
    """Print images/s and ratios over the plain loop."""
    with tempfile.TemporaryDirectory() as temporary:
        rng = np.random.default_rng(0)
        place = Path(temporary)
        for label in range(11):
            (place / f"{label:02d}").mkdir()
            for index in range(20):
                pixels = rng.integers(0, 255, (80, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{label:02d}" / f"{index}.png")
        overrides = [f"data.train={place}", f"batch_size={batch}", "compute.precision=fp32", "steps=100000"]
        config, folder = load_config(DiffusionTraining, CONFIG, overrides), ImageFolder(place)
        loops = {
            "plain loop, float32": plain(config, folder),
            "guided train, float32": ours(config, folder),
            "guided train, bfloat16": ours(config, folder, precision="bf16"),
            "guided train, bfloat16, compiled": ours(config, folder, precision="bf16", compile=True),
        }
        rates: dict[str, list[float]] = {name: [] for name in loops}
        for step in loops.values():
            rate(step, 3, batch)  # warm up, compile
        for _ in range(rounds):
            for name, step in loops.items():
                rates[name].append(rate(step, steps, batch))
    base = rates["plain loop, float32"]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {batch}, {rounds} rounds of {steps} steps"
    )
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        print(f"{name:34} {statistics.median(found):6.1f} images/s   {ratio:.2f}x")


if __name__ == "__main__":
    typer.run(main)
