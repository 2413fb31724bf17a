"""What the engine costs: its throughput over that of a bare sampling loop, at the same width, in one run.

python benchmarks/overhead.py
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from model_core.batch import SampleBatch
from model_core.bundle import Store
from model_core.denoiser import Denoiser, SampleSpec
from model_core.hardware import choose_dtype
from model_core.samplers import Sampler
from model_core.weights import load
from worker.engine import Engine, Request, stage_of

STEPS = 25


def specs(width: int) -> list[SampleSpec]:
    """Guided samples, half of them DDPM, half DDIM."""
    return [
        SampleSpec(seed=i, respacing=f"ddim{STEPS}", sampler=Sampler(i % 2), guidance_scale=4.0, label=i % 10)
        for i in range(width)
    ]


def bare(denoiser: Denoiser, width: int) -> float:
    """Seconds of the bare loop."""
    began = time.perf_counter()
    batch = SampleBatch(denoiser, specs(width))
    for _ in range(STEPS):
        batch.step()
    batch.x.cpu()
    return time.perf_counter() - began


def engine(denoiser: Denoiser, width: int) -> float:
    """Seconds of the engine for the same samples, each a request of its own."""
    began = time.perf_counter()
    engine = Engine(lambda event: None)
    engine.add_lane("model", denoiser, width)
    for number, spec in enumerate(specs(width)):
        engine.submit(Request(str(number), [(stage_of("model", spec, denoiser),)]))
    while engine.step():
        pass
    return time.perf_counter() - began


def main(
    model: str = "emoji32",
    models_dir: Path = Path("models"),
    widths: Annotated[str, typer.Option(help="Batch widths.")] = "1,4,16",
    pairs: Annotated[int, typer.Option(help="Alternating pairs of runs.")] = 9,
) -> None:
    """Measure it: the median of the ratios of runs made next to each other."""
    dtype = choose_dtype("auto", torch.device("cpu"))
    denoiser = load(Store(models_dir).find(model), "cpu", dtype)
    for width in map(int, widths.split(",")):
        bare(denoiser, width), engine(denoiser, width)  # warm
        ratios = []
        for pair in range(pairs):
            # Who goes first alternates, so that a drifting clock speed favours neither.
            times = {run: run(denoiser, width) for run in ((bare, engine) if pair % 2 else (engine, bare))}
            ratios.append(times[bare] / times[engine])
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"width {width:2}: engine / bare loop {statistics.median(ratios):.3f} ({spread}), goal 0.97", flush=True)


if __name__ == "__main__":
    typer.run(main)
