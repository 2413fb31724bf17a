"""Real processes for tests: Valkey, the API and workers, which tests may kill and start again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from redis import Redis

from clients.calls import key_headers
from server.up import free_port, valkey_command, wait_for_redis

T = TypeVar("T")


def eventually(probe: Callable[[], T | None], seconds: float = 30.0, what: str = "it") -> T:
    """Wait until ``probe`` gives something true, and return that."""
    until = time.monotonic() + seconds
    while True:
        if found := probe():
            return found
        assert time.monotonic() < until, f"{what} did not happen within {seconds} s"
        time.sleep(0.02)


def heed_interrupts() -> None:
    """For a child about to start: a shell that runs the tests in the background lets all they start ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Process:
    """A child process with its output in a file."""

    def __init__(self, name: str, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.name, self.command, self.environment = name, command, environment
        self.log = folder / f"{name}.log"
        self.start()

    def start(self) -> None:
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                self.command, env={**os.environ, **self.environment}, stdout=output, stderr=subprocess.STDOUT
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 30.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def said(self, lines: int = 20) -> str:
        """The end of its output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


class Stack:
    """A data folder with the processes that share it; nothing runs until it is started."""

    def __init__(
        self, folder: Path, models_dir: Path, *, password: str = "", api_key: str | None = None, **settings: Any
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.redis_port, self.port = free_port(), free_port()
        user = f":{password}@" if password else ""
        self.redis_url = f"redis://{user}127.0.0.1:{self.redis_port}/0"
        self.url = f"http://127.0.0.1:{self.port}"
        given = {
            "redis_url": self.redis_url,
            "data_dir": folder,
            "models_dir": models_dir,
            "port": self.port,
            "dtype": "float32",
            "width": 4,
            "threads": 1,
            "heartbeat_ttl_s": 3,
            "compile": False,
            **settings,
        }
        self.environment = {f"GUIDED_{name.upper()}": str(value) for name, value in given.items()}
        self.environment |= {
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "GUIDED_CONFIG": str(folder / "absent.toml"),
        }
        self.processes: list[Process] = []
        self.http = httpx.Client(base_url=self.url, timeout=60, headers=key_headers(api_key))

    def valkey(self, *options: str) -> Process:
        """Start Valkey, perhaps with more options."""
        command = [*valkey_command(self.folder / "valkey", self.redis_port), *options]
        process = self._start("valkey", command)
        wait_for_redis(self.redis_url)
        return process

    def api(self) -> Process:
        """Start the API and wait for it."""
        process = self._start("api", [sys.executable, "-m", "clients", "server"])
        eventually(self._healthy, what="the API")
        return process

    def worker(self, name: str = "worker", wait: bool = True, **settings: Any) -> Process:
        """Start a worker and wait until it takes jobs."""
        environment = {f"GUIDED_{key.upper()}": str(value) for key, value in settings.items()}
        process = self._start(name, [sys.executable, "-m", "clients", "worker"], environment)
        if wait:
            eventually(lambda: "takes jobs of" in process.log.read_text(), 60, f"{name}")
        return process

    def trainer(self, name: str = "trainer", **settings: Any) -> Process:
        """Start a training worker and wait until it takes jobs."""
        environment = {f"GUIDED_{key.upper()}": str(value) for key, value in settings.items()}
        process = self._start(name, [sys.executable, "-m", "clients", "worker", "--queues", "training"], environment)
        eventually(lambda: "takes training jobs" in process.log.read_text(), 60, name)
        return process

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Valkey, the API and one worker, until the end of the block."""
        try:
            self.valkey()
            self.api()
            self.worker()
            yield
        finally:
            self.close()

    def redis(self) -> Redis:
        """A connection."""
        return Redis.from_url(self.redis_url, protocol=2)

    def _start(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> Process:
        process = Process(name, command, {**self.environment, **(environment or {})}, self.folder)
        self.processes.append(process)
        return process

    def _healthy(self) -> bool:
        try:
            return self.http.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Kill whatever still runs."""
        self.http.close()
        for process in self.processes:
            if process.process.poll() is None:
                process.kill()

    # --- Requests ---------------------------------------------------------------------------------

    def generate(self, expect: int = 202, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
        """POST /generate."""
        answer = self.http.post("/generate", json={"model": "tiny", **body}, headers=headers)
        assert answer.status_code == expect, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def train(self, expect: int = 202, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
        """POST /train."""
        answer = self.http.post("/train", json=body, headers=headers)
        assert answer.status_code == expect, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def job(self, job_id: str) -> dict[str, Any]:
        """GET /jobs/{id}."""
        answer = self.http.get(f"/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def wait(self, job_id: str, *statuses: str, seconds: float = 60.0) -> dict[str, Any]:
        """Poll until the job has one of the statuses."""
        wanted = statuses or ("finished", "failed", "cancelled")

        def look() -> dict[str, Any] | None:
            job = self.job(job_id)
            return job if job["status"] in wanted else None

        return eventually(look, seconds, f"{' or '.join(wanted)} of {job_id}")

    def image(self, job_id: str, index: int = 0) -> bytes:
        """GET /jobs/{id}/images/{index}."""
        answer = self.http.get(f"/jobs/{job_id}/images/{index}")
        assert answer.status_code == 200, answer.text
        return answer.content
