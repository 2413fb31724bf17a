"""What a server needs before it listens: settings of keys and addresses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import Request

from server.keys import hashed
from server.security import address_of, is_loopback
from server.up import free_port
from tests.stack import Process, Stack, eventually


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "GUIDED_CONFIG": "absent.toml", **environment}
    return subprocess.run(
        [sys.executable, "-m", "clients", *command], env=given, capture_output=True, text=True, timeout=60
    )


def entries(**changes: Any) -> str:
    """The setting of one key."""
    return json.dumps([{"name": "a", "hash": hashed("x"), "scopes": ["admin"], **changes}])


@pytest.mark.parametrize("verb", ["server", "up"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_it_does_not_serve_everybody_by_mistake(verb: str, host: str, tmp_path: Path) -> None:
    done = run(
        [verb, "--host", host, "--port", str(free_port())],
        GUIDED_REDIS_URL="redis://127.0.0.1:1/0",
        GUIDED_DATA_DIR=str(tmp_path),
    )
    assert done.returncode == 2
    assert "guided keys new" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "leave",
    [
        {"allow_unauthenticated": "true"},
        {"api_keys": entries()},
    ],
)
def test_it_serves_others_with_keys_or_if_told_so(leave: dict[str, str], tmp_path: Path, served_models: Path) -> None:
    stack = Stack(tmp_path, served_models, host="0.0.0.0", **leave)
    try:
        stack.api()
    finally:
        stack.close()


def test_a_key_made_by_the_command_works_from_a_settings_file(tmp_path: Path) -> None:
    told = json.loads(run(["keys", "new", "carol", "--scope", "generate", "--scope", "train", "--json"]).stdout)
    assert told["entry"] == {"name": "carol", "hash": hashed(told["key"]), "scopes": ["generate", "train"]}
    text = run(["keys", "new", "dave", "--rate-limit", "60/minute", "--images-per-day", "100"]).stdout
    file = tmp_path / "guided.toml"
    file.write_text("port = 9000\n\n" + text[text.index("[[api_keys]]") : text.index("Or, for")])
    listed = json.loads(run(["keys", "list", "--json"], GUIDED_CONFIG=str(file)).stdout)
    assert listed == [{"name": "dave", "scopes": ["generate"], "rate_limit": "60/minute", "images_per_day": 100}]
    shown = json.loads(run(["config", "--json"], GUIDED_CONFIG=str(file)).stdout)
    assert {row["name"]: row["value"] for row in shown}["port"] == 9000


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("api_keys", entries(hash="plain"), "api_keys.0.hash"),
        ("api_keys", entries(scopes=["root"]), "api_keys.0.scopes.0"),
        ("api_keys", entries(scopes=[]), "api_keys.0.scopes"),
        ("api_keys", entries(name="../a"), "api_keys.0.name"),
        ("api_keys", entries(key="x"), "api_keys.0.key"),
        ("api_keys", entries(rate_limit="often"), "'60/minute'"),
        ("rate_limit", "often", "'60/minute'"),
        ("webhook_secret", "secret", "whsec_"),
    ],
)
def test_wrong_settings_are_named(setting: str, value: str, message: str) -> None:
    done = run(["config"], **{f"GUIDED_{setting.upper()}": value})
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


def test_secrets_are_not_printed(tmp_path: Path) -> None:
    secret = "whsec_" + "QUJD" * 10
    shown = run(["config"], GUIDED_REDIS_URL="redis://:hush@host:6379/0", GUIDED_WEBHOOK_SECRET=secret).stdout
    assert "redis://:***@host:6379/0" in shown
    assert "hush" not in shown
    assert secret not in shown


def test_addresses_are_limited_where_there_are_no_keys(tmp_path: Path, served_models: Path) -> None:
    stack = Stack(tmp_path, served_models, rate_limit="3/minute", images_per_day=2)
    try:
        stack.valkey()
        stack.api()
        body = {"model": "tiny", "class_label": 1, "steps": 2, "num_images": 2}
        assert stack.http.post("/generate", json=body).status_code == 202
        assert "127.0.0.1 may have 2 pictures" in stack.http.post("/generate", json=body).json()["detail"]
        other = free_port()  # a second API process counts in the same place
        second = Process(
            "second", stack.processes[-1].command, stack.environment | {"GUIDED_PORT": str(other)}, tmp_path
        )
        stack.processes.append(second)
        url = f"http://127.0.0.1:{other}"
        eventually(lambda: "Uvicorn running" in second.log.read_text(), what="the second API")
        assert [httpx.get(f"{at}/models").status_code for at in (url, stack.url, url)] == [200, 429, 429]
        assert stack.http.get("/healthz").status_code == 200
        eventually(lambda: stack.redis().keys("guided:limits*"), what="the counts in Redis")
    finally:
        stack.close()


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("", False)],
)
def test_which_addresses_only_this_machine_reaches(host: str, alone: bool) -> None:
    assert is_loopback(host) == alone


@pytest.mark.parametrize(
    ("address", "counted_as"),
    [("203.0.113.7", "203.0.113.7"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"), ("unix", "unix")],
)
def test_what_counts_as_one_caller(address: str, counted_as: str) -> None:
    assert address_of(Request({"type": "http", "client": (address, 1)})) == counted_as
