"""The FastAPI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi_offline import FastAPIOffline
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.middleware.cors import CORSMiddleware

from server import problems
from server.catalog import Catalog
from server.context import Context
from server.headers import SecurityHeadersMiddleware, policy_for
from server.limits import BodyLimitMiddleware
from server.metrics import MetricsMiddleware, ServerMetrics
from server.openai_schemas import OpenAIProblem
from server.plan import Planner
from server.problems import OPENAI, openai_responses, responses
from server.rates import Limiter
from server.routes import generate, health, jobs, models, openai, playground, train, workers
from server.schemas import Json, Problem
from server.security import GuardMiddleware, Links, check_exposure, is_open
from server.settings import ServerSettings
from server.store import JobStore
from worker.artifacts import ArtifactStore

log = logging.getLogger(__name__)

DOCS_FILES = "/docs/static"
DESCRIPTION = """\
Classifier-guided diffusion (ADM) as a sampling server: `POST /generate` queues a job, workers sample it
together with everyone else's, `GET /jobs/{id}` or its events tell how far it is.

Errors are problem documents (RFC 9457) that name the fields at fault."""


async def _watch_deadlines(context: Context) -> None:
    """End what waits past its deadline: a worker does so only with what it has taken."""
    while True:
        await asyncio.sleep(1)
        try:
            for job, outcome in await run_in_threadpool(context.store.end_overdue):
                context.tell(job, outcome)
        except RedisError as error:
            log.debug("deadlines are not looked at: %s", error)


def create_app(settings: ServerSettings) -> FastAPI:
    """The application for some settings.

    Raises:
        ValueError: without a Redis URL, or if it would serve everybody by mistake.
    """
    check_exposure(settings)
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
        watching = asyncio.create_task(_watch_deadlines(app.state.context))
        yield
        watching.cancel()
        await run_in_threadpool(app.state.context.calling.shutdown)
        await store.close()

    limiter, links = Limiter(store.blocking, settings), Links(store.blocking)
    app = FastAPIOffline(
        docs_url=None,
        redoc_url=None,
        static_url=DOCS_FILES,
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
        limiter=limiter,
        links=links,
    )
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimitMiddleware)
    app.add_middleware(GuardMiddleware, settings=settings, limiter=limiter, links=links)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Prefer"],
            expose_headers=["Location", "Preference-Applied", "Retry-After", "ETag", "RateLimit", "RateLimit-Policy"],
        )
    app.add_middleware(SecurityHeadersMiddleware)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    problems.install(app)
    for router in (
        generate.router,
        jobs.router,
        train.router,
        models.router,
        workers.router,
        openai.router,
        health.router,
        playground.router,
    ):
        app.include_router(router)
    app.mount("/playground", playground.Files())
    _add_docs(app)
    _describe(app, settings)
    return app


def _add_docs(app: FastAPI) -> None:
    """Swagger UI at ``/docs``, from this machine, with leave for its own script only."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=app.title,
        swagger_js_url=f"{DOCS_FILES}/swagger-ui-bundle.js",
        swagger_css_url=f"{DOCS_FILES}/swagger-ui.css",
        swagger_favicon_url=f"{DOCS_FILES}/favicon.png",
    )
    page.headers["Content-Security-Policy"] = policy_for(bytes(page.body).decode())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return page


def _describe(app: FastAPI, settings: ServerSettings) -> None:
    """Complete the OpenAPI description: the error schemas, only ours, and what keys and limits add to every answer."""
    make = app.openapi

    def openapi() -> Json:
        if app.openapi_schema is None:
            document = make()
            schemas = document["components"]["schemas"]
            for model in (Problem, OpenAIProblem):
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs"))
                schemas[model.__name__] = schema
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    if path.startswith(OPENAI):
                        operation["responses"].pop("422", None)  # 400 there
            _describe_guard(document, settings)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_guard(document: Json, settings: ServerSettings) -> None:
    statuses = [401, 403] if settings.api_keys else []
    if settings.rate_limit or any(key.rate_limit for key in settings.api_keys):
        statuses.append(429)
    if settings.api_keys:
        bearer = {"type": "http", "scheme": "bearer", "description": "A key made with `guided keys new`."}
        document["components"]["securitySchemes"] = {"key": bearer}
    for path, operations in document["paths"].items():
        if is_open(path, settings):
            continue
        describe = openai_responses if path.startswith(OPENAI) else responses
        for operation in operations.values():
            for status, answer in describe(*statuses).items():
                operation["responses"].setdefault(str(status), answer)
            if settings.api_keys:
                operation["security"] = [{"key": []}]
