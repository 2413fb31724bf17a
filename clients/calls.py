"""What both clients have in common: requests to send, answers to read, when to try again."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

import httpx
from httpx_sse import ServerSentEvent
from pydantic import TypeAdapter

from clients import KEY_VARIABLE
from clients.errors import ApiError, JobEndedBadly, Unreachable, error_of
from server.schemas import AnyJob, GenerateRequest, JobView, Progress, TrainProgress, TrainRequest, TrainView

MAX_PAUSE_S = 300.0
"""A call is not tried again if the server asks to wait longer, as it does for a quota that is used up."""
RETRY_STATUSES = (429, 502, 503, 504)
STREAM_FAILURES = 3
"""Broken event streams in a row after which :meth:`wait` polls."""
POLL_S = 0.5
SILENCE_S = 10.0
"""Seconds without an event after which :meth:`wait` looks at the clock, and asks anew."""
FINAL = ("finished", "failed", "cancelled")
ANY_JOB: TypeAdapter[JobView | TrainView] = TypeAdapter(AnyJob)
PROGRESS: TypeAdapter[Progress | TrainProgress] = TypeAdapter(Progress | TrainProgress)


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
    data: JobView | TrainView | Progress | TrainProgress | Preview

    @classmethod
    def parse(cls, event: ServerSentEvent) -> Event:
        """Read a server-sent event."""
        match event.event:
            case "progress":
                return cls(event.id, "progress", PROGRESS.validate_json(event.data))
            case "preview":
                return cls(event.id, "preview", Preview(**event.json()))
            case "status" | "done":
                return cls(event.id, event.event, ANY_JOB.validate_json(event.data))
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


def train_call(options: dict[str, Any], key: str | None) -> Call:
    """``POST /train``; its own idempotency key makes it safe to send again.

    Raises:
        pydantic.ValidationError: for options that no run allows.
    """
    body = TrainRequest(**options).model_dump(exclude_none=True, mode="json")
    return Call("POST", "/train", json=body, headers={"Idempotency-Key": key or uuid4().hex})


def key_headers(api_key: str | None) -> dict[str, str]:
    """The header that holds the key, if there is one."""
    key = api_key or os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def is_transient(error: Exception) -> bool | float:
    """Whether to try again; a number is the seconds the server asks to wait."""
    if isinstance(error, ApiError) and error.status in RETRY_STATUSES:
        if error.retry_after is not None and error.retry_after > MAX_PAUSE_S:
            return False
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


OnProgress = Callable[[JobView | TrainView | Progress | TrainProgress], None]
"""Called with each change of a job that is waited for."""


class Follower:
    """Follows a job by its events: what came last, how often the stream broke, how much time is left.

    Args:
        job_id: the job.
        timeout: seconds to follow it.
        on_progress: called with each change.
    """

    def __init__(self, job_id: str, timeout: float | None, on_progress: OnProgress) -> None:
        self.job_id, self.on_progress = job_id, on_progress
        self.until = None if timeout is None else time.monotonic() + timeout
        self.last: str | None = None
        self.failures = 0

    @property
    def streaming(self) -> bool:
        """Whether events are still worth trying."""
        return self.failures < STREAM_FAILURES

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next try."""
        return 0.2 * self.failures

    def silence_s(self) -> float:
        """Seconds without an event after which to look at the clock."""
        return min(SILENCE_S, self.left_s())

    def left_s(self) -> float:
        """Seconds left."""
        return math.inf if self.until is None else max(0.01, self.until - time.monotonic())

    def take(self, event: Event) -> JobView | TrainView | None:
        """Take in an event; the job, if it has ended.

        Raises:
            TimeoutError: if the time is over.
        """
        self.last, self.failures = event.id, 0
        if not isinstance(event.data, Preview):
            self.on_progress(event.data)
        if event.kind == "done" and isinstance(event.data, JobView | TrainView):
            return event.data
        self.check_time()
        return None

    def look(self, job: JobView | TrainView) -> JobView | TrainView | None:
        """Take in the job as it was asked for; the job, if it has ended.

        Raises:
            TimeoutError: if the time is over.
        """
        self.on_progress(job)
        if job.status in FINAL:
            return job
        self.check_time()
        return None

    def failed(self) -> None:
        """The stream broke.

        Raises:
            TimeoutError: if the time is over.
        """
        self.failures += 1
        self.check_time()

    def check_time(self) -> None:
        """TimeoutError once the time is over."""
        if self.until is not None and time.monotonic() > self.until:
            raise TimeoutError(f"job {self.job_id} has not ended in time")


def outcome(job: JobView | TrainView, check_outcome: bool) -> JobView | TrainView:
    """An ended job, unless it is to be an error."""
    if check_outcome and job.status != "finished":
        raise JobEndedBadly(job)
    return job
