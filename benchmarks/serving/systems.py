"""The three systems, for real: the engine, one request at a time, and request-level batching."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from benchmarks.serving.workload import Arrival, Recorder, Result, take_group
from model_core.batch import SampleBatch
from model_core.denoiser import Denoiser
from worker.engine import Engine, Event, Finished, Request, Stage
from worker.lane import StepReport
from worker.scheduler import Policy

System = Callable[[Sequence[Arrival]], Result]


class Clock:
    """Seconds since the start of a run."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began


def engine(denoiser: Denoiser, width: int, policy: Policy) -> System:
    """(a) The engine of this project; every request is submitted when it arrives."""

    def run(trace: Sequence[Arrival]) -> Result:
        record, clock = Recorder(trace), Clock()

        def on_event(event: Event) -> None:
            if isinstance(event, Finished):
                record.ended[int(event.sample.request.id)] = clock()

        def on_step(report: StepReport) -> None:
            record.step(clock(), report.samples)

        engine = Engine(on_event, on_step=on_step, policy=policy, clock=clock)
        engine.add_lane("model", denoiser, width)
        coming = list(enumerate(trace))[::-1]
        while not record.finished:
            while coming and coming[-1][1].at <= clock():
                number, arrival = coming.pop()
                stages: list[tuple[Stage, ...]] = [(Stage("model", arrival.spec, arrival.steps),)]
                engine.submit(Request(str(number), stages, arrived=arrival.at))
            if not engine.step() and coming:
                time.sleep(max(0.0, coming[-1][1].at - clock()))
        return record.result()

    return run


def grouped(denoiser: Denoiser, width: int) -> System:
    """(c) Request-level dynamic batching; with width 1 (b), one request at a time."""

    def run(trace: Sequence[Arrival]) -> Result:
        numbers = {id(arrival): number for number, arrival in enumerate(trace)}
        coming, waiting = list(trace)[::-1], list[Arrival]()
        record, clock = Recorder(trace), Clock()
        while not record.finished:
            while coming and coming[-1].at <= clock():
                waiting.append(coming.pop())
            if not waiting:
                time.sleep(max(0.0, coming[-1].at - clock()))
                continue
            group = take_group(waiting, width)
            batch = SampleBatch(denoiser, [arrival.spec for arrival in group])
            for _ in range(group[0].steps):
                batch.step()
                batch.x.cpu()  # waits for the device, as the engine does
                record.step(clock(), len(group))
            for arrival in group:
                record.ended[numbers[id(arrival)]] = clock()
        return record.result()

    return run
