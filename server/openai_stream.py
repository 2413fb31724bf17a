"""A picture on its way, as OpenAI's API streams it."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool

from server.context import Context
from server.openai_schemas import OutputFormat, PictureEvent, TokenUsage
from server.problems import ProblemError, openai_error
from server.store import Seen
from server.submission import see
from worker.artifacts import convert
from worker.records import FINAL, events_key

SILENCE_S = 15
"""Seconds without an event after which a comment keeps the connection open."""


class PictureStream:
    """Server-sent events of a job of one picture: previews, then the picture, or an error.

    Args:
        context: the application's parts.
        job_id: the job; it is cancelled if the caller goes away first.
        partials: previews to send, at most.
        size: of the picture.
        output_format: of the picture; previews are PNG.
    """

    def __init__(self, context: Context, job_id: str, partials: int, size: str, output_format: OutputFormat) -> None:
        self._context, self._job_id, self._partials = context, job_id, partials
        self._size, self._format = size, output_format

    async def events(self, finished: Callable[[Seen], Seen]) -> AsyncIterator[bytes]:
        """The events as bytes.

        Args:
            finished: gives the ended job back if it finished, or raises the ProblemError that tells how it ended.
        """
        over = False
        try:
            async for event in self._follow(finished):
                yield event
            over = True
        finally:
            if not over:
                with anyio.CancelScope(shield=True):
                    await cancel(self._context, self._job_id)

    async def _follow(self, finished: Callable[[Seen], Seen]) -> AsyncIterator[bytes]:
        last, sent, silent = "0", 0, 0
        while True:
            seen = await see(self._context, self._job_id)
            ended = seen.status in FINAL
            redis = self._context.store.redis
            news: Any = await redis.xread({events_key(self._job_id): last}, block=None if ended else 1000)
            for event_id, fields in news[0][1] if news else []:
                last = event_id.decode()
                if fields[b"event"] == b"preview" and sent < self._partials:
                    png = json.loads(fields[b"data"])["png"]
                    yield self._event(seen, png, "png", sent)
                    sent += 1
            if ended:
                yield await self._end(seen, finished)
                return
            silent = 0 if news else silent + 1
            if silent >= SILENCE_S:
                yield KEEPALIVE_COMMENT
                silent = 0

    async def _end(self, seen: Seen, finished: Callable[[Seen], Seen]) -> bytes:
        try:
            finished(seen)
        except ProblemError as problem:
            return format_sse_event(event="error", data_str=openai_error(problem).model_dump_json())
        file = await run_in_threadpool(self._context.artifacts.read, self._job_id, 0)
        if self._format != "png":
            file = await run_in_threadpool(convert, file, self._format)
        return self._event(seen, base64.b64encode(file).decode(), self._format)

    def _event(
        self,
        seen: Seen,
        picture: str,
        format: OutputFormat,
        index: int | None = None,
    ) -> bytes:
        event = PictureEvent(
            type="image_generation.completed" if index is None else "image_generation.partial_image",
            b64_json=picture,
            created_at=int(seen.record.job.created),
            size=self._size,
            output_format=format,
            partial_image_index=index,
            usage=TokenUsage() if index is None else None,
            seed=seen.record.job.seed,
            job=self._job_id,
        )
        return format_sse_event(event=event.type, data_str=event.model_dump_json(exclude_none=True))


async def cancel(context: Context, job_id: str) -> None:
    """End a job whose caller went away."""
    seen = await context.store.see(job_id)
    if seen is not None:
        await run_in_threadpool(context.store.cancel, seen.record.job)
