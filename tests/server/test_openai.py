"""OpenAI's API, by its own client and by hand."""

from __future__ import annotations

import base64
import io
import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import APIError, BadRequestError, InternalServerError, NotFoundError, OpenAI
from PIL import Image

from clients import Client
from tests.stack import Stack, eventually


@pytest.fixture
def openai(stack: Stack) -> Iterator[OpenAI]:
    """The official client; nothing but its base URL is ours."""
    with OpenAI(base_url=f"{stack.url}/v1", api_key="unused") as client:
        yield client


def files(answer: Any) -> list[bytes]:
    return [base64.b64decode(item.b64_json) for item in answer.data]


def ask(stack: Stack, status: int = 200, **body: Any) -> dict[str, Any]:
    answer = stack.http.post("/v1/images/generations", json={"prompt": "class 1", "steps": 2, **body})
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refused(stack: Stack, status: int = 400, **body: Any) -> dict[str, Any]:
    found = ask(stack, status, **body)
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = found["error"]
    return error


def test_the_official_client_makes_pictures(openai: OpenAI) -> None:
    answer = openai.images.generate(prompt="a Class-3", model="tiny", n=2, extra_body={"seed": 5, "steps": 3})
    first, second = files(answer)
    assert Image.open(io.BytesIO(first)).size == (16, 16)
    assert first != second
    assert answer.data is not None
    assert [item.revised_prompt for item in answer.data] == ["class 3", "class 3"]
    assert (answer.size, answer.output_format) == ("16x16", "png")


def test_the_official_client_lists_models(openai: OpenAI) -> None:
    assert [model.id for model in openai.models.list()] == ["tiny"]
    assert openai.models.retrieve("tiny").object == "model"
    assert openai.models.retrieve("tiny@1").id == "tiny@1"
    with pytest.raises(NotFoundError, match="there is no model 'gpt-image-2'") as error:
        openai.models.retrieve("gpt-image-2")
    assert error.value.code == "model_not_found"


def test_openai_curl_and_our_client_get_the_same_picture(stack: Stack, openai: OpenAI) -> None:
    options: dict[str, Any] = {"seed": 21, "steps": 6, "guidance_scale": 3.0, "sampler": "ddim"}
    by_openai = openai.images.generate(prompt="class 4", model="tiny", response_format="b64_json", extra_body=options)
    command = ["curl", "-sS", "--fail-with-body", "-H", "Content-Type: application/json", "-H", "Prefer: wait=60"]
    body = json.dumps({"model": "tiny", "class_label": "class 4", **options})
    told = subprocess.run([*command, "-d", body, f"{stack.url}/generate"], capture_output=True, check=True, timeout=90)
    url = stack.url + json.loads(told.stdout)["images"][0]["url"]
    by_curl = subprocess.run(["curl", "-sS", "--fail", url], capture_output=True, check=True, timeout=30).stdout
    with Client(stack.url) as client:
        ours = client.wait(client.generate(model="tiny", class_label="class 4", **options), timeout=60)
        by_client = client.image(ours)
    assert by_curl == by_client == files(by_openai)[0]


def test_pictures_come_both_ways_unless_one_is_asked_for(stack: Stack) -> None:
    (both,) = ask(stack, seed=3)["data"]
    assert httpx.get(both["url"]).content == base64.b64decode(both["b64_json"])
    assert both["seed"] == 3
    assert ask(stack, response_format="url")["data"][0]["b64_json"] is None
    assert ask(stack, response_format="b64_json")["data"][0]["url"] is None


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_output_formats(stack: Stack, format: str) -> None:
    (item,) = ask(stack, output_format=format)["data"]
    for file in (base64.b64decode(item["b64_json"]), httpx.get(item["url"]).content):
        assert Image.open(io.BytesIO(file)).format == format.upper()


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({}, 16),
        ({"size": "auto"}, 16),
        ({"size": "16x16"}, 16),
        ({"size": "32x32"}, 32),
        ({"upsample": "up"}, 32),
        ({"upsample": "up@1", "size": "32x32", "upsample_respacing": "2"}, 32),
    ],
)
def test_a_size_is_the_models_or_that_of_an_upsampler_that_fits(stack: Stack, given: dict[str, Any], size: int) -> None:
    answer = ask(stack, **given)
    picture = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    assert (answer["size"], picture.size) == (f"{size}x{size}", (size, size))


