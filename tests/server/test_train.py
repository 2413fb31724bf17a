"""Training jobs through HTTP, by real training workers."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rq.job import Job
from rq.registry import StartedJobRegistry
from rq.serializers import JSONSerializer

from clients import Client
from tests.models import publish, tiny_config
from tests.stack import Stack, eventually

CONFIG: dict[str, Any] = {
    "steps": 3,
    "batch_size": 4,
    "log_every": 1,
    "eval_every": 1000000,
    "tensorboard": False,
    "data": {"train": "noise", "workers": 0},
    "compute": {"threads": 1},
    "sample": {"per_class": 1, "steps": 2},
    "diffusion": {"noise_schedule": "cosine"},
    "unet": {
        "image_size": 8,
        "model_channels": 32,
        "out_channels": 6,
        "num_res_blocks": 1,
        "attention_resolutions": [],
        "channel_mult": [1],
        "num_classes": 2,
    },
}


def config(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(CONFIG) | changes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Valkey and API with a data set; tests start training workers."""
    folder = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        place = folder / "data" / "noise" / name
        place.mkdir(parents=True)
        for index in range(4):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(place / f"{index}.png")
    (folder / "data" / "outside").symlink_to(folder / "models")
    (folder / "data" / "link-0.tar").touch()
    (folder / "data" / "link-1.tar").symlink_to("/etc/passwd")
    models = folder / "models"
    publish(models, "tiny", tiny_config())
    stack = Stack(folder / "stack", models, data_roots=f'["{folder}/data", "s3://bucket/sets"]')
    try:
        stack.valkey()
        stack.api()
        yield stack
    finally:
        stack.close()


@pytest.fixture
def trainer(trained: Stack) -> Iterator[Stack]:
    process = trained.trainer()
    yield trained
    process.kill()


def until_step(stack: Stack, job_id: str, step: int) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        job = stack.job(job_id)
        assert job["status"] in ("queued", "running"), job
        return job if job["progress"]["step"] >= step else None

    return eventually(look, 60, f"step {step}")


def test_from_request_to_served_model(trainer: Stack) -> None:
    worker = trainer.worker(model_poll_s=0.1)
    job = trainer.train(what="diffusion", config=config(ema=[0.9]), publish="toy", publish_every=2)
    assert job["kind"] == "train"
    assert job["status"] == "queued"
    assert job["progress"] == {
        "step": 0,
        "steps": 3,
        "fraction": 0.0,
        "images_per_s": None,
        "eta_s": None,
        "figures": {},
    }
    done = trainer.wait(job["id"])
    assert done["status"] == "finished", trainer.http.get(f"/jobs/{job['id']}/log").text
    assert done["published"] == ["toy@1", "toy@2"]
    assert done["progress"]["figures"]["loss"] > 0
    names = [model["name"] for model in trainer.http.get("/models").json()["models"]]
    assert "toy" in names
    # The worker was there before the model.
    picture = trainer.wait(trainer.generate(model="toy", class_label="b", steps=2)["id"])
    assert (picture["status"], picture["version"]) == ("finished", "2")
    worker.stop()
    figures = trainer.http.get(f"/jobs/{job['id']}/figures", params={"kind": "train", "after_step": 1}).json()[
        "figures"
    ]
    assert [line["step"] for line in figures] == [2, 3]
    lines = trainer.http.get(f"/jobs/{job['id']}/log", params={"lines": 1}).json()["lines"]
    assert lines == ["step 3: complete"]
    events = trainer.http.get(f"/jobs/{job['id']}/events").text
    assert events.count("event: done") == 1
    assert "event: progress" in events
    listed = trainer.http.get("/jobs").json()["jobs"]
    assert [job["kind"] for job in listed[:2]] == ["sample", "train"]
    rq_job = Job.fetch(job["id"], connection=trainer.redis(), serializer=JSONSerializer)
    assert rq_job.get_status() == "finished"


def test_client_trains_and_waits(trainer: Stack) -> None:
    seen: list[object] = []
    with Client(trainer.url) as client:
        job = client.wait(client.train("diffusion", config(steps=2)), timeout=60, on_progress=seen.append)
        assert job.status == "finished"
        assert client.training(job.id).published == []
        assert client.training_log(job.id, 1) == ["step 2: complete"]
    assert {type(state).__name__ for state in seen} == {"TrainView", "TrainProgress"}


