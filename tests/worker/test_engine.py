"""The engine with a small real model: whatever happens around a sample, its picture is the one made alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_core.denoiser import Denoiser, SampleSpec
from model_core.pictures import from_pixels, to_pixels
from model_core.samplers import Sampler
from model_core.sampling import sample
from model_core.weights import load
from tests.models import publish, tiny_denoiser, upsampler_config
from worker.engine import Engine, Event, Failed, Finished, Preview, Request, Stage, Started, measure_width, stage_of
from worker.lane import StepReport
from worker.scheduler import Policy

SPECS = [
    SampleSpec(seed=1, respacing="6", guidance_scale=3.0, label=1),
    SampleSpec(seed=2, respacing="ddim5", sampler=Sampler.DDIM, label=2),
    SampleSpec(seed=3, respacing="3", label=3),
    SampleSpec(seed=4, respacing="4,2", sampler=Sampler.DDIM, eta=0.5, guidance_scale=8.0, label=4),
    SampleSpec(seed=5, respacing="8", guidance_scale=1.0, guidance_interval=(300, 700), label=5),
]


class Bench:
    """An engine with one lane, driven by hand."""

    def __init__(self, width: int = 3, denoiser: Denoiser | None = None, **options: Any) -> None:
        self.events: list[Event] = []
        self.reports: list[StepReport] = []
        self.now = 0.0
        self.denoiser = denoiser or tiny_denoiser()
        self.engine = Engine(self.events.append, on_step=self.reports.append, clock=lambda: self.now, **options)
        self.engine.add_lane("tiny", self.denoiser, width)

    def submit(self, name: str, *specs: SampleSpec, **fields: Any) -> Request:
        stages: list[tuple[Stage, ...]] = [(stage_of("tiny", spec, self.denoiser),) for spec in specs]
        request = Request(name, stages, arrived=self.now, **fields)
        self.engine.submit(request)
        return request

    def finish(self) -> None:
        while self.engine.step():
            self.now += 1.0

    def pictures(self) -> dict[tuple[str, int], Tensor]:
        return {(e.sample.request.id, e.sample.index): e.x for e in self.events if isinstance(e, Finished)}

    def failures(self) -> dict[str, Failed]:
        return {e.request.id: e for e in self.events if isinstance(e, Failed)}


def alone(spec: SampleSpec) -> Tensor:
    return sample(tiny_denoiser(), [spec])[0]


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-3)


def test_unlike_requests_share_every_pass_and_come_out_as_made_alone() -> None:
    bench = Bench(width=8)
    for i, spec in enumerate(SPECS):
        bench.submit(str(i), spec)
    bench.finish()
    assert len(bench.reports) == 8  # the longest request's steps: nobody waited for anybody
    assert sum(r.samples for r in bench.reports) == 6 + 5 + 3 + 6 + 8
    for i, spec in enumerate(SPECS):
        assert same(bench.pictures()[str(i), 0], alone(spec))


def test_requests_join_running_ones_and_the_width_is_kept() -> None:
    bench = Bench(width=2)
    bench.submit("first", SPECS[0], SPECS[4])
    bench.engine.step()
    bench.submit("second", SPECS[1])
    bench.finish()
    assert max(r.samples for r in bench.reports) == 2
    for key, spec in ((("first", 0), SPECS[0]), (("first", 1), SPECS[4]), (("second", 0), SPECS[1])):
        assert same(bench.pictures()[key], alone(spec))


def test_higher_priority_parks_a_running_sample_which_resumes() -> None:
    bench = Bench(width=1)
    low = bench.submit("low", SPECS[4], priority=0)
    bench.engine.step()
    bench.engine.step()
    bench.submit("high", SPECS[0], priority=2)
    bench.engine.step()
    assert bench.engine.parked() == 1
    assert low.samples[0].steps_done == 2
    bench.finish()
    assert [e.sample.request.id for e in bench.events if isinstance(e, Finished)] == ["high", "low"]
    assert same(bench.pictures()["low", 0], alone(SPECS[4]))
    assert same(bench.pictures()["high", 0], alone(SPECS[0]))


@pytest.mark.parametrize(("policy", "order"), [("shortest", ["c", "b", "a"]), ("arrival", ["a", "b", "c"])])
def test_policies(policy: Any, order: list[str]) -> None:
    bench = Bench(width=1, policy=Policy(policy))
    for name, spec in (("a", SPECS[4]), ("b", SPECS[0]), ("c", SPECS[2])):
        bench.submit(name, spec)
        bench.now += 0.001
    bench.finish()
    assert [e.sample.request.id for e in bench.events if isinstance(e, Finished)] == order


def test_cancelling_running_waiting_and_unknown_requests() -> None:
    bench = Bench(width=1)
    bench.submit("running", SPECS[0])
    bench.submit("waiting", SPECS[4], SPECS[4])
    bench.submit("other", SPECS[1])
    bench.engine.step()
    for name in ("running", "waiting", "unknown"):
        bench.engine.cancel(name)
    bench.finish()
    assert {k: v.kind for k, v in bench.failures().items()} == {"running": "cancelled", "waiting": "cancelled"}
    assert list(bench.pictures()) == [("other", 0)]
    assert same(bench.pictures()["other", 0], alone(SPECS[1]))


def test_a_deadline_ends_the_request_at_the_next_step() -> None:
    bench = Bench(width=1)
    bench.submit("late", SPECS[4], deadline=2.5)
    bench.submit("in time", SPECS[4], deadline=100.0)
    bench.finish()
    assert bench.failures()["late"].kind == "deadline"
    assert list(bench.pictures()) == [("in time", 0)]
    assert len(bench.reports) == 3 + 8


def test_impossible_samples_fail_their_own_request_with_the_field() -> None:
    bench = Bench()
    bench.submit("bad", replace(SPECS[0], label=99))
    bench.engine.submit(Request("lost", [(stage_of("absent", SPECS[0], bench.denoiser),)]))
    bench.submit("good", SPECS[2])
    bench.finish()
    assert bench.failures()["bad"].message == "label: 99 is not between 0 and 9"
    assert "'absent' is not loaded" in bench.failures()["lost"].message
    assert list(bench.pictures()) == [("good", 0)]


def sabotage(bench: Bench, fault: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let the UNet fail as ``fault`` says; the network itself is the real one."""
    bench.denoiser.unet.register_forward_hook(lambda _, inputs, output: fault(inputs[0], output))


