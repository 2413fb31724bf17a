"""What sampling and training workers have in common as RQ workers."""

from __future__ import annotations

import logging
import time
from typing import Any

from redis import Redis
from redis.exceptions import RedisError
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.queue import Queue
from rq.registry import CanceledJobRegistry, clean_registries
from rq.serializers import JSONSerializer
from rq.utils import now
from rq.worker import BaseWorker
from rq.worker.base import WorkerStatus
from rq.worker_registration import clean_worker_registry

from worker.settings import WorkerSettings

LISTEN_S = 0.25
"""Longest time a stopping worker waits for its listening thread to notice."""


class QueueWorker(BaseWorker):
    """An RQ worker of JSON jobs, whose heartbeats and clean-up all go by ``heartbeat_ttl_s``.

    Args:
        queues: names of RQ queues.
        connection: Redis.
        settings: of this worker.
    """

    def __init__(self, queues: list[str], connection: Redis, settings: WorkerSettings) -> None:
        super().__init__(
            queues,
            connection=connection,
            serializer=JSONSerializer,
            default_result_ttl=settings.result_ttl_s,
            worker_ttl=settings.heartbeat_ttl_s,
            maintenance_interval=settings.heartbeat_ttl_s,
            job_monitoring_interval=settings.heartbeat_ttl_s,
            log_job_description=False,
        )
        self.settings = settings

    def enrol(self, **channels: Any) -> None:
        """Become known to RQ, idle, and listen; see :meth:`subscribe` for the channels."""
        logging.getLogger("rq.worker").setLevel(logging.WARNING)
        self.connection.delete(self.key)  # of a try that was cut off in the middle
        self.register_birth()  # type: ignore[no-untyped-call]
        self.subscribe(**channels)
        self.set_state(WorkerStatus.IDLE)

    def give_up(self, job: Job, source: Queue, execution: Execution | None, reason: str) -> None:
        """Fail an RQ job: no use in trying again."""
        job.retries_left = 0
        job.ended_at = now()
        self.handle_job_failure(job, source, exc_string=reason, execution=execution)

    def subscribe(self, **channels: Any) -> None:
        """Listen to RQ's commands, and to further channels (name -> what to call with a message)."""
        self.pubsub: Any = self.connection.pubsub()
        self.pubsub.subscribe(**{self.pubsub_channel_name: self.handle_payload}, **channels)
        self.pubsub_thread: Any = self.pubsub.run_in_thread(
            sleep_time=LISTEN_S, daemon=True, exception_handler=self._pubsub_failed
        )

    def unsubscribe(self) -> None:
        """Listen no more. The listening thread closes its connection itself: a close from here races with it."""
        if self.pubsub_thread:
            self.pubsub_thread.stop()
            self.pubsub_thread.join(timeout=4 * LISTEN_S)

    def _pubsub_failed(self, error: BaseException, pubsub: Any, thread: Any) -> None:
        if not isinstance(error, RedisError):
            raise error
        time.sleep(1.0)  # redis-py reconnects and subscribes again

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Seconds after which a silent worker's jobs are given to others."""
        return self.settings.heartbeat_ttl_s

    def clean_registries(self) -> None:
        """Put back the jobs of dead workers; one worker at a time, with a lock that outlives it only briefly."""
        for source in self.queues:
            if not self.connection.set(source.registry_cleaning_key, 1, nx=True, ex=self.settings.heartbeat_ttl_s):
                continue
            clean_registries(source, self._exc_handlers)
            clean_worker_registry(source)
            source.intermediate_queue.cleanup(self, source)
            cancelled = CanceledJobRegistry(source.name, self.connection, serializer=self.serializer)
            self.connection.zremrangebyscore(cancelled.key, 0, time.time() - self.settings.result_ttl_s)  # RQ keeps all
            source.release_maintenance_lock()

    def drop(self, job: Job, source: Queue, execution: Execution) -> None:
        """Close an RQ job whose request has ended some other way."""
        with self.connection.pipeline() as pipe:
            job.set_status(JobStatus.CANCELED, pipeline=pipe)
            self.cleanup_execution(job, pipe, execution)
            CanceledJobRegistry(source.name, self.connection, serializer=self.serializer).add(job, pipeline=pipe)
            pipe.expire(job.key, self.settings.result_ttl_s)
            pipe.execute()
