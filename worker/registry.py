"""Models a worker has loaded: versions side by side, loaded in the background, freed when not needed."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from model_core.acceleration import Accelerated, Accelerator
from model_core.bundle import Bundle, BundleError, Store, atomic
from model_core.compilation import AccelerationError
from model_core.denoiser import Denoiser, Functions
from model_core.hardware import choose_device, choose_dtype, release_memory
from worker.engine import Engine, measure_width
from worker.settings import WorkerSettings

log = logging.getLogger(__name__)

T = TypeVar("T")

IDLE_S, PATIENCE_S = 5.0, 120.0
"""Compiling begins when nothing has been sampled for so long, or after so long all the same."""
RETRY_S = 300.0
"""Time after which a new version that could not be loaded is tried again: there may have been no memory for it."""


def next_bucket(count: int) -> int:
    """Batch size to pad to: powers of two, and halves between them from 4 on."""
    if count <= 2:
        return count
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if count <= power * 3 // 4 else power


@dataclass
class Loaded:
    """A model version that is being served."""

    model: Accelerated
    width: int
    seconds: float
    """Time it took to load, with the width measurement."""
    used: float
    """When it was last asked for, monotonic s."""

    compile_seconds: float | None = None
    """Time until its compiled functions served, if they were not there when it was loaded."""

    @property
    def bundle(self) -> Bundle:
        """What was loaded."""
        return self.model.bundle

    @property
    def key(self) -> str:
        """Name of its lane."""
        return lane_key(self.bundle.name, self.bundle.version)


def lane_key(name: str, version: str) -> str:
    """Lane of a model version."""
    return f"{name}@{version}"


class Registry:
    """Loads model versions into an engine's lanes. Methods are called from one thread.

    Args:
        engine: gets the lanes.
        settings: device, type, widths, limits.
        on_loaded: called after each load, and again once compiled functions serve or cannot be had.
    """

    def __init__(
        self, engine: Engine, settings: WorkerSettings, on_loaded: Callable[[Loaded], None] = lambda loaded: None
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._on_loaded = on_loaded
        self.store = Store(settings.models_dir)
        self.device = choose_device(settings.device)
        self.dtype = choose_dtype(settings.dtype, self.device)
        self._accelerator = Accelerator(self.device, self.dtype, settings.acceleration_folder)
        self._loads: dict[str, Future[Loaded]] = {}
        self._current: dict[str, str] = {}
        self._bad: dict[str, float] = {}
        """New versions that could not be loaded, and when to try them again."""
        self._loading, self._compiling = threading.Lock(), threading.Lock()
        self._closed = threading.Event()

    @property
    def names(self) -> list[str]:
        """Models that jobs are taken of."""
        return list(self._current)

    @property
    def loaded(self) -> list[Loaded]:
        """Versions that are ready."""
        return [f.result() for f in list(self._loads.values()) if f.done() and not f.exception()]

    def serve(self) -> None:
        """Load the newest version of every model to be served, and wait for them.

        Raises:
            ValueError: if there is none, or one of ``models`` cannot be loaded.
        """
        for name in self._settings.models or self.store.names():
            try:
                version = self.store.latest(name)
                if self._settings.models or self.store.find(name).config.kind == "diffusion":
                    self.get(name, version).result()
                    self._current[name] = version
            except (BundleError, AccelerationError) as error:
                if self._settings.models:
                    raise
                log.error("model %s: not served: %s", name, error)
        if not self._current:
            raise BundleError(f"models: no diffusion model that can be loaded in {self.store.root}")

    def current(self, name: str) -> str:
        """The version that new jobs of a served model get; of another model, its latest.

        Raises:
            BundleError: if there is no such model.
        """
        return self._current.get(name) or self.store.latest(name)

    def get(self, name: str, version: str) -> Future[Loaded]:
        """A model version, loaded in the background if need be; the future may hold a BundleError."""
        key = lane_key(name, version)
        future = self._loads.get(key)
        if future is None or (future.done() and future.exception()):
            future = self._loads[key] = _start(self._loading, self._load, name, version)
        elif future.done():
            future.result().used = time.monotonic()
        return future

    def poll(self) -> None:
        """Look for newer versions and, unless told which to serve, new models; take them up once they are ready."""
        for name, version in [*self._current.items(), *((name, None) for name in self._unknown())]:
            try:
                latest = self.store.latest(name)
            except (BundleError, OSError):
                continue  # the folder is away: go on with what is loaded
            key = lane_key(name, latest)
            if latest == version or time.monotonic() < self._bad.get(key, 0.0):
                continue
            future = self._loads.get(key) or self.get(name, latest)
            if not future.done():
                continue
            if error := future.exception():
                log.error("model %s: not taken up, tried again in %d s: %s", key, RETRY_S, error)
                self._bad[key] = time.monotonic() + RETRY_S
                del self._loads[key]
                continue
            before = f" instead of {version}" if version else ""
            log.info("model %s: now serving version %s%s", name, latest, before)
            self._current[name] = latest

    def _unknown(self) -> list[str]:
        """Diffusion models that were published since the start."""
        if self._settings.models:
            return []
        found = []
        with suppress(OSError):  # the folder is away
            for name in set(self.store.names()) - set(self._current):
                try:
                    bundle = self.store.find(name)
                except BundleError as error:
                    log.debug("model %s: not served: %s", name, error)
                    continue
                if bundle.config.kind == "diffusion":
                    found.append(name)
        return found

    def close(self) -> None:
        """Compile nothing more."""
        self._closed.set()
        self._accelerator.close()

    def tidy(self) -> None:
        """Free versions that are no longer current, once no sample needs them; in the background."""
        _start(self._loading, self._tidy)

    def _tidy(self) -> None:
        for loaded in self.loaded:
            idle = time.monotonic() - loaded.used > 60
            if idle and self._current.get(loaded.bundle.name) != loaded.bundle.version:
                self._unload(loaded)

    def _unload(self, loaded: Loaded) -> bool:
        removed = self._engine.remove_lane(loaded.key).result(timeout=60)
        if removed:
            del self._loads[loaded.key]
            release_memory()
            log.info("model %s: unloaded", loaded.key)
        return removed

    def _load(self, name: str, version: str) -> Loaded:
        bundle = self.store.find(lane_key(name, version))
        self._make_room(sum(bundle.weights_path(part).stat().st_size for part in bundle.parts))
        began = time.perf_counter()
        model = self._accelerator.load(bundle)
        width = self._settings.width or self._width(model, model.denoiser)
        loaded = Loaded(model, width, time.perf_counter() - began, time.monotonic())
        pad = self.device.type == "cuda" if self._settings.pad_batches is None else self._settings.pad_batches
        self._engine.add_lane(loaded.key, model.denoiser, width, next_bucket if pad else None)
        how = "compiled" if model.compiled else "eager"
        log.info("model %s: loaded in %.1f s, %s, width %d", loaded.key, loaded.seconds, how, width)
        self._on_loaded(loaded)
        if self._settings.compile and not model.compiled and "code" not in model.refused:
            _start(self._compiling, self._compile, loaded)
        return loaded

    def _compile(self, loaded: Loaded) -> None:
        self._wait_until_idle()
        began, model = time.perf_counter(), loaded.model
        try:
            functions = self._accelerator.compile(model)
            width = self._settings.width or self._width(model, self._beside(model.denoiser, functions))
        except AccelerationError as error:
            if self._closed.is_set():
                return
            model.refused.append("code")
            log.warning("model %s: stays eager: %s", loaded.key, error)
        else:
            loaded.compile_seconds, loaded.width = time.perf_counter() - began, width
            self._engine.exchange(loaded.key, functions, width)
            log.info("model %s: compiled after %.0f s, width %d", loaded.key, loaded.compile_seconds, width)
        self._on_loaded(loaded)

    def _wait_until_idle(self) -> None:
        """However low its priority, compiling slows down whoever waits for a picture."""
        began = quiet = time.monotonic()
        while not self._closed.wait(0.25) and time.monotonic() - began < PATIENCE_S:
            if any(running + waiting for running, waiting in self._engine.counts().values()):
                quiet = time.monotonic()
            elif time.monotonic() - quiet > IDLE_S:
                return

    @staticmethod
    def _beside(denoiser: Denoiser, functions: Functions) -> Denoiser:
        """The same networks for another thread, with functions nobody else uses yet."""
        other = Denoiser(denoiser.unet, denoiser.classifier, denoiser.diffusion)
        other.functions = functions
        return other

    def _make_room(self, needed: int) -> None:
        limit = self._settings.memory_limit_mb
        if limit is None:
            return
        by_use = sorted(self.loaded, key=lambda loaded: loaded.used)
        for loaded in by_use:
            if sum(x.model.bytes for x in self.loaded) + needed <= limit << 20:
                return
            self._unload(loaded)
        held = sum(x.model.bytes for x in self.loaded)
        if held + needed > limit << 20:
            raise BundleError(
                f"memory_limit_mb: {needed >> 20} MiB of weights do not fit beside {held >> 20} of {limit} MiB in use"
            )

    def _width(self, model: Accelerated, denoiser: Denoiser) -> int:
        """Measured once per model version, type, code and machine, and remembered on disk."""
        cache = self._settings.data_dir / "widths.json"
        weights = ",".join(model.bundle.digest(part)[:12] for part in model.bundle.parts)
        key = f"{weights} {model.target.key} {model.compiled} {self._settings.max_width}"
        known = _read_json(cache)
        if key not in known:
            known[key] = measure_width(denoiser, max_width=self._settings.max_width)
            if any(running for running, _ in self._engine.counts().values()):
                return known[key]  # not measured alone: good enough for now, not for ever
            cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic(cache) as temporary:
                temporary.write_text(json.dumps({**_read_json(cache), key: known[key]}, indent=2))
        return known[key]


def _start(lock: threading.Lock, function: Callable[..., T], *arguments: object) -> Future[T]:
    """Run a function in the background, those of one lock one after the other.

    Each gets a thread that ends with it. OpenMP keeps helpers for every thread that has computed, and once
    there are more of them than processors they no longer spin for work but sleep between any two loops: a
    small model's step would take four times as long.
    """

    def run() -> T:
        with lock:
            return function(*arguments)

    executor = ThreadPoolExecutor(1, thread_name_prefix=function.__name__)
    try:
        return executor.submit(run)
    finally:
        executor.shutdown(wait=False)


def _read_json(path: Path) -> dict[str, int]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return {}
