"""Keys, scopes, limits and headers over HTTP; Valkey asks for a password here, too."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, OpenAI, PermissionDeniedError, RateLimitError
from redis import Redis
from redis.exceptions import AuthenticationError as RedisAuthenticationError

from clients import ApiError, AsyncClient, Client
from server.keys import hashed, new_key
from tests.stack import Stack

KEYS = {name: new_key() for name in ("alice", "bob", "tina", "root", "often", "frugal", "hasty", "patient")}
ENTRIES: list[dict[str, Any]] = [
    {"name": "alice", "scopes": ["generate"]},
    {"name": "bob", "scopes": ["generate"]},
    {"name": "tina", "scopes": ["train"]},
    {"name": "root", "scopes": ["admin"]},
    {"name": "often", "scopes": ["generate"], "rate_limit": "5/minute"},
    {"name": "frugal", "scopes": ["generate"], "images_per_day": 3},
    {"name": "hasty", "scopes": ["generate"], "images_per_day": 3},
    {"name": "patient", "scopes": ["generate"], "steps_per_day": 10},
]
PASSWORD = "s3cret-pa%2Fss"
"""As it stands in a URL."""
BODY: dict[str, Any] = {"model": "tiny", "class_label": 1, "steps": 2}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, served_models: Path) -> Iterator[Stack]:
    """Valkey with a password, an API with keys, one worker."""
    stack = Stack(
        tmp_path_factory.mktemp("guarded"),
        served_models,
        password=PASSWORD,
        api_key=KEYS["root"],
        api_keys=json.dumps([{**entry, "hash": hashed(KEYS[entry["name"]])} for entry in ENTRIES]),
        cors_origins='["https://page.example"]',
    )
    try:
        stack.valkey("--requirepass", "s3cret-pa/ss")
        stack.api()
        stack.worker()
        yield stack
    finally:
        stack.close()


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def call(stack: Stack, name: str, method: str, path: str, **arguments: Any) -> httpx.Response:
    """A call with somebody's key."""
    return httpx.request(method, stack.url + path, headers=bearer(name), timeout=60, **arguments)


def made(stack: Stack, name: str, **body: Any) -> dict[str, Any]:
    headers = bearer(name) | {"Prefer": "wait=60"}
    answer = httpx.post(f"{stack.url}/generate", json={**BODY, **body}, headers=headers, timeout=90)
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    assert job["status"] == "finished"
    return job


PROTECTED = [
    ("POST", "/generate"),
    ("GET", "/jobs"),
    ("GET", "/jobs/absent"),
    ("DELETE", "/jobs/absent"),
    ("GET", "/jobs/absent/events"),
    ("GET", "/jobs/absent/images/0"),
    ("GET", "/jobs/absent/samples.npz"),
    ("POST", "/train"),
    ("GET", "/train/diffusion/schema"),
    ("GET", "/jobs/train-absent/log"),
    ("GET", "/models"),
    ("GET", "/models/tiny"),
    ("GET", "/metrics"),
    ("POST", "/v1/images/generations"),
    ("GET", "/v1/models"),
    ("GET", "/nowhere"),
    ("GET", "//jobs"),
]


