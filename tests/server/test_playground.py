"""The page's files, and the endpoints it needs, over HTTP."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.stack import Stack, eventually

FOLDER = Path(__file__).parents[2] / "server" / "playground"
FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())


def test_the_page_is_at_the_root(stack: Stack) -> None:
    answer = stack.http.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.content == (FOLDER / "index.html").read_bytes()


def test_its_files_are_served_and_revalidated(stack: Stack) -> None:
    for path in FILES:
        answer = stack.http.get(f"/playground/{path.relative_to(FOLDER)}")
        assert answer.content == path.read_bytes()
        assert answer.headers["cache-control"] == "no-cache"
        known = {"If-None-Match": answer.headers["etag"]}
        assert stack.http.get(f"/playground/{path.relative_to(FOLDER)}", headers=known).status_code == 304


@pytest.mark.parametrize(
    "path", ["playground/absent.js", "playground/..%2fapp.py", "playground/%2e%2e/app.py", "playground/"]
)
def test_nothing_else_is(stack: Stack, path: str) -> None:
    answer = stack.http.get(f"/{path}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"


def test_other_methods_are_refused(stack: Stack) -> None:
    answer = stack.http.post("/")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    for path in FILES:
        if path.suffix in (".html", ".js", ".css"):
            text = path.read_text()
            addresses = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
            assert addresses == set(), path
            assert len(text.splitlines()) < 400
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", page)


def test_workers_tell_of_themselves(stack: Stack) -> None:
    stack.wait(stack.generate(steps=20, num_images=2)["id"])
    stack.generate(steps=400, num_images=3)

    def busy() -> dict[str, object] | None:
        (worker,) = stack.http.get("/workers").json()["workers"]
        (lane,) = [lane for lane in worker["lanes"] if lane["model"] == "tiny"]
        return worker if lane == {"model": "tiny", "version": "1", "width": 4, "running": 3, "waiting": 0} else None

    worker = eventually(busy, what="a report of three running pictures")
    assert (worker["device"], worker["dtype"], worker["models"]) == ("cpu", "float32", ["tiny"])
    assert isinstance(worker["steps_per_second"], float)
    assert worker["steps_per_second"] > 0


def test_queues_tell_what_waits(own_stack: Stack) -> None:
    own_stack.generate(num_images=20, priority="high")  # nobody works here: three parts wait
    answer = own_stack.http.get("/workers").json()
    assert answer["workers"] == []
    depths = {queue["priority"]: queue["parts"] for queue in answer["queues"]}
    assert depths == {"low": 0, "default": 0, "high": 3}
    (high,) = [queue for queue in answer["queues"] if queue["priority"] == "high"]
    assert 0 < high["oldest_age_s"] < 60


def test_examples_of_the_classes(stack: Stack) -> None:
    model = stack.http.get("/models/tiny").json()
    assert model["examples"] == "/models/tiny/examples"
    answer = stack.http.get(model["examples"])
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.headers["cache-control"] == "private, max-age=300"
    assert Image.open(io.BytesIO(answer.content)).size == (64, 48)


@pytest.mark.parametrize(
    ("name", "detail"),
    [
        ("up", "model 'up' comes without examples"),
        ("none", "there is no model 'none'"),
        ("tiny@1", "no model 'tiny@1'"),
    ],
)
def test_examples_that_are_not_there(stack: Stack, name: str, detail: str) -> None:
    answer = stack.http.get(f"/models/{name}/examples")
    assert answer.status_code == 404
    assert detail in answer.json()["detail"]
    assert stack.http.get("/models/up").json()["examples"] is None
