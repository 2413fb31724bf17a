"""What fewer passes cost and change: options of a request against 25 guided DDIM steps, in one run.

python -m benchmarks.passes
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from model_core.acceleration import Accelerator
from model_core.bundle import Store
from model_core.denoiser import Denoiser, SampleSpec
from model_core.hardware import choose_device, choose_dtype, keep_memory
from model_core.samplers import Sampler
from model_core.sampling import sample

BASE = SampleSpec(respacing="ddim25", sampler=Sampler.DDIM, guidance_scale=4.0)
OPTIONS: dict[str, SampleSpec] = {
    "ddim, 25 steps": BASE,
    "not guided": replace(BASE, guidance_scale=0.0),
    "guidance_every 2": replace(BASE, guidance_every=2),
    "guidance_every 3": replace(BASE, guidance_every=3),
    "guidance_interval [0, 600]": replace(BASE, guidance_interval=(0, 600)),
    "guidance_interval [400, 999]": replace(BASE, guidance_interval=(400, 999)),
    "ddim, 10 steps": replace(BASE, respacing="ddim10"),
    "ddim, 15 steps": replace(BASE, respacing="stride15"),
    "ddim, quad10": replace(BASE, respacing="quad10"),
    "ddim, quad15": replace(BASE, respacing="quad15"),
    "dpmpp_2m, 10 steps": replace(BASE, respacing="quad10", sampler=Sampler.DPMPP_2M),
    "dpmpp_2m, 15 steps": replace(BASE, respacing="quad15", sampler=Sampler.DPMPP_2M),
    "dpmpp_2m, 15 steps, guidance_every 2": replace(
        BASE, respacing="quad15", sampler=Sampler.DPMPP_2M, guidance_every=2
    ),
}


def make(denoiser: Denoiser, spec: SampleSpec, count: int) -> tuple[Tensor, float]:
    """Pictures of all classes, and the seconds they took."""
    classes = denoiser.num_classes or 1
    began = time.perf_counter()
    x = sample(denoiser, [replace(spec, seed=i, label=i % classes) for i in range(count)], batch_size=8)
    return x.clamp(-1, 1), time.perf_counter() - began


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over pictures, in dB."""
    mse = ((x - y) / 2).square().flatten(1).mean(1).clamp(min=1e-10)
    return float((-10 * mse.log10()).mean())


@torch.no_grad()
def confidence(denoiser: Denoiser, x: Tensor) -> float:
    """Mean probability the model's own classifier gives the wanted class."""
    assert denoiser.classifier is not None
    label = torch.arange(len(x)) % (denoiser.num_classes or 1)
    logits = denoiser.classifier(x.to(denoiser.device), torch.zeros(len(x), device=denoiser.device)).cpu()
    return float(F.softmax(logits, dim=-1).gather(1, label[:, None]).mean())


def main(
    model: str = "emoji32",
    count: Annotated[int, typer.Option(help="Pictures per option.")] = 22,
    rounds: Annotated[int, typer.Option(help="Alternating rounds; times are medians.")] = 3,
    cache: Annotated[Path, typer.Option(help="Folder of compiled code.")] = Path(".guided/acceleration"),
    models_dir: Path = Path("models"),
) -> None:
    """Measure time, distance from many steps, and the classifier's confidence."""
    keep_memory()
    device = choose_device("auto")
    served = Accelerator(device, choose_dtype("auto", device), cache).load(Store(models_dir).find(model))
    print(f"{model}, {served.dtype}, {'compiled' if served.compiled else 'eager'}, {count} pictures in batches of 8\n")
    far, _ = make(served.denoiser, replace(BASE, respacing="ddim250"), count)
    times: dict[str, list[float]] = {name: [] for name in OPTIONS}
    pictures = {}
    for _ in range(rounds):
        for name, spec in OPTIONS.items():
            pictures[name], seconds = make(served.denoiser, spec, count)
            times[name].append(seconds)
    first = next(iter(OPTIONS))
    print("| option | time | PSNR to it, dB | PSNR to 250 steps, dB | p(class) |\n| --- | --- | --- | --- | --- |")
    for name, x in pictures.items():
        ratio = statistics.median(ours / base for ours, base in zip(times[name], times[first], strict=True))
        near = "" if name == first else f"{psnr(x, pictures[first]):.1f}"
        print(f"| {name} | {ratio:.2f} | {near} | {psnr(x, far):.1f} | {confidence(served.denoiser, x):.2f} |")


if __name__ == "__main__":
    typer.run(main)
