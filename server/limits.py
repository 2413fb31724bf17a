"""Limits on requests."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.problems import ProblemError, respond

MAX_BODY = 1 << 20
"""Bytes a request's body may have."""
MAX_HEAD = 1 << 15
"""Bytes a request's line and headers may have; uvicorn answers 400 to more."""
_DETAIL = f"the body has more than {MAX_BODY} bytes"


class BodyLimitMiddleware:
    """Answers 413, as a problem document, to bodies that are too large, told so in advance or not."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and count its body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > MAX_BODY:
            await respond(Request(scope), ProblemError(413, _DETAIL))(scope, receive, send)
            return
        size = 0

        async def count() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise HTTPException(413, _DETAIL)
            return message

        await self._app(scope, count, send)
