"""A training run as a child process: torchrun with ``guided train``, and what it says."""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from typing import Any

from model_core.bundle import Store
from model_core.training.commands import last_end, torchrun_command
from worker.settings import WorkerSettings
from worker.training import TrainJob

NICE = 10
"""Sampling on the same machine goes before training."""
PR_SET_PDEATHSIG = 1


class TrainingRun:
    """The process that trains for a job, in a folder of its own.

    Args:
        job: what to train.
        settings: of the worker.
    """

    def __init__(self, job: TrainJob, settings: WorkerSettings) -> None:
        self.job, self.settings = job, settings
        self.folder = settings.training_folder / job.id
        self.process: subprocess.Popen[bytes] | None = None
        self._read = {"output.log": 0, "log.jsonl": 0}
        self._kill_at: float | None = None
        self._began = 0.0

    def start(self) -> bool:
        """Start it; ``False`` if another worker's process has not let go of the folder yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        (self.folder / "config.json").write_text(json.dumps(self._config(), indent=2))
        arguments = ["train", self.job.what, "--config", str(self.folder / "config.json")]
        environment = {"OMP_NUM_THREADS": str(self.settings.threads or os.cpu_count() or 1), **os.environ}
        for name in self._read:  # what an earlier process said was told by an earlier worker
            file = self.folder / name
            self._read[name] = file.stat().st_size if file.exists() else 0
        self._began = time.time()
        shutdown = math.ceil(self.settings.train_grace_s) + 5  # we kill what does not stop in time, not torchrun
        with (self.folder / "output.log").open("ab") as output:
            self.process = subprocess.Popen(
                torchrun_command(self.settings.train_processes, arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment | {"PYTHONUNBUFFERED": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(shutdown)},
                start_new_session=True,
                preexec_fn=_as_child_of(os.getpid()),
            )
        return True

    def _config(self) -> dict[str, Any]:
        job, store = self.job, Store(self.settings.models_dir)
        config: dict[str, Any] = dict(job.config) | {"run_dir": str(self.folder)}
        if job.init:
            config["init"] = str(store.find(job.init).path)
        if job.publish:
            config["publish"] = {"model": job.publish, "models_dir": str(self.settings.models_dir.resolve())}
            if job.publish_every:
                config["publish"]["every"] = job.publish_every
            if job.publish_defaults:
                config["publish"]["defaults"] = job.publish_defaults.model_dump(mode="json")
        return config

    @property
    def running(self) -> bool:
        """Whether it is still there; what does not stop in time is killed."""
        assert self.process
        if self._kill_at is not None and time.monotonic() > self._kill_at:
            self._signal(signal.SIGKILL)
        return self.process.poll() is None

    def stop(self) -> None:
        """Have it save its state and end."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self.settings.train_grace_s
            self._signal(signal.SIGTERM)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process
        try:
            if number is signal.SIGTERM:  # torchrun passes it on
                self.process.send_signal(number)
            else:
                os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    @property
    def complete(self) -> bool | None:
        """Whether it ended with the run complete; ``None`` if it broke off."""
        return last_end(self.folder / "log.jsonl", self._began)

    def news(self, name: str) -> list[str]:
        """Whole lines since the last call, of ``output.log`` or ``log.jsonl``."""
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(0, os.SEEK_END)
                # A resumed run drops the lines of steps that were not saved.
                file.seek(min(self._read[name], file.tell()))
                data = file.read()
                begin = file.tell() - len(data)
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._read[name] = begin + len(whole)
        return whole.decode(errors="replace").splitlines()

    def last_words(self) -> str:
        """The line of its output that tells why it failed."""
        lines = (self.folder / "output.log").read_text(errors="replace").splitlines()
        telling = [line for line in lines if line.startswith("guided: ") or "Error" in line.split(":")[0]]
        told = [line for line in telling if "ChildFailedError" not in line]
        return (told or lines or ["it ended without a word"])[-1][:500]


def _as_child_of(parent: int) -> Any:
    """What the child does before it becomes torchrun: make sure that it stops, state saved, if the worker dies."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        os.nice(NICE)
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died already
            os._exit(1)

    return prepare
