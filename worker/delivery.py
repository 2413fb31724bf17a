"""What becomes of the parts a worker holds: the engine's events, told to Redis.

The engine never waits for Redis: what cannot be delivered stays in the outbox until it can. Every
delivery may be tried twice, and changes nothing the second time.
"""

from __future__ import annotations

import base64
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from redis import Redis
from rq.utils import now
from rq.worker.base import WorkerStatus

from model_core.pictures import to_pixels
from worker import records
from worker.artifacts import ArtifactStore, preview_png
from worker.base import QueueWorker
from worker.engine import Engine, Event, Failed, Finished, Preview, Started
from worker.metrics import WorkerMetrics
from worker.parts import Part
from worker.records import JobError, Outcome, add_event, record_key
from worker.registry import Registry
from worker.settings import WorkerSettings
from worker.webhooks import send_webhook

log = logging.getLogger(__name__)


class DeliveringWorker(QueueWorker):
    """An RQ worker that holds many parts at once and tells Redis what becomes of them.

    Args:
        queues: names of RQ queues.
        connection: Redis.
        settings: of this worker.
        engine: samples; it must be running.
        registry: the models.
        metrics: counts.
        events: the engine's.
    """

    def __init__(
        self,
        queues: list[str],
        connection: Redis,
        settings: WorkerSettings,
        engine: Engine,
        registry: Registry,
        metrics: WorkerMetrics,
        events: queue.SimpleQueue[Event],
    ) -> None:
        super().__init__(queues, connection, settings)
        self.engine, self.registry, self.metrics = engine, registry, metrics
        self.artifacts = ArtifactStore(settings.artifacts)
        self.parts: dict[str, Part] = {}
        self.wake = threading.Event()
        self.away = False
        """Whether Redis could not be reached last time."""
        self.steps_per_part = 0.0
        self.outbox: deque[Callable[[], None]] = deque()
        self.storing = ThreadPoolExecutor(4, thread_name_prefix="store")
        self.calling = ThreadPoolExecutor(4, thread_name_prefix="webhook")
        """Beside the storing threads: a receiver that is slow must not hold up pictures."""
        self._events = events

    # --- What the engine says ---------------------------------------------------------------------

    def collect(self) -> None:
        """Take in the engine's events; nothing here waits for Redis."""
        while True:
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            request = event.request if isinstance(event, Started | Failed) else event.sample.request
            part = self.parts.get(request.id)
            if part is None or part.over or part.request is not request:
                continue
            match event:
                case Started():
                    self.outbox.append(partial(self._deliver_start, part, time.time()))
                case Preview():
                    self._preview(part, event)
                case Finished():
                    self.storing.submit(self._store, part, event)
                case Failed(kind="cancelled"):
                    self.cancel(part)
                case Failed(kind="unloaded"):
                    self._reload(part)
                case Failed():
                    kind = "deadline" if event.kind == "deadline" else "error"
                    self.fail(part, JobError(kind=kind, message=event.message))

    def _reload(self, part: Part) -> None:
        """Its model was freed just before it could start: have it loaded again."""
        part.request = None
        part.loads = [self.registry.get(s.model, v) for s, v in zip(part.job.stages, part.versions, strict=True)]

    def _preview(self, part: Part, event: Preview) -> None:
        if self.away:
            return  # nobody is looking
        index = part.image_of(event.sample.index)
        png = base64.b64encode(preview_png(to_pixels(event.x0[None])[0])).decode()
        data = {"index": index, "steps_done": event.steps_done, "png": png}
        self.outbox.append(lambda: add_event(self.connection, part.job.id, "preview", **data))

    def _store(self, part: Part, event: Finished) -> None:
        """Write a picture; on the storing thread."""
        index = part.image_of(event.sample.index)
        try:
            part.store(self.artifacts, index, event.x)
        except Exception as error:
            message = f"picture {index} could not be stored: {error}"
            self.outbox.append(lambda: self.fail(part, JobError(kind="error", message=message)))
        else:
            self.outbox.append(lambda: self._deliver_image(part, index))
        self.wake.set()

    # --- What Redis is told -----------------------------------------------------------------------

    def deliver(self) -> None:
        """Empty the outbox, in order.

        Raises:
            RedisError: if Redis is away; the delivery that failed is tried again next time.
        """
        while self.outbox:
            self.outbox[0]()  # may raise: then it is tried again
            self.outbox.popleft()

    def _deliver_start(self, part: Part, at: float) -> None:
        if self.connection.hsetnx(record_key(part.job.id), "started", at):
            self.metrics.queue_wait.labels(part.lane).observe(at - part.job.created)
            add_event(self.connection, part.job.id, "status")

    def _deliver_image(self, part: Part, index: int) -> None:
        if part.over:
            return
        with self.connection.pipeline() as pipe:
            pipe.hset(record_key(part.job.id), mapping={f"d{index}": time.time(), f"p{index}": part.job.steps})
            add_event(pipe, part.job.id, "progress")
            pipe.execute()
        if index not in part.done:
            self.metrics.images.labels(part.lane).inc()
        part.done.add(index)
        part.reported[index] = part.job.steps
        if part.done == set(part.images):
            self.finish(part)

    def finish(self, part: Part) -> None:
        """Its pictures are all stored."""
        key = record_key(part.job.id)
        self.connection.hset(key, f"part{part.part}", 1)
        record = records.read(self.connection, part.job.id)
        if record is None:  # Redis has lost it
            self.connection.delete(key, records.events_key(part.job.id))
        elif record.parts_done == len(part.job.parts):
            self._end(part, Outcome(status="finished", at=time.time()))
        part.rq_job.ended_at = now()
        part.rq_job._result = None
        source = part.queue
        self.handle_job_success(part.rq_job, source, source.started_job_registry, part.execution)
        self._count(part, "finished")
        self._forget(part)

    def fail(self, part: Part, error: JobError) -> None:
        """Its request failed; no use in trying again."""

        def deliver() -> None:
            self._end(part, Outcome(status="failed", at=time.time(), error=error))
            self.give_up(part.rq_job, part.queue, part.execution, error.message)
            self._count(part, "failed")
            self._forget(part)

        self._close(part, deliver)

    def cancel(self, part: Part) -> None:
        """Its request has been cancelled, or has ended elsewhere."""

        def deliver() -> None:
            self._end(part, Outcome(status="cancelled", at=time.time()))
            self.drop(part.rq_job, part.queue, part.execution)
            self._count(part, "cancelled")
            self._forget(part)

        self._close(part, deliver)

    def _close(self, part: Part, deliver: Callable[[], None]) -> None:
        if not part.over:
            part.over = True
            if part.request is not None:
                self.engine.cancel(part.id)
            self.outbox.append(deliver)
            self.wake.set()

    def _end(self, part: Part, outcome: Outcome) -> None:
        job = part.job
        if not records.end(self.connection, job.id, outcome, self.settings.result_ttl_s):
            return
        self.metrics.end_to_end.labels(part.lane).observe(outcome.at - job.created)
        started: Any = self.connection.hget(record_key(job.id), "started")
        if started:
            self.metrics.run_time.labels(part.lane).observe(outcome.at - float(started))
        self.calling.submit(send_webhook, job, outcome, self.settings)

    def _count(self, part: Part, outcome: str) -> None:
        self.metrics.jobs.labels(part.lane, outcome).inc()
        steps = part.job.steps * len(part.images)
        self.steps_per_part = 0.9 * self.steps_per_part + 0.1 * steps if self.steps_per_part else steps

    def _forget(self, part: Part) -> None:
        part.over = True
        self.parts.pop(part.id, None)
        self.rest()
        self.wake.set()

    def rest(self) -> None:
        """Tell that nothing is being done, if so: RQ has called the worker busy since it took a job."""
        if not self.parts:
            self.set_state(WorkerStatus.IDLE)

    def report_progress(self) -> None:
        """Write the steps done since last time; notice requests that ended elsewhere."""
        parts = [p for p in self.parts.values() if not p.over]
        with self.connection.pipeline() as pipe:
            for part in parts:
                news = {i: n for i, n in part.progress().items() if part.reported.get(i) != n}
                part.reported.update(news)
                if news:
                    pipe.hset(record_key(part.job.id), mapping={f"p{i}": n for i, n in news.items()})
                    add_event(pipe, part.job.id, "progress")
            count = len(pipe)
            for part in parts:
                pipe.hget(record_key(part.job.id), "outcome")
            outcomes = pipe.execute()[count:]
        for part, outcome in zip(parts, outcomes, strict=True):
            if outcome:
                self.cancel(part)

    def put_back(self, parts: list[Part]) -> None:
        """Return parts to the front of their queues, at no cost of a retry."""
        for part in parts:
            if part.over:
                continue

            def deliver(part: Part = part) -> None:
                with self.connection.pipeline() as pipe:
                    pipe.multi()
                    self.cleanup_execution(part.rq_job, pipe, part.execution)
                    part.queue.enqueue_job(part.rq_job, pipeline=pipe, at_front=True)
                    add_event(pipe, part.job.id, "status")
                    pipe.publish(records.wake_channel(part.job.stages[0].model), "")
                    pipe.execute()
                self.metrics.requeued.labels(part.lane).inc()
                self._forget(part)

            self._close(part, deliver)
