"""Requests in Redis, from the server's side: put into the queue, read, cancelled."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.exceptions import WatchError
from redis.retry import Retry as ReconnectPolicy
from rq.command import send_stop_job_command
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job, JobStatus, Retry
from rq.queue import Queue
from rq.serializers import JSONSerializer

from server.problems import ProblemError
from server.schemas import Status
from worker import records, training
from worker.jobs import SAMPLE_FUNCTION, Priority, SampleJob, queue_name
from worker.records import JobError, Outcome, Record, WorkerReport
from worker.training import TRAIN_FUNCTION, TRAIN_QUEUE, TrainJob, TrainRecord

RETRIES = 3
"""Times a job whose worker died is given to another."""
PATIENCE_S = 3.0
"""Time after a deadline in which the worker that runs a job may end it itself."""
SOCKET_S = 5.0
IDEMPOTENCY = "guided:idempotency:"
FLEET_S = 1.0
"""Time for which what workers said about themselves is not read again."""


@dataclass(frozen=True)
class Fleet:
    """The live workers."""

    workers: tuple[WorkerReport, ...]

    def of(self, model: str) -> list[WorkerReport]:
        """Workers that take a model's jobs."""
        return [w for w in self.workers if model in w.models]

    def steps_per_second(self, model: str) -> float:
        """Sample-steps per second the model's workers do, as measured; 0 if nothing has been."""
        return sum(w.steps_per_second for w in self.of(model))

    def steps_per_part(self, model: str) -> float:
        """Steps of a part on average, as measured; 0 if nothing has been."""
        measured = [w.steps_per_part for w in self.of(model) if w.steps_per_part]
        return sum(measured) / len(measured) if measured else 0.0

    def remaining_steps(self, model: str) -> int:
        """Steps left of all that the model's workers hold."""
        return sum(w.remaining_steps for w in self.of(model))


@dataclass(frozen=True)
class Seen:
    """A request as it is now."""

    record: Record
    status: Status
    position: int | None
    """Parts of other requests before it, if it is queued."""


@dataclass(frozen=True)
class SeenTraining:
    """A training job as it is now."""

    record: TrainRecord
    status: Status