def test_fields_that_mean_nothing_here_are_accepted(stack: Stack) -> None:
    ask(
        stack,
        user="u",
        quality="high",
        style="vivid",
        moderation="low",
        background="opaque",
        output_compression=100,
        stream=False,
        partial_images=0,
        safety_identifier="s",
        size=None,
        n=None,
        model=None,
    )


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "elephant"}, "prompt", "classes: class 0 (0), class 1 (1)"),
        ({"prompt": "class 1 or class 2"}, "prompt", "several classes: class 1 (1), class 2 (2)"),
        ({"prompt": "10"}, "prompt", "10 is not between 0 and 9"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": "x" * 1001}, "prompt", "at most 1000"),
        ({"size": "64x64"}, "size", "possible: auto, 16x16, 32x32 (with up)"),
        ({"size": "16x32"}, "size", "possible: auto, 16x16"),
        ({"size": "big"}, "size", "pattern"),
        ({"size": "16x16", "upsample": "up"}, "size", "possible: auto, 32x32 (with up)"),
        ({"n": 21}, "n", "21 is more than 20"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"response_format": "gif"}, "response_format", "'b64_json' or 'url'"),
        ({"background": "transparent"}, "background", "'auto' or 'opaque'"),
        ({"stream": True, "n": 2}, "n", "with stream only 1"),
        ({"partial_images": 2}, "partial_images", "needs stream"),
        ({"stream": True, "partial_images": 4}, "partial_images", "less than or equal to 3"),
        ({"stream": True, "steps": 5000}, "steps", "5000 is not between 1 and 1000"),
        ({"steps": 5000}, "steps", "5000 is not between 1 and 1000"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"sampler": "euler"}, "sampler", "'ddpm'"),
        ({"deadline_s": 1e6}, "deadline_s", "more than 86400"),
        ({"frame_count": 3}, "frame_count", "not permitted"),
        ({"webhook_url": "http://127.0.0.1"}, "webhook_url", "not permitted"),
    ],
)
def test_bad_fields_are_400_in_that_apis_shape(stack: Stack, body: dict[str, Any], param: str, message: str) -> None:
    error = refused(stack, **body)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_the_official_client_understands_the_errors(openai: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="names no class") as error:
        openai.images.generate(prompt="elephant", model="tiny")
    assert (error.value.param, error.value.type) == ("prompt", "invalid_request_error")
    with pytest.raises(NotFoundError, match=r"there: tiny") as missing:
        openai.images.generate(prompt="class 1", model="gpt-image-2")
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize("model", ["up", "tiny@9", "absent"])
def test_models_that_cannot_be_sampled(stack: Stack, model: str) -> None:
    error = refused(stack, 404, model=model)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("GET", "/v1/nowhere", b"", 404),
        ("PUT", "/v1/images/generations", b"{}", 405),
        ("POST", "/v1/images/generations", b"{", 400),
        ("POST", "/v1/images/generations", b"[]", 400),
        ("POST", "/v1/images/generations", b" " * 2**21, 413),
    ],
)
def test_every_error_below_v1_has_that_shape(stack: Stack, method: str, path: str, content: bytes, status: int) -> None:
    answer = stack.http.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_passed_deadline_is_told_and_not_tried_again(stack: Stack, openai: OpenAI) -> None:
    before = stack.redis().zcard("guided:jobs")
    with pytest.raises(InternalServerError, match="deadline") as error:
        openai.images.generate(prompt="class 1", model="tiny", n=8, extra_body={"steps": 1000, "deadline_s": 0.3})
    assert (error.value.status_code, error.value.type) == (504, "server_error")
    assert stack.redis().zcard("guided:jobs") == before + 1


def test_a_job_somebody_cancels_is_told(stack: Stack) -> None:
    answers: list[dict[str, Any]] = []

    def cancel() -> str | None:
        jobs = stack.http.get("/jobs", params={"limit": 1}).json()["jobs"]
        return str(jobs[0]["id"]) if jobs and jobs[0]["num_images"] == 7 else None

    from threading import Thread

    thread = Thread(target=lambda: answers.append(refused(stack, 409, n=7, steps=1000)))
    thread.start()
    stack.http.delete(f"/jobs/{eventually(cancel)}")
    thread.join()
    assert answers[0]["code"] == "cancelled"


def test_a_caller_that_goes_away_cancels_its_job(stack: Stack) -> None:
    with httpx.Client(base_url=stack.url, timeout=1.0) as impatient, pytest.raises(httpx.ReadTimeout):
        impatient.post("/v1/images/generations", json={"prompt": "class 1", "n": 6, "steps": 1000})
    job = stack.http.get("/jobs", params={"limit": 1}).json()["jobs"][0]
    assert job["num_images"] == 6
    assert stack.wait(job["id"])["status"] == "cancelled"


@pytest.mark.parametrize(("given", "format"), [({}, "PNG"), ({"output_format": "webp", "size": "32x32"}, "WEBP")])
def test_the_official_client_streams_a_picture_on_its_way(openai: OpenAI, given: dict[str, Any], format: str) -> None:
    options = {"seed": 4, "steps": 8}
    stream = openai.images.generate(
        prompt="class 2", model="tiny", stream=True, partial_images=3, extra_body=options, **given
    )
    events = list(stream)
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [event.partial_image_index for event in partial] == [0, 1, 2]
    for event in partial:
        assert Image.open(io.BytesIO(base64.b64decode(event.b64_json))).format == "PNG"
    done = events[-1]
    assert done.type == "image_generation.completed"
    assert len(events) == 4
    whole = openai.images.generate(prompt="class 2", model="tiny", extra_body=options, **given)
    assert base64.b64decode(done.b64_json) == files(whole)[0]
    assert Image.open(io.BytesIO(base64.b64decode(done.b64_json))).format == format


def test_an_error_on_the_way_ends_the_stream(openai: OpenAI) -> None:
    stream = openai.images.generate(
        prompt="class 2", model="tiny", stream=True, extra_body={"steps": 1000, "deadline_s": 0.2}
    )
    with pytest.raises(APIError, match="deadline"):
        list(stream)


def test_a_caller_that_leaves_a_stream_cancels_its_job(stack: Stack) -> None:
    body = {"prompt": "class 1", "steps": 1000, "stream": True, "partial_images": 3, "seed": 77}
    with stack.http.stream("POST", "/v1/images/generations", json=body) as answer:
        first = next(answer.iter_lines())
    assert first == "event: image_generation.partial_image"
    job = stack.http.get("/jobs", params={"limit": 1}).json()["jobs"][0]
    assert stack.wait(job["id"])["status"] == "cancelled"
