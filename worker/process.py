"""``guided worker``: one worker process, put together."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time

import torch
from prometheus_client import start_http_server
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from model_core.hardware import keep_memory
from worker.engine import Engine, Event
from worker.metrics import WorkerMetrics
from worker.registry import Loaded, Registry
from worker.rq_worker import AWAY, GuidedWorker
from worker.scheduler import Policy
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)


def run_worker(settings: WorkerSettings) -> None:
    """Load the models, then work until a signal says stop.

    Raises:
        ValueError: for settings that cannot be met (no Redis URL, device, model).
    """
    if settings.redis_url is None:
        raise ValueError("redis_url: a worker needs one (GUIDED_REDIS_URL); 'guided up' brings its own")
    keep_memory()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    metrics = WorkerMetrics()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    workers: list[GuidedWorker] = []

    def on_event(event: Event) -> None:
        events.put(event)
        for worker in workers:
            worker.wake.set()

    policy = Policy(settings.policy, settings.ageing, settings.promote_after_s)
    engine = Engine(on_event, on_step=metrics.observe_step, policy=policy)

    def on_loaded(loaded: Loaded) -> None:
        metrics.observe_loaded(loaded, registry.device)
        for worker in workers:
            worker.wake.set()

    registry = Registry(engine, settings, on_loaded)
    thread = threading.Thread(target=engine.run, name="engine")
    thread.start()
    try:
        registry.serve()
        worker = _connect(settings, engine, registry, metrics, events)
        workers.append(worker)
        if settings.metrics_port is not None:
            server, _ = start_http_server(settings.metrics_port, settings.metrics_host, metrics.registry)
            worker.metrics_url = f"http://{settings.metrics_host}:{server.server_port}/metrics"
            log.info("worker %s: metrics at %s", worker.name, worker.metrics_url)
        worker.work()
        log.info("worker %s: stopped", worker.name)
    finally:
        registry.close()
        engine.stop()
        thread.join()


def _connect(
    settings: WorkerSettings,
    engine: Engine,
    registry: Registry,
    metrics: WorkerMetrics,
    events: queue.SimpleQueue[Event],
) -> GuidedWorker:
    assert settings.redis_url
    wait = 0.1
    while True:
        connection = Redis.from_url(
            settings.redis_url, retry=Retry(NoBackoff(), 0), health_check_interval=30, protocol=2
        )
        try:
            return GuidedWorker(connection, settings, engine, registry, metrics, events)
        except AWAY as error:
            log.warning("worker %d: waiting for Redis: %s", os.getpid(), error)
            time.sleep(wait)
            wait = min(5.0, 2 * wait)
