"""A part of a request on a worker: from its RQ job to engine samples, and from samples to stored pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from rq.executions import Execution
from rq.job import Job
from rq.queue import Queue
from torch import Tensor

from model_core.denoiser import SampleSpec
from model_core.pictures import to_pixels
from model_core.samplers import SAMPLERS
from worker.artifacts import ArtifactStore, encode_picture
from worker.engine import Request, Stage
from worker.jobs import SampleJob
from worker.registry import Loaded, lane_key

STORE_ATTEMPTS = 4


@dataclass(eq=False)
class Part:
    """A part this worker holds: claimed, perhaps running."""

    job: SampleJob
    part: int
    rq_job: Job
    queue: Queue
    execution: Execution
    versions: tuple[str, ...]
    loads: list[Future[Loaded]]
    request: Request | None = None
    """The engine's view, once the models are loaded."""
    done: set[int] = field(default_factory=set)
    """Pictures that are stored."""
    reported: dict[int, int] = field(default_factory=dict)
    """Steps last written to Redis, by picture."""
    over: bool = False

    def __post_init__(self) -> None:
        self.todo = [index for index in self.images if index not in self.done]
        """Pictures to be made: those that an earlier try stored are kept."""

    @property
    def id(self) -> str:
        """Id of the RQ job and the engine's request."""
        return self.job.part_id(self.part)

    @property
    def images(self) -> range:
        """Indices of the pictures."""
        return self.job.parts[self.part]

    @property
    def lane(self) -> str:
        """The base model's lane, for metrics."""
        return lane_key(self.job.stages[0].model, self.versions[0])

    def image_of(self, sample_index: int) -> int:
        """Index in the job of a sample of :attr:`request`."""
        return self.todo[sample_index]

    def progress(self) -> dict[int, int]:
        """Steps done by each picture."""
        if self.request is None:
            return {}
        return {self.image_of(s.index): s.steps_done for s in self.request.samples}

    def build_request(self, clock: Callable[[], float]) -> Request:
        """What the engine is to do; times go from Unix time to the engine's clock."""
        shift = clock() - time.time()
        deadline = self.job.deadline
        stages = [
            tuple(
                Stage(lane_key(plan.model, version), self._spec(number, index), plan.steps)
                for number, (plan, version) in enumerate(zip(self.job.stages, self.versions, strict=True))
            )
            for index in self.todo
        ]
        self.request = Request(
            id=self.id,
            stages=stages,
            priority=int(self.job.priority),
            arrived=self.job.created + shift,
            deadline=None if deadline is None else deadline + shift,
            preview_every=self.job.preview_every,
        )
        return self.request

    def _spec(self, stage: int, index: int) -> SampleSpec:
        plan = self.job.stages[stage]
        return SampleSpec(
            seed=self.job.seed_of(index),
            stage=stage,
            respacing=plan.respacing,
            sampler=SAMPLERS[plan.sampler],
            eta=plan.eta,
            guidance_scale=plan.guidance_scale,
            guidance_interval=plan.guidance_interval,
            guidance_every=plan.guidance_every,
            label=self.job.labels[index] if plan.labelled else None,
            clip_denoised=plan.clip_denoised,
        )

    def store(self, artifacts: ArtifactStore, index: int, x: Tensor) -> None:
        """Write a finished picture (C, H, W), trying again if the store is briefly away.

        Raises:
            OSError: if it stays away.
        """
        png = encode_picture(self.job, index, self.versions, to_pixels(x[None])[0])
        for attempt in range(STORE_ATTEMPTS):
            try:
                artifacts.write(self.job.id, index, png)
                return
            except OSError:
                if attempt == STORE_ATTEMPTS - 1:
                    raise
                time.sleep(2.0**attempt)
