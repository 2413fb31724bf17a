"""The engine: continuous batching of denoising steps. It knows nothing of Redis or HTTP.

A lane is one loaded model; its slots hold samples in flight, each with its own steps, sampler, scale
and class. Every pass of the loop lets the scheduler choose who has a slot, takes one step of each
lane's batch, and retires what is finished. Samples join and leave between steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from model_core.batch import SampleBatch
from model_core.denoiser import Denoiser, Functions, SampleSpec
from model_core.pictures import from_pixels, to_pixels
from model_core.schedule import respaced_timesteps
from worker.lane import Lane, StepReport, out_of_memory
from worker.scheduler import Policy

log = logging.getLogger(__name__)

FailureKind = Literal["error", "deadline", "cancelled", "unloaded"]


@dataclass(frozen=True)
class Stage:
    """One model's part in a picture."""

    lane: str
    spec: SampleSpec
    steps: int


@dataclass(eq=False)
class Request:
    """Pictures that are asked for together.

    Args:
        id: names it in :meth:`Engine.cancel`.
        stages: of each picture, the models it goes through.
        priority: larger goes first.
        arrived: on the engine's clock, s.
        deadline: on the engine's clock, s.
        preview_every: steps between previews.
    """

    id: str
    stages: list[tuple[Stage, ...]]
    priority: int = 1
    arrived: float = 0.0
    deadline: float | None = None
    preview_every: int | None = None
    samples: list[Sample] = field(init=False)
    remaining: int = field(init=False)
    """Steps left, over all its pictures."""
    started: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.samples = [Sample(self, i, stages) for i, stages in enumerate(self.stages)]
        self.remaining = sum(stage.steps for stages in self.stages for stage in stages)


@dataclass(eq=False)
class Sample:
    """One picture on its way."""

    request: Request
    index: int
    stages: tuple[Stage, ...]
    stage: int = 0
    steps_done: int = 0
    """Over all stages."""
    running: bool = False
    low_res: Tensor | None = None
    """What an upsampler starts from, (1, C, h, w)."""

    @property
    def spec(self) -> SampleSpec:
        """How the current stage is sampled."""
        return self.stages[self.stage].spec

    @property
    def priority(self) -> int:
        """Of its request."""
        return self.request.priority

    @property
    def arrived(self) -> float:
        """Of its request."""
        return self.request.arrived

    @property
    def remaining(self) -> int:
        """Of its request."""
        return self.request.remaining


@dataclass(frozen=True)
class Started:
    """A request's first sample got a slot."""

    request: Request


@dataclass(frozen=True)
class Preview:
    """What a sample looks like so far: ``x0`` (C, H, W)."""

    sample: Sample
    steps_done: int
    x0: Tensor


@dataclass(frozen=True)
class Finished:
    """A picture is done: ``x`` (C, H, W) float32 in about [-1, 1]."""

    sample: Sample
    x: Tensor


@dataclass(frozen=True)
class Failed:
    """A request ended without its (other) pictures; nothing more will come of it."""

    request: Request
    kind: FailureKind
    message: str


Event = Started | Preview | Finished | Failed


