"""RQ's lifecycle around the engine: a worker that holds many executions at once.

One thread (this one) talks to Redis: it claims jobs, keeps their heartbeats, delivers events and
results, and cleans up after dead workers. The engine samples on its own thread and never waits for
Redis; what cannot be delivered stays in the outbox until it can.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any, ClassVar

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from rq.command import parse_payload
from rq.exceptions import DeserializationError, NoSuchJobError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.suspension import is_suspended
from rq.utils import now, utcformat

from worker import records
from worker.delivery import DeliveringWorker
from worker.engine import Engine, Event
from worker.jobs import SAMPLE_FUNCTION, Priority, SampleJob, queue_name
from worker.metrics import WorkerMetrics
from worker.parts import Part
from worker.records import JobError, Outcome, record_key
from worker.registry import Registry
from worker.settings import WorkerSettings
from worker.training import figures_key, log_key
from worker.webhooks import send_webhook

log = logging.getLogger(__name__)

TICK_S = 0.25
"""Longest sleep between two looks at Redis."""
MAX_BACKOFF_S = 2.0
PROGRESS_S = 0.4
"""Time between progress reports of a job."""
AWAY = (RedisConnectionError, RedisTimeoutError)
"""What a Redis that is away, or still loading its data, raises."""


class GuidedWorker(DeliveringWorker):
    """Samples jobs of its registry's models; the engine must be running.

    Args:
        connection: Redis.
        settings: of this worker.
        engine: samples; its events must go to :attr:`events`.
        registry: its models are the queues.
        metrics: counts.
        events: the engine's.
    """

    allowed: ClassVar[frozenset[str]] = frozenset({SAMPLE_FUNCTION})
    """Job functions it acts on; it never imports or calls what a job names."""

    def __init__(
        self,
        connection: Redis,
        settings: WorkerSettings,
        engine: Engine,
        registry: Registry,
        metrics: WorkerMetrics,
        events: queue.SimpleQueue[Event],
    ) -> None:
        super().__init__(_queue_names(registry), connection, settings, engine, registry, metrics, events)
        self.metrics_url: str | None = None
        self._stop_at: float | None = None
        self._cold = False
        self._backoff = 0.0
        self._next: dict[str, float] = {}
        self._turned_queues = time.monotonic()
        self._started_at = time.time()
        self.push_exc_handler(self._abandoned)  # type: ignore[no-untyped-call]

    # --- Life -------------------------------------------------------------------------------------

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Work until a signal or shutdown command; RQ's arguments have no meaning here."""
        self._install_signal_handlers()  # type: ignore[no-untyped-call]
        while not self._reach(self._register):
            if self._stop_at is not None:
                return False
            self.wake.wait(self._backoff)
        try:
            while not self._finished():
                self.wake.wait(self._backoff or TICK_S)
                self.wake.clear()
                self._turn()
        finally:
            self.storing.shutdown()
            self.calling.shutdown()
            self._reach(self.teardown)
        return True

    def _register(self) -> None:
        self.enrol(**self._wake_channels())
        self._report()
        log.info("worker %s: takes jobs of %s", self.name, ", ".join(self.registry.names))

    def _finished(self) -> bool:
        """After a stop was asked for: whether all is done or put back."""
        if self._stop_at is None:
            return False
        idle = [p for p in self.parts.values() if not (p.request and p.request.started)]
        late = self._cold or time.monotonic() > self._stop_at
        self.put_back(list(self.parts.values()) if late else idle)
        if self._cold and self._backoff:
            return True  # Redis is away and we were told to hurry: the jobs count as abandoned
        return not self.parts and not self.outbox

    def _turn(self) -> None:
        """One round: take in what the engine did, tell Redis, claim what there is room for."""
        if self.engine.crashed:
            raise RuntimeError("the engine has crashed (see above); the jobs here are retried elsewhere")
        self.collect()
        self._start_loaded()
        if not self._reach(self.deliver):
            return
        self._every("progress", PROGRESS_S, self.report_progress)
        self._every("report", self.settings.heartbeat_ttl_s / 5, self._report)
        self._every("maintenance", float(self.settings.heartbeat_ttl_s) / 2, self.run_maintenance_tasks)
        self._every("models", self.settings.model_poll_s, self._poll_models)
        if self._stop_at is None:
            self._reach(self._claim)
            self._start_loaded()

    def _every(self, what: str, seconds: float, action: Callable[[], None]) -> None:
        if time.monotonic() >= self._next.get(what, 0.0) and self._reach(action):
            self._next[what] = time.monotonic() + seconds

    def _reach(self, action: Callable[[], None]) -> bool:
        """Do something with Redis; if it is away, back off. Whether it was there."""
        try:
            action()
        except RedisError as error:
            if not self._backoff:
                log.warning("worker %s: Redis is away (%s); sampling goes on", self.name, error)
            self.metrics.redis_down.inc()
            self.away = True
            self._backoff = min(MAX_BACKOFF_S, max(0.1, 2 * self._backoff))
            return False
        if self._backoff:
            log.info("worker %s: Redis is back", self.name)
            self._backoff, self.away = 0.0, False
            # Everyone gets the time to renew the heartbeats before anyone is taken for dead.
            self._next["maintenance"] = time.monotonic() + self.settings.heartbeat_ttl_s
            self._next["report"] = 0.0
        return True

    # --- Claiming ---------------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """Pictures to hold at most."""
        width = sum(self.engine.widths().values())
        return self.settings.window or max(8, 2 * width)

    def _claim(self) -> None:
        if is_suspended(self.connection, self):
            return
        order = list(self.queues)
        if time.monotonic() - self._turned_queues > self.settings.promote_after_s:
            # Now and then the lowest priority has the first choice, so that nothing starves.
            self._turned_queues = time.monotonic()
            order.reverse()
        for source in order:
            priority = Priority[source.name.rpartition(":")[2]]
            while sum(len(p.images) for p in self.parts.values() if p.job.priority >= priority) < self.window:
                # By way of RQ's intermediate list: a worker that dies right here loses nothing.
                popped = Queue.lmove(self.connection, source.key, None)
                if popped is None:
                    break
                self._take(source, popped[1].decode())

    def _take(self, source: Queue, rq_id: str) -> None:
        try:
            job = Job.fetch(rq_id, connection=self.connection, serializer=self.serializer)
        except NoSuchJobError:
            source.intermediate_queue.remove(rq_id)
            return
        if job.get_status(refresh=False) != JobStatus.QUEUED:  # cancelled, or done by a worker thought dead
            source.intermediate_queue.remove(rq_id)
            return
        execution = self.prepare_execution(job)
        try:
            self.prepare_job_execution(job, remove_from_intermediate_queue=True)
            part = self._read_part(job, source, execution)
        except (DeserializationError, ValueError, TypeError, KeyError) as error:
            self._refuse(job, source, execution, f"refused: {error}")
            self.rest()
            return
        if part is None:  # the request has ended, or is gone
            self.drop(job, source, execution)
            self.rest()
            return
        if held := self.parts.get(part.id):  # this worker was thought dead, and still has it
            held.rq_job, held.queue, held.execution = job, source, execution
            return
        self.parts[part.id] = part

    def _refuse(self, job: Job, source: Queue, execution: Execution, reason: str) -> None:
        """Fail an RQ job that cannot be run, and the request it is a part of, if it is one."""
        log.error("job %s: %s", job.id, reason)
        source.intermediate_queue.remove(job.id)
        self.give_up(job, source, execution, reason)
        self._fail_request(job.id.partition("-")[0], JobError(kind="error", message=reason))

    def _fail_request(self, job_id: str, error: JobError) -> None:
        outcome = Outcome(status="failed", at=time.time(), error=error)
        record = records.read(self.connection, job_id)
        if record and records.end(self.connection, job_id, outcome, self.settings.result_ttl_s):
            self.calling.submit(send_webhook, record.job, outcome, self.settings)

    def _read_part(self, job: Job, source: Queue, execution: Execution) -> Part | None:
        if job.func_name not in self.allowed:
            raise ValueError(f"{job.func_name!r} is not a job function this worker runs")
        job_id, number = job.args
        record = records.read(self.connection, str(job_id))
        if record is None or record.outcome is not None:
            return None
        if not 0 <= int(number) < len(record.job.parts) or record.job.part_id(int(number)) != job.id:
            raise ValueError(f"it has no part {number}")
        versions = tuple(self._fix_version(record.job, i) for i in range(len(record.job.stages)))
        loads = [
            self.registry.get(stage.model, version) for stage, version in zip(record.job.stages, versions, strict=True)
        ]
        done = set(record.done) & set(record.job.parts[int(number)])
        return Part(record.job, int(number), job, source, execution, versions, loads, done=done)

    def _fix_version(self, job: SampleJob, stage: int) -> str:
        """The version a stage runs on: the first worker to take the job decides for all parts and retries."""
        plan = job.stages[stage]
        if plan.version is not None:
            return plan.version
        field = f"version{stage}"
        self.connection.hsetnx(record_key(job.id), field, self.registry.current(plan.model))
        fixed: Any = self.connection.hget(record_key(job.id), field)
        return str(fixed.decode())

    def _start_loaded(self) -> None:
        """Hand parts to the engine whose models are ready."""
        for part in list(self.parts.values()):
            if not part.todo and not part.over:  # its worker died between the last picture and saying so
                part.over = True
                self.outbox.append(partial(self.finish, part))
            if part.request is not None or part.over or not all(load.done() for load in part.loads):
                continue
            if error := next((e for load in part.loads if (e := load.exception())), None):
                self.fail(part, JobError(kind="error", message=str(error)))
                continue
            self.engine.submit(part.build_request(self.engine.clock))

    # --- Upkeep -----------------------------------------------------------------------------------

    def _report(self) -> None:
        """Heartbeats of this worker and all it holds, and what it says about itself."""
        ttl = self.settings.heartbeat_ttl_s
        with self.connection.pipeline() as pipe:
            pipe.hset(self.key, mapping=self.serialize())
            self.heartbeat(ttl, pipeline=pipe)
            pipe.sadd(self.redis_workers_keys, self.key)
            for source in self.queues:
                pipe.sadd(f"rq:workers:{source.name}", self.key)
            for part in self.parts.values():
                part.execution.save(ttl, pipeline=pipe)
                part.execution.heartbeat(part.rq_job.started_job_registry, ttl, pipeline=pipe)
                pipe.hset(part.rq_job.key, "last_heartbeat", utcformat(part.execution.last_heartbeat))
            pipe.set(records.worker_key(self.name), self._about().model_dump_json(), ex=ttl)
            pipe.execute()
        self.metrics.observe_engine(self.engine)

    def _about(self) -> records.WorkerReport:
        counts, widths = self.engine.counts(), self.engine.widths()
        lanes = tuple(
            records.LaneReport(
                model=loaded.bundle.name,
                version=loaded.bundle.version,
                width=widths.get(loaded.key, loaded.width),
                running=counts.get(loaded.key, (0, 0))[0],
                waiting=counts.get(loaded.key, (0, 0))[1],
                load_seconds=loaded.seconds,
            )
            for loaded in self.registry.loaded
        )
        return records.WorkerReport(
            name=self.name,
            hostname=self.hostname or "",
            pid=self.pid or 0,
            started=self._started_at,
            device=str(self.registry.device),
            dtype=str(self.registry.dtype).removeprefix("torch."),
            models=tuple(self.registry.names),
            lanes=lanes,
            steps_per_second=self.metrics.steps_per_second,
            steps_per_part=self.steps_per_part,
            remaining_steps=sum(p.request.remaining for p in self.parts.values() if p.request),
            metrics_url=self.metrics_url,
        )

    def clean_registries(self) -> None:
        """As any worker, and delete what has outlived its time."""
        super().clean_registries()
        self._sweep()

    def _abandoned(self, job: Job, *exc_info: Any) -> None:
        """RQ found a job whose worker died; it is retried, or failed if it was retried too often."""
        model = job.origin.rpartition(":")[0]
        if job.retries_left:
            log.warning("job %s: its worker died; put back (%d retries left)", job.id, job.retries_left - 1)
            self.metrics.retries.labels(model).inc()
            return
        self._fail_request(str(job.args[0]), JobError(kind="abandoned", message=records.ABANDONED))

    def _sweep(self) -> None:
        """Delete what has outlived its time."""
        due: Any = self.connection.zrangebyscore(records.EXPIRY, 0, time.time(), start=0, num=100)
        for member in due:
            job_id = member.decode()
            try:
                self.artifacts.delete(job_id)
            except Exception as error:  # the store is away: tried again next time
                log.warning("job %s: its pictures could not be deleted: %s", job_id, error)
                continue
            with self.connection.pipeline() as pipe:
                pipe.delete(record_key(job_id), records.events_key(job_id), log_key(job_id), figures_key(job_id))
                pipe.zrem(records.INDEX, job_id)
                pipe.zrem(records.EXPIRY, job_id)
                pipe.execute()

    def _poll_models(self) -> None:
        self.registry.poll()
        self.registry.tidy()
        names = _queue_names(self.registry)
        if len(names) != len(self.queues):  # a model was published that was not there before
            self.queues = [Queue(name, connection=self.connection, serializer=self.serializer) for name in names]
            self._ordered_queues = self.queues[:]
            self.pubsub.subscribe(**self._wake_channels())
            self._next["report"] = 0.0
            log.info("worker %s: takes jobs of %s", self.name, ", ".join(self.registry.names))

    # --- Stopping ---------------------------------------------------------------------------------

    def _wake_channels(self) -> dict[str, Any]:
        return {records.wake_channel(model): lambda message: self.wake.set() for model in self.registry.names}

    def handle_payload(self, message: Any) -> None:
        """RQ's commands: stop-job and stop-execution cancel the request, shutdown is as SIGTERM."""
        payload = parse_payload(message)
        match payload.get("command"):
            case "stop-job" | "stop-execution":
                if part := self.parts.get(payload.get("job_id", "")):
                    self.cancel(part)
            case "shutdown":
                os.kill(os.getpid(), signal.SIGTERM)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """First signal: no new jobs, finish within the grace period, put back the rest. Second: put all back now."""
        if self._stop_at is None:
            log.info("worker %s: stopping; %d jobs to finish or put back", self.name, len(self.parts))
            self._stop_at = time.monotonic() + self.settings.grace_s
            self._shutdown_requested_date = now()
        elif (now() - (self._shutdown_requested_date or now())).total_seconds() > 1:
            self._cold = True  # within a second it is the same Ctrl-C, told twice
        # No wake.set() here: the main thread may be inside wake.wait(), whose lock is not reentrant.


def _queue_names(registry: Registry) -> list[str]:
    """Queues of the models served, high priority first."""
    return [queue_name(model, p) for p in sorted(Priority, reverse=True) for model in registry.names]
