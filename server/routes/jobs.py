"""Jobs: state, events, pictures, cancelling."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from server.context import Context, Ctx, FoundAny, FoundJob
from server.problems import ProblemError, responses
from server.schemas import EVENT_DOC, AnyJob, JobList, JobSummary, JobView, Status, TrainView
from server.security import Who
from server.store import Seen, SeenTraining
from server.train_views import train_progress, train_view
from server.views import progress, summary, view
from worker.artifacts import convert, decode
from worker.records import FINAL, events_key
from worker.training import PREFIX

router = APIRouter(tags=["jobs"])

JobId = Annotated[str, Path(description="Id of a job.", max_length=64)]
SCAN = 200
"""Jobs looked at in one go when a list is filtered."""
MAX_SCANS = 10
_CACHE = "private, max-age=31536000, immutable"
_IMAGE_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_NPZ = "application/x-npz"


@router.get(
    "/jobs",
    operation_id="listJobs",
    summary="List jobs, newest first",
    responses=responses(422, 503),
)
async def list_jobs(
    context: Ctx,
    caller: Who,
    status: Annotated[Status | None, Query(description="Only jobs of this status.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Jobs per page, at most.")] = 20,
    cursor: Annotated[
        str | None, Query(pattern=r"^[0-9]{1,12}\.[0-9]{1,9}$", description="`next_cursor` of the page before.")
    ] = None,
) -> JobList:
    """A page of jobs: all, or for a key without the scope `admin` its own.

    With a filter a page may hold fewer than `limit` jobs and yet not be the last.
    """
    filtered = status is not None or not caller.may("admin")
    before = float(cursor) if cursor else None
    found: list[Seen | SeenTraining] = []
    for _ in range(MAX_SCANS):
        entries = await context.store.page(before, SCAN if filtered else limit + 1)
        jobs = await _see_all(context, [job_id for job_id, _ in entries])
        for seen, (_, created) in zip(jobs, entries, strict=True):
            if seen and status in (None, seen.status) and caller.sees(seen.record.job.owner):
                if len(found) == limit:
                    return JobList(jobs=[_summary(s) for s in found], next_cursor=f"{before:.6f}")
                found.append(seen)
            before = created
        if len(entries) < (SCAN if filtered else limit + 1):
            return JobList(jobs=[_summary(s) for s in found], next_cursor=None)
    return JobList(jobs=[_summary(s) for s in found], next_cursor=f"{before:.6f}")


async def _see_all(context: Context, job_ids: list[str]) -> list[Seen | SeenTraining | None]:
    """Jobs of both kinds, in order."""
    sampling = [job_id for job_id in job_ids if not job_id.startswith(PREFIX)]
    seen: dict[str, Seen | SeenTraining | None] = {}
    seen |= dict(zip(sampling, await context.store.see_many(sampling, positions=False), strict=True))
    for job_id in job_ids:
        if job_id not in seen:
            seen[job_id] = await context.store.see_training(job_id)
    return [seen[job_id] for job_id in job_ids]


def _summary(seen: Seen | SeenTraining) -> JobSummary | TrainView:
    return train_view(seen) if isinstance(seen, SeenTraining) else summary(seen)


async def _view(context: Context, seen: Seen | SeenTraining) -> JobView | TrainView:
    if isinstance(seen, SeenTraining):
        return train_view(seen)
    return view(seen, await context.store.fleet(), context.catalog)


@router.get("/jobs/{job_id}", operation_id="getJob", summary="A job's state", responses=responses(404, 422, 503))
async def get_job(job_id: JobId, seen: FoundAny, context: Ctx) -> AnyJob:
    """Status, place in the queue, progress of each picture, estimated time left, seeds, error, links."""
    return await _view(context, seen)


@router.delete("/jobs/{job_id}", operation_id="cancelJob", summary="Cancel", responses=responses(404, 422, 503))
async def cancel_job(job_id: JobId, seen: FoundAny, context: Ctx) -> AnyJob:
    """Cancel a queued or running job, which stops at the next step. A job that has ended stays as it is."""
    if isinstance(seen, SeenTraining):
        await run_in_threadpool(context.store.cancel_training, job_id)
        return await _view(context, await context.store.see_training(job_id) or seen)
    job = seen.record.job
    if outcome := await run_in_threadpool(context.store.cancel, job):
        context.tell(job, outcome)
    return await _view(context, await context.store.see(job_id) or seen)


@router.get(
    "/jobs/{job_id}/events",
    operation_id="jobEvents",
    summary="Follow a job",
    description=EVENT_DOC,
    response_class=EventSourceResponse,
    responses=responses(404, 422, 503),
)
async def job_events(
    job_id: JobId,
    seen: FoundAny,
    context: Ctx,
    last_event_id: Annotated[
        str, Header(pattern=r"^(0|[0-9]{1,15}-[0-9]{1,15})$", description="Resume after the event of this id.")
    ] = "0",
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events until the job has ended."""
    last, patient = last_event_id, True
    while True:
        ended = (await _again(context, job_id, seen)).status in FINAL
        news: Any = await context.store.redis.xread({events_key(job_id): last}, block=None if ended else 1000)
        for event_id, fields in _newest(news[0][1] if news else []):
            last = event_id.decode()
            kind = fields[b"event"].decode()
            yield await _event(context, job_id, seen, kind, last, fields[b"data"])
            if kind == "done":
                return
        if ended and patient:  # the last event is written a moment after the outcome
            patient = False
            await asyncio.sleep(0.1)
        elif ended:  # it is no longer kept, or never came: RQ saw the end, not a worker
            yield await _event(context, job_id, seen, "done", last if last != "0" else "0-1", b"{}")
            return


