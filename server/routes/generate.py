"""``POST /generate``."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from starlette.concurrency import run_in_threadpool

from server.context import Context, Ctx
from server.problems import ProblemError, responses
from server.schemas import GenerateRequest, JobView
from server.store import Seen
from server.views import view
from worker.records import FINAL, events_key

router = APIRouter(tags=["jobs"])

_LOCATION = {"Location": {"description": "The job.", "schema": {"type": "string"}}}


@router.post(
    "/generate",
    operation_id="generate",
    summary="Ask for pictures",
    status_code=202,
    response_model=JobView,
    responses={
        202: {"description": "The job is queued.", "headers": _LOCATION},
        200: {
            "description": "`Prefer: wait` was given, and the job has ended in time.",
            "model": JobView,
            "headers": _LOCATION,
        },
        **responses(400, 404, 413, 422, 429, 503),
    },
)
async def generate(
    body: GenerateRequest,
    request: Request,
    response: Response,
    context: Ctx,
    prefer: Annotated[
        str | None, Header(description="`wait=N`: answer when the job has ended, at the latest after N seconds.")
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(max_length=200, description="Calls with the same key and body get the job of the first call."),
    ] = None,
) -> JobView:
    """Queue a job. It answers at once, unless `Prefer: wait=N` asks to wait for the end."""
    wait = _wait(prefer, context)
    job = context.planner.plan(body)
    job_id, new = await run_in_threadpool(context.store.submit, job, idempotency_key, await request.body())
    if new:
        context.metrics.submitted.labels(job.stages[0].model, job.priority.name).inc()
    seen = await _ended(context, job_id, wait) if wait is not None else await _see(context, job_id)
    if wait is not None:
        response.headers["Preference-Applied"] = f"wait={wait:g}"
        if seen.status in FINAL:
            response.status_code = 200
    response.headers["Location"] = f"/jobs/{job_id}"
    return view(seen, await context.store.fleet(), context.catalog)


def _wait(prefer: str | None, context: Context) -> float | None:
    match = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,6}(?:\.[0-9]{1,3})?)\"?(?=$|[,;\s])", prefer or "")
    # Preferences that are not understood are to be ignored (RFC 7240).
    return min(float(match[1]), context.settings.max_wait_s) if match else None


async def _see(context: Context, job_id: str) -> Seen:
    seen = await context.store.see(job_id)
    if seen is None:  # ended, and its time was over before we looked
        raise ProblemError(404, "the job is no longer there")
    return seen


async def _ended(context: Context, job_id: str, wait: float) -> Seen:
    """The job, once it has ended or the time is over."""
    clock = asyncio.get_running_loop().time
    until, last = clock() + wait, "0"
    while True:
        seen = await _see(context, job_id)
        left = until - clock()
        if seen.status in FINAL or left <= 0:
            return seen
        # Any event wakes us; without one we look again now and then.
        block = max(1, int(min(left, 2.0) * 1000))
        news: Any = await context.store.redis.xread({events_key(job_id): last}, block=block, count=1000)
        if news:
            last = news[0][1][-1][0].decode()
