"""The Python clients against a real server, and against small real HTTP servers that misbehave."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from clients import ApiError, AsyncClient, Client, JobEndedBadly, Preview, Unreachable
from server.schemas import JobView, Progress
from server.up import free_port
from tests.stack import Stack


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url) as client:
        yield client


def test_from_request_to_picture(client: Client) -> None:
    states: list[object] = []
    job = client.generate(model="tiny", class_label="class 2", steps=100, num_images=2)
    job = client.wait(job, timeout=30, on_progress=states.append)
    assert job.status == "finished"
    assert {type(state) for state in states} == {JobView, Progress}
    assert Image.open(io.BytesIO(client.image(job, 1))).size == (16, 16)
    assert {lane.model: lane.width for lane in client.workers().workers[0].lanes}["tiny"] == 4
    assert Image.open(io.BytesIO(client.image(job.id, format="webp"))).format == "WEBP"
    with np.load(io.BytesIO(client.samples(job))) as file:
        assert file["arr_1"].tolist() == [2, 2]


def test_the_asynchronous_client_does_the_same(stack: Stack) -> None:
    async def run() -> list[bytes]:
        async with AsyncClient(stack.url) as client:
            jobs = await asyncio.gather(
                *(client.generate(model="tiny", class_label=3, steps=20, seed=seed) for seed in (1, 1, 2))
            )
            ended = await asyncio.gather(*(client.wait(job, timeout=30) for job in jobs))
            assert [event.kind async for event in client.events(jobs[0].id)][-1] == "done"
            assert (await client.model("tiny")).image_size == 16
            assert [m.name for m in await client.models()] == ["tiny", "up"]
            assert (await client.ready()).ready
            assert [worker.models for worker in (await client.workers()).workers] == [["tiny"]]
            assert (await client.job(jobs[0].id)).status == "finished"
            assert (await client.cancel(jobs[0].id)).status == "finished"
            assert len([job async for job in client.jobs(status="finished", page=2)]) >= 3
            assert await client.samples(jobs[0])
            return [await client.image(job) for job in ended]

    one, again, other = asyncio.run(run())
    assert np.abs(_pixels(one) - _pixels(again)).max() <= 1
    assert np.abs(_pixels(one) - _pixels(other)).max() > 10


def _pixels(file: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(file))).astype(int)


def test_events_are_typed_and_resume(client: Client) -> None:
    job = client.generate(model="tiny", class_label=3, steps=200, preview_every=50)
    told = list(client.events(job.id))
    preview = next(event.data for event in told if isinstance(event.data, Preview))
    assert Image.open(io.BytesIO(base64.b64decode(preview.png))).size == (16, 16)
    rest = list(client.events(job.id, told[0].id))
    assert told[0].id not in {event.id for event in rest}
    assert rest[-1].kind == "done"


def test_listing_goes_over_all_pages(client: Client) -> None:
    made = [client.generate(model="tiny", class_label=1, steps=1).id for _ in range(5)]
    listed = [job.id for job in client.jobs(page=2)]
    assert listed[:5] == made[::-1]
    assert len(set(listed)) == len(listed)


def test_each_call_makes_one_job_and_a_key_names_it(client: Client) -> None:
    options: dict[str, Any] = {"model": "tiny", "class_label": 1, "steps": 1}
    assert client.generate(**options).id != client.generate(**options).id
    first, again = (client.generate(idempotency_key="client", **options).id for _ in range(2))
    assert first == again


def test_refusals_name_the_field(client: Client) -> None:
    with pytest.raises(ApiError, match="class_label: 10 is not between 0 and 9") as caught:
        client.generate(model="tiny", class_label=10)
    assert (caught.value.status, caught.value.problem.errors[0].field) == (422, "class_label")
    with pytest.raises(ApiError, match="there is no model 'absent'"):
        client.model("absent")
    with pytest.raises(ValidationError, match="num_images"):
        client.generate(model="tiny", num_images=0)
    with pytest.raises(ApiError, match="there is no job"):
        list(client.events("absent"))


def test_waiting_for_a_job_that_is_cancelled_or_takes_too_long(client: Client) -> None:
    job = client.generate(model="tiny", class_label=1, steps=1000, num_images=8)
    with pytest.raises(TimeoutError, match="has not ended"):
        client.wait(job, timeout=0.5)
    assert client.cancel(job.id).status == "cancelled"
    with pytest.raises(JobEndedBadly, match="cancelled") as caught:
        client.wait(job)
    assert caught.value.job.id == job.id
    assert client.wait(job, check_outcome=False).status == "cancelled"


Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def http_server(answer: Callable[[str, str], Answer]) -> Iterator[str]:
    """A server whose answers a function decides, from method and path."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = answer(self.command, self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = reply

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