def test_cancel_running_and_queued(trainer: Stack) -> None:
    first = trainer.train(what="diffusion", config=config(steps=100000))["id"]
    second = trainer.train(what="diffusion", config=config(steps=100000))["id"]
    until_step(trainer, first, 2)
    for job_id in (second, first):
        assert trainer.http.delete(f"/jobs/{job_id}").json()["status"] == "cancelled"
    registry = StartedJobRegistry("training", connection=trainer.redis(), serializer=JSONSerializer)
    eventually(lambda: registry.count == 0 or None, 30, "the end of the run")
    text = trainer.http.get("/metrics").text
    assert "guided_training_workers 1.0" in text
    assert 'guided_training_jobs{state="running"} 0.0' in text
    log = Path(trainer.job(first)["run_dir"]) / "log.jsonl"
    assert eventually(lambda: "end" in log.read_text().splitlines()[-1] or None, 30)
    assert trainer.job(second)["progress"]["step"] == 0


def test_failure_tells_why(trainer: Stack) -> None:
    body = config()
    body["unet"]["num_classes"] = 3
    done = trainer.wait(trainer.train(what="diffusion", config=body)["id"])
    assert done["status"] == "failed"
    assert done["error"]["kind"] == "error"
    assert "unet.num_classes: 3 classes" in done["error"]["message"]


@pytest.mark.slow
def test_killed_worker_and_sigterm_resume_elsewhere(trained: Stack) -> None:
    first = trained.trainer("first")
    job_id = trained.train(what="diffusion", config=config(steps=4000, save_minutes=1e-9))["id"]
    step = until_step(trained, job_id, 3)["progress"]["step"]
    first.kill()
    second = trained.trainer("second")
    until_step(trained, job_id, step + 3)
    figures = trained.http.get(f"/jobs/{job_id}/figures", params={"kind": "end"}).json()["figures"]
    assert second.stop() == 0  # saves, and puts the job back at no cost of a retry
    assert trained.job(job_id)["status"] == "queued"
    left = Job.fetch(job_id, connection=trained.redis(), serializer=JSONSerializer).retries_left
    assert left == 2
    third = trained.trainer("third")
    until_step(trained, job_id, step + 6)
    steps = [line["step"] for line in trained.http.get(f"/jobs/{job_id}/figures?kind=train").json()["figures"]]
    assert min(steps[steps.index(step) + 1 :]) > 1  # it never began anew
    assert all(not line["complete"] for line in figures)
    trained.http.delete(f"/jobs/{job_id}")
    third.stop()


def test_idempotency_key(trained: Stack) -> None:
    headers = {"Idempotency-Key": "once"}
    one = trained.train(headers=headers, what="diffusion", config=config())
    two = trained.train(headers=headers, what="diffusion", config=config())
    assert one["id"] == two["id"]
    trained.http.delete(f"/jobs/{one['id']}")


def changed(path: str, value: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"what": "diffusion", "config": config()}
    table = body
    *parents, last = path.split(".")
    for name in parents:
        table = table[name]
    table[last] = value
    return body


