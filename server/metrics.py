"""Prometheus metrics of the server."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from starlette.types import ASGIApp, Message, Receive, Scope, Send

disable_created_metrics()  # type: ignore[no-untyped-call]

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServerMetrics:
    """All of them, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        labels = ["method", "route", "status"]
        self.requests = Counter("guided_http_requests", "Requests answered.", labels, registry=r)
        self.latency = Histogram(
            "guided_http_request_seconds",
            "Time to the answer's first byte.",
            ["method", "route"],
            buckets=BUCKETS,
            registry=r,
        )
        self.submitted = Counter("guided_jobs_submitted", "Jobs taken in.", ["model", "priority"], registry=r)
        self.depth = Gauge("guided_queue_depth", "Parts of jobs that wait.", ["model", "priority"], registry=r)
        self.age = Gauge(
            "guided_queue_oldest_age_seconds", "Age of the oldest waiting job.", ["model", "priority"], registry=r
        )
        self.workers = Gauge("guided_workers", "Live workers that take the model's jobs.", ["model"], registry=r)
        self.training = Gauge("guided_training_jobs", "Training jobs by state.", ["state"], registry=r)
        self.training_workers = Gauge("guided_training_workers", "Live training workers.", registry=r)
        self.redis_up = Gauge("guided_redis_up", "Whether Redis could be reached.", registry=r)


class MetricsMiddleware:
    """Counts and times every request by its route's template."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and watch the answer begin."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()

        async def watch(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "unknown")
                method = scope["method"] if route is not None else "other"
                self._metrics.requests.labels(method, path, message["status"]).inc()
                self._metrics.latency.labels(method, path).observe(time.perf_counter() - began)
            await send(message)

        await self._app(scope, receive, watch)
