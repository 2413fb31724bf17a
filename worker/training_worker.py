"""``guided worker --queues training``: runs one training job at a time as a torchrun child."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from types import FrameType
from typing import Any, ClassVar

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from rq.command import parse_payload
from rq.exceptions import DeserializationError, NoSuchJobError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.utils import now
from rq.worker.base import WorkerStatus

from worker import records
from worker.base import QueueWorker
from worker.records import JobError, Outcome, add_event, record_key
from worker.settings import WorkerSettings
from worker.training import (
    MAX_FIGURES,
    MAX_LINES,
    TRAIN_FUNCTION,
    TRAIN_QUEUE,
    TrainJob,
    figures_key,
    log_key,
    read,
)
from worker.training_run import TrainingRun

log = logging.getLogger(__name__)

TICK_S = 0.5


class TrainingWorker(QueueWorker):
    """Takes training jobs; RQ's registries, heartbeats and retries are as in any worker.

    Args:
        connection: Redis.
        settings: of this worker.
    """

    allowed: ClassVar[frozenset[str]] = frozenset({TRAIN_FUNCTION})

    def __init__(self, connection: Redis, settings: WorkerSettings) -> None:
        super().__init__([TRAIN_QUEUE], connection, settings)
        self.run: TrainingRun | None = None
        self._rq_job: Job | None = None
        self._execution: Execution | None = None
        self._stopping = False
        self._next = {"report": 0.0, "maintenance": 0.0}
        self.push_exc_handler(self._abandoned)  # type: ignore[no-untyped-call]

    @property
    def source(self) -> Queue:
        """The queue of training jobs."""
        queue: Queue = self.queues[0]
        return queue

    # --- Life -------------------------------------------------------------------------------------

    def work(self, *args: Any, **kwargs: Any) -> bool:
        """Work until a signal or shutdown command; RQ's arguments have no meaning here."""
        self._install_signal_handlers()  # type: ignore[no-untyped-call]
        registered = False
        away = False
        while not (self._stopping and self.run is None):
            try:
                if not registered:
                    self._register()
                    registered = True
                self._turn()
                away = False
            except RedisError as error:
                if not away:
                    log.warning("worker %s: Redis is away (%s); training goes on", self.name, error)
                away = True
                # Everyone gets the time to renew the heartbeats before anyone is taken for dead.
                self._next = {"report": 0.0, "maintenance": time.monotonic() + self.settings.heartbeat_ttl_s}
            time.sleep(TICK_S)
        if registered and not away:
            self.teardown()  # type: ignore[no-untyped-call]
        return True

    def _register(self) -> None:
        self.enrol()
        log.info("worker %s: takes training jobs", self.name)

    def _turn(self) -> None:
        self._every("report", self.settings.heartbeat_ttl_s / 5, self._report)
        self._every("maintenance", self.settings.heartbeat_ttl_s / 2, self.run_maintenance_tasks)
        if self.run is None and not self._stopping:
            self._claim()
        if self.run is not None:
            self._look_after(self.run)

    def _every(self, what: str, seconds: float, action: Any) -> None:
        if time.monotonic() >= self._next[what]:
            action()
            self._next[what] = time.monotonic() + seconds

    # --- A job ------------------------------------------------------------------------------------

    def _claim(self) -> None:
        popped = Queue.lmove(self.connection, self.source.key, None)
        if popped is None:
            return
        rq_id = popped[1].decode()
        try:
            job = Job.fetch(rq_id, connection=self.connection, serializer=self.serializer)
        except NoSuchJobError:
            self.source.intermediate_queue.remove(rq_id)
            return
        if job.get_status(refresh=False) != JobStatus.QUEUED:
            self.source.intermediate_queue.remove(rq_id)
            return
        execution = self.prepare_execution(job)
        try:
            self.prepare_job_execution(job, remove_from_intermediate_queue=True)
            if job.func_name not in self.allowed:
                raise ValueError(f"{job.func_name!r} is not a job function this worker runs")
            record = read(self.connection, str(job.args[0]))
        except (DeserializationError, ValueError, TypeError, KeyError, IndexError) as error:
            log.error("job %s: refused: %s", rq_id, error)
            self.give_up(job, self.source, execution, f"refused: {error}")
            refused = JobError(kind="error", message=f"refused: {error}")
            outcome = Outcome(status="failed", at=time.time(), error=refused)
            records.end(self.connection, rq_id, outcome, self.settings.result_ttl_s)
            self._forget()
            return
        self._rq_job, self._execution = job, execution
        if record is None or record.outcome is not None:
            self._drop()
            return
        self.run = TrainingRun(record.job, self.settings)
        log.info("job %s: trains in %s", record.job.id, self.run.folder)

    def _look_after(self, run: TrainingRun) -> None:
        """Start it, pass on what it says, see to its end."""
        job = run.job
        ended_elsewhere = self.connection.hexists(record_key(job.id), "outcome")
        if run.process is None:
            if ended_elsewhere:
                self._drop()
            elif self._stopping:
                self._put_back(run)
            else:
                self._start(run)
            return
        if ended_elsewhere or self._stopping:
            run.stop()
        running = run.running
        self._tell(run)
        if running:
            return
        if ended_elsewhere:
            self._drop()
        elif run.complete:
            self._finish(job)
        elif run.complete is False or self._stopping:  # killed while it saved, it goes on from the state before
            self._put_back(run)
        else:
            self._fail(job, run.last_words())

    def _start(self, run: TrainingRun) -> None:
        try:
            started = run.start()
        except (OSError, ValueError) as error:
            self._fail(run.job, str(error))
            return
        if started:
            self.connection.hset(record_key(run.job.id), "output", str(run.folder))
            self.connection.hsetnx(record_key(run.job.id), "started", str(time.time()))
            add_event(self.connection, run.job.id, "status")

    def _tell(self, run: TrainingRun) -> None:
        lines, figures = run.news("output.log"), run.news("log.jsonl")
        if not lines and not figures:
            return
        key, job_id = record_key(run.job.id), run.job.id
        parsed = [json.loads(line) for line in figures]
        with self.connection.pipeline() as pipe:
            if lines:
                pipe.rpush(log_key(job_id), *lines)
                pipe.ltrim(log_key(job_id), -MAX_LINES, -1)
            if figures:
                pipe.rpush(figures_key(job_id), *figures)
                pipe.ltrim(figures_key(job_id), -MAX_FIGURES, -1)
            for record in parsed:
                if record["kind"] == "train":
                    pipe.hset(key, "progress", json.dumps(record))
            if published := [record["model"] for record in parsed if record["kind"] == "published"]:
                known: Any = self.connection.hget(key, "published")
                pipe.hset(key, "published", json.dumps(json.loads(known or b"[]") + published))
            if figures:
                add_event(pipe, job_id, "progress")
            pipe.execute()

    # --- Ends -------------------------------------------------------------------------------------

    def _finish(self, job: TrainJob) -> None:
        self._end(job, Outcome(status="finished", at=time.time()))
        assert self._rq_job
        assert self._execution
        self._rq_job.ended_at = now()
        self._rq_job._result = None
        self.handle_job_success(self._rq_job, self.source, self.source.started_job_registry, self._execution)
        self._forget()

    def _fail(self, job: TrainJob, message: str) -> None:
        log.warning("job %s: failed: %s", job.id, message)
        self._end(job, Outcome(status="failed", at=time.time(), error=JobError(kind="error", message=message)))
        assert self._rq_job
        self.give_up(self._rq_job, self.source, self._execution, message)
        self._forget()

    def _put_back(self, run: TrainingRun) -> None:
        """Its state is saved: whoever takes it next goes on from there, at no cost of a retry."""
        assert self._rq_job
        with self.connection.pipeline() as pipe:
            pipe.multi()
            self.cleanup_execution(self._rq_job, pipe, self._execution)
            self.source.enqueue_job(self._rq_job, pipeline=pipe, at_front=True)
            add_event(pipe, run.job.id, "status")
            pipe.execute()
        self._forget()

    def _drop(self) -> None:
        assert self._rq_job
        assert self._execution
        self.drop(self._rq_job, self.source, self._execution)
        self._forget()

    def _forget(self) -> None:
        self.run = self._rq_job = self._execution = None
        self.set_state(WorkerStatus.IDLE)

    def _end(self, job: TrainJob, outcome: Outcome) -> None:
        records.end(self.connection, job.id, outcome, self.settings.result_ttl_s)

    # --- Upkeep -----------------------------------------------------------------------------------

    def _report(self) -> None:
        ttl = self.settings.heartbeat_ttl_s
        with self.connection.pipeline() as pipe:
            pipe.hset(self.key, mapping=self.serialize())
            self.heartbeat(ttl, pipeline=pipe)
            pipe.sadd(self.redis_workers_keys, self.key)
            pipe.sadd(f"rq:workers:{self.source.name}", self.key)
            if self._rq_job is not None and self._execution is not None:
                self._execution.save(ttl, pipeline=pipe)
                self._execution.heartbeat(self._rq_job.started_job_registry, ttl, pipeline=pipe)
            pipe.execute()

    def _abandoned(self, job: Job, *exc_info: Any) -> None:
        """RQ found a job whose worker died; it is retried, or failed if it was retried too often."""
        if job.retries_left:
            log.warning("job %s: its worker died; put back (%d retries left)", job.id, job.retries_left - 1)
            return
        error = JobError(kind="abandoned", message=records.ABANDONED)
        outcome = Outcome(status="failed", at=time.time(), error=error)
        records.end(self.connection, job.id, outcome, self.settings.result_ttl_s)

    # --- Signals ----------------------------------------------------------------------------------

    def handle_payload(self, message: Any) -> None:
        """RQ's commands: stop-job cancels, shutdown is as SIGTERM."""
        payload = parse_payload(message)
        match payload.get("command"):
            case "stop-job" | "stop-execution":
                if self.run is not None and payload.get("job_id") == self.run.job.id:
                    self._end(self.run.job, Outcome(status="cancelled", at=time.time()))
            case "shutdown":
                os.kill(os.getpid(), signal.SIGTERM)

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Have the run save its state, and put its job back."""
        if not self._stopping:
            log.info("worker %s: stopping%s", self.name, "; the run saves its state" if self.run else "")
        self._stopping = True


def run_training_worker(settings: WorkerSettings) -> None:
    """Work until a signal says stop.

    Raises:
        ValueError: without a Redis URL.
    """
    if settings.redis_url is None:
        raise ValueError("redis_url: a worker needs one (GUIDED_REDIS_URL); 'guided up' brings its own")
    while True:
        connection = Redis.from_url(
            settings.redis_url, retry=Retry(NoBackoff(), 0), health_check_interval=30, protocol=2
        )
        try:
            worker = TrainingWorker(connection, settings)
        except RedisError as error:
            log.warning("worker %d: waiting for Redis: %s", os.getpid(), error)
            time.sleep(1.0)
        else:
            worker.work()
            return
