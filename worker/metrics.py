"""Prometheus metrics of a worker."""

from __future__ import annotations

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from model_core.hardware import peak_memory
from worker.engine import Engine
from worker.lane import StepReport
from worker.registry import Loaded

disable_created_metrics()  # type: ignore[no-untyped-call]

LATENCY = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class WorkerMetrics:
    """All of them, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        self.jobs = Counter("guided_jobs", "Parts of jobs that ended here.", ["model", "outcome"], registry=r)
        self.retries = Counter("guided_retries", "Jobs put back after their worker died.", ["model"], registry=r)
        self.requeued = Counter("guided_requeued", "Jobs put back at shutdown.", ["model"], registry=r)
        self.queue_wait = Histogram(
            "guided_queue_wait_seconds", "From request to first step.", ["model"], buckets=LATENCY, registry=r
        )
        self.run_time = Histogram(
            "guided_run_seconds", "From first step to last picture.", ["model"], buckets=LATENCY, registry=r
        )
        self.end_to_end = Histogram(
            "guided_end_to_end_seconds", "From request to last picture.", ["model"], buckets=LATENCY, registry=r
        )
        self.images = Counter("guided_images", "Pictures made.", ["model"], registry=r)
        self.steps = Counter("guided_denoising_steps", "Steps of single samples.", ["model"], registry=r)
        self.step_time = Histogram(
            "guided_step_seconds", "One pass of a batch, by batch size.", ["model", "width"], buckets=STEP, registry=r
        )
        self.occupancy = Histogram(
            "guided_batch_occupancy_ratio",
            "Filled part of the batch's width, at each pass.",
            ["model"],
            buckets=[i / 10 for i in range(1, 11)],
            registry=r,
        )
        self.classifier_steps = Counter(
            "guided_classifier_steps", "Steps of single samples that had a classifier pass.", ["model"], registry=r
        )
        self.classifier_saved = Counter(
            "guided_classifier_steps_saved",
            "Steps of single samples that needed no classifier pass.",
            ["model"],
            registry=r,
        )
        self.model_info = Gauge(
            "guided_model_info", "1 for each model version loaded.", ["model", "version", "dtype"], registry=r
        )
        self.compiled = Gauge(
            "guided_model_compiled", "Whether compiled functions serve the model.", ["model"], registry=r
        )
        self.compile_time = Gauge(
            "guided_model_compile_seconds",
            "Time until they did, where they were not there at once.",
            ["model"],
            registry=r,
        )
        self.precision_error = Gauge(
            "guided_precision_error_ratio",
            "Relative error of what serves, on fixed inputs, against float32.",
            ["model", "function"],
            registry=r,
        )
        self.refused = Gauge(
            "guided_acceleration_refused",
            "1 where a model is served without its type or compiled code, for imprecision or other failures.",
            ["model", "what"],
            registry=r,
        )
        self.peak_memory = Gauge(
            "guided_peak_memory_bytes", "Most memory in use so far: of the process, or on a CUDA device.", registry=r
        )
        self.load_time = Gauge("guided_model_load_seconds", "Time to load the model last time.", ["model"], registry=r)
        self.running = Gauge("guided_samples_running", "Samples with a slot.", ["model"], registry=r)
        self.waiting = Gauge("guided_samples_waiting", "Samples without a slot.", ["model"], registry=r)
        self.width = Gauge("guided_batch_width", "Samples that may run at once.", ["model"], registry=r)
        self.parked = Gauge("guided_samples_parked", "Samples that had begun and wait again.", registry=r)
        self.redis_down = Counter("guided_redis_errors", "Failed exchanges with Redis.", registry=r)
        self.memory = Gauge("guided_device_memory_bytes", "Memory of tensors on the device.", ["device"], registry=r)
        self._known: set[str] = set()
        self._samples = self._seconds = 0.0

    def observe_step(self, report: StepReport) -> None:
        """Count a step of a lane; called on the engine's thread."""
        model = report.lane
        # Sums that forget: about the last hundred passes count.
        self._samples = 0.99 * self._samples + report.samples
        self._seconds = 0.99 * self._seconds + report.seconds
        self.steps.labels(model).inc(report.samples)
        self.step_time.labels(model, str(report.samples)).observe(report.seconds)
        self.occupancy.labels(model).observe(report.samples / report.width)
        self.classifier_steps.labels(model).inc(report.guided)
        self.classifier_saved.labels(model).inc(report.samples - report.guided)

    def observe_loaded(self, loaded: Loaded, device: torch.device) -> None:
        """Tell what is known of a model that was loaded, or got compiled functions."""
        model, bundle = loaded.model, loaded.bundle
        self.model_info.labels(bundle.name, bundle.version, str(model.dtype).removeprefix("torch.")).set(1)
        self.load_time.labels(bundle.name).set(loaded.seconds)
        memory = torch.cuda.memory_allocated() if device.type == "cuda" else model.bytes
        self.memory.labels(str(device)).set(memory)
        self.compiled.labels(loaded.key).set(model.compiled)
        if loaded.compile_seconds is not None:
            self.compile_time.labels(loaded.key).set(loaded.compile_seconds)
        for function, error in model.errors.items():
            self.precision_error.labels(loaded.key, function).set(error)
        for what in ("dtype", "code"):
            self.refused.labels(loaded.key, what).set(what in model.refused)
        self.peak_memory.set_function(lambda: peak_memory(device))

    @property
    def steps_per_second(self) -> float:
        """Sample-steps per second of work, lately; 0 before the first."""
        return self._samples / self._seconds if self._seconds else 0.0

    def observe_engine(self, engine: Engine) -> None:
        """Read the engine's gauges."""
        counts, widths = engine.counts(), engine.widths()
        for gone in self._known - set(counts):
            for gauge in (self.running, self.waiting, self.width):
                gauge.remove(gone)
        self._known = set(counts)
        for lane, (running, waiting) in counts.items():
            self.running.labels(lane).set(running)
            self.waiting.labels(lane).set(waiting)
            self.width.labels(lane).set(widths.get(lane, 0))
        self.parked.set(engine.parked())
