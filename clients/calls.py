"""What both clients have in common: requests to send, answers to read, when to try again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

import httpx
from httpx_sse import ServerSentEvent

from clients.errors import ApiError, Unreachable, error_of
from server.schemas import GenerateRequest, JobView, Progress

DEFAULT_URL = "http://127.0.0.1:8000"
RETRY_STATUSES = (429, 502, 503, 504)
STREAM_FAILURES = 3
"""Broken event streams in a row after which :meth:`wait` polls."""
POLL_S = 0.5
FINAL = ("finished", "failed", "cancelled")


@dataclass(frozen=True)
class Preview:
    """A picture on its way: its predicted x_0 as a small PNG."""

    index: int
    steps_done: int
    png: str
    """Base64."""


@dataclass(frozen=True)
class Event:
    """One event of a job; ``data`` is as its ``kind`` says."""

    id: str
    kind: Literal["status", "progress", "preview", "done"]
    data: JobView | Progress | Preview

    @classmethod
    def parse(cls, event: ServerSentEvent) -> Event:
        """Read a server-sent event."""
        match event.event:
            case "progress":
                return cls(event.id, "progress", Progress.model_validate_json(event.data))
            case "preview":
                return cls(event.id, "preview", Preview(**event.json()))
            case "status" | "done":
                return cls(event.id, event.event, JobView.model_validate_json(event.data))
        raise ValueError(f"unknown event {event.event!r}")


@dataclass(frozen=True)
class Call:
    """One HTTP request."""

    method: str
    path: str
    params: dict[str, Any] | None = None
    json: dict[str, Any] | None = None
    headers: dict[str, str] | None = None
    accept: tuple[int, ...] = ()
    """Statuses beside success that are answers, too."""


def generate_call(options: dict[str, Any], key: str | None) -> Call:
    """``POST /generate``; its own idempotency key makes it safe to send again.

    Raises:
        pydantic.ValidationError: for options that no model allows.
    """
    request = GenerateRequest(**options)
    body = request.model_dump(exclude_none=True, mode="json")
    return Call("POST", "/generate", json=body, headers={"Idempotency-Key": key or uuid4().hex})


def is_transient(error: Exception) -> bool | float:
    """Whether to try again; a number is the seconds the server asks to wait."""
    if isinstance(error, ApiError) and error.status in RETRY_STATUSES:
        return error.retry_after or True
    return isinstance(error, httpx.TransportError)


def check(response: httpx.Response, accept: tuple[int, ...] = ()) -> httpx.Response:
    """The answer, if it is one.

    Raises:
        ApiError: if it is an error.
    """
    if response.is_success or response.status_code in accept:
        return response
    raise error_of(response)


def unreachable(url: str, error: httpx.TransportError) -> Unreachable:
    """What a caller is told once trying again is over."""
    return Unreachable(f"cannot reach {url} ({error or type(error).__name__}); 'guided up' starts a server")


OnProgress = Callable[[JobView | Progress], None]
"""Called with each change of a job that is waited for."""
