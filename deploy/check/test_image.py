"""The image alone: its entry point, user, health check, a picture, SIGTERM."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from .conftest import HARDENED, IMAGE, eventually, inspect, make_picture, run


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    """The image's own command: Valkey, the API and workers in one container."""
    options = ("--detach", "--name", "alone", "--publish", "127.0.0.1:8000:8000", *HARDENED)
    run("podman", "run", *options, "--env", "GUIDED_ALLOW_UNAUTHENTICATED=true", IMAGE)
    eventually(lambda: inspect("alone")["State"]["Health"]["Status"] == "healthy", 60, "health")
    yield "alone"
    run("podman", "rm", "--force", "--volumes", "alone")


def test_it_runs_as_a_user_without_rights(container: str) -> None:
    status = run("podman", "exec", container, "cat", "/proc/1/status").splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in status)}
    assert fields["Uid"] == ["10001"] * 4
    assert (fields["CapEff"], fields["CapBnd"], fields["NoNewPrivs"]) == (["0" * 16], ["0" * 16], ["1"])


def test_only_data_models_and_tmp_can_be_written(container: str) -> None:
    for folder in ("/data", "/models", "/tmp"):
        run("podman", "exec", container, "touch", f"{folder}/x")
    for folder in ("/opt/guided", "/etc", "/usr/local/bin"):
        assert "Read-only" in run("podman", "exec", container, "touch", f"{folder}/x", expect=1)


def test_it_compiles_and_loads_what_it_compiled(container: str) -> None:
    program = '#include <cmath>\nextern "C" double f(double x) { return std::sqrt(x); }\n'
    steps = (
        f"printf '%s' '{program}' >/tmp/f.cpp && g++ -shared -fPIC -o /tmp/f.so /tmp/f.cpp && python -c '"
        'import ctypes; f = ctypes.CDLL("/tmp/f.so").f; f.restype = ctypes.c_double; print(f(ctypes.c_double(9)))\''
    )
    assert run("podman", "exec", container, "sh", "-c", steps) == "3.0\n"


def test_the_shipped_model_makes_a_picture(container: str) -> None:
    assert make_picture()[:8] == b"\x89PNG\r\n\x1a\n"


def test_sigterm_ends_it_in_order(container: str) -> None:
    began = time.monotonic()
    run("podman", "stop", "--time", "45", container)
    state = inspect(container)["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 0)
    assert time.monotonic() - began < 20
    log = run("podman", "logs", container)
    assert "stopped" in log
    assert "killed" not in log
