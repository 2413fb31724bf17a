"""Run it: ``python -m benchmarks.serving``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.serving.chart import draw_curve
from benchmarks.serving.simulation import tune
from benchmarks.serving.systems import System, engine, grouped
from benchmarks.serving.workload import Mix, Result, make_trace
from model_core.bundle import Store
from model_core.hardware import choose_dtype
from model_core.importing import DTYPES
from model_core.weights import load
from worker.engine import measure_width
from worker.scheduler import Policy

Figures = dict[str, Result]
TITLES = {"engine": "(a) this engine", "one": "(b) one at a time", "grouped": "(c) request-level batching"}


def main(
    model: str = "emoji32",
    models_dir: Path = Path("models"),
    width: Annotated[int | None, typer.Option(help="Batch width of (a) and (c); default: measured.")] = None,
    requests: Annotated[int, typer.Option(help="Requests per run at full load.")] = 100,
    loads: Annotated[str, typer.Option(help="Of the capacity of (c), first mix.")] = "0.2,0.4,0.6,0.8,1.0",
    dtype: str = "auto",
    policy: str = "shortest",
    ageing: float = Policy.ageing,
    seed: int = 1,
    out: Path = Path("serving.png"),
    json_out: Annotated[Path | None, typer.Option("--json")] = None,
    simulate: Annotated[bool, typer.Option(help="Only simulate, to compare policies.")] = False,
) -> None:
    """Compare three ways to serve the same requests, in one run on this machine."""
    if simulate:
        print("\n".join(tune(width or 32, (0.6, 0.8, 1.0, 1.2), (0.0, 1.0, 3.0, 10.0, 30.0))))
        return
    chosen = choose_dtype(dtype, torch.device("cpu")) if dtype == "auto" else DTYPES[dtype]
    denoiser = load(Store(models_dir).find(model), "cpu", chosen)
    width = width or measure_width(denoiser, max_width=64)
    print(f"{model}, {chosen}, {torch.get_num_threads()} threads, width {width}, {requests} requests per run\n")
    rules = Policy(policy, ageing)  # type: ignore[arg-type]
    systems = {
        "engine": engine(denoiser, width, rules),
        "grouped": grouped(denoiser, width),
        "one": grouped(denoiser, 1),
    }
    shape = (seed, denoiser.num_classes or 1, denoiser.diffusion.diffusion_steps)
    saturated = dict(_saturate(systems, requests, shape))
    capacity = saturated["choice"]["grouped"].throughput
    curves: dict[float, Figures] = {}
    for load_ in map(float, loads.split(",")):
        trace = make_trace("choice", max(20, round(requests * load_)), load_ * capacity, *shape)
        # One at a time above its own capacity: the queue grows without end.
        bearable = [n for n in systems if n != "one" or load_ * capacity < saturated["choice"]["one"].throughput]
        curves[load_] = {n: systems[n](trace) for n in bearable}
        _show(f"{load_:.0%} of the capacity of (c), steps from 10, 25, 50, 100, 250", curves[load_])
    _goals(saturated, curves)
    series = {n: [(x, f[n].mean, f[n].quantile(0.95)) for x, f in curves.items() if n in f] for n in systems}
    draw_curve({n: line for n, line in series.items() if line}, out, f"{model}: latency against load")
    print(f"\ncurve: {out}")
    if json_out:
        json_out.write_text(json.dumps({"saturated": _plain(saturated), "loads": _plain(curves)}, indent=2))


def _saturate(systems: dict[str, System], requests: int, shape: tuple[int, int, int]) -> Iterator[tuple[Mix, Figures]]:
    mixes: tuple[Mix, ...] = ("choice", "uniform")
    for mix in mixes:
        trace = make_trace(mix, requests, None, *shape)
        # One at a time has nothing to gain from a long run.
        figures = {name: run(trace[: requests // 4] if name == "one" else trace) for name, run in systems.items()}
        _show(f"all requests there at once, mix {mix}", figures)
        yield mix, figures


def _show(title: str, figures: Figures) -> None:
    print(title)
    for name, r in figures.items():
        print(
            f"  {TITLES[name]:28} {r.throughput:6.3f} requests/s  {r.steps_per_second:7.1f} steps/s  "
            f"mean {r.mean:7.2f} s  p50 {r.quantile(0.5):7.2f} s  p95 {r.quantile(0.95):7.2f} s",
            flush=True,
        )
    mine, other = figures["engine"], figures["grouped"]
    print(
        f"  (a)/(c): steps/s {mine.steps_per_second / other.steps_per_second:.2f}, "
        f"mean {mine.mean / other.mean:.2f}, p95 {mine.quantile(0.95) / other.quantile(0.95):.2f}\n",
        flush=True,
    )


def _goals(saturated: dict[Mix, Figures], curves: dict[float, Figures]) -> None:
    def goal(what: str, figure: float, least: float | None = None, most: float | None = None) -> None:
        met = (least is None or figure >= least) and (most is None or figure <= most)
        bound = f">= {least}" if least is not None else f"<= {most}"
        print(f"  {'met    ' if met else 'NOT met'}  {what}: {figure:.2f} (goal {bound})")

    print("goals")
    if 0.8 in curves:
        a, c = curves[0.8]["engine"], curves[0.8]["grouped"]
        goal("mean latency (a)/(c) at 80%, first mix", a.mean / c.mean, most=0.5)
        goal("p95 latency (a)/(c) at 80%, first mix", a.quantile(0.95) / c.quantile(0.95), most=0.7)
    for name in ("grouped", "one"):
        ratio = saturated["uniform"]["engine"].steps_per_second / saturated["uniform"][name].steps_per_second
        goal(f"steps/s (a) over {TITLES[name]} at saturation, second mix", ratio, least=1.5)
        ratio = saturated["choice"]["engine"].steps_per_second / saturated["choice"][name].steps_per_second
        goal(f"steps/s (a) over {TITLES[name]} at saturation, first mix", ratio, least=0.97)


def _plain(results: dict[Mix, Figures] | dict[float, Figures]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        str(key): {
            name: {
                "requests_per_second": r.throughput,
                "steps_per_second": r.steps_per_second,
                "mean_s": r.mean,
                "p50_s": r.quantile(0.5),
                "p95_s": r.quantile(0.95),
            }
            for name, r in figures.items()
        }
        for key, figures in results.items()
    }


if __name__ == "__main__":
    typer.run(main)
