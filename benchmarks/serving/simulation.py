"""The same comparison in a simulation: seconds instead of minutes, to tune the scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.serving.workload import Arrival, Mix, Recorder, Result, make_trace, take_group
from worker.lane import REARRANGE_EVERY
from worker.scheduler import Policy, choose


@dataclass(frozen=True)
class StepTime:
    """Time of a step: a fixed part and a part per sample, for each network, in s.

    The defaults are those of the shipped model in bfloat16 on two cores.
    """

    unet: tuple[float, float] = (0.016, 0.0051)
    classifier: tuple[float, float] = (0.013, 0.0026)

    def __call__(self, samples: int, guided: int) -> float:
        """Time of one step of ``samples``, ``guided`` of them with a classifier pass."""
        guidance = self.classifier[0] + guided * self.classifier[1] if guided else 0.0
        return self.unet[0] + samples * self.unet[1] + guidance


@dataclass(eq=False)
class Simulated:
    """A request in the simulated engine."""

    number: int
    arrived: float
    remaining: int
    guided: bool
    running: bool = False
    priority: int = 1


def simulate_engine(trace: Sequence[Arrival], width: int, policy: Policy, step_time: StepTime) -> Result:
    """(a), with the real scheduler."""
    record = Recorder(trace)
    coming = [Simulated(i, a.at, a.steps, a.guided) for i, a in enumerate(trace)][::-1]
    here: list[Simulated] = []
    now, until_rearranged, running = 0.0, 0, list[Simulated]()
    while not record.finished:
        while coming and coming[-1].arrived <= now:
            here.append(coming.pop())
            until_rearranged = 0
        if not here:
            now = coming[-1].arrived
            continue
        if until_rearranged <= 0:
            running = [here[i] for i in choose(here, width, policy, now)]
            for sample in here:
                sample.running = sample in running
            until_rearranged = REARRANGE_EVERY
        until_rearranged -= 1
        now += step_time(len(running), sum(sample.guided for sample in running))
        record.step(now, len(running))
        for sample in running:
            sample.remaining -= 1
            if not sample.remaining:
                record.ended[sample.number] = now
                here.remove(sample)
                until_rearranged = 0
        running = [sample for sample in running if sample.remaining]
    return record.result()


def simulate_grouped(trace: Sequence[Arrival], width: int, step_time: StepTime) -> Result:
    """(c); with width 1 (b)."""
    numbers = {id(arrival): number for number, arrival in enumerate(trace)}
    record = Recorder(trace)
    coming, waiting, now = list(trace)[::-1], list[Arrival](), 0.0
    while not record.finished:
        while coming and coming[-1].at <= now:
            waiting.append(coming.pop())
        if not waiting:
            now = coming[-1].at
            continue
        group = take_group(waiting, width)
        for _ in range(group[0].steps):
            now += step_time(len(group), sum(arrival.guided for arrival in group))
            record.step(now, len(group))
        for arrival in group:
            record.ended[numbers[id(arrival)]] = now
    return record.result()


def tune(width: int, loads: Sequence[float], ageings: Sequence[float], count: int = 2000) -> list[str]:
    """A table of policies at several loads (of the capacity of (c)), for both mixes."""
    lines, step_time = [], StepTime()
    mixes: tuple[Mix, ...] = ("choice", "uniform")
    for mix in mixes:
        backlog = make_trace(mix, count, None, 1, 10, 1000)
        capacity = simulate_grouped(backlog, width, step_time).throughput
        best = simulate_engine(backlog, width, Policy("arrival"), step_time).throughput
        one = simulate_grouped(backlog, 1, step_time).throughput
        lines.append(f"{mix}: at saturation (a)/(c) {best / capacity:.2f}, (a)/(b) {best / one:.2f}")
        for load in loads:
            trace = make_trace(mix, count, load * capacity, 1, 10, 1000)
            rows = [("(c)", simulate_grouped(trace, width, step_time))]
            rows.append(("arrival", simulate_engine(trace, width, Policy("arrival"), step_time)))
            for ageing in ageings:
                policy = Policy("shortest", ageing)
                rows.append((f"ageing {ageing:g}", simulate_engine(trace, width, policy, step_time)))
            for name, r in rows:
                figures = f"mean {r.mean:8.2f}  p95 {r.quantile(0.95):8.2f}  max {max(r.latencies):8.2f}"
                lines.append(f"{mix:8} load {load:4.2f}  {name:12} {figures}")
    return lines
