"""Containers run by podman in a network namespace of their own; ``deploy/check.sh`` starts this there."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest

T = TypeVar("T")

PROJECT = Path(__file__).parents[2]
IMAGE = "guided-sampling-server:cpu"
API = "http://127.0.0.1:8000"
HARDENED = ("--read-only", "--tmpfs=/tmp:exec,mode=1777", "--cap-drop=all", "--security-opt=no-new-privileges")
"""Options of ``podman run`` that say what the compose file says."""
PASSWORDS = {"REDIS_PASSWORD": "c0rrect", "GRAFANA_PASSWORD": "secret"}


def run(*command: str, expect: int = 0, stdin: str = "", **environment: str) -> str:
    """Output of a command that must end as expected."""
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, cwd=PROJECT, env={**os.environ, **environment}
    )
    assert done.returncode == expect, f"{command}: {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout + done.stderr if expect else done.stdout


def eventually(probe: Callable[[], T | None], seconds: float, what: str) -> T:
    """Wait until ``probe`` gives something true, and return that."""
    until = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < until, f"{what} did not happen within {seconds} s"
        time.sleep(0.5)
    return found


def compose(*arguments: str, expect: int = 0, **environment: str) -> str:
    """``docker compose`` of the project's file."""
    return run(os.environ["COMPOSE"], *arguments, expect=expect, **{**PASSWORDS, **environment})


def inspect(container: str) -> dict[str, Any]:
    """What podman knows of a container."""
    found: dict[str, Any] = json.loads(run("podman", "inspect", container))[0]
    return found


def make_picture(key: str = "", api: str = API, **body: Any) -> bytes:
    """A picture of the shipped model, over HTTP."""
    authorization = {"Authorization": f"Bearer {key}"} if key else {}
    asked = {"model": "emoji32", "class_label": "heart", "steps": 10, "seed": 7, **body}
    answer = httpx.post(f"{api}/generate", json=asked, headers={"Prefer": "wait=60", **authorization}, timeout=70)
    assert answer.status_code == 200, answer.text
    picture = httpx.get(api + answer.json()["images"][0]["url"], headers=authorization)
    assert picture.status_code == 200, picture.text
    return picture.content


@pytest.fixture(scope="session", autouse=True)
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Podman's service, for Compose, and health checks, which podman leaves to systemd."""
    run("ip", "link", "set", "lo", "up")
    over = threading.Event()

    def check_health() -> None:
        while not over.wait(1.0):
            for container in subprocess.run(["podman", "ps", "-q"], capture_output=True, text=True).stdout.split():
                subprocess.run(["podman", "healthcheck", "run", container], capture_output=True)

    log = (tmp_path_factory.mktemp("podman") / "service.log").open("w")
    service = subprocess.Popen(
        ["podman", "system", "service", "--time", "0", os.environ["DOCKER_HOST"]], stdout=log, stderr=log
    )
    eventually(Path(os.environ["DOCKER_HOST"].removeprefix("unix://")).is_socket, 30, "podman's service")
    checks = threading.Thread(target=check_health)
    checks.start()
    try:
        yield
    finally:
        over.set()
        checks.join()
        service.terminate()
        service.wait()
        log.close()
