"""Health, readiness and metrics."""

from __future__ import annotations

import logging

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError

from server.context import Ctx
from server.schemas import Health, Readiness
from server.security import requires

log = logging.getLogger(__name__)

router = APIRouter(tags=["operation"])


@router.get("/healthz", operation_id="health", summary="The process is up")
async def healthz() -> Health:
    """Always 200 while the process answers."""
    return Health()


@router.get(
    "/readyz",
    operation_id="ready",
    summary="Whether jobs would be taken",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "Redis is away, or a model has no live worker."}},
)
async def readyz(context: Ctx) -> Response:
    """200 if Redis answers and every model that can be sampled has a live worker, else 503."""
    try:
        fleet = await context.store.fleet()
        await context.store.redis.ping()
    except RedisError as error:
        log.warning("Redis cannot be reached: %s", error)  # the answer is open to all: no addresses in it
        answer = Readiness(ready=False, redis=False, workers={}, detail="Redis cannot be reached; the log says why")
        return JSONResponse(answer.model_dump(), 503)
    workers = {name: len(fleet.of(name)) for name in context.catalog.served()}
    without = [name for name, count in workers.items() if not count]
    detail = f"no live worker for {', '.join(without)}" if without else "ready" if workers else "there are no models"
    ready = bool(workers) and not without
    answer = Readiness(ready=ready, redis=True, workers=workers, detail=detail)
    return JSONResponse(answer.model_dump(), 200 if ready else 503)


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Prometheus metrics of this process and the queues",
    response_class=PlainTextResponse,
    dependencies=[requires("admin")],
)
async def metrics(context: Ctx) -> Response:
    """Metrics of the workers are at each worker's own port."""
    m = context.metrics
    try:
        fleet = await context.store.fleet()
        for model, priority, depth, age in await context.store.depths(context.catalog.served()):
            m.depth.labels(model, priority).set(depth)
            m.age.labels(model, priority).set(age)
        for model in context.catalog.served():
            m.workers.labels(model).set(len(fleet.of(model)))
        queued, running, workers = await context.store.training_depth()
        m.training.labels("queued").set(queued)
        m.training.labels("running").set(running)
        m.training_workers.set(workers)
        m.redis_up.set(1)
    except RedisError:
        m.redis_up.set(0)
    return Response(generate_latest(m.registry), media_type=CONTENT_TYPE_LATEST)