class JobStore:
    """Writes through RQ (blocking; call it on a thread), reads asynchronously.

    Args:
        url: of Redis.
        max_queued: parts that may wait per model.
        max_training_queued: training jobs that may wait.
        result_ttl: seconds ended jobs are kept.
        idempotency_ttl: seconds an idempotency key is remembered.
    """

    def __init__(
        self, url: str, *, max_queued: int, result_ttl: int, idempotency_ttl: int, max_training_queued: int = 100
    ) -> None:
        once = ReconnectPolicy(NoBackoff(), 1)
        self.blocking = Redis.from_url(url, socket_timeout=SOCKET_S, socket_connect_timeout=2, retry=once, protocol=2)
        self.redis: AsyncRedis = AsyncRedis.from_url(url, socket_connect_timeout=2, socket_timeout=SOCKET_S, protocol=2)
        self._max_queued, self._result_ttl, self._idempotency_ttl = max_queued, result_ttl, idempotency_ttl
        self._max_training_queued = max_training_queued
        self._queues: dict[str, Queue] = {}
        self._fleet, self._fleet_read = Fleet(()), float("-inf")

    async def close(self) -> None:
        """Close the connections."""
        await self.redis.aclose()
        self.blocking.close()

    # --- Writing ----------------------------------------------------------------------------------

    def submit(
        self, job: SampleJob, key: str | None, body: bytes, admit: Callable[[], None] = lambda: None
    ) -> tuple[str, bool]:
        """Put a request into the queue.

        Args:
            job: the request.
            key: idempotency key; each owner has their own.
            body: what a later call with this key must repeat.
            admit: called before a new job is queued; raises to prevent it.

        Returns:
            Id of the job, and whether it is new.

        Raises:
            ProblemError: 422 if the key came with another body, 429 if the queue is full.
        """

        def check() -> None:
            self._check_room(job)
            admit()

        return self._submit(job, key, body, check, lambda pipe: self._enqueue(pipe, job))

    def submit_training(self, job: TrainJob, key: str | None, body: bytes) -> str:
        """Put a training job into its queue; its id, or that of the job the key had before.

        Raises:
            ProblemError: 422 if the key came with another body, 429 if the queue is full.
        """
        queue = self._queue(TRAIN_QUEUE)

        def check_room() -> None:
            if len(queue) >= self._max_training_queued:
                raise ProblemError(429, f"{len(queue)} training jobs wait already", retry_after=60)

        def enqueue(pipe: Pipeline) -> None:
            training.create(pipe, job)
            rq_job = queue.create_job(
                TRAIN_FUNCTION,
                args=(job.id,),
                job_id=job.id,
                timeout=-1,
                result_ttl=self._result_ttl,
                failure_ttl=self._result_ttl,
                description=f"{job.what}, {job.steps} steps",
                retry=Retry(RETRIES, enqueue_at_front=True),
            )
            queue.enqueue_job(rq_job, pipeline=pipe)

        return self._submit(job, key, body, check_room, enqueue)[0]

    def _submit(
        self,
        job: SampleJob | TrainJob,
        key: str | None,
        body: bytes,
        check_room: Callable[[], None],
        enqueue: Callable[[Pipeline], None],
    ) -> tuple[str, bool]:
        if key is None:
            check_room()
            with self.blocking.pipeline() as pipe:
                pipe.multi()
                enqueue(pipe)
                pipe.execute()
            return job.id, True
        name = IDEMPOTENCY + hashlib.sha256(f"{job.owner or ''} {key}".encode()).hexdigest()
        digest = hashlib.sha256(body).hexdigest()
        while True:
            with self.blocking.pipeline() as pipe:
                try:
                    pipe.watch(name)
                    known: Any = pipe.get(name)
                    if known is not None:
                        known_id, _, known_digest = known.decode().partition(" ")
                        if known_digest != digest:
                            raise ProblemError(422, "Idempotency-Key: it was used with another body")
                        return known_id, False
                    check_room()
                    pipe.multi()
                    pipe.set(name, f"{job.id} {digest}", ex=self._idempotency_ttl)
                    enqueue(pipe)
                    pipe.execute()
                    return job.id, True
                except WatchError:
                    continue  # the same key came twice at once: look again

    def _check_room(self, job: SampleJob) -> None:
        model = job.stages[0].model
        with self.blocking.pipeline(transaction=False) as pipe:
            for priority in Priority:
                pipe.llen(self._queue(queue_name(model, priority)).key)
            waiting = sum(pipe.execute())
        over = waiting + len(job.parts) - self._max_queued
        if over > 0:
            raise ProblemError(
                429,
                f"{waiting} parts of requests wait for {model}, and {self._max_queued} may",
                retry_after=self._time_for(model, over),
            )

    def _time_for(self, model: str, parts: int) -> int:
        """Seconds the workers need for some parts, at their measured rate."""
        rate, work = self._fleet.steps_per_second(model), self._fleet.steps_per_part(model)
        return max(1, min(3600, round(parts * work / rate))) if rate and work else 10

    def _queue(self, name: str) -> Queue:
        if name not in self._queues:
            self._queues[name] = Queue(name, connection=self.blocking, serializer=JSONSerializer)
        return self._queues[name]

    def _enqueue(self, pipe: Pipeline, job: SampleJob) -> None:
        records.create(pipe, job)
        queue = self._queue(job.queue)
        what = f"{job.num_images} x {job.steps} steps"
        for part in range(len(job.parts)):
            rq_job = queue.create_job(
                SAMPLE_FUNCTION,
                args=(job.id, part),
                job_id=job.part_id(part),
                timeout=-1,
                result_ttl=self._result_ttl,
                failure_ttl=self._result_ttl,
                description=what,
                retry=Retry(RETRIES, enqueue_at_front=True),
            )
            queue.enqueue_job(rq_job, pipeline=pipe)
        pipe.publish(records.wake_channel(job.stages[0].model), "")

    def cancel(self, job: SampleJob) -> Outcome | None:
        """End a request, wherever it is; ``None`` if it had ended already."""
        return self._end(job, Outcome(status="cancelled", at=time.time()))

    def end_overdue(self) -> list[tuple[SampleJob, Outcome]]:
        """End the requests whose deadline has passed while they waited; those that were ended.

        Workers end what they hold themselves, so there is a little patience with them.
        """
        due: Any = self.blocking.zrangebyscore(records.DEADLINES, 0, time.time() - PATIENCE_S, start=0, num=100)
        ended = []
        for member in due:
            record = records.read(self.blocking, member.decode())
            error = JobError(kind="deadline", message="the deadline passed before the job was done")
            outcome = Outcome(status="failed", at=time.time(), error=error)
            if record and self._end(record.job, outcome):
                ended.append((record.job, outcome))
            self.blocking.zrem(records.DEADLINES, member)
        return ended

    def _end(self, job: SampleJob, outcome: Outcome) -> Outcome | None:
        if not records.end(self.blocking, job.id, outcome, self._result_ttl):
            return None
        for part in range(len(job.parts)):
            self._cancel_part(job.part_id(part))
        return outcome

    def cancel_training(self, job_id: str) -> None:
        """End a training job, wherever it is; one that has ended stays as it is."""
        if records.end(self.blocking, job_id, Outcome(status="cancelled", at=time.time()), self._result_ttl):
            self._cancel_part(job_id)

    def _cancel_part(self, rq_id: str) -> None:
        try:
            job = Job.fetch(rq_id, connection=self.blocking, serializer=JSONSerializer)
            if job.is_queued:
                job.cancel()
                self.blocking.expire(job.key, self._result_ttl)
            elif job.is_started:
                send_stop_job_command(self.blocking, rq_id, serializer=JSONSerializer)
        except (NoSuchJobError, InvalidJobOperation):
            pass  # it ended meanwhile

    # --- Reading ----------------------------------------------------------------------------------

    async def see(self, job_id: str) -> Seen | None:
        """A request as it is now, if there is one."""
        found = await self.see_many([job_id])
        return found[0]

    async def see_many(self, job_ids: Sequence[str], *, positions: bool = True) -> list[Seen | None]:
        """Requests as they are now, on demand with their place in the queue; ``None`` where there is none."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hgetall(records.record_key(job_id))
                pipe.hget(Job.key_for(job_id), "status")
            answers: list[Any] = await pipe.execute()
        seen: list[Seen | None] = []
        for fields, state in zip(answers[::2], answers[1::2], strict=True):
            record = Record.parse(fields)
            seen.append(await self._place(record, state, positions) if record else None)
        return seen

    async def see_training(self, job_id: str) -> SeenTraining | None:
        """A training job as it is now, if there is one."""
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.hgetall(records.record_key(job_id))
            pipe.hget(Job.key_for(job_id), "status")
            fields, state = await pipe.execute()
        record = TrainRecord.parse(fields)
        return SeenTraining(record, record.status(records.parse_state(state))) if record else None

    async def _place(self, record: Record, state: bytes | None, positions: bool) -> Seen:
        job = record.job
        states: list[JobStatus | None] = [records.parse_state(state)]
        if record.outcome is None and len(job.parts) > 1:
            async with self.redis.pipeline(transaction=False) as pipe:
                for part in range(1, len(job.parts)):
                    pipe.hget(Job.key_for(job.part_id(part)), "status")
                states += [records.parse_state(s) for s in await pipe.execute()]
        status = record.status(states)
        wanted = positions and status == "queued"
        return Seen(record, status, await self._position(job) if wanted else None)

    async def _position(self, job: SampleJob) -> int:
        model = job.stages[0].model
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.lpos(f"{Queue.redis_queue_namespace_prefix}{job.queue}", job.id)
            for priority in Priority:
                if priority > job.priority:
                    pipe.llen(f"{Queue.redis_queue_namespace_prefix}{queue_name(model, priority)}")
            place, *before = await pipe.execute()
        # Not in the queue any more: a worker has taken it and will start it soon.
        return 0 if place is None else place + sum(before)

    async def page(self, before: float | None, count: int) -> list[tuple[str, float]]:
        """Ids of requests, newest first, with their creation times; those made before a time."""
        top = "+inf" if before is None else f"({before!r}"
        found: Any = await self.redis.zrange(
            records.INDEX, top, "-inf", desc=True, byscore=True, offset=0, num=count, withscores=True
        )
        return [(member.decode(), float(score)) for member, score in found]

    async def fleet(self) -> Fleet:
        """The live workers, as they last reported."""
        if time.monotonic() - self._fleet_read > FLEET_S:
            keys: Any = await self.redis.smembers("rq:workers")
            names = [key.decode().removeprefix("rq:worker:") for key in keys]
            reports: Any = await self.redis.mget([records.worker_key(n) for n in names]) if names else []
            workers = [WorkerReport.model_validate_json(report) for report in reports if report]
            self._fleet, self._fleet_read = Fleet(tuple(workers)), time.monotonic()
        return self._fleet

    async def depths(self, models: Sequence[str]) -> list[tuple[str, str, int, float]]:
        """By model and priority: parts that wait, and the age of the oldest, s."""
        names = [(model, priority) for model in models for priority in Priority]
        async with self.redis.pipeline(transaction=False) as pipe:
            for model, priority in names:
                key = f"{Queue.redis_queue_namespace_prefix}{queue_name(model, priority)}"
                pipe.llen(key)
                pipe.lindex(key, 0)
            answers: list[Any] = await pipe.execute()
        now, depths = time.time(), []
        for (model, priority), length, oldest in zip(names, answers[::2], answers[1::2], strict=True):
            age = 0.0
            if oldest:
                created = await self.redis.zscore(records.INDEX, oldest.decode().partition("-")[0])
                age = max(0.0, now - float(created)) if created else 0.0
            depths.append((model, priority.name, int(length), age))
        return depths

    async def training_depth(self) -> tuple[int, int, int]:
        """Training jobs that wait and that run, and live training workers."""
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.llen(f"{Queue.redis_queue_namespace_prefix}{TRAIN_QUEUE}")
            pipe.zcard(f"rq:wip:{TRAIN_QUEUE}")
            pipe.smembers(f"rq:workers:{TRAIN_QUEUE}")
            queued, running, keys = await pipe.execute()
        alive: int = await self.redis.exists(*keys) if keys else 0
        return int(queued), int(running), alive
