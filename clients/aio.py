"""The asynchronous client.

async with AsyncClient("http://127.0.0.1:8000") as client:
    job = await client.wait(await client.generate(model="emoji32", class_label="heart", guidance_scale=4.0))
    Path("heart.png").write_bytes(await client.image(job))
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, overload

import httpx
import stamina
from httpx_sse import SSEError, aconnect_sse

from clients import DEFAULT_URL
from clients.calls import (
    ANY_JOB,
    POLL_S,
    RETRY_STATUSES,
    Call,
    Event,
    Follower,
    OnProgress,
    check,
    generate_call,
    is_transient,
    key_headers,
    outcome,
    train_call,
    unreachable,
)
from clients.errors import ApiError, Unreachable
from model_core.training.config import Kind
from server.schemas import (
    JobList,
    JobSummary,
    JobView,
    ModelList,
    ModelView,
    Readiness,
    Status,
    TrainLog,
    TrainView,
)
from server.worker_schemas import WorkerList


class AsyncClient:
    """A server, as Python calls to await; arguments and errors are those of :class:`clients.Client`."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = 30.0,
        retries: int = 10,
        retry_s: float = 60.0,
    ) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.AsyncClient(base_url=self.url, timeout=timeout, headers=key_headers(api_key))
        self._retries, self._retry_s = retries, retry_s

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def generate(self, *, idempotency_key: str | None = None, **options: Any) -> JobView:
        """Ask for pictures; the options are the fields of :class:`server.schemas.GenerateRequest`.

        Args:
            idempotency_key: calls of the same key get the same job; by default each call has its own,
                so that trying again cannot ask twice.
            options: at least ``model``.

        Raises:
            pydantic.ValidationError: for options no model allows.
        """
        return JobView.model_validate_json((await self._send(generate_call(options, idempotency_key))).content)

    async def train(
        self,
        what: Kind,
        config: dict[str, Any],
        *,
        publish: str | None = None,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> TrainView:
        """Start a training job.

        Args:
            what: diffusion, classifier or upsampler.
            config: of the run, as in a file for ``guided train``.
            publish: model to publish new versions of.
            idempotency_key: as for :meth:`generate`.
            options: other fields of :class:`server.schemas.TrainRequest`.

        Raises:
            pydantic.ValidationError: for options no run allows.
        """
        call = train_call({"what": what, "config": config, "publish": publish, **options}, idempotency_key)
        return TrainView.model_validate_json((await self._send(call)).content)

    async def training(self, job_id: str) -> TrainView:
        """A training job as it is now."""
        return TrainView.model_validate_json((await self._send(Call("GET", f"/jobs/{job_id}"))).content)

    async def training_log(self, job_id: str, lines: int = 200) -> list[str]:
        """The last lines a training job said."""
        call = Call("GET", f"/jobs/{job_id}/log", {"lines": lines})
        return TrainLog.model_validate_json((await self._send(call)).content).lines

    async def job(self, job_id: str) -> JobView:
        """A job as it is now."""
        return JobView.model_validate_json((await self._send(Call("GET", f"/jobs/{job_id}"))).content)

    async def any_job(self, job_id: str) -> JobView | TrainView:
        """A job of either kind as it is now."""
        return ANY_JOB.validate_json((await self._send(Call("GET", f"/jobs/{job_id}"))).content)

    async def jobs(self, status: Status | None = None, page: int = 50) -> AsyncIterator[JobSummary | TrainView]:
        """All jobs, newest first, fetched page by page."""
        params: dict[str, Any] = {"limit": page} | ({"status": status} if status else {})
        while True:
            found = JobList.model_validate_json((await self._send(Call("GET", "/jobs", params))).content)
            for job in found.jobs:
                yield job
            if found.next_cursor is None:
                return
            params["cursor"] = found.next_cursor

    async def cancel(self, job_id: str) -> JobView | TrainView:
        """Cancel a job; one that has ended stays as it is."""
        return ANY_JOB.validate_json((await self._send(Call("DELETE", f"/jobs/{job_id}"))).content)

    async def events(
        self, job_id: str, last_event_id: str | None = None, silence_s: float = 60.0
    ) -> AsyncIterator[Event]:
        """A job's events until it has ended, from one connection.

        Args:
            job_id: the job.
            last_event_id: go on after this event.
            silence_s: seconds without a word from the server after which the connection counts as broken.

        Raises:
            httpx.TransportError: if the connection breaks; pass the last event's id to go on.
        """
        headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
        path = f"/jobs/{job_id}/events"
        async with aconnect_sse(self._http, "GET", path, headers=headers, timeout=silence_s) as source:
            if source.response.is_error:
                await source.response.aread()
            check(source.response)
            async for event in source.aiter_sse():
                yield Event.parse(event)

    @overload
    async def wait(
        self,
        job: TrainView,
        *,
        timeout: float | None = None,
        on_progress: OnProgress = lambda state: None,
        check_outcome: bool = True,
    ) -> TrainView: ...

    @overload
    async def wait(
        self,
        job: JobView | str,
        *,
        timeout: float | None = None,
        on_progress: OnProgress = lambda state: None,
        check_outcome: bool = True,
    ) -> JobView: ...

    async def wait(
        self,
        job: JobView | TrainView | str,
        *,
        timeout: float | None = None,
        on_progress: OnProgress = lambda state: None,
        check_outcome: bool = True,
    ) -> JobView | TrainView:
        """Wait until a job has ended: by its events, and by asking now and then where they do not get through.

        Args:
            job: the job or its id.
            timeout: seconds.
            on_progress: called with each change.
            check_outcome: raise if the job did not finish.

        Raises:
            JobEndedBadly: the job failed or was cancelled.
            TimeoutError: it has not ended in time; it goes on.
        """
        job_id = job if isinstance(job, str) else job.id
        follower = Follower(job_id, timeout, on_progress)
        while follower.streaming:
            try:
                async for event in self.events(job_id, follower.last, follower.silence_s()):
                    if ended := follower.take(event):
                        return outcome(ended, check_outcome)
                follower.failed()  # it closed before the end
            except httpx.ReadTimeout:
                follower.check_time()  # nothing happened for a while: ask anew from where we are
            except (httpx.TransportError, SSEError):
                follower.failed()
            except ApiError as error:
                if error.status not in RETRY_STATUSES:
                    raise
                follower.failed()
            await asyncio.sleep(follower.pause_s)
        while True:
            try:
                answer = await self._send(Call("GET", f"/jobs/{job_id}"), follower.left_s())
            except (Unreachable, ApiError):
                follower.check_time()
                raise
            if ended := follower.look(ANY_JOB.validate_json(answer.content)):
                return outcome(ended, check_outcome)
            await asyncio.sleep(POLL_S)

    async def image(self, job: JobView | str, index: int = 0, format: str | None = None) -> bytes:
        """A picture's file: png, jpeg or webp; by default what the job asked for."""
        job_id = job if isinstance(job, str) else job.id
        params = {"format": format} if format else None
        return (await self._send(Call("GET", f"/jobs/{job_id}/images/{index}", params))).content

    async def samples(self, job: JobView | str) -> bytes:
        """All pictures of a finished job as an npz file in the published layout."""
        job_id = job if isinstance(job, str) else job.id
        return (await self._send(Call("GET", f"/jobs/{job_id}/samples.npz"))).content

    async def models(self) -> list[ModelView]:
        """The models the server has."""
        return ModelList.model_validate_json((await self._send(Call("GET", "/models"))).content).models

    async def model(self, name: str) -> ModelView:
        """One model."""
        return ModelView.model_validate_json((await self._send(Call("GET", f"/models/{name}"))).content)

    async def workers(self) -> WorkerList:
        """The live workers and their queues."""
        return WorkerList.model_validate_json((await self._send(Call("GET", "/workers"))).content)

    async def ready(self) -> Readiness:
        """Whether jobs would be taken now."""
        return Readiness.model_validate_json((await self._send(Call("GET", "/readyz", accept=(503,)))).content)

    async def _send(self, call: Call, within_s: float = math.inf) -> httpx.Response:
        timeout = min(self._retry_s, within_s)
        try:
            async for attempt in stamina.retry_context(
                on=is_transient, attempts=self._retries + 1, timeout=timeout, wait_max=10.0
            ):
                with attempt:
                    response = await self._http.request(
                        call.method, call.path, params=call.params, json=call.json, headers=call.headers
                    )
                    check(response, call.accept)
        except httpx.TransportError as error:
            raise unreachable(self.url, error) from None
        return response
