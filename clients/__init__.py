"""Python client and command line.

from clients import Client
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clients.aio import AsyncClient
    from clients.calls import Event, Preview
    from clients.client import Client
    from clients.errors import ApiError, JobEndedBadly, Unreachable

DEFAULT_URL = "http://127.0.0.1:8000"
_HOMES = {
    "ApiError": "errors",
    "AsyncClient": "aio",
    "Client": "client",
    "Event": "calls",
    "JobEndedBadly": "errors",
    "Preview": "calls",
    "Unreachable": "errors",
}

__all__ = ["DEFAULT_URL", "ApiError", "AsyncClient", "Client", "Event", "JobEndedBadly", "Preview", "Unreachable"]


def __getattr__(name: str) -> Any:
    """Import on first use: ``guided --help`` and a shell's completion should not wait for HTTP."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