def test_a_sample_that_becomes_nan_fails_alone() -> None:
    bench = Bench(width=4)
    poison: Tensor | None = None

    def fault(x: Tensor, output: Tensor) -> Tensor:
        nonlocal poison
        if poison is None:
            poison = x[1].clone()
        if len(x) > 1 and bool((x[1] == poison).all()):
            output = output.clone()
            output[1] = float("nan")
        return output

    sabotage(bench, fault)
    bench.submit("a", SPECS[0])
    bench.submit("b", replace(SPECS[2], clip_denoised=False), SPECS[2])
    bench.submit("c", SPECS[4])
    bench.finish()
    assert bench.failures()["b"].kind == "error"
    assert "picture 0" in bench.failures()["b"].message
    assert sorted(bench.pictures()) == [("a", 0), ("c", 0)]
    assert same(bench.pictures()["c", 0], alone(SPECS[4]))


def room_for_two(x: Tensor, output: Tensor) -> Tensor:
    """Memory runs out with more than two samples."""
    if len(x) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return output


def test_out_of_memory_halves_the_width_and_loses_nothing() -> None:
    bench = Bench(width=5)
    sabotage(bench, room_for_two)
    for i, spec in enumerate(SPECS):
        bench.submit(str(i), spec)
    bench.finish()
    assert bench.engine.widths() == {"tiny": 2}
    assert not bench.failures()
    for i, spec in enumerate(SPECS):
        assert same(bench.pictures()[str(i), 0], alone(spec))


def test_a_step_that_fails_for_newcomers_loses_nobody() -> None:
    bench = Bench(width=5)
    sabotage(bench, room_for_two)
    for i, spec in enumerate(SPECS[:2]):
        bench.submit(str(i), spec)
    bench.engine.step()
    for i, spec in enumerate(SPECS[2:], start=2):
        bench.submit(str(i), spec, priority=2)  # they keep their slots when the width is halved
    bench.finish()
    assert not bench.failures()
    assert len(bench.pictures()) == len(SPECS)
    for i, spec in enumerate(SPECS):
        assert same(bench.pictures()[str(i), 0], alone(spec))


