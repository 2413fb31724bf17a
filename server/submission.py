"""The way every request for pictures walks: planned, counted, queued, waited for."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.concurrency import run_in_threadpool

from server.context import Context
from server.problems import ProblemError
from server.schemas import GenerateRequest
from server.security import Caller
from server.store import Seen
from worker.records import FINAL, events_key


async def submit(context: Context, caller: Caller, request: GenerateRequest, key: str | None, body: bytes) -> str:
    """Queue a job; its id, or that of the job the idempotency key had before.

    Args:
        context: the application's parts.
        caller: who asks; the job is theirs, and counts towards their quota.
        request: what for.
        key: idempotency key.
        body: what a later call with this key must repeat.

    Raises:
        ProblemError: 404 for an unknown model, 422 with every field at fault, 429 if the queue is full or the quota
            used up.
    """
    job = context.planner.plan(request, caller.owner)

    def admit() -> None:
        context.limiter.work(caller.key, caller.who, job.num_images, job.num_images * job.steps)

    job_id, new = await run_in_threadpool(context.store.submit, job, key, body, admit)
    if new:
        context.metrics.submitted.labels(job.stages[0].model, job.priority.name).inc()
    return job_id


async def see(context: Context, job_id: str) -> Seen:
    """The job as it is now.

    Raises:
        ProblemError: 404, if it ended so long ago that it is no longer kept.
    """
    seen = await context.store.see(job_id)
    if seen is None:
        raise ProblemError(404, "the job is no longer there")
    return seen


async def ended(context: Context, job_id: str, wait: float | None) -> Seen:
    """The job, once it has ended or the time (s) is over."""
    clock = asyncio.get_running_loop().time
    until, last = None if wait is None else clock() + wait, "0"
    while True:
        seen = await see(context, job_id)
        left = 2.0 if until is None else until - clock()
        if seen.status in FINAL or left <= 0:
            return seen
        # Any event wakes us; without one we look again now and then.
        block = max(1, int(min(left, 2.0) * 1000))
        news: Any = await context.store.redis.xread({events_key(job_id): last}, block=block, count=1000)
        if news:
            last = news[0][1][-1][0].decode()
