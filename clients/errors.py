"""What can go wrong with a call."""

from __future__ import annotations

import httpx
from pydantic import ValidationError

from server.schemas import JobView, Problem, TrainView

_HINTS = {
    401: " (pass api_key=..., --api-key, or set GUIDED_API_KEY)",
    403: " (another key may; 'guided keys new' on the server makes one)",
}


class ApiError(ValueError):
    """The server refused a call.

    Attributes:
        status: HTTP status.
        problem: what the server said (RFC 9457).
        retry_after: seconds after which it asks to try again.
    """

    def __init__(self, status: int, problem: Problem, retry_after: float | None = None) -> None:
        super().__init__(problem.detail + _HINTS.get(status, ""))
        self.status, self.problem, self.retry_after = status, problem, retry_after


class Unreachable(OSError):
    """Nobody answers at the server's URL."""


class JobEndedBadly(RuntimeError):
    """A job failed or was cancelled.

    Attributes:
        job: the job as it ended.
    """

    def __init__(self, job: JobView | TrainView) -> None:
        reason = f": {job.error.message}" if job.error else ""
        super().__init__(f"job {job.id} {job.status}{reason}")
        self.job = job


def error_of(response: httpx.Response) -> ApiError:
    """The error an answer tells of."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:  # a proxy's answer, or a server that is no server of ours
        text = response.text[:200].strip() or response.reason_phrase
        problem = Problem(title=response.reason_phrase, status=response.status_code, detail=text)
    after = response.headers.get("Retry-After", "")
    return ApiError(response.status_code, problem, float(after) if after.isdigit() else None)
