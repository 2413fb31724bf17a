"""Every endpoint and every error, over HTTP, against real Valkey and a real worker."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import numpy as np
import pytest
from httpx_sse import ServerSentEvent, connect_sse
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.stack import Stack, eventually

WAIT = {"Prefer": "wait=60"}


def made(stack: Stack, **body: Any) -> dict[str, Any]:
    """A finished job."""
    job = stack.generate(expect=200, headers=WAIT, **body)
    assert job["status"] == "finished", job["error"]
    return job


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def events(stack: Stack, job_id: str, **headers: str) -> Iterator[ServerSentEvent]:
    with connect_sse(stack.http, "GET", f"/jobs/{job_id}/events", headers=headers) as source:
        yield from source.iter_sse()


def test_a_job_from_request_to_picture(stack: Stack) -> None:
    answer = stack.http.post("/generate", json={"model": "tiny", "class_label": "class 3", "steps": 5, "seed": 9})
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == job["links"]["self"] == f"/jobs/{job['id']}"
    job = stack.wait(job["id"])
    assert (job["status"], job["model"], job["version"]) == ("finished", "tiny", "1")
    assert job["progress"] == {"steps_done": 5, "steps_total": 5, "fraction": 1.0}
    assert job["timings"]["queued_s"] >= 0
    assert job["timings"]["running_s"] > 0
    (image,) = job["images"]
    assert (image["seed"], image["class_label"], image["class_name"]) == (9, 3, "class 3")
    picture = stack.http.get(image["url"])
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(picture.content)).size == (16, 16)


def test_defaults_come_from_the_bundle(stack: Stack) -> None:
    (plan,) = made(stack, class_label=1)["stages"]
    defaults = stack.http.get("/models/tiny").json()["defaults"]
    assert {k: plan[k] for k in defaults} == defaults


def test_prefer_wait_answers_202_if_the_time_is_over(stack: Stack) -> None:
    began = time.monotonic()
    job = stack.generate(expect=202, headers={"Prefer": "wait=0.3"}, num_images=8, steps=1000)
    assert 0.2 < time.monotonic() - began < 5
    assert job["status"] in ("queued", "running")
    stack.http.delete(f"/jobs/{job['id']}")


def test_unknown_preferences_are_ignored(stack: Stack) -> None:
    stack.generate(expect=202, headers={"Prefer": "respond-async, wait=soon"}, steps=2)


def test_an_idempotency_key_returns_the_first_job(stack: Stack) -> None:
    body = {"class_label": 1, "steps": 2}
    first = stack.generate(headers={"Idempotency-Key": "one"}, **body)
    again = stack.generate(headers={"Idempotency-Key": "one"}, **body)
    other = stack.generate(headers={"Idempotency-Key": "two"}, **body)
    assert first["id"] == again["id"] != other["id"]
    answer = stack.http.post("/generate", json={"model": "tiny", "steps": 3}, headers={"Idempotency-Key": "one"})
    assert answer.status_code == 422
    assert "Idempotency-Key" in answer.json()["detail"]


def test_an_idempotency_key_used_at_once_by_many_makes_one_job(stack: Stack) -> None:
    found: list[str] = []

    def call() -> None:
        with httpx.Client(base_url=stack.url, timeout=60) as http:
            body = {"model": "tiny", "steps": 2, "class_label": 1}
            found.append(http.post("/generate", json=body, headers={"Idempotency-Key": "many"}).json()["id"])

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"class_label": 4}, False),
        ({"seed": 12}, False),
        ({"steps": 7}, False),
        ({"sampler": "ddim"}, False),
        ({"sampler": "ddim", "eta": 0.8}, False),
        ({"guidance_scale": 60.0}, False),
        ({"guidance_interval": [900, 999]}, False),
        ({"clip_denoised": False}, False),
        ({"sampler": "dpmpp_2m"}, False),
        ({"guidance_every": 3}, False),
        ({"guidance_every": 1}, True),
        ({"guidance_interval": [0, 999]}, True),
        ({"priority": "high"}, True),
        ({"model": "tiny@1"}, True),
        ({"respacing": "6", "steps": None}, True),
        ({"respacing": "3,3", "steps": None}, False),
        ({"deadline_s": 50.0}, True),
        ({"format": "webp"}, True),
    ],
)
def test_each_option_reaches_the_picture(stack: Stack, change: dict[str, Any], same: bool) -> None:
    base = {"class_label": 3, "steps": 6, "seed": 11, "sampler": "ddpm", "guidance_scale": 8.0}
    reference = made(stack, **base)
    body = {k: v for k, v in {**base, **change}.items() if v is not None}
    job = made(stack, **body)
    difference = np.abs(
        pixels(stack.image(reference["id"])) - pixels(stack.http.get(f"/jobs/{job['id']}/images/0?format=png").content)
    )
    assert (difference.max() <= 1) == same


def test_several_classes_fill_the_number_of_images(stack: Stack) -> None:
    job = made(stack, class_label=["class 1", 5], num_images=5, steps=2, seed=3)
    assert [image["class_label"] for image in job["images"]] == [1, 5, 1, 5, 1]
    assert [image["seed"] for image in job["images"]] == [3, 4, 5, 6, 7]


def test_without_a_class_each_picture_gets_one_that_its_seed_decides(stack: Stack) -> None:
    first, again = (made(stack, num_images=6, steps=2, seed=5)["images"] for _ in range(2))
    assert first == [{**image, "url": old["url"]} for image, old in zip(again, first, strict=True)]
    assert len({image["class_label"] for image in first}) > 1


def test_a_picture_of_many_is_made_again_alone_from_its_recipe(stack: Stack) -> None:
    job = made(stack, class_label=[2, 7], num_images=6, respacing="ddim5", sampler="ddim", seed=21, upsample="up")
    picture = stack.image(job["id"], 5)
    info = Image.open(io.BytesIO(picture)).info
    assert info["Software"] == "guided-sampling-server"
    recipe = json.loads(info["recipe"])
    assert (recipe["model"], recipe["class_label"], recipe["seed"], recipe["upsample"]) == ("tiny@1", 7, 26, "up@1")
    again = stack.generate(expect=200, headers=WAIT, **{k: v for k, v in recipe.items() if v is not None})
    assert np.abs(pixels(stack.image(again["id"])) - pixels(picture)).max() <= 1
    assert Image.open(io.BytesIO(picture)).size == (32, 32)


@pytest.mark.parametrize(("name", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_formats(stack: Stack, name: str, kind: str) -> None:
    job = made(stack, class_label=1, steps=2, format=name)
    answer = stack.http.get(f"/jobs/{job['id']}/images/0")
    assert answer.headers["content-type"] == f"image/{name}"
    assert Image.open(io.BytesIO(answer.content)).format == kind
    other = stack.http.get(f"/jobs/{job['id']}/images/0", params={"format": "png"})
    assert Image.open(io.BytesIO(other.content)).format == "PNG"


def test_npz_has_the_published_layout(stack: Stack) -> None:
    job = made(stack, class_label=[4, 2], steps=2, format="npz")
    with np.load(io.BytesIO(stack.http.get(job["links"]["samples"]).content)) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == [4, 2]
        assert (file["arr_0"][1] == pixels(stack.image(job["id"], 1))).all()


def test_pictures_are_cached_for_good(stack: Stack) -> None:
    job = made(stack, class_label=1, steps=2)
    for path in (f"/jobs/{job['id']}/images/0", job["links"]["samples"]):
        first = stack.http.get(path)
        assert "immutable" in first.headers["cache-control"]
        again = stack.http.get(path, headers={"If-None-Match": f'"x", {first.headers["etag"]}'})
        assert (again.status_code, again.content) == (304, b"")


def test_events_tell_the_story_and_resume(stack: Stack) -> None:
    job = stack.generate(class_label=1, num_images=2, steps=400, preview_every=100)
    told = list(events(stack, job["id"]))
    kinds = [event.event for event in told]
    assert kinds[0] == "status"
    assert kinds[-1] == "done"
    assert {"progress", "preview"} <= set(kinds)
    assert told[-1].json()["status"] == "finished"
    fractions = [event.json()["fraction"] for event in told if event.event == "progress"]
    assert fractions == sorted(fractions)
    preview = next(event.json() for event in told if event.event == "preview")
    assert preview["steps_done"] % 100 == 0
    middle = len(told) // 2
    rest = list(events(stack, job["id"], **{"Last-Event-ID": told[middle].id}))
    assert {event.id for event in rest} <= {event.id for event in told[middle + 1 :]}
    assert rest[-1].event == "done"


def test_events_of_a_job_that_has_ended_long_ago(stack: Stack) -> None:
    job = made(stack, class_label=1, steps=2)
    stack.redis().delete(f"guided:events:{job['id']}")
    assert [event.event for event in events(stack, job["id"])] == ["done"]


def test_lists_are_filtered_and_paged(stack: Stack) -> None:
    ids = [made(stack, class_label=1, steps=1)["id"] for _ in range(5)]
    first = stack.http.get("/jobs", params={"limit": 2, "status": "finished"}).json()
    second = stack.http.get("/jobs", params={"limit": 2, "status": "finished", "cursor": first["next_cursor"]}).json()
    assert [job["id"] for job in first["jobs"] + second["jobs"]] == ids[:0:-1]
    everything, cursor = [], None
    while True:
        page = stack.http.get("/jobs", params={"limit": 3, **({"cursor": cursor} if cursor else {})}).json()
        everything += [job["id"] for job in page["jobs"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert len(everything) == len(set(everything)) == stack.redis().zcard("guided:jobs")
    assert stack.http.get("/jobs", params={"status": "failed", "limit": 100}).status_code == 200


def test_cancelling_a_running_job_and_one_that_has_ended(stack: Stack) -> None:
    job = stack.generate(class_label=1, num_images=4, steps=1000)
    stack.wait(job["id"], "running")
    answer = stack.http.delete(f"/jobs/{job['id']}")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
    eventually(lambda: stack.redis().hget(f"rq:job:{job['id']}", "status") == b"canceled", what="RQ's state")
    assert stack.http.delete(f"/jobs/{job['id']}").json()["status"] == "cancelled"
    finished = made(stack, class_label=1, steps=1)
    assert stack.http.delete(f"/jobs/{finished['id']}").json()["status"] == "finished"


def test_a_passed_deadline_fails_the_job(stack: Stack) -> None:
    job = stack.generate(class_label=1, num_images=4, steps=1000, deadline_s=0.3)
    job = stack.wait(job["id"])
    assert (job["status"], job["error"]["kind"]) == ("failed", "deadline")
    assert "deadline" in job["error"]["message"]


@pytest.mark.parametrize("ending", ["finished", "cancelled", "failed"])
def test_a_webhook_tells_how_it_ended(stack: Stack, ending: str) -> None:
    heard: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/hook"
        steps, deadline = (2, None) if ending == "finished" else (1000, 0.3 if ending == "failed" else None)
        job = stack.generate(class_label=1, num_images=4, steps=steps, deadline_s=deadline, webhook_url=url)
        if ending == "cancelled":
            stack.http.delete(f"/jobs/{job['id']}")
        eventually(lambda: heard, what="the webhook")
        server.shutdown()
        thread.join()
    error = stack.job(job["id"])["error"]
    assert heard == [{"id": job["id"], "status": ending, "error": error}]
    assert (error is None) == (ending != "failed")


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"class_label": 10}, "class_label", "10 is not between 0 and 9"),
        ({"class_label": "dog"}, "class_label", "names: class 0, class 1"),
        ({"class_label": [1, 99]}, "class_label.1", "99 is not between 0 and 9"),
        ({"class_label": []}, "class_label", "at least 1"),
        ({"class_label": True}, "class_label", "valid integer or"),
        ({"num_images": 0}, "num_images", "greater than or equal to 1"),
        ({"num_images": 21}, "num_images", "21 is more than 20"),
        ({"steps": 1001}, "steps", "1001 is not between 1 and 1000"),
        ({"steps": 2.5}, "steps", "valid integer"),
        ({"steps": 5, "respacing": "5"}, "steps", "not both"),
        ({"respacing": "ddim300"}, "respacing", "near: ddim167"),
        ({"respacing": "abc"}, "respacing", "pattern"),
        ({"sampler": "euler"}, "sampler", "'ddpm', 'ddim' or 'dpmpp_2m'"),
        ({"eta": 1.5}, "eta", "less than or equal to 1"),
        ({"guidance_scale": 1e9}, "guidance_scale", "less than or equal to 1000"),
        ({"guidance_interval": [5, 2]}, "guidance_interval", "within 0 to 999"),
        ({"guidance_interval": [5]}, "guidance_interval", "at least 2"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than or equal to"),
        ({"priority": "urgent"}, "priority", "'low', 'default' or 'high'"),
        ({"deadline_s": 0}, "deadline_s", "greater than 0"),
        ({"deadline_s": 90000}, "deadline_s", "more than 86400"),
        ({"upsample": "tiny"}, "upsample", "is a diffusion model, not an upsampler"),
        ({"upsample_respacing": "5"}, "upsample_respacing", "needs upsample"),
        ({"model": "up"}, "model", "name it in upsample"),
        ({"format": "gif"}, "format", "'png'"),
        ({"preview_every": 0}, "preview_every", "greater than or equal to 1"),
        ({"webhook_url": "http://10.0.0.1/x"}, "webhook_url", "allowed here (127.0.0.1)"),
        ({"webhook_url": "ftp://x"}, "webhook_url", "pattern"),
        ({"webhook_url": "http://xn--a/"}, "webhook_url", "is not a URL"),
        ({"colour": "red"}, "colour", "not permitted"),
    ],
)
def test_bad_fields_are_named_with_what_is_allowed(
    stack: Stack, body: dict[str, Any], field: str, message: str
) -> None:
    answer = stack.http.post("/generate", json={"model": "tiny", **body})
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == 422
    assert any(e["field"] == field and message in e["message"] for e in problem["errors"]), problem


def test_all_bad_fields_are_told_at_once(stack: Stack) -> None:
    answer = stack.http.post("/generate", json={"model": "tiny", "class_label": 77, "steps": 5000, "num_images": 50})
    assert [e["field"] for e in answer.json()["errors"]] == ["num_images", "class_label", "steps"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/jobs/absent", 404),
        ("DELETE", "/jobs/absent", 404),
        ("GET", "/jobs/absent/events", 404),
        ("GET", "/jobs/absent/images/0", 404),
        ("GET", "/jobs/absent/samples.npz", 404),
        ("GET", "/models/absent", 404),
        ("GET", "/models/tiny@1", 404),
        ("GET", "/nowhere", 404),
        ("PUT", "/generate", 405),
        ("GET", "/jobs?status=lost", 422),
        ("GET", "/jobs?limit=0", 422),
        ("GET", "/jobs?cursor=x", 422),
    ],
)
def test_errors_are_problem_documents(stack: Stack, method: str, path: str, status: int) -> None:
    answer = stack.http.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status


@pytest.mark.parametrize(
    ("content", "status", "detail"),
    [
        (b"{", 422, "not JSON"),
        (b"[1]", 422, "must be a JSON object"),
        (b"", 422, "missing"),
        (b" " * 2**21, 413, "more than 1048576"),
    ],
)
def test_bodies_that_are_no_request(stack: Stack, content: bytes, status: int, detail: str) -> None:
    answer = stack.http.post("/generate", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert detail in answer.json()["detail"]


def test_a_body_that_does_not_tell_its_size_is_limited_too(stack: Stack) -> None:
    chunks = (b" " * 2**16 for _ in range(40))
    answer = stack.http.post("/generate", content=chunks, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json")


def test_unknown_models_and_versions(stack: Stack) -> None:
    for model in ("absent", "tiny@7"):
        answer = stack.http.post("/generate", json={"model": model})
        assert answer.status_code == 404
        assert "there: " in answer.json()["detail"]


def test_pictures_that_are_not_there(stack: Stack) -> None:
    job = stack.generate(class_label=1, num_images=4, steps=1000)
    early = stack.http.get(f"/jobs/{job['id']}/images/0")
    assert (early.status_code, early.headers["retry-after"]) == (409, "1")
    assert stack.http.get(f"/jobs/{job['id']}/samples.npz").status_code == 409
    assert stack.http.get(f"/jobs/{job['id']}/images/9").status_code == 404
    stack.http.delete(f"/jobs/{job['id']}")
    never = stack.http.get(f"/jobs/{job['id']}/images/0")
    assert never.status_code == 404
    assert "cancelled" in never.json()["detail"]


def test_models_are_described(stack: Stack) -> None:
    models = {model["name"]: model for model in stack.http.get("/models").json()["models"]}
    tiny = models["tiny"]
    assert (tiny["image_size"], tiny["num_classes"], tiny["class_names"][3]) == (16, 10, "class 3")
    assert (tiny["guidance"], tiny["class_conditional"], tiny["workers"]) == (True, True, 1)
    assert tiny["limits"]["max_steps"] == 1000
    assert (models["up"]["kind"], models["up"]["low_res_size"]) == ("upsampler", 16)


def test_health_and_readiness(stack: Stack) -> None:
    assert stack.http.get("/healthz").json() == {"status": "ok"}
    ready = stack.http.get("/readyz")
    assert (ready.status_code, ready.json()["workers"]) == (200, {"tiny": 1})


def test_metrics_follow_prometheus_conventions(stack: Stack) -> None:
    made(stack, class_label=1, steps=2)
    (report,) = [json.loads(stack.redis().get(k) or b"") for k in stack.redis().keys("guided:worker:*")]
    server, worker = stack.http.get("/metrics").text, httpx.get(report["metrics_url"]).text
    for text in (server, worker):
        for family in text_string_to_metric_families(text):
            assert family.documentation, family.name
            assert family.type in ("counter", "gauge", "histogram"), family.name
    names = {family.name for family in text_string_to_metric_families(server + worker)}
    assert {
        "guided_http_requests",
        "guided_http_request_seconds",
        "guided_queue_depth",
        "guided_queue_oldest_age_seconds",
        "guided_workers",
        "guided_jobs",
        "guided_queue_wait_seconds",
        "guided_run_seconds",
        "guided_end_to_end_seconds",
        "guided_images",
        "guided_denoising_steps",
        "guided_step_seconds",
        "guided_batch_occupancy_ratio",
        "guided_classifier_steps_saved",
        "guided_model_info",
        "guided_model_load_seconds",
        "guided_samples_parked",
        "guided_device_memory_bytes",
    } <= names
    assert 'guided_http_requests_total{method="POST",route="/generate",status="200"}' in server
    assert 'guided_jobs_total{model="tiny@1",outcome="finished"}' in worker


def test_the_description_names_every_operation_and_error(stack: Stack) -> None:
    document = stack.http.get("/openapi.json").json()
    operations = [op for path in document["paths"].values() for op in path.values()]
    openai = [op for path, item in document["paths"].items() if path.startswith("/v1/") for op in item.values()]
    assert len({op["operationId"] for op in operations}) == len(operations)
    generate = document["paths"]["/generate"]["post"]
    assert {"200", "202", "404", "422", "429", "503"} <= set(generate["responses"])
    assert document["components"]["schemas"]["GenerateRequest"]["examples"]
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for operation in operations:
        for status, answer in operation["responses"].items():
            if status[0] == "4":
                kind = "application/json" if operation in openai else "application/problem+json"
                assert list(answer["content"]) == [kind]