class Engine:
    """Samples requests on one thread; everything but :meth:`step` may be called from any thread.

    Args:
        on_event: called with each event, on the engine's thread; it must be quick.
        on_step: called after each step of a lane.
        policy: the scheduler's order.
        clock: seconds, for arrival and deadlines.
    """

    def __init__(
        self,
        on_event: Callable[[Event], None],
        *,
        on_step: Callable[[StepReport], None] = lambda report: None,
        policy: Policy = Policy(),  # noqa: B008
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_event = on_event
        self._on_step = on_step
        self._policy = policy
        self.clock = clock
        self._lanes: dict[str, Lane[Sample]] = {}
        self._requests: dict[str, Request] = {}
        self._orders: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stop = False
        self.crashed = False

    def add_lane(self, key: str, denoiser: Denoiser, width: int, bucket: Callable[[int], int] | None = None) -> None:
        """Serve a model under a name, ``width`` samples at once."""
        lane: Lane[Sample] = Lane(key, denoiser, width, bucket)
        self._order(lambda: self._lanes.__setitem__(key, lane))

    def remove_lane(self, key: str) -> Future[bool]:
        """Stop serving a model unless samples still need it; whether it was removed."""
        answer: Future[bool] = Future()

        def remove() -> None:
            needed = any(s.lane == key for r in self._requests.values() for stages in r.stages for s in stages)
            answer.set_result(not needed and self._lanes.pop(key, None) is not None)

        self._order(remove)
        return answer

    def exchange(self, key: str, functions: Functions, width: int) -> None:
        """Let a lane go on with other functions of its model, and another width."""

        def apply() -> None:
            if lane := self._lanes.get(key):
                lane.denoiser.functions, lane.width = functions, width

        self._order(apply)

    def submit(self, request: Request) -> None:
        """Take a request in; its lanes must have been added."""
        self._order(lambda: self._admit(request))

    def cancel(self, request_id: str, kind: FailureKind = "cancelled", message: str = "cancelled") -> None:
        """End a request at the next step boundary; :class:`Failed` tells when. Unknown ids are ignored."""

        def end() -> None:
            if request := self._requests.get(request_id):
                self._fail(request, kind, message)

        self._order(end)

    def counts(self) -> dict[str, tuple[int, int]]:
        """By lane, samples that run and samples that wait (parked ones among them)."""
        lanes = list(self._lanes.items())  # the engine's thread may add one meanwhile
        return {key: (len(lane.running), len(lane.samples) - len(lane.running)) for key, lane in lanes}

    def parked(self) -> int:
        """Samples that had begun and wait for a slot again."""
        return sum(lane.parked for lane in list(self._lanes.values()))

    def widths(self) -> dict[str, int]:
        """By lane, how many samples may run at once."""
        return {key: lane.width for key, lane in list(self._lanes.items())}

    def run(self) -> None:
        """Work until :meth:`stop`; :attr:`crashed` tells if it ended some other way."""
        try:
            while not self._stop:
                self._wake.clear()
                if not self.step():
                    self._wake.wait(timeout=0.2)  # deadlines of waiting requests are looked at now and then
        finally:
            self.crashed = not self._stop

    def stop(self) -> None:
        """Let :meth:`run` return after the current step."""
        self._stop = True
        self._wake.set()

    def step(self) -> bool:
        """Obey orders, drop what is overdue, and take one step of every lane that has work."""
        while self._orders:
            self._orders.popleft()()
        now = self.clock()
        for request in [r for r in self._requests.values() if r.deadline is not None and r.deadline <= now]:
            self._fail(request, "deadline", "the deadline passed before the job was done")
        worked = False
        for lane in list(self._lanes.values()):
            if lane.samples:
                self._step_lane(lane, now)
                worked = True
        return worked

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        self._wake.set()

    def _admit(self, request: Request) -> None:
        try:
            for stages in request.stages:
                for stage in stages:
                    self._lanes[stage.lane].denoiser.check(stage.spec)
        except KeyError as error:
            self._on_event(Failed(request, "unloaded", f"model {error} is not loaded"))
            return
        except ValueError as error:
            self._on_event(Failed(request, "error", str(error)))
            return
        self._requests[request.id] = request
        for sample in request.samples:
            self._lanes[sample.stages[0].lane].add(sample)

    def _step_lane(self, lane: Lane[Sample], now: float) -> None:
        for sample in lane.arrange(self._policy, now):
            if not sample.request.started:
                sample.request.started = True
                self._on_event(Started(sample.request))
        try:
            report = lane.step()
        except Exception as error:  # whatever a step raises must not end the worker
            self._recover(lane, error)
            return
        self._on_step(report)
        for sample in lane.running:
            sample.steps_done += 1
            sample.request.remaining -= 1
        for sample in lane.broken():
            self._fail(sample.request, "error", f"picture {sample.index} became infinite or NaN while sampling")
        for sample, x in lane.retire():
            self._finish_stage(sample, x)
        for sample in lane.running:
            every = sample.request.preview_every
            if every and sample.steps_done % every == 0:
                self._on_event(Preview(sample, sample.steps_done, lane.preview(sample)))

    def _recover(self, lane: Lane[Sample], error: Exception) -> None:
        count = len(lane.running)
        culprits = []
        if count == 1:
            culprits = [(lane.running[0], error)]
        elif not out_of_memory(error):
            log.error("lane %s: a step of %d samples failed", lane.key, count, exc_info=error)
            culprits = lane.find_culprits()
        for sample, cause in culprits:
            self._fail(sample.request, "error", f"sampling failed: {type(cause).__name__}: {cause}")
        if not culprits:  # nobody has taken the step; the next pass tries it narrower
            lane.width = count // 2
            log.warning("lane %s: failed at width %d (%s); now %d", lane.key, count, error, lane.width)

    def _finish_stage(self, sample: Sample, x: Tensor) -> None:
        sample.stage += 1
        if sample.stage < len(sample.stages):
            # Between the stages pictures are rounded to 8 bits, as in the published pipeline.
            sample.low_res = from_pixels(to_pixels(x[None].cpu()))
            self._lanes[sample.stages[sample.stage].lane].add(sample)
            return
        request = sample.request
        if all(s.stage == len(s.stages) for s in request.samples):
            self._requests.pop(request.id, None)
        self._on_event(Finished(sample, x.cpu()))

    def _fail(self, request: Request, kind: FailureKind, message: str) -> None:
        if self._requests.pop(request.id, None) is None:
            return  # two of its samples failed at the same step
        for lane in self._lanes.values():
            lane.drop(request.samples)
        self._on_event(Failed(request, kind, message))


def stage_of(lane: str, spec: SampleSpec, denoiser: Denoiser) -> Stage:
    """A stage, its steps counted from the model's process."""
    return Stage(lane, spec, len(respaced_timesteps(denoiser.diffusion.diffusion_steps, spec.respacing)))


@torch.no_grad()
def measure_width(denoiser: Denoiser, *, max_width: int, budget_s: float = 10.0, tolerance: float = 0.05) -> int:
    """The narrowest batch whose throughput is within ``tolerance`` of the best.

    Steps as requests will take them (guided where there is a classifier) are timed at widths 1, 2, 4,
    ... until memory or time runs out or wider stops paying.
    """
    label = 0 if denoiser.num_classes else None
    scale = 1.0 if denoiser.classifier is not None else 0.0
    rates: dict[int, float] = {}
    width, spent = 1, 0.0
    while width <= max_width and spent < budget_s:
        specs = [SampleSpec(seed=i, label=label, guidance_scale=scale) for i in range(width)]
        low_res = denoiser.low_res_shape
        try:
            batch = SampleBatch(denoiser, specs, low_res=None if low_res is None else torch.zeros(width, *low_res))
            batch.step()  # allocations and kernel choice
            times = []
            for _ in range(3):
                began = time.perf_counter()
                batch.step()
                batch.x.sum().item()  # waits for the device
                times.append(time.perf_counter() - began)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            break
        spent += sum(times) * 4 / 3
        rates[width] = width / min(times)
        if rates[width] < max(rates.values()) * (1 - 2 * tolerance):
            break
        width *= 2
    best = max(rates.values(), default=0.0)
    return next((w for w, rate in sorted(rates.items()) if rate >= best * (1 - tolerance)), 1)
