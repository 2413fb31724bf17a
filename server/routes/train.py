"""``POST /train``, and what training jobs have beside other jobs."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from model_core.training.config import KINDS, Kind
from server.context import Ctx, FoundTraining
from server.problems import ProblemError, responses
from server.schemas import Json, TrainFigures, TrainLog, TrainRequest, TrainView
from server.security import Who, requires
from server.train_plan import plan
from server.train_views import train_view
from worker.training import MAX_FIGURES, MAX_LINES, figures_key, log_key

router = APIRouter(tags=["training"])

JobId = Annotated[str, Path(description="Id of a training job.", max_length=64)]


@router.post(
    "/train",
    operation_id="train",
    summary="Train a model",
    status_code=202,
    response_model=TrainView,
    dependencies=[requires("train")],
    responses={
        202: {
            "description": "The job is queued.",
            "headers": {"Location": {"description": "The job.", "schema": {"type": "string"}}},
        },
        **responses(400, 404, 413, 422, 429, 503),
    },
)
async def train(
    body: TrainRequest,
    request: Request,
    response: Response,
    context: Ctx,
    caller: Who,
    idempotency_key: Annotated[
        str | None,
        Header(max_length=200, description="Calls with the same key and body get the job of the first call."),
    ] = None,
) -> TrainView:
    """Queue a training job; a training worker takes it, and publishes what it makes."""
    job = await run_in_threadpool(plan, body, context.settings, round(time.time(), 6), caller.owner)
    job_id = await run_in_threadpool(context.store.submit_training, job, idempotency_key, await request.body())
    record = await context.store.see_training(job_id)
    if record is None:
        raise ProblemError(404, "the job is no longer there")
    response.headers["Location"] = f"/jobs/{job_id}"
    return train_view(record)


@router.get(
    "/train/{what}/schema",
    operation_id="trainSchema",
    summary="What a training configuration may say",
    responses=responses(422),
)
async def train_schema(what: Annotated[Kind, Path(description="What a run trains.")]) -> Json:
    """JSON schema of `config` in `POST /train`."""
    schema = KINDS[what].model_json_schema()
    for field in ("run_dir", "publish", "init"):
        schema["properties"].pop(field)
    schema["required"].remove("run_dir")
    return schema


@router.get(
    "/jobs/{job_id}/log",
    operation_id="trainLog",
    summary="A training job's output",
    responses=responses(404, 422, 503),
)
async def train_log(
    job_id: JobId,
    seen: FoundTraining,
    context: Ctx,
    lines: Annotated[int, Query(ge=1, le=MAX_LINES, description="Lines from the end, at most.")] = 200,
) -> TrainLog:
    """The last lines the run said."""
    found: Any = await context.store.redis.lrange(log_key(job_id), -lines, -1)
    return TrainLog(lines=[line.decode(errors="replace") for line in found])


@router.get(
    "/jobs/{job_id}/figures",
    operation_id="trainFigures",
    summary="A training job's figures over time",
    responses=responses(404, 422, 503),
)
async def train_figures(
    job_id: JobId,
    seen: FoundTraining,
    context: Ctx,
    after_step: Annotated[int, Query(ge=-1, le=1_000_000_000, description="Only what came after this step.")] = -1,
    kind: Annotated[
        Literal["train", "eval", "published", "skipped", "end"] | None, Query(description="Only lines of this kind.")
    ] = None,
) -> TrainFigures:
    """Losses, learning rate and speed every `log_every` steps, validations, publications."""
    found: Any = await context.store.redis.lrange(figures_key(job_id), -MAX_FIGURES, -1)
    records = [json.loads(line) for line in found]
    return TrainFigures(figures=[r for r in records if r["step"] > after_step and kind in (None, r["kind"])])