PROBLEM = json.dumps({"title": "The queue is full", "status": 429, "detail": "full"}).encode()


@pytest.mark.parametrize("status", [429, 503])
def test_it_comes_back_when_the_server_asks_to(client: Client, status: int) -> None:
    job = client.wait(client.generate(model="tiny", class_label=1, steps=1))
    calls: list[str] = []

    def answer(method: str, path: str) -> Answer:
        calls.append(path)
        if len(calls) < 3:
            return status, {"Retry-After": "0"}, PROBLEM
        return 202, {}, job.model_dump_json().encode()

    with http_server(answer) as url, Client(url) as other:
        assert other.generate(model="tiny").id == job.id
    assert calls == ["/generate"] * 3


def test_it_gives_up_with_the_servers_reason() -> None:
    with (
        http_server(lambda method, path: (429, {"Retry-After": "0"}, PROBLEM)) as url,
        Client(url, retries=2) as client,
        pytest.raises(ApiError, match="full"),
    ):
        client.generate(model="tiny")


def test_answers_that_are_no_problem_documents() -> None:
    with (
        http_server(lambda method, path: (404, {}, b"<h1>nginx</h1>")) as url,
        Client(url) as client,
        pytest.raises(ApiError, match="nginx"),
    ):
        client.models()


@pytest.mark.parametrize(
    ("status", "media_type", "body"),
    [
        (200, "text/html", b"a proxy that does not let events through"),
        (200, "text/event-stream", b": the stream ends early\n\n"),
        (503, "application/problem+json", PROBLEM),
    ],
)
def test_waiting_falls_back_to_asking(client: Client, status: int, media_type: str, body: bytes) -> None:
    job = client.wait(client.generate(model="tiny", class_label=1, steps=1))

    def answer(method: str, path: str) -> Answer:
        if path.endswith("/events"):
            return status, {"Content-Type": media_type}, body
        return 200, {"Content-Type": "application/json"}, job.model_dump_json().encode()

    with http_server(answer) as url, Client(url) as other:
        assert other.wait(job.id, timeout=10).status == "finished"
        assert asyncio.run(_wait_async(url, job.id)) == "finished"


def test_waiting_ends_in_time_where_nothing_happens(own_stack: Stack) -> None:
    # No worker: the job stays queued, and its stream says nothing.
    with Client(own_stack.url) as client:
        job = client.generate(model="tiny", class_label=1, steps=1)
        before = time.monotonic()
        with pytest.raises(TimeoutError):
            client.wait(job, timeout=1.5)
        with pytest.raises(TimeoutError):
            asyncio.run(_wait_async(own_stack.url, job.id, timeout=1.5))
        assert time.monotonic() - before < 8


def test_waiting_ends_in_time_where_nobody_answers() -> None:
    url, began = f"http://127.0.0.1:{free_port()}", time.monotonic()
    with Client(url) as client, pytest.raises(TimeoutError):
        client.wait("0" * 32, timeout=1)
    with pytest.raises(TimeoutError):
        asyncio.run(_wait_async(url, "0" * 32, timeout=1))
    assert time.monotonic() - began < 15


async def _wait_async(url: str, job_id: str, timeout: float = 10) -> str:
    async with AsyncClient(url) as client:
        return (await client.wait(job_id, timeout=timeout)).status


def test_nobody_there() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url, retries=1) as client, pytest.raises(Unreachable, match="cannot reach http"):
        client.models()
