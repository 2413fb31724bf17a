"""How fast the API answers: POST /generate per second, and GET /jobs/{id} latency while a worker is busy.

Run it against a server that runs (``guided up``); it is a process of its own and speaks HTTP over plain
sockets, so that it costs little beside the server it measures.

    python benchmarks/api.py http://127.0.0.1:8000
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer


class Connection:
    """One keep-alive HTTP/1.1 connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self._reader, self._writer, self._host = reader, writer, host

    @classmethod
    async def open(cls, url: str) -> Connection:
        """Connect to the server."""
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        return cls(reader, writer, parts.netloc)

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """One exchange: status and body."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = int((await self._reader.readuntil(b"\r\n")).split()[1])
        length = 0
        while (line := await self._reader.readuntil(b"\r\n")) != b"\r\n":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, await self._reader.readexactly(length)


async def post_rate(url: str, body: bytes, seconds: float, connections: int) -> tuple[float, list[str]]:
    """Requests per second that ``connections`` callers get answered with 202, and the jobs' ids."""
    ids: list[str] = []
    until = time.perf_counter() + seconds

    async def call() -> None:
        connection = await Connection.open(url)
        while time.perf_counter() < until:
            status, answer = await connection.ask("POST", "/generate", body)
            if status != 202:
                raise SystemExit(f"POST /generate answered {status}: {answer.decode()}")
            ids.append(json.loads(answer)["id"])

    began = time.perf_counter()
    await asyncio.gather(*(call() for _ in range(connections)))
    return len(ids) / (time.perf_counter() - began), ids


async def get_latency(url: str, path: str, rate: float, seconds: float, connections: int) -> list[float]:
    """Latencies, s, of GETs sent at fixed times (a late answer delays no other request's clock)."""
    pool = [await Connection.open(url) for _ in range(connections)]
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for connection in pool:
        free.put_nowait(connection)
    latencies: list[float] = []

    async def call(due: float) -> None:
        connection = await free.get()
        status, _ = await connection.ask("GET", path)
        latencies.append(time.perf_counter() - due)
        free.put_nowait(connection)
        assert status == 200

    began, tasks = time.perf_counter(), []
    for number in range(int(rate * seconds)):
        due = began + number / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(call(due)))
    await asyncio.gather(*tasks)
    return sorted(latencies)


async def measure(url: str, model: str, seconds: float, rate: float, connections: int) -> None:
    """Both figures, printed."""
    body: dict[str, Any] = {"model": model, "class_label": 0, "steps": 10, "guidance_scale": 0}
    busy = await Connection.open(url)
    _, answer = await busy.ask("POST", "/generate", json.dumps({**body, "steps": 1000, "num_images": 16}).encode())
    job = json.loads(answer)["id"]
    await asyncio.sleep(2)
    latencies = await get_latency(url, f"/jobs/{job}", rate, seconds, connections)
    p50, p99 = (1e3 * latencies[int(len(latencies) * q)] for q in (0.5, 0.99))
    print(
        f"GET /jobs/{{id}} at {rate:.0f}/s, worker busy: p50 {p50:.2f} ms, p99 {p99:.2f} ms ({len(latencies)} requests)"
    )
    await busy.ask("DELETE", f"/jobs/{job}")
    posted, ids = await post_rate(url, json.dumps({**body, "priority": "low"}).encode(), seconds, connections)
    print(f"POST /generate with {connections} callers: {posted:.0f} requests/s ({len(ids)} requests)")
    for job in ids:
        await busy.ask("DELETE", f"/jobs/{job}")


def main(
    url: Annotated[str, typer.Argument()] = "http://127.0.0.1:8000",
    model: str = "emoji32",
    seconds: float = 10.0,
    rate: float = 200.0,
    connections: int = 8,
) -> None:
    """Measure a running server."""
    asyncio.run(measure(url, model, seconds, rate, connections))


if __name__ == "__main__":
    typer.run(main)
