"""Errors as one line and an exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import typer

from clients import ApiError, Unreachable
from clients.exits import ExitCode, report
from server.schemas import Problem


def api_error(status: int) -> ApiError:
    return ApiError(status, Problem(title="", status=status, detail="the server's words"))


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (api_error(422), ExitCode.USAGE, "guided: the server's words"),
        (api_error(404), ExitCode.USAGE, "guided: the server's words"),
        (api_error(401), ExitCode.REFUSED, "guided: the server's words"),
        (api_error(403), ExitCode.REFUSED, "guided: the server's words"),
        (api_error(429), ExitCode.REFUSED, "guided: the server's words"),
        (api_error(503), ExitCode.REFUSED, "guided: the server's words"),
        (Unreachable("cannot reach it"), ExitCode.UNREACHABLE, "guided: cannot reach it"),
        (ValueError("steps: two\n lines"), ExitCode.USAGE, "guided: steps: two lines"),
        (FileNotFoundError(2, "No such file", "x"), ExitCode.USAGE, "guided: [Errno 2] No such file: 'x'"),
        (OSError(28, "No space left"), ExitCode.FAILED, "guided: [Errno 28] No space left"),
        (FloatingPointError("the loss is not finite"), ExitCode.FAILED, "guided: the loss is not finite"),
        (KeyError("x"), ExitCode.FAILED, "guided: unexpected KeyError: 'x'; GUIDED_DEBUG=1 shows where"),
        (ModuleNotFoundError("", name="torch"), ExitCode.FAILED, "guided: torch is not installed; this verb needs: "),
        (typer.Abort(), ExitCode.INTERRUPTED, ""),
    ],
)
def test_code_and_line(error: Exception, code: ExitCode, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(error) == code
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == (1 if line else 0)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clients", "models", "verify", str(tmp_path / "absent")]
    for value, count in (("0", 0), ("1", 1)):
        done = subprocess.run(command, capture_output=True, text=True, env={"GUIDED_DEBUG": value}, timeout=60)
        assert done.returncode == 2
        assert done.stderr.count("Traceback (most recent call last)") == count
        assert done.stderr.splitlines()[-1].startswith("guided: ")
