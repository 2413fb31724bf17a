"""What acceleration brings: eager float32 as published against what serves, alternating in one run.

python -m benchmarks.model                # 64x64, 128x128 and the shipped model, at widths 1, 2, 4, 8
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model_core import layers
from model_core.bundle import BundleConfig, Store
from model_core.compilation import Compiled, Target, compile_here
from model_core.denoiser import Denoiser, Functions, UpdateInputs
from model_core.flags import classifier_config, diffusion_config, parse_flags, unet_config
from model_core.hardware import choose_device, choose_dtype, keep_memory, peak_memory
from model_core.presets import preset
from model_core.weights import blank

PARTS = ("UNet", "classifier gradient", "guided step")
PRESETS = {"64x64": ("64x64_diffusion", "64x64_classifier"), "128x128": ("128x128_diffusion", "128x128_classifier")}


def config_of(name: str, models_dir: Path) -> BundleConfig:
    """A published configuration, or a model's."""
    if name not in PRESETS:
        return Store(models_dir).find(name).config
    unet, classifier = (parse_flags(preset(part).flags) for part in PRESETS[name])
    return BundleConfig(
        unet=unet_config(unet), classifier=classifier_config(classifier), diffusion=diffusion_config(unet)
    )


def networks(config: BundleConfig, device: torch.device, dtype: torch.dtype) -> Denoiser:
    """Networks with random weights."""
    denoiser = Denoiser(*blank(config.unet, config.classifier, device, dtype), config.diffusion)
    for network in (denoiser.unet, denoiser.classifier):
        assert network is not None
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return denoiser


def einsum_attend(qkv: Tensor, num_heads: int, *, heads_first: bool) -> Tensor:
    """:func:`model_core.layers.attend` as published: two einsums around a softmax in float32."""
    layout = (num_heads, 3, -1) if heads_first else (3, num_heads, -1)
    q, k, v = qkv.reshape(*qkv.shape[:2], *layout).unbind(3 if heads_first else 2)
    scale = q.shape[-1] ** -0.25
    weight = torch.einsum("bthc,bshc->bhts", q * scale, k * scale)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    return torch.einsum("bhts,bshc->bthc", weight, v).flatten(2)


@contextmanager
def as_published() -> Iterator[None]:
    """Attention by einsum."""
    with mock.patch.object(layers, "attend", einsum_attend):
        yield


def work(denoiser: Denoiser, functions: Functions, width: int) -> dict[str, Callable[[], None]]:
    """Each part's call, at a width."""
    x = torch.randn(width, *denoiser.shape, device=denoiser.device)
    t = torch.linspace(50, 900, width, device=denoiser.device).round()
    label = torch.arange(width, device=denoiser.device) % (denoiser.num_classes or 1)
    rows = denoiser.bank.rows(torch.full_like(label, denoiser.bank.offset("") + 500))
    one, zero = torch.ones(width, device=denoiser.device), torch.zeros_like(label)

    def step() -> None:
        output = functions.predict(x, t, denoiser.shown(label), None)
        gradient = functions.gradient(x, t, label)
        functions.update(UpdateInputs(rows, x, output, gradient, one, x, x, zero + 1, one * 0, zero.bool()))

    def wait(function: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            function()
            if denoiser.device.type == "cuda":
                torch.cuda.synchronize()

        return run

    parts = (
        lambda: functions.predict(x, t, denoiser.shown(label), None),
        lambda: functions.gradient(x, t, label),
        step,
    )
    return {name: torch.no_grad()(wait(part)) for name, part in zip(PARTS, parts, strict=True)}


def matrix_peak(device: torch.device, dtype: torch.dtype, seconds: float = 3.0) -> float:
    """Best FLOP/s of a matrix product large enough to be at the machine's limit."""
    best = 0.0
    for size in (1024, 2048, 4096):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        a @ b
        until = time.perf_counter() + seconds / 3
        while time.perf_counter() < until:
            best = max(best, 2 * size**3 / timed(lambda a=a, b=b: a @ b))  # type: ignore[misc]
    return best


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def flops(denoiser: Denoiser) -> dict[str, float]:
    """Floating point operations of each part, per picture; a gradient for the input costs a forward pass twice."""
    x, t, y = torch.zeros(1, *denoiser.shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    found = []
    for network, rest in ((denoiser.unet, [denoiser.shown(y)]), (denoiser.classifier, [])):
        assert network is not None
        with FlopCounterMode(display=False) as counter, as_published():
            network(*(part if part is None else part.to(denoiser.device) for part in (x, t, *rest)))
        found.append(float(counter.get_total_flops()))
    unet, classifier = found
    return dict(zip(PARTS, (unet, 2 * classifier, unet + 2 * classifier), strict=True))


@torch.no_grad()
def measure(baseline: Denoiser, ours: Denoiser, compiled: Functions, widths: list[int], rounds: int) -> None:
    """Print a row per part and width."""
    dtype = ours.unet.torso_dtype
    costs = flops(baseline)
    print(
        "| part | width | baseline images/s | ours images/s | ratio | GFLOP/s | of peak |\n| --- " + "| --- " * 6 + "|"
    )
    for width in widths:
        old, new = work(baseline, baseline.functions, width), work(ours, compiled, width)
        for part in PARTS:
            new[part]()
            with as_published():
                old[part]()
            ratios, rates, shares = [], [], []
            for _ in range(rounds):
                peak = matrix_peak(ours.device, dtype, 0.6)
                with as_published():
                    before = timed(old[part])
                after = min(timed(new[part]) for _ in range(2))
                ratios.append(before / after)
                rates.append((width / before, width / after))
                shares.append(costs[part] * width / after / peak)
            (b, a), r, share = (
                map(statistics.median, zip(*rates, strict=True)),
                *map(statistics.median, (ratios, shares)),
            )
            speed = costs[part] * a / 1e9
            print(f"| {part} | {width} | {b:.2f} | {a:.2f} | {r:.2f} | {speed:.0f} | {share:.0%} |", flush=True)


def main(
    configs: Annotated[str, typer.Option(help="64x64, 128x128, or models by name.")] = "64x64,128x128,emoji32",
    widths: Annotated[str, typer.Option(help="Pictures at once.")] = "1,2,4,8",
    rounds: Annotated[int, typer.Option(help="Alternating rounds; medians are printed.")] = 3,
    device: str = "auto",
    dtype: str = "auto",
    cache: Annotated[Path, typer.Option(help="Folder of compiled code.")] = Path(".guided/compiled"),
    models_dir: Path = Path("models"),
) -> None:
    """Measure UNet, classifier gradient and guided step."""
    keep_memory()
    where = choose_device(device)
    half = choose_dtype(dtype, where)
    peaks = {t: matrix_peak(where, t) / 1e9 for t in {torch.float32, half}}
    print(
        f"{where}, {torch.get_num_threads()} threads; matrix peak "
        + ", ".join(f"{t}: {p:.0f} GFLOP/s" for t, p in peaks.items())
    )
    for name in configs.split(","):
        config = config_of(name, models_dir)
        began = time.perf_counter()
        code = compile_here(cache, Target.of(config, where, half))
        print(f"\n{name}: code ready after {time.perf_counter() - began:.0f} s\n")
        with torch.no_grad():
            baseline, ours = networks(config, where, torch.float32), networks(config, where, half)
        measure(baseline, ours, Compiled(code, ours), [int(width) for width in widths.split(",")], rounds)
        print(f"\nPeak memory of this process so far: {peak_memory(where) >> 20} MiB")


if __name__ == "__main__":
    typer.run(main)
