"""Exit codes of the ``guided`` command, and its one-line errors."""

from __future__ import annotations

import os
import sys
import traceback
from enum import IntEnum

import typer

OPTIONAL = (
    "torch",
    "safetensors",
    "numpy",
    "PIL",
    "fastapi",
    "uvicorn",
    "redis",
    "rq",
    "fsspec",
    "pydantic_settings",
    "tensorboard",
)
"""Packages that come with the extras only."""


class ExitCode(IntEnum):
    """What the exit code of a verb says."""

    OK = 0
    FAILED = 1
    """A job or run failed, or something nobody thought of."""
    USAGE = 2
    """Bad input: an option, a file, a field of the request."""
    STOPPED = 3
    """A signal stopped a training run, which is saved; the same command goes on."""
    REFUSED = 4
    """The server would not: not allowed, full, or not able to at the moment."""
    UNREACHABLE = 5
    """Nobody answers at the server's URL."""
    INTERRUPTED = 130
    """Ctrl-C."""


BAD_REQUESTS = (400, 404, 405, 413, 415, 422)
"""Statuses of a server that say that the request itself is at fault."""


def report(error: BaseException) -> ExitCode:
    """Print one line about an error (``GUIDED_DEBUG=1``: its traceback before), and return the exit code."""
    code, text = _understand(error)
    if os.environ.get("GUIDED_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    if text:
        print(f"guided: {' '.join(text.split())}", file=sys.stderr)
    return code


def _understand(error: BaseException) -> tuple[ExitCode, str]:
    from pydantic import ValidationError

    from clients.errors import ApiError, JobEndedBadly, Unreachable
    from model_core.config import explain

    text = str(error) or type(error).__name__
    match error:
        case KeyboardInterrupt() | typer.Abort():
            return ExitCode.INTERRUPTED, ""
        case ModuleNotFoundError() if error.name in OPTIONAL:
            needs = "this verb needs: pip install 'guided-sampling-server[all]'"
            return ExitCode.FAILED, f"{error.name} is not installed; {needs}"
        case typer.TyperException():
            return ExitCode.USAGE, _usage(error)
        case Unreachable():
            return ExitCode.UNREACHABLE, text
        case ApiError():
            return ExitCode.USAGE if error.status in BAD_REQUESTS else ExitCode.REFUSED, text
        case JobEndedBadly():
            return ExitCode.FAILED, text
        case ValidationError():
            return ExitCode.USAGE, explain(error)
        case ValueError():
            return ExitCode.USAGE, text
        case FileNotFoundError() | FileExistsError() | PermissionError() | IsADirectoryError() | NotADirectoryError():
            return ExitCode.USAGE, text
        case BlockingIOError():  # another process has the folder
            return ExitCode.USAGE, text
        case OSError() | FloatingPointError():
            return ExitCode.FAILED, text
    return ExitCode.FAILED, f"unexpected {type(error).__name__}: {text}; GUIDED_DEBUG=1 shows where"


def _usage(error: typer.TyperException) -> str:
    """What is wrong with the command line, and where help is."""
    context = getattr(error, "ctx", None)
    path = context.command_path.removeprefix("guided").strip() if context else ""
    text = error.format_message()
    if not text:  # the verb was called without anything, and its help was printed
        return ""
    said = f"{text[0].lower()}{text[1:]}".rstrip(".")
    return f"{said}; see 'guided {path} --help'".replace("  ", " ")
