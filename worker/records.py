"""State of requests in Redis: the names of keys and fields, and what they mean. No torch.

A request is a hash (:func:`record_key`), a stream of events, and one RQ job per part. The hash holds
the job as given, what was fixed when it was first taken, progress, and the outcome; RQ's own state
tells whether a part waits, runs or was abandoned. Both sides write each field in one place only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from redis import Redis
from redis.client import Pipeline
from rq.job import Job, JobStatus

from model_core.config import FrozenModel
from worker.jobs import SampleJob

Status = Literal["queued", "running", "finished", "failed", "cancelled"]
FINAL: tuple[Status, ...] = ("finished", "failed", "cancelled")

INDEX = "guided:jobs"
"""Sorted set of all requests by creation time."""
EXPIRY = "guided:expiry"
"""Sorted set of ended requests by the time their pictures are deleted."""
DEADLINES = "guided:deadlines"
"""Sorted set of requests that have not ended by their deadline, for those that have one."""
MAX_EVENTS = 1000
"""Events kept per request, about."""
ABANDONED = "the worker died while running this job, and so did the workers that retried it"


def record_key(job_id: str) -> str:
    """Hash of a request."""
    return f"guided:job:{job_id}"


def events_key(job_id: str) -> str:
    """Stream of a request's events."""
    return f"guided:events:{job_id}"


def worker_key(name: str) -> str:
    """JSON that a live worker keeps there about itself (:class:`WorkerReport`)."""
    return f"guided:worker:{name}"


def wake_channel(model: str) -> str:
    """Channel on which a model's workers hear that there is work."""
    return f"guided:wake:{model}"


class JobError(FrozenModel):
    """Why a request failed."""

    kind: Literal["error", "deadline", "abandoned"]
    message: str


class Outcome(FrozenModel):
    """How and when (Unix time, s) a request ended."""

    status: Literal["finished", "failed", "cancelled"]
    at: float
    error: JobError | None = None


class LaneReport(FrozenModel):
    """One model on one worker."""

    model: str
    version: str
    width: int
    running: int
    waiting: int
    load_seconds: float


class WorkerReport(FrozenModel):
    """What a live worker says about itself."""

    name: str
    hostname: str
    pid: int
    started: float
    device: str
    dtype: str
    models: tuple[str, ...]
    """Models it takes jobs of."""
    lanes: tuple[LaneReport, ...]
    steps_per_second: float
    """Sample-steps per second while busy; 0 before the first."""
    steps_per_part: float
    """Steps of a part, on average; 0 before the first."""
    remaining_steps: int
    """Steps left of all it holds."""
    metrics_url: str | None


@dataclass(frozen=True)
class Record:
    """A request's hash, read."""

    job: SampleJob
    versions: tuple[str | None, ...]
    """Version of each stage's model, once fixed."""
    started: float | None
    outcome: Outcome | None
    steps_done: Mapping[int, int]
    """By picture."""
    done: frozenset[int]
    """Pictures that are stored."""
    parts_done: int

    @classmethod
    def parse(cls, fields: Mapping[bytes, bytes]) -> Record | None:
        """Read the hash; ``None`` if there is no request in it."""
        if b"job" not in fields:
            return None
        job = SampleJob.model_validate_json(fields[b"job"])
        versions = tuple(
            (fields[b"version%d" % i].decode() if b"version%d" % i in fields else stage.version)
            for i, stage in enumerate(job.stages)
        )
        outcome = fields.get(b"outcome")
        return cls(
            job=job,
            versions=versions,
            started=float(fields[b"started"]) if b"started" in fields else None,
            outcome=Outcome.model_validate_json(outcome) if outcome else None,
            steps_done={i: int(fields.get(b"p%d" % i, 0)) for i in range(job.num_images)},
            done=frozenset(i for i in range(job.num_images) if b"d%d" % i in fields),
            parts_done=sum(name.startswith(b"part") for name in fields),
        )

    def status(self, parts: Iterable[JobStatus | None]) -> Status:
        """Where the request is, given the states of its parts' RQ jobs (``None``: gone)."""
        if self.outcome:
            return self.outcome.status
        states = set(parts)
        if JobStatus.FAILED in states:
            return "failed"  # abandoned too often, and cleaned up by someone who knows nothing of us
        if self.parts_done == len(self.job.parts) and states <= {JobStatus.FINISHED, None}:
            return "finished"  # the worker died after the last picture, before it could say so
        live = JobStatus.STARTED in states or self.parts_done > 0
        return "running" if self.started is not None and live else "queued"


def read(connection: Redis, job_id: str) -> Record | None:
    """A request's record, if there is one."""
    fields: Any = connection.hgetall(record_key(job_id))
    return Record.parse(fields)


def create(pipe: Pipeline, job: SampleJob) -> None:
    """Write a new request's record and its first event."""
    pipe.hset(record_key(job.id), "job", job.model_dump_json())
    pipe.zadd(INDEX, {job.id: job.created})
    if job.deadline is not None:
        pipe.zadd(DEADLINES, {job.id: job.deadline})
    add_event(pipe, job.id, "status")


def add_event(pipe: Redis | Pipeline, job_id: str, event: str, **data: Any) -> None:
    """Append to a request's events."""
    pipe.xadd(events_key(job_id), {"event": event, "data": json.dumps(data)}, maxlen=MAX_EVENTS, approximate=True)


def end(connection: Redis, job_id: str, outcome: Outcome, ttl: int) -> bool:
    """Write how a request ended, unless it has ended already; whether this call ended it."""
    key = record_key(job_id)

    def write(pipe: Pipeline) -> Any:
        if not pipe.exists(key) or pipe.hexists(key, "outcome"):
            return False
        pipe.multi()
        pipe.hset(key, "outcome", outcome.model_dump_json())
        add_event(pipe, job_id, "done")
        pipe.zrem(DEADLINES, job_id)
        pipe.zadd(EXPIRY, {job_id: outcome.at + ttl})
        # The sweep deletes all at once; the times to live only catch what it should miss.
        for name in (key, events_key(job_id)):
            pipe.expire(name, ttl + 3600)
        return True

    return bool(connection.transaction(write, key, value_from_callable=True))  # all of it or nothing


def part_states(connection: Redis, job: SampleJob) -> list[JobStatus | None]:
    """States of the parts' RQ jobs."""
    with connection.pipeline() as pipe:
        for part in range(len(job.parts)):
            pipe.hget(Job.key_for(job.part_id(part)), "status")
        return [parse_state(state) for state in pipe.execute()]


def parse_state(state: bytes | None) -> JobStatus | None:
    """An RQ job's status field."""
    return JobStatus(state.decode()) if state else None
