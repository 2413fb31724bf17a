"""Mixed requests that arrive at random: the same trace for every system."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from model_core.denoiser import SampleSpec
from model_core.samplers import Sampler
from model_core.schedule import respacing_for

Mix = Literal["choice", "uniform"]
CHOICES = (10, 25, 50, 100, 250)
UNGUIDED = 0.3
"""Share of requests without guidance."""


@dataclass(frozen=True)
class Arrival:
    """One request for one picture."""

    at: float
    """Seconds after the start."""
    steps: int
    spec: SampleSpec

    @property
    def guided(self) -> bool:
        """Whether its steps need the classifier."""
        return self.spec.guidance_scale != 0

    @property
    def group(self) -> tuple[int, int]:
        """What request-level batching may put together: equal steps and sampler."""
        return self.steps, int(self.spec.sampler)


def make_trace(
    mix: Mix, count: int, rate: float | None, seed: int, num_classes: int, diffusion_steps: int
) -> list[Arrival]:
    """Requests with Poisson arrivals.

    Args:
        mix: steps from ``CHOICES``, or uniform from 10 to 250.
        count: requests.
        rate: requests per second; ``None``: all are there at once.
        seed: of the trace.
        num_classes: of the model.
        diffusion_steps: of the model.
    """
    draw = random.Random(seed)
    trace, at = [], 0.0
    for number in range(count):
        at += draw.expovariate(rate) if rate else 0.0
        steps = draw.choice(CHOICES) if mix == "choice" else draw.randint(10, 250)
        sampler = draw.choice(("ddpm", "ddim"))
        spec = SampleSpec(
            seed=number,
            respacing=respacing_for(diffusion_steps, steps, sampler),
            sampler=Sampler[sampler.upper()],
            guidance_scale=0.0 if draw.random() < UNGUIDED else draw.uniform(1, 10),
            label=draw.randrange(num_classes),
        )
        trace.append(Arrival(at, steps, spec))
    return trace


@dataclass(frozen=True)
class Result:
    """What one system made of a trace."""

    latencies: tuple[float, ...]
    """Seconds from arrival to picture, in order of the trace."""
    makespan: float
    """Seconds from the start to the last picture."""
    steps_per_second: float
    """Sample-steps per second until three quarters of the work was done: without the idle tail."""

    @property
    def throughput(self) -> float:
        """Requests per second."""
        return len(self.latencies) / self.makespan

    @property
    def mean(self) -> float:
        """Mean latency, s."""
        return float(np.mean(self.latencies))

    def quantile(self, q: float) -> float:
        """Quantile of the latency, s."""
        return float(np.quantile(self.latencies, q))


def take_group(waiting: list[Arrival], width: int) -> list[Arrival]:
    """Request-level batching: the oldest request, and up to ``width`` that have its steps and sampler."""
    group = [a for a in waiting if a.group == waiting[0].group][:width]
    for arrival in group:
        waiting.remove(arrival)
    return group


class Recorder:
    """Notes when requests end and how the work goes on.

    Args:
        trace: the requests.
    """

    def __init__(self, trace: Sequence[Arrival]) -> None:
        self._trace = trace
        self._left = round(0.75 * sum(a.steps for a in trace))
        self._work, self._rate = self._left, 0.0
        self.ended: dict[int, float] = {}

    @property
    def finished(self) -> bool:
        """Whether all requests have ended."""
        return len(self.ended) == len(self._trace)

    def step(self, now: float, samples: int) -> None:
        """``samples`` samples took a step."""
        self._left -= samples
        if self._left <= 0 and not self._rate:
            self._rate = (self._work - self._left) / now

    def result(self) -> Result:
        """The result, once all have ended."""
        latencies = tuple(self.ended[i] - arrival.at for i, arrival in enumerate(self._trace))
        return Result(latencies, max(self.ended.values()), self._rate)