@pytest.mark.parametrize(
    ("path", "value", "field", "message"),
    [
        ("what", "gan", "what", "diffusion"),
        ("config.steps", 0, "config.steps", "greater than or equal to 1"),
        ("config.stepz", 1, "config.stepz", "not permitted"),
        ("config.run_dir", "/etc", "config.run_dir", "not set here"),
        ("config.publish", {}, "config.publish", "not set here"),
        ("config.data.cache", "/tmp", "config.data.cache", "set by the server"),
        ("config.data.train", "../secret", "config.data.train", "data roots"),
        ("config.data.train", "/etc", "config.data.train", "data roots"),
        ("config.data.train", "absent", "config.data.train", "no folder"),
        ("config.data.train", "a" * 300, "config.data.train", "data roots"),
        ("config.data.val", "noise::../x", "config.data.val", "data roots"),
        ("config.data.train", "s3://other/x-{0..1}.tar", "config.data.train", "data roots"),
        ("config.data.train", "s3://bucket/sets/../../x.tar", "config.data.train", "data roots"),
        ("config.data.train", "file:///etc/x.tar", "config.data.train", "data roots"),
        ("config.data.train", "outside", "config.data.train", "data roots"),
        ("config.data.train", "outside/noise", "config.data.train", "data roots"),
        ("config.data.train", "link-{0..1}.tar", "config.data.train", "data roots"),
        ("config.data.train", "x\0.tar", "config.data.train", "data roots"),
        ("config.data.train", "x-{0..99999}{0..99999}.tar", "config.data.train", "more than 100000"),
        ("config.data.train", "http://127.0.0.1/x.tar", "config.data.train", "data roots"),
        ("config.run_dir", "/tmp/x", "config.run_dir", "is not set here"),
        ("config.publish", {"model": "x", "models_dir": "/tmp"}, "config.publish", "is not set here"),
        ("config.data.cache", "/tmp/x", "config.data.cache", "set by the server"),
        ("init", "../tiny", "init", "pattern"),
        ("publish", "tiny/../../x", "publish", "pattern"),
        ("config.unet.out_channels", 3, "config.out_channels", "needs 6 output channels"),
        ("config.unet.attention_resolutions", [4], "config.unet.attention_resolutions", "allowed: 1"),
        ("config.compute.precision", "int4", "config.compute.precision", "fp32"),
        ("publish", "../x", "publish", "pattern"),
        ("publish_every", 5, "publish", "needed with publish_every"),
        ("init", "tiny@0", "init", "pattern"),
    ],
)
def test_mistakes_are_named(trained: Stack, path: str, value: Any, field: str, message: str) -> None:
    problem = trained.train(expect=422, **changed(path, value))
    assert [error["field"] for error in problem["errors"]] == [field]
    assert message in problem["detail"]


def test_what_is_not_there(trained: Stack) -> None:
    assert "init" in trained.train(expect=404, what="diffusion", config=config(), init="absent")["detail"]
    classifier = {k: v for k, v in config().items() if k not in ("unet", "sample")} | {
        "classifier": {k: v for k, v in CONFIG["unet"].items() if k != "num_classes"}
    }
    classifier["classifier"] |= {"out_channels": 2, "num_head_channels": 16}
    problem = trained.train(expect=422, what="classifier", config=classifier, publish="nothing-yet")
    assert "no diffusion model yet" in problem["detail"]
    for path in ("train-0", "train-0/log", "train-0/figures", "train-0/events", "train-0/images/0"):
        assert trained.http.get(f"/jobs/{path}").status_code == 404


@pytest.mark.parametrize("what", ["diffusion", "classifier", "upsampler"])
def test_schema(trained: Stack, what: str) -> None:
    schema = trained.http.get(f"/train/{what}/schema").json()
    assert "run_dir" not in schema["properties"]
    assert {"steps", "batch_size", "data"} <= set(schema["required"])


@pytest.mark.slow
def test_publishing_while_fifty_requests_run(trained: Stack) -> None:
    worker = trained.worker(model_poll_s=0.1)
    before = [trained.generate(class_label=i % 10, steps=40, seed=i)["id"] for i in range(25)]
    eventually(lambda: trained.job(before[-1])["stages"][0]["version"], 60, "the last claim")
    models = Path(trained.environment["GUIDED_MODELS_DIR"])
    second = publish(models, "tiny", tiny_config())
    eventually(lambda: "tiny@2" in worker.log.read_text() or None, 60, "the load")
    time.sleep(0.2)
    after = [trained.generate(class_label=i % 10, steps=4, seed=i)["id"] for i in range(25)]
    assert second.version == "2"
    for job_ids, version in ((before, "1"), (after, "2")):
        for job_id in job_ids:
            job = trained.wait(job_id)
            assert job["status"] == "finished"
            recipe = Image.open(io.BytesIO(trained.image(job_id))).info["recipe"]
            assert f"tiny@{version}" in recipe
    back = [sys.executable, "-m", "clients", "models", "rollback", "tiny", "--models-dir", str(models)]
    subprocess.run(back, check=True, capture_output=True)
    eventually(lambda: "serving version 1 instead of 2" in worker.log.read_text() or None, 60, "the way back")
    again = trained.wait(trained.generate(class_label=1, steps=4)["id"])
    assert again["version"] == "1"
    worker.stop()
