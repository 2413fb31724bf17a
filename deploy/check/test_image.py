"""The image alone: its entry point, user, health check, a picture, SIGTERM."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from .conftest import HARDENED, IMAGE, eventually, inspect, make_picture, run


def test_it_does_not_serve_everybody_unless_told_so() -> None:
    assert "there are no api_keys" in run("podman", "run", "--rm", *HARDENED, IMAGE, expect=2)


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


def test_torch_compiles_ahead_of_time_and_runs_it(container: str) -> None:
    program = """
import torch
layer, x = torch.nn.Linear(8, 8), torch.ones(2, 8)
package = torch._inductor.aoti_compile_and_package(torch.export.export(layer, (x,)), package_path="/tmp/layer.pt2")
assert torch.allclose(torch._inductor.aoti_load_package(package)(x), layer(x), atol=1e-5)
"""
    run("podman", "exec", container, "python", "-c", program)


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