@pytest.mark.parametrize(("method", "path"), PROTECTED)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer gss_wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic cm9vdDpyb290"},
        {"X-Api-Key": KEYS["root"]},
    ],
    ids=["none", "wrong", "empty", "basic", "elsewhere"],
)
def test_without_a_valid_key_all_but_the_open_paths_are_401(
    guarded: Stack, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = httpx.request(method, guarded.url + path, headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert "key" in answer.text


def test_every_documented_operation_but_health_needs_a_key(guarded: Stack) -> None:
    document = httpx.get(f"{guarded.url}/openapi.json").json()
    open_ones = {p for p, item in document["paths"].items() for op in item.values() if "security" not in op}
    assert open_ones == {"/healthz", "/readyz"}
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if path not in open_ones:
                assert {"401", "403"} <= set(operation["responses"])
                assert httpx.request(method, guarded.url + path).status_code == 401, path


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/docs", "/openapi.json"])
def test_what_is_open_needs_no_key(guarded: Stack, path: str) -> None:
    assert httpx.get(guarded.url + path).status_code == 200


@pytest.mark.parametrize(
    ("name", "method", "path", "body"),
    [
        ("tina", "POST", "/generate", BODY),
        ("tina", "POST", "/v1/images/generations", {"prompt": "class 1"}),
        ("alice", "POST", "/train", {"what": "diffusion", "config": {}}),
        ("alice", "GET", "/metrics", None),
        ("tina", "GET", "/metrics", None),
    ],
)
def test_a_key_without_the_scope_is_403(guarded: Stack, name: str, method: str, path: str, body: Any) -> None:
    answer = call(guarded, name, method, path, json=body)
    assert answer.status_code == 403
    assert f"'{name}' has" in answer.text


def test_each_scope_opens_what_is_its_own(guarded: Stack) -> None:
    assert call(guarded, "alice", "POST", "/generate", json=BODY).status_code == 202
    assert call(guarded, "tina", "POST", "/train", json={"what": "diffusion", "config": {}}).status_code == 422
    for path in ("/metrics", "/jobs", "/models"):
        assert call(guarded, "root", "GET", path).status_code == 200
    assert call(guarded, "root", "POST", "/generate", json=BODY).status_code == 202
    assert call(guarded, "tina", "GET", "/models").status_code == 200


def test_a_job_is_its_keys_own_and_the_admins(guarded: Stack) -> None:
    job = made(guarded, "alice")
    paths = [f"/jobs/{job['id']}{end}" for end in ("", "/events", "/images/0", "/samples.npz")]
    for path in paths:
        assert call(guarded, "bob", "GET", path).status_code == 404, path
        assert call(guarded, "tina", "GET", path).status_code == 404, path
        assert call(guarded, "alice", "GET", path).status_code == 200, path
        assert call(guarded, "root", "GET", path).status_code == 200, path
    assert call(guarded, "bob", "DELETE", paths[0]).status_code == 404
    assert call(guarded, "alice", "DELETE", paths[0]).status_code == 200


def test_lists_show_a_keys_own_jobs_page_by_page(guarded: Stack) -> None:
    mine = {made(guarded, "bob")["id"] for _ in range(3)}
    made(guarded, "alice")
    found, cursor = [], None
    while True:
        page = call(
            guarded, "bob", "GET", "/jobs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}
        ).json()
        found += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert mine <= set(found)
    assert len(found) == len(set(found))
    assert all(call(guarded, "bob", "GET", f"/jobs/{job_id}").status_code == 200 for job_id in found)
    everything = call(guarded, "root", "GET", "/jobs", params={"limit": 100}).json()["jobs"]
    assert len(everything) > len(found)


def test_an_idempotency_key_is_its_api_keys_own(guarded: Stack) -> None:
    ids = set()
    for name in ("alice", "alice", "bob"):
        headers = bearer(name) | {"Idempotency-Key": "same"}
        ids.add(httpx.post(f"{guarded.url}/generate", json=BODY, headers=headers).json()["id"])
    assert len(ids) == 2


def test_too_many_requests_are_429_with_the_time_to_wait(guarded: Stack) -> None:
    answers = [call(guarded, "often", "GET", "/models") for _ in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 5 + [429]
    left = [answer.headers["ratelimit"].split(";")[1] for answer in answers]
    assert left == [f"r={count}" for count in (4, 3, 2, 1, 0, 0)]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert answers[-1].headers["ratelimit-policy"] == '"default";q=5;w=60'
    assert "key often may make 5 requests per minute" in answers[-1].json()["detail"]
    assert call(guarded, "alice", "GET", "/models").status_code == 200


def test_a_quota_of_pictures_is_kept_and_a_refusal_costs_nothing(guarded: Stack) -> None:
    made(guarded, "frugal", num_images=2)
    over = call(guarded, "frugal", "POST", "/generate", json={**BODY, "num_images": 2})
    assert over.status_code == 429
    assert "3 pictures a day, and 1 are left; this asks for 2" in over.json()["detail"]
    assert int(over.headers["retry-after"]) > 3600
    again = {"Idempotency-Key": "once"} | bearer("frugal")
    for _ in range(2):  # the second is no new job, and costs nothing
        assert httpx.post(f"{guarded.url}/generate", json=BODY, headers=again).status_code == 202
    assert call(guarded, "frugal", "POST", "/generate", json=BODY).status_code == 429


def test_a_quota_is_not_spent_twice_by_requests_at_once(guarded: Stack) -> None:
    with ThreadPoolExecutor(8) as callers:
        body = {**BODY, "num_images": 3}
        answers = list(callers.map(lambda _: call(guarded, "hasty", "POST", "/generate", json=body), range(8)))
    assert sorted(answer.status_code for answer in answers) == [202] + [429] * 7


def test_a_quota_of_steps_counts_all_pictures(guarded: Stack) -> None:
    made(guarded, "patient", num_images=3, steps=3)
    over = call(guarded, "patient", "POST", "/generate", json={**BODY, "steps": 2})
    assert over.status_code == 429
    assert "10 denoising steps a day, and 1 are left; this asks for 2" in over.json()["detail"]
    with OpenAI(base_url=f"{guarded.url}/v1", api_key=KEYS["patient"]) as client:
        with pytest.raises(RateLimitError) as error:
            client.images.generate(prompt="class 1", extra_body={"steps": 9})
        assert error.value.code == "insufficient_quota"


def test_the_openai_client_sends_the_key_and_understands_refusals(guarded: Stack) -> None:
    with OpenAI(base_url=f"{guarded.url}/v1", api_key=KEYS["alice"]) as client:
        answer = client.images.generate(prompt="class 1", extra_body={"steps": 2})
    assert answer.data is not None
    assert answer.data[0].url is not None
    with OpenAI(base_url=f"{guarded.url}/v1", api_key="sk-wrong") as client:
        with pytest.raises(AuthenticationError) as wrong:
            client.models.list()
        assert wrong.value.code == "invalid_api_key"
    with OpenAI(base_url=f"{guarded.url}/v1", api_key=KEYS["tina"]) as client, pytest.raises(PermissionDeniedError):
        client.images.generate(prompt="class 1")


def test_a_link_to_a_picture_stands_for_the_key_and_for_nothing_else(guarded: Stack) -> None:
    body = {"prompt": "class 1", "n": 2, "steps": 2, "response_format": "url"}
    answer = call(guarded, "alice", "POST", "/v1/images/generations", json=body).json()
    first, second = (item["url"] for item in answer["data"])
    assert first.startswith(f"{guarded.url}/jobs/{answer['job']}/images/0?token=")
    assert httpx.get(first).headers["content-type"] == "image/png"
    token = first.partition("token=")[2]
    assert httpx.get(second.partition("?")[0], params={"token": token}).status_code == 401
    assert httpx.get(first[:-3] + "abc").status_code == 401
    assert httpx.get(f"{guarded.url}/jobs/{answer['job']}", params={"token": token}).status_code == 401
    assert httpx.delete(f"{guarded.url}/jobs/{answer['job']}", params={"token": token}).status_code == 401


def test_our_client_sends_its_key_and_says_what_is_missing(guarded: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(guarded.url) as client, pytest.raises(ApiError, match=r"set GUIDED_API_KEY") as missing:
        client.models()
    assert missing.value.status == 401
    with Client(guarded.url, api_key=KEYS["tina"]) as client, pytest.raises(ApiError, match="the scope 'generate'"):
        client.generate(**BODY)

    async def list_models(key: str) -> int:
        async with AsyncClient(guarded.url, api_key=key) as client:
            return len(await client.models())

    with pytest.raises(ApiError, match="not valid"):
        asyncio.run(list_models("wrong"))
    assert asyncio.run(list_models(KEYS["tina"])) == 2
    monkeypatch.setenv("GUIDED_API_KEY", KEYS["alice"])
    with Client(guarded.url) as client:
        assert client.wait(client.generate(**BODY), timeout=60).status == "finished"


def test_the_command_line_takes_the_key(guarded: Stack, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clients", "generate", "--model", "tiny", "--steps", "2", "--url", guarded.url]
    out = tmp_path / "a.png"
    command += ["--class", "1", "--out", str(out)]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert refused.returncode != 0
    assert "set GUIDED_API_KEY" in refused.stderr
    assert "Traceback" not in refused.stderr
    subprocess.run([*command, "--api-key", KEYS["alice"]], check=True, timeout=60)
    assert out.stat().st_size > 100


def test_valkey_refuses_whoever_lacks_the_password(guarded: Stack) -> None:
    with pytest.raises(RedisAuthenticationError):
        Redis.from_url(f"redis://127.0.0.1:{guarded.redis_port}/0").ping()
    assert guarded.redis().ping()


def test_what_goes_wrong_inside_is_told_without_details(guarded: Stack) -> None:
    broken = "f" * 32
    guarded.redis().hset(f"guided:job:{broken}", "job", "secret detail")
    answer = guarded.http.get(f"/jobs/{broken}")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "secret detail" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    guarded.redis().delete(f"guided:job:{broken}")


def test_no_key_or_password_is_in_the_logs(guarded: Stack) -> None:
    made(guarded, "alice")
    logs = "".join(process.log.read_text() for process in guarded.processes)
    assert not any(secret in logs for secret in (*KEYS.values(), PASSWORD, "s3cret-pa/ss"))


@pytest.mark.parametrize(
    ("path", "status"),
    [("/healthz", 200), ("/docs", 200), ("/nowhere", 401), ("/v1/models", 401), ("/generate", 401), ("/jobs/x", 401)],
)
def test_security_headers_are_on_every_answer(guarded: Stack, path: str, status: int) -> None:
    answer = httpx.get(guarded.url + path)
    assert answer.status_code == status
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-frame-options"] == "DENY"
    assert "server" not in answer.headers


def test_the_documentation_page_asks_nobody_else(guarded: Stack) -> None:
    page = httpx.get(f"{guarded.url}/docs")
    sources = re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text)
    assert sources
    for source in sources:
        assert source.startswith("/"), source
        assert httpx.get(guarded.url + source).status_code == 200, source
    assert "://" not in "".join(sources)
    assert re.search(r"script-src 'self' 'sha256-[^']+'", page.headers["content-security-policy"])


def test_other_origins_are_let_in_only_if_they_are_named(guarded: Stack, stack: Stack) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for url, origin, allowed in [
        (guarded.url, "https://page.example", "https://page.example"),
        (guarded.url, "https://evil.example", None),
        (stack.url, "https://page.example", None),
    ]:
        answer = httpx.options(f"{url}/generate", headers={"Origin": origin, **ask})
        assert answer.headers.get("access-control-allow-origin") == allowed
        plain = httpx.get(f"{url}/healthz", headers={"Origin": origin})
        assert plain.headers.get("access-control-allow-origin") == allowed


def test_a_name_that_is_made_to_lead_here_is_refused_where_there_are_no_keys(stack: Stack, guarded: Stack) -> None:
    answer = stack.http.get("/models", headers={"Host": "evil.example"})
    assert answer.status_code == 400
    assert "allowed_hosts" in answer.json()["detail"]
    assert stack.http.get("/healthz", headers={"Host": "api"}).status_code == 200  # as a container is asked
    assert stack.http.get("/models", headers={"Host": f"localhost:{stack.port}"}).status_code == 200
    assert guarded.http.get("/models", headers={"Host": "models.example"}).status_code == 200


def test_a_page_of_another_site_cannot_post_without_asking(stack: Stack) -> None:
    body = json.dumps(BODY)
    answer = stack.http.post("/generate", content=body, headers={"Content-Type": "text/plain"})
    assert answer.status_code == 422


def raw(stack: Stack, head: bytes) -> bytes:
    """An answer to bytes that no client would send."""
    with socket.create_connection(("127.0.0.1", stack.port), 5) as connection:
        connection.sendall(head)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
        return received


@pytest.mark.parametrize(
    "path",
    [
        "/docs/static/../../pyproject.toml",
        "/docs/static/%2e%2e/core.py",
        "/docs/static/..%2fcore.py",
        "/docs/static//etc/passwd",
        "/playground/../jobs",
        "/playground/..%2fjobs",
        "/docs/static/../../jobs",
        "/models/..%2f..%2fetc%2fpasswd",
        "/jobs/..%2f..%2fetc/images/0",
        "/jobs/../../etc/images/0",
        "/jobs/x/images/..%2f0",
        "/v1/models/..%2f..",
        "/train/..%2f..%2fetc/schema",
    ],
)
def test_no_path_leads_out(stack: Stack, guarded: Stack, path: str) -> None:
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    assert raw(stack, head).split()[1] in (b"404", b"422", b"400")
    assert raw(guarded, head).split()[1] in (b"404", b"401")


@pytest.mark.parametrize(
    "request_line", [b"GET /healthz?" + b"x" * 40_000, b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 40_000]
)
def test_a_head_that_is_too_large_is_refused(stack: Stack, request_line: bytes) -> None:
    assert raw(stack, request_line).startswith(b"HTTP/1.1 400")
