"""The shipped model through HTTP against a plain loop, alternating in one run.

guided up &
python -m benchmarks.served http://127.0.0.1:8000
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.model import as_published
from clients.client import Client
from model_core.bundle import Store
from model_core.denoiser import Denoiser, SampleSpec
from model_core.samplers import Sampler
from model_core.sampling import sample
from model_core.weights import load

OPTIONS: dict[str, Any] = {"respacing": "ddim25", "sampler": "ddim", "guidance_scale": 4.0}
"""Of every request."""


def loop(denoiser: Denoiser, pictures: int) -> float:
    """Pictures per second of eager float32 networks, one picture at a time."""
    began = time.perf_counter()
    for seed in range(pictures):
        spec = SampleSpec(seed, respacing="ddim25", sampler=Sampler.DDIM, guidance_scale=4.0, label=seed % 10)
        with as_published():
            sample(denoiser, [spec])
    return pictures / (time.perf_counter() - began)


def unloaded(client: Client, model: str, requests: int) -> list[float]:
    """Seconds of single requests, one after the other, from POST to the picture's bytes."""
    times = []
    for seed in range(requests):
        began = time.perf_counter()
        job = client.wait(client.generate(model=model, class_label=seed % 10, **OPTIONS))
        client.image(job)
        times.append(time.perf_counter() - began)
    return times


def saturated(client: Client, model: str, pictures: int) -> float:
    """Pictures per second of a backlog."""
    began = time.perf_counter()
    labels = [i % 10 for i in range(pictures)]
    client.wait(client.generate(model=model, class_label=labels, num_images=pictures, **OPTIONS))
    return pictures / (time.perf_counter() - began)


def main(
    url: Annotated[str, typer.Argument(help="A server nobody else uses, on this machine.")] = "http://127.0.0.1:8000",
    model: str = "emoji32",
    rounds: Annotated[int, typer.Option(help="Alternating rounds; medians are printed.")] = 5,
    models_dir: Path = Path("models"),
) -> None:
    """Measure latency when nothing else runs, and throughput over that of the loop."""
    denoiser = load(Store(models_dir).find(model), "cpu", torch.float32)
    ratios, rates, times = [], [], []
    with Client(url) as client:
        unloaded(client, model, 3), saturated(client, model, 64)
        for _ in range(rounds):
            plain = loop(denoiser, 4)
            served = saturated(client, model, 128)
            rates.append((plain, served))
            ratios.append(served / plain)
            times += unloaded(client, model, 10)
    plain, served = map(statistics.median, zip(*rates, strict=True))
    cuts = statistics.quantiles(times, n=20)
    print(f"one request at a time: p50 {statistics.median(times):.2f} s, p95 {cuts[-1]:.2f} s")
    print(f"saturated: {served:.2f} pictures/s; eager float32 loop {plain:.2f}; ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    typer.run(main)
