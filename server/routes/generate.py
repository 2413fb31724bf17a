"""``POST /generate``."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from server.context import Context, Ctx
from server.problems import responses
from server.schemas import GenerateRequest, JobView
from server.security import Who, requires
from server.submission import ended, see, submit
from server.views import view
from worker.records import FINAL

router = APIRouter(tags=["jobs"])

_LOCATION = {"Location": {"description": "The job.", "schema": {"type": "string"}}}


@router.post(
    "/generate",
    operation_id="generate",
    summary="Ask for pictures",
    status_code=202,
    response_model=JobView,
    dependencies=[requires("generate")],
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
    caller: Who,
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
    job_id = await submit(context, caller, body, idempotency_key, await request.body())
    seen = await ended(context, job_id, wait) if wait is not None else await see(context, job_id)
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