def test_out_of_memory_at_width_one_fails_that_request_only() -> None:
    bench = Bench(width=1)
    calls = 0

    def fault(x: Tensor, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise MemoryError("no memory")
        return output

    sabotage(bench, fault)
    bench.submit("first", SPECS[2])
    bench.submit("second", SPECS[2])
    bench.finish()
    assert "no memory" in bench.failures()["first"].message
    assert list(bench.pictures()) == [("second", 0)]


def test_a_sample_whose_step_raises_is_found_and_fails_alone() -> None:
    bench = Bench(width=4)
    assert bench.denoiser.classifier is not None

    def fault(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if (inputs[0].detach() == 0).any():
            raise ValueError("zeros")

    bench.denoiser.classifier.register_forward_pre_hook(fault)
    bench.submit("good", SPECS[0])
    request = bench.submit("bad", SPECS[3])
    bench.engine.step()
    lane = bench.engine._lanes["tiny"]
    assert lane._batch is not None
    lane._batch.x[lane.running.index(request.samples[0])] = 0.0
    bench.finish()
    assert bench.failures()["bad"].message == "sampling failed: ValueError: zeros"
    assert same(bench.pictures()["good", 0], alone(SPECS[0]))


def test_previews_and_start_events() -> None:
    bench = Bench(width=4)
    bench.submit("seen", SPECS[0], preview_every=2)
    bench.submit("unseen", SPECS[2])
    bench.finish()
    previews = [e for e in bench.events if isinstance(e, Preview)]
    assert [e.sample.request.id for e in previews] == ["seen"] * 2  # steps 2 and 4; at 6 it is done
    assert all(float(e.x0.abs().max()) <= 1.0 for e in previews)
    assert sorted(e.request.id for e in bench.events if isinstance(e, Started)) == ["seen", "unseen"]


def test_a_cascade_goes_through_both_lanes(tmp_path: Any) -> None:
    bench = Bench(width=4)
    upper = load(publish(tmp_path, "up", upsampler_config()))
    bench.engine.add_lane("up", upper, 1)
    spec = SampleSpec(seed=9, stage=1, respacing="3", label=1)
    stages = (stage_of("tiny", SPECS[0], bench.denoiser), stage_of("up", spec, upper))
    bench.engine.submit(Request("tall", [stages]))
    bench.finish()
    low_res = from_pixels(to_pixels(alone(SPECS[0])[None]))
    picture = bench.pictures()["tall", 0]
    assert picture.shape == (3, 32, 32)
    assert same(picture, sample(upper, [spec], low_res=low_res)[0])


def test_a_lane_is_removed_only_when_nobody_needs_it() -> None:
    bench = Bench()
    bench.submit("a", SPECS[2])
    answer = bench.engine.remove_lane("tiny")
    bench.engine.step()
    assert answer.result(timeout=1) is False
    bench.finish()
    answer = bench.engine.remove_lane("tiny")
    bench.engine.step()
    assert answer.result(timeout=1) is True
    assert bench.engine.widths() == {}


def test_forgotten_coefficient_tables_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.lane.MAX_TABLE_ROWS", 10)
    bench = Bench(width=2)
    for i, spec in enumerate(SPECS):
        bench.submit(str(i), spec)
    bench.finish()
    for i, spec in enumerate(SPECS):
        assert same(bench.pictures()[str(i), 0], alone(spec))


def test_padding_to_buckets_keeps_the_pictures() -> None:
    bench = Bench()
    bench.engine.add_lane("padded", bench.denoiser, 3, lambda n: 1 << (n - 1).bit_length())
    widths = set()
    bench.denoiser.unet.register_forward_pre_hook(lambda _, inputs: widths.add(len(inputs[0])))
    for i, spec in enumerate(SPECS):
        bench.engine.submit(Request(str(i), [(stage_of("padded", spec, bench.denoiser),)]))
    bench.finish()
    assert widths <= {1, 2, 4}
    for i, spec in enumerate(SPECS):
        assert same(bench.pictures()[str(i), 0], alone(spec))


def test_it_runs_on_a_thread_of_its_own() -> None:
    bench = Bench()
    thread = threading.Thread(target=bench.engine.run)
    thread.start()
    bench.submit("a", SPECS[0])
    until = time.monotonic() + 30
    while not bench.pictures() and time.monotonic() < until:
        time.sleep(0.01)
    bench.engine.stop()
    thread.join(timeout=10)
    assert not thread.is_alive()
    assert same(bench.pictures()["a", 0], alone(SPECS[0]))


def test_measured_width_stays_inside_memory() -> None:
    denoiser = tiny_denoiser()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    denoiser.unet.register_forward_pre_hook(hook)
    assert measure_width(denoiser, max_width=64) in (1, 2, 4)
    assert measure_width(denoiser, max_width=1) == 1
