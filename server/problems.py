"""Errors as RFC 9457 problem documents, with the fields at fault."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from server.headers import SECURITY_HEADERS
from server.openai_schemas import OpenAIError, OpenAIProblem
from server.schemas import FieldError, Problem

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
TITLES = {
    400: "Bad request",
    401: "No valid key",
    403: "Not allowed",
    404: "Not found",
    405: "Method not allowed",
    409: "Not yet",
    410: "Gone",
    413: "Too large",
    422: "Not valid",
    429: "Too much at once",
    500: "Our fault",
    503: "Not available",
    504: "Not in time",
}
OPENAI = "/v1/"
"""Below this path errors have the shape of OpenAI's API."""


class ProblemError(Exception):
    """An error with its HTTP answer.

    Args:
        status: HTTP status.
        detail: what happened.
        errors: fields at fault.
        retry_after: seconds.
        headers: more headers of the answer.
        code: a name for what happened, where OpenAI's API has one.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        errors: Sequence[FieldError] = (),
        retry_after: int | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
        code: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.errors, self.retry_after = status, detail, list(errors), retry_after
        self.headers, self.code = headers, code


def invalid(errors: Iterable[tuple[str, str]]) -> ProblemError:
    """422 with (field, message) pairs."""
    fields = [FieldError(field=field, message=message) for field, message in errors]
    return ProblemError(422, "; ".join(f"{e.field}: {e.message}" for e in fields), fields)


def respond(request: Request, problem: ProblemError) -> JSONResponse:
    """The answer for a problem."""
    headers = dict(problem.headers)
    if problem.retry_after is not None:
        headers["Retry-After"] = str(problem.retry_after)
    if request.url.path.startswith(OPENAI):
        return _openai(problem, headers)
    title = TITLES.get(problem.status, "Error")
    body = Problem(
        title=title,
        status=problem.status,
        detail=problem.detail,
        instance=request.url.path,
        errors=problem.errors,
    )
    return JSONResponse(body.model_dump(), problem.status, headers, media_type=MEDIA_TYPE)


def openai_error(problem: ProblemError) -> OpenAIProblem:
    """A problem as OpenAI's API tells it."""
    status = problem.status
    told = OpenAIError(
        message=problem.detail,
        type="server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error",
        param=problem.errors[0].field if problem.errors else None,
        code=problem.code or {404: "not_found", 429: "rate_limit_exceeded"}.get(status),
    )
    return OpenAIProblem(error=told)


def _openai(problem: ProblemError, headers: dict[str, str]) -> JSONResponse:
    """The answer in that API, where what is not valid is a 400."""
    status = 400 if problem.status == 422 else problem.status
    if problem.code == "insufficient_quota" or status in (409, 500, 504):
        headers["x-should-retry"] = "false"  # its clients would ask again at once, in vain
    return JSONResponse(openai_error(problem).model_dump(), status, headers)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI descriptions of error answers."""
    descriptions: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        description: dict[str, Any] = {
            "description": TITLES[status],
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        if status in (409, 429, 503):
            description["headers"] = {
                "Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}
            }
        descriptions[status] = description
    return descriptions


def openai_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI descriptions of error answers below ``/v1``."""
    schema = {"application/json": {"schema": {"$ref": "#/components/schemas/OpenAIProblem"}}}
    return {status: answer | {"content": schema} for status, answer in responses(*statuses).items()}


def redis_away() -> ProblemError:
    """Nothing can be looked up or queued for the moment."""
    return ProblemError(503, "the queue (Redis) cannot be reached", retry_after=2)


def install(app: FastAPI) -> None:
    """Let every error of the app be a problem document."""

    @app.exception_handler(ProblemError)
    async def on_problem(request: Request, error: ProblemError) -> JSONResponse:
        return respond(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return respond(request, _from_validation(error))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        answer = respond(request, ProblemError(error.status_code, str(error.detail)))
        answer.headers.update(error.headers or {})
        if error.status_code == 405 and (methods := _methods(app, request)):
            answer.headers["Allow"] = ", ".join(methods)
        return answer

    async def on_redis(request: Request, error: Exception) -> JSONResponse:
        log.warning("Redis is away: %s", error)
        return respond(request, redis_away())

    for kind in (RedisConnectionError, RedisTimeoutError):
        app.add_exception_handler(kind, on_redis)

    @app.exception_handler(Exception)
    async def on_crash(request: Request, error: Exception) -> JSONResponse:
        """Ours to repair; the log has it, for it is raised again after this answer."""
        answer = respond(request, ProblemError(500, "something went wrong here; the server's log says what"))
        answer.headers.update(SECURITY_HEADERS)  # beyond the middleware that adds them elsewhere
        return answer


def _methods(app: FastAPI, request: Request) -> list[str]:
    """What a path can do, over all its routes."""
    path = request.url.path
    documented = app.openapi()["paths"].items()
    matching = [item for template, item in documented if compile_path(template)[0].match(path)]
    return sorted({method.upper() for item in matching for method in item})


def _from_validation(error: RequestValidationError) -> ProblemError:
    """FastAPI's validation errors; those of a union's branches are told as one."""
    found: dict[str, list[str]] = {}
    for item in error.errors():
        where = [str(part) for part in item["loc"][1:]]
        message = str(item["msg"]).removeprefix("Value error, ")
        if item["type"] == "json_invalid":
            return ProblemError(422, f"the body is not JSON: {item.get('ctx', {}).get('error', message)}")
        if item["type"] == "model_attributes_type":
            field, message = "body", "must be a JSON object"
        elif item["type"] == "missing" and not where:
            field, message = "body", "is missing; a JSON object is needed"
        elif not where and ": " in message:  # from a validator over several fields
            field, _, message = message.partition(": ")
        else:
            field = _public_name(where)
        found.setdefault(field, [])
        if message not in found[field]:
            found[field].append(message)
    return invalid((field, " or ".join(_lower(m) for m in messages)) for field, messages in found.items())


def _public_name(where: list[str]) -> str:
    """A path without pydantic's names for the branches of unions."""
    kept = [part for part in where if part.replace("-", "_").isidentifier() or part.isdigit()]
    return ".".join(part for part in kept if part.removeprefix("constrained-") not in ("int", "str", "float"))


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


def dumps(value: Any) -> str:
    """Compact JSON."""
    return json.dumps(value, separators=(",", ":"))
