"""Training jobs (pydantic, no torch): written by the server, run by training workers.

A job is a hash like those of sampling requests (:mod:`worker.records`), with what it is in the field
``train``, its latest figures in ``progress``; logs and figures over time are capped lists of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from uuid import uuid4

from pydantic import Field, JsonValue
from redis import Redis
from redis.client import Pipeline
from rq.job import JobStatus

from model_core.bundle import SamplingDefaults
from model_core.config import FrozenModel
from model_core.training.config import Kind
from worker import records
from worker.records import Outcome, Status

TRAIN_QUEUE = "training"
TRAIN_FUNCTION = "worker.training.train"
"""Name of the RQ job function of training jobs."""
PREFIX = "train-"
"""What ids of training jobs begin with."""
MAX_LINES = 5000
"""Lines of output kept per job."""
MAX_FIGURES = 20_000
"""Lines of figures kept per job."""


class TrainJob(FrozenModel):
    """One training run."""

    id: str = Field(pattern=rf"^{PREFIX}[0-9a-f]{{32}}$")
    created: float
    """Unix time, s."""
    what: Kind
    config: dict[str, JsonValue]
    """Validated, but for what the worker fills in: ``run_dir``, ``init`` and ``publish``."""
    init: str | None
    """Model (``name@version``) whose weights the run begins with."""
    publish: str | None
    publish_every: int | None
    publish_defaults: SamplingDefaults | None
    owner: str | None = None
    """Name of the API key that asked."""

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return int(self.config["steps"])  # type: ignore[arg-type]

    @staticmethod
    def new_id() -> str:
        """An id nobody else has."""
        return PREFIX + uuid4().hex


def log_key(job_id: str) -> str:
    """List of a run's lines of output."""
    return f"guided:log:{job_id}"


def figures_key(job_id: str) -> str:
    """List of a run's figures, JSON objects as in its ``log.jsonl``."""
    return f"guided:figures:{job_id}"


@dataclass(frozen=True)
class TrainRecord:
    """A training job's hash, read."""

    job: TrainJob
    started: float | None
    outcome: Outcome | None
    figures: Mapping[str, Any]
    """The latest line of figures of a step."""
    published: tuple[str, ...]
    """Versions published so far."""
    output: str | None
    """Folder of the run."""

    @classmethod
    def parse(cls, fields: Mapping[bytes, bytes]) -> TrainRecord | None:
        """Read the hash; ``None`` if there is no training job in it."""
        if b"train" not in fields:
            return None
        outcome = fields.get(b"outcome")
        return cls(
            job=TrainJob.model_validate_json(fields[b"train"]),
            started=float(fields[b"started"]) if b"started" in fields else None,
            outcome=Outcome.model_validate_json(outcome) if outcome else None,
            figures=json.loads(fields.get(b"progress", b"{}")),
            published=tuple(json.loads(fields.get(b"published", b"[]"))),
            output=fields[b"output"].decode() if b"output" in fields else None,
        )

    def status(self, state: JobStatus | None) -> Status:
        """Where the run is, given the state of its RQ job (``None``: gone)."""
        if self.outcome:
            return self.outcome.status
        if state in (JobStatus.FAILED, None):
            return "failed"  # abandoned too often, and cleaned up by someone who knows nothing of us
        return "running" if state == JobStatus.STARTED else "queued"


def create(pipe: Pipeline, job: TrainJob) -> None:
    """Write a new training job's record and its first event."""
    pipe.hset(records.record_key(job.id), "train", job.model_dump_json())
    pipe.zadd(records.INDEX, {job.id: job.created})
    records.add_event(pipe, job.id, "status")


def read(connection: Redis, job_id: str) -> TrainRecord | None:
    """A training job's record, if there is one."""
    fields: Any = connection.hgetall(records.record_key(job_id))
    return TrainRecord.parse(fields)


def train(job_id: str) -> NoReturn:
    """The RQ job function of training jobs; ``guided worker --queues training`` recognises its name and trains.

    Raises:
        RuntimeError: always, for a plain RQ worker cannot run it.
    """
    raise RuntimeError(f"job {job_id}: training jobs run on 'guided worker --queues training', not on 'rq worker'")