def _newest(entries: list[tuple[bytes, dict[bytes, bytes]]]) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Events worth telling: of several states at once only the last, and of previews the last per picture."""
    seen: set[bytes] = set()
    kept = []
    for event_id, fields in reversed(entries):
        kind = fields[b"event"]
        key = kind + b"%d" % json.loads(fields[b"data"])["index"] if kind == b"preview" else kind
        if key not in seen:
            seen.add(key)
            kept.append((event_id, fields))
    return kept[::-1]


async def _again(context: Context, job_id: str, seen: Seen | SeenTraining) -> Seen | SeenTraining:
    """The job now; as last seen, should its time be over meanwhile."""
    if isinstance(seen, SeenTraining):
        return await context.store.see_training(job_id) or seen
    return await context.store.see(job_id) or seen


async def _event(
    context: Context, job_id: str, seen: Seen | SeenTraining, kind: str, event_id: str, data: bytes
) -> ServerSentEvent:
    if kind == "preview":
        return ServerSentEvent(event=kind, id=event_id, raw_data=data.decode())
    now = await _again(context, job_id, seen)
    if kind == "progress":
        done = train_progress(now) if isinstance(now, SeenTraining) else progress(now.record)
        return ServerSentEvent(event=kind, id=event_id, raw_data=done.model_dump_json())
    body = await _view(context, now)
    return ServerSentEvent(event=kind, id=event_id, raw_data=body.model_dump_json())


@router.get(
    "/jobs/{job_id}/images/{index}",
    operation_id="getImage",
    summary="A picture",
    response_class=Response,
    responses={
        200: {
            "description": "The picture; a PNG holds its recipe in the text chunk `recipe`.",
            "content": {t: {"schema": {"type": "string", "format": "binary"}} for t in _IMAGE_TYPES.values()},
        },
        304: {"description": "As the `If-None-Match` header says, it is known already."},
        **responses(404, 409, 422, 503),
    },
)
async def get_image(
    job_id: JobId,
    index: Annotated[int, Path(ge=0, le=100_000, description="Index of the picture.")],
    seen: FoundJob,
    context: Ctx,
    request: Request,
    format: Annotated[
        Literal["png", "jpeg", "webp"] | None, Query(description="Default: what the job asked for, or png.")
    ] = None,
    token: Annotated[
        str | None, Query(max_length=200, description="In place of a key, in links that `/v1/images/generations` gave.")
    ] = None,
) -> Response:
    """One picture, as soon as it is done."""
    record = seen.record
    if index >= record.job.num_images:
        raise ProblemError(404, f"index: {index} is not between 0 and {record.job.num_images - 1}")
    png = await _read(context, seen, index)
    wanted = format or (record.job.format if record.job.format != "npz" else "png")
    body = png if wanted == "png" else await run_in_threadpool(convert, png, wanted)
    return _immutable(request, body, _IMAGE_TYPES[wanted])


@router.get(
    "/jobs/{job_id}/samples.npz",
    operation_id="getSamples",
    summary="All pictures as npz",
    response_class=Response,
    responses={
        200: {
            "description": "The published layout: `arr_0` uint8 [N, H, W, 3], and `arr_1` labels if there are classes.",
            "content": {_NPZ: {"schema": {"type": "string", "format": "binary"}}},
        },
        304: {"description": "As the `If-None-Match` header says, it is known already."},
        **responses(404, 409, 422, 503),
    },
)
async def get_samples(job_id: JobId, seen: FoundJob, context: Ctx, request: Request) -> Response:
    """All pictures of a finished job."""
    files = await asyncio.gather(*(_read(context, seen, i) for i in range(seen.record.job.num_images)))
    return _immutable(request, await run_in_threadpool(_npz, files, seen.record.job.labels), _NPZ)


async def _read(context: Context, seen: Seen, index: int) -> bytes:
    """A stored picture's PNG file; 409 if it is not done yet, 404 if it never will be."""
    record = seen.record
    if index not in record.done:
        if seen.status in FINAL:
            raise ProblemError(404, f"picture {index} was not made: the job is {seen.status}")
        done = f"{record.steps_done[index]} of {record.job.steps} steps"
        raise ProblemError(409, f"picture {index} is not done yet ({done})", retry_after=1)
    try:
        return await run_in_threadpool(context.artifacts.read, record.job.id, index)
    except FileNotFoundError:
        raise ProblemError(404, f"picture {index} is no longer kept") from None


def _npz(files: list[bytes], labels: tuple[int | None, ...]) -> bytes:
    arrays = [np.stack([decode(png) for png in files])]
    if all(label is not None for label in labels):
        arrays.append(np.array(labels, dtype=np.int64))
    file = io.BytesIO()
    np.savez(file, *arrays)
    return file.getvalue()


def _immutable(request: Request, body: bytes, media_type: str) -> Response:
    """An answer that never changes, or 304 if the caller has it."""
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": _CACHE, "Vary": "Accept"}
    known = [part.strip().removeprefix("W/") for part in request.headers.get("If-None-Match", "").split(",")]
    if tag in known or known == ["*"]:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=media_type, headers=headers)
