"""The benchmarks measure what they say: same work, all of it done."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.serving.chart import draw_curve
from benchmarks.serving.simulation import StepTime, simulate_engine, simulate_grouped
from benchmarks.serving.systems import engine, grouped
from benchmarks.serving.workload import Arrival, Result, make_trace, take_group
from model_core.denoiser import Denoiser, SampleSpec
from model_core.samplers import Sampler
from tests.models import tiny_denoiser
from worker.scheduler import Policy


def short(trace: list[Arrival]) -> list[Arrival]:
    """The same requests with few steps."""
    specs = [SampleSpec(seed=a.spec.seed, respacing=f"ddim{2 + i % 3}", label=1) for i, a in enumerate(trace)]
    return [Arrival(a.at, 2 + i % 3, spec) for i, (a, spec) in enumerate(zip(trace, specs, strict=True))]


def count_steps(denoiser: Denoiser) -> list[int]:
    widths: list[int] = []
    denoiser.unet.register_forward_pre_hook(lambda _, inputs: widths.append(len(inputs[0])))
    return widths


def test_all_systems_do_all_the_work() -> None:
    trace = short(make_trace("choice", 9, 50.0, 1, 10, 1000))
    work = sum(arrival.steps for arrival in trace)
    denoiser = tiny_denoiser()
    widths = count_steps(denoiser)
    for system, widest in ((engine(denoiser, 4, Policy()), 4), (grouped(denoiser, 4), 4), (grouped(denoiser, 1), 1)):
        widths.clear()
        result = system(trace)
        assert len(result.latencies) == 9
        assert min(result.latencies) > 0
        assert sum(widths) == work
        assert max(widths) <= widest
        assert result.makespan >= trace[-1].at


def test_traces_are_the_same_for_the_same_seed_and_have_the_asked_rate() -> None:
    trace = make_trace("choice", 2000, 4.0, 1, 10, 1000)
    assert trace == make_trace("choice", 2000, 4.0, 1, 10, 1000)
    assert trace[-1].at == pytest.approx(500, rel=0.1)
    assert {a.steps for a in trace} == {10, 25, 50, 100, 250}
    uniform = make_trace("uniform", 2000, None, 1, 10, 1000)
    assert (min(a.steps for a in uniform), max(a.steps for a in uniform)) == (10, 250)
    assert {a.at for a in uniform} == {0.0}


def test_groups_have_equal_steps_and_sampler_and_begin_with_the_oldest() -> None:
    spec = {name: SampleSpec(sampler=Sampler[name]) for name in ("DDPM", "DDIM")}
    waiting = [
        Arrival(i, steps, spec[name]) for i, (steps, name) in enumerate(((10, "DDIM"), (25, "DDIM"))) for _ in "ab"
    ]
    waiting.append(Arrival(9, 10, spec["DDPM"]))
    group = take_group(waiting, 8)
    assert [(a.steps, a.spec.sampler) for a in group] == [(10, Sampler.DDIM)] * 2
    assert len(waiting) == 3


def test_the_simulation_of_one_server_agrees_with_queueing_theory() -> None:
    # M/D/1: mean wait = rho / (2 (1 - rho)) service times.
    spec = SampleSpec()
    trace = [Arrival(a.at, 10, spec) for a in make_trace("choice", 20_000, 0.6, 1, 10, 1000)]
    step = StepTime(unet=(0.1, 0.0), classifier=(0.0, 0.0))
    expected = 1.0 + 0.6 / (2 * 0.4)
    assert simulate_grouped(trace, 1, step).mean == pytest.approx(expected, rel=0.05)
    assert simulate_engine(trace, 1, Policy("arrival"), step).mean == pytest.approx(expected, rel=0.05)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    draw_curve({"engine": [(0.2, 1, 3), (0.8, 4, 9)], "grouped": [(0.2, 2, 5), (0.8, 20, 90)]}, tmp_path / "a.png", "x")
    with Image.open(tmp_path / "a.png") as image:
        assert len(image.getcolors(1 << 16) or []) > 3


def test_figures_of_a_result() -> None:
    result = Result((1.0, 2.0, 3.0), 6.0, 10.0)
    assert (result.throughput, result.mean, result.quantile(0.5)) == (0.5, 2.0, 2.0)
