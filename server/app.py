"""The FastAPI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from server import problems
from server.catalog import Catalog
from server.context import Context
from server.limits import BodyLimitMiddleware
from server.metrics import MetricsMiddleware, ServerMetrics
from server.plan import Planner
from server.routes import generate, health, jobs, models, playground, train, workers
from server.schemas import Json, Problem
from server.settings import ServerSettings
from server.store import JobStore
from worker.artifacts import ArtifactStore

DESCRIPTION = """\
Classifier-guided diffusion (ADM) as a sampling server: `POST /generate` queues a job, workers sample it
together with everyone else's, `GET /jobs/{id}` or its events tell how far it is.

Errors are problem documents (RFC 9457) that name the fields at fault."""


def create_app(settings: ServerSettings) -> FastAPI:
    """The application for some settings.

    Raises:
        ValueError: without a Redis URL.
    """
    if settings.redis_url is None:
        raise ValueError("redis_url: the server needs one (GUIDED_REDIS_URL); 'guided up' brings its own")
    catalog = Catalog(settings)
    store = JobStore(
        settings.redis_url,
        max_queued=settings.max_queued,
        result_ttl=settings.result_ttl_s,
        idempotency_ttl=settings.idempotency_ttl_s,
        max_training_queued=settings.max_training_queued,
    )
    metrics = ServerMetrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await store.close()

    app = FastAPI(
        title="guided-sampling-server",
        version=version("guided-sampling-server"),
        description=DESCRIPTION,
        lifespan=lifespan,
        license_info={"name": "MIT", "identifier": "MIT"},
    )
    app.state.context = Context(
        settings=settings,
        catalog=catalog,
        planner=Planner(catalog, settings),
        store=store,
        artifacts=ArtifactStore(settings.artifacts),
        metrics=metrics,
    )
    app.add_middleware(BodyLimitMiddleware)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    problems.install(app)
    for router in (generate.router, jobs.router, train.router, models.router, workers.router, health.router):
        app.include_router(router)
    app.include_router(playground.router)
    app.mount("/playground", playground.Files())
    _describe_problems(app)
    return app


def _describe_problems(app: FastAPI) -> None:
    """Put the error schema into the OpenAPI description, and only ours."""
    make = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is None:
            document = make()
            schemas = document["components"]["schemas"]
            problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(problem.pop("$defs"))
            schemas["Problem"] = problem
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
