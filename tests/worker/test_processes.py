"""Workers as processes that are killed, stopped, joined and cut off, with real Valkey: nothing is lost."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from redis import Redis
from rq.command import send_stop_job_command
from rq.job import Job
from rq.queue import Queue
from rq.serializers import JSONSerializer

from model_core.bundle import Store
from server.up import wait_for_redis
from tests.models import publish, tiny_config
from tests.stack import Stack, eventually
from worker.records import DEADLINES

LONG: dict[str, Any] = {"class_label": 1, "steps": 500, "seed": 5}


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png))).astype(int)


def started(stack: Stack, job_id: str) -> dict[str, Any]:
    """The job, once it has made some steps."""

    def look() -> dict[str, Any] | None:
        job = stack.job(job_id)
        return job if job["progress"]["steps_done"] > 0 else None

    return eventually(look, what="the first steps")


def rq_job(stack: Stack, job_id: str) -> Job:
    return Job.fetch(job_id, connection=stack.redis(), serializer=JSONSerializer)


def reports(stack: Stack) -> list[dict[str, Any]]:
    connection = stack.redis()
    found = [connection.get(key) for key in connection.keys("guided:worker:*")]
    return [json.loads(report) for report in found if isinstance(report, bytes)]


def test_a_job_of_a_killed_worker_finishes_elsewhere_with_the_identical_picture(own_stack: Stack) -> None:
    first = own_stack.worker("first")
    job = own_stack.generate(**LONG)
    started(own_stack, job["id"])
    first.kill()
    own_stack.worker("second")
    ended = own_stack.wait(job["id"])
    assert ended["status"] == "finished", ended
    alone = own_stack.generate(expect=200, headers={"Prefer": "wait=60"}, **LONG)
    assert own_stack.image(job["id"]) == own_stack.image(alone["id"])
    assert rq_job(own_stack, job["id"]).retries_left == 2


def test_a_job_that_kills_its_workers_fails_with_the_reason(own_stack: Stack) -> None:
    worker = own_stack.worker("first")
    job = own_stack.generate(**LONG)
    started(own_stack, job["id"])
    own_stack.redis().hset(f"rq:job:{job['id']}", "retries_left", 0)  # as after three retries
    worker.kill()
    own_stack.worker("second")
    ended = own_stack.wait(job["id"])
    assert (ended["status"], ended["error"]["kind"]) == ("failed", "abandoned")
    assert "worker died" in ended["error"]["message"]


def test_valkey_killed_and_started_again_loses_nothing(own_stack: Stack) -> None:
    valkey = own_stack.processes[0]
    worker = own_stack.worker(window=1, width=1)
    jobs = [own_stack.generate(**{**LONG, "seed": seed}) for seed in range(4)]
    started(own_stack, jobs[0]["id"])
    valkey.kill()
    answer = own_stack.http.get(f"/jobs/{jobs[0]['id']}")
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
    assert int(answer.headers["retry-after"]) > 0
    assert own_stack.http.post("/generate", json={"model": "tiny"}).status_code == 503
    assert own_stack.http.get("/readyz").json()["redis"] is False
    assert "guided_redis_up 0.0" in own_stack.http.get("/metrics").text
    time.sleep(4)  # longer than a heartbeat lives, and the first job is done meanwhile
    valkey.start()
    wait_for_redis(own_stack.redis_url)
    for job in jobs:
        assert own_stack.wait(job["id"])["status"] == "finished"
    assert worker.process.poll() is None
    assert rq_job(own_stack, jobs[0]["id"]).retries_left == 3  # it was delivered, not done again
    assert "Redis is back" in worker.log.read_text()


def test_sigterm_finishes_what_runs_and_puts_back_the_rest(own_stack: Stack) -> None:
    worker = own_stack.worker("first", width=1, window=3)
    jobs = [own_stack.generate(**{**LONG, "steps": 300, "seed": seed}) for seed in range(3)]
    started(own_stack, jobs[0]["id"])
    assert worker.stop() == 0
    states = [own_stack.job(job["id"])["status"] for job in jobs]
    assert sorted(states) == ["finished", "queued", "queued"]
    own_stack.worker("second")
    for job in jobs:
        assert own_stack.wait(job["id"])["status"] == "finished"
        assert rq_job(own_stack, job["id"]).retries_left == 3


def test_after_the_grace_period_running_jobs_are_put_back(own_stack: Stack) -> None:
    worker = own_stack.worker("first", grace_s=0.2)
    job = own_stack.generate(**{**LONG, "steps": 1000})
    started(own_stack, job["id"])
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began < 5
    now = own_stack.job(job["id"])
    assert (now["status"], now["queue_position"]) == ("queued", 0)
    own_stack.worker("second")
    assert own_stack.wait(job["id"])["status"] == "finished"


def test_a_second_signal_puts_everything_back_at_once(own_stack: Stack) -> None:
    worker = own_stack.worker(grace_s=60)
    job = own_stack.generate(**{**LONG, "steps": 1000})
    started(own_stack, job["id"])
    worker.process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert worker.stop(10) == 0
    assert own_stack.job(job["id"])["status"] == "queued"


def test_a_worker_that_was_thought_dead_goes_on_with_what_it_has(own_stack: Stack) -> None:
    worker = own_stack.worker()
    alone = own_stack.image(own_stack.wait(own_stack.generate(**LONG)["id"])["id"])
    job_id = own_stack.generate(**LONG)["id"]
    started(own_stack, job_id)
    # As another worker does whose view of the heartbeats has run out.
    queue = Queue("tiny:default", connection=own_stack.redis(), serializer=JSONSerializer)
    queue.enqueue_job(rq_job(own_stack, job_id), at_front=True)
    assert own_stack.wait(job_id)["status"] == "finished"
    assert own_stack.image(job_id) == alone
    assert own_stack.wait(own_stack.generate(**LONG)["id"])["status"] == "finished"
    assert worker.process.poll() is None
    assert worker.log.read_text().count("takes jobs") == 1


def test_a_deadline_holds_while_nobody_takes_the_job(own_stack: Stack) -> None:
    with ThreadPoolExecutor(1) as other:
        body = {"prompt": "class 1", "model": "tiny", "deadline_s": 1}
        waiting = other.submit(own_stack.http.post, "/v1/images/generations", json=body)
        ended = own_stack.wait(own_stack.generate(**LONG, deadline_s=1)["id"])
        assert (ended["status"], ended["error"]["kind"]) == ("failed", "deadline")
        answer = waiting.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
    connection = own_stack.redis()
    assert connection.llen("rq:queue:tiny:default") == 0
    assert not connection.exists(DEADLINES)


def test_a_queued_job_is_cancelled(own_stack: Stack) -> None:
    jobs = [own_stack.generate(class_label=1, num_images=20, steps=3) for _ in range(2)]
    assert [own_stack.job(job["id"])["queue_position"] for job in jobs] == [0, 3]
    assert own_stack.http.delete(f"/jobs/{jobs[0]['id']}").json()["status"] == "cancelled"
    assert own_stack.job(jobs[1]["id"])["queue_position"] == 0
    own_stack.worker()
    assert own_stack.wait(jobs[1]["id"])["status"] == "finished"
    assert own_stack.job(jobs[0]["id"])["progress"]["steps_done"] == 0


def test_a_job_that_has_run_for_a_while_can_be_cancelled(own_stack: Stack) -> None:
    own_stack.worker()
    job = own_stack.generate(**{**LONG, "num_images": 8, "steps": 1000})
    beats = {own_stack.redis().hget(f"rq:job:{job['id']}", "last_heartbeat")}
    eventually(lambda: len(beats | {own_stack.redis().hget(f"rq:job:{job['id']}", "last_heartbeat")}) > 1, 10)
    time.sleep(1.0)
    assert rq_job(own_stack, job["id"]).last_heartbeat is not None
    answer = own_stack.http.delete(f"/jobs/{job['id']}")
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")


def test_rqs_own_stop_command_cancels(own_stack: Stack) -> None:
    own_stack.worker()
    job = own_stack.generate(**{**LONG, "steps": 1000})
    started(own_stack, job["id"])
    send_stop_job_command(own_stack.redis(), job["id"], serializer=JSONSerializer)
    assert own_stack.wait(job["id"], seconds=5)["status"] == "cancelled"


def test_a_worker_that_joins_takes_its_share(own_stack: Stack) -> None:
    own_stack.worker("first", width=2, window=4)
    jobs = [own_stack.generate(class_label=1, steps=250, seed=seed) for seed in range(16)]
    started(own_stack, jobs[0]["id"])
    own_stack.worker("second", width=2, window=4)
    began = time.monotonic()
    eventually(lambda: len([r for r in reports(own_stack) if r["remaining_steps"]]) == 2, 5, "sharing")
    assert time.monotonic() - began < 5
    assert all(own_stack.wait(job["id"])["status"] == "finished" for job in jobs)
    workers = {rq_job(own_stack, job["id"]).worker_name for job in jobs}
    assert len(workers) == 2


def test_a_request_for_many_images_is_split_over_workers(own_stack: Stack) -> None:
    job = own_stack.generate(class_label=1, num_images=32, steps=60)
    for name in ("first", "second"):
        own_stack.worker(name, wait=False, width=2, window=8)
    assert own_stack.wait(job["id"])["status"] == "finished"
    names = {rq_job(own_stack, part).worker_name for part in (job["id"], *(f"{job['id']}-{i}" for i in (1, 2, 3)))}
    assert len(names) == 2


def test_high_priority_overtakes_a_running_job(own_stack: Stack) -> None:
    own_stack.worker(width=1)
    low = own_stack.generate(**{**LONG, "steps": 1000, "priority": "low"})
    started(own_stack, low["id"])
    high = own_stack.generate(**{**LONG, "steps": 100, "priority": "high"})
    assert own_stack.wait(high["id"])["status"] == "finished"
    assert own_stack.job(low["id"])["status"] == "running"
    assert own_stack.wait(low["id"])["status"] == "finished"


def test_only_sampling_jobs_are_accepted(own_stack: Stack, tmp_path: Path) -> None:
    connection = own_stack.redis()
    target = tmp_path / "pwned"
    evil = Queue("tiny:default", connection=connection, serializer=JSONSerializer).enqueue("os.mkdir", str(target))
    pickled = Queue("tiny:default", connection=connection).enqueue("os.mkdir", str(target))
    worker = own_stack.worker()
    for job in (evil, pickled):
        eventually(lambda job=job: job.get_status(refresh=True) == "failed", what="refusal")  # type: ignore[misc]
    assert not target.exists()
    assert "refused" in worker.log.read_text()
    eventually(lambda: "idle" in rq_info(own_stack), 10, "idleness")
    assert own_stack.wait(own_stack.generate(class_label=1, steps=2)["id"])["status"] == "finished"


def test_a_full_queue_answers_429_with_the_time_it_takes(tmp_path: Path, served_models: Path) -> None:
    stack = Stack(tmp_path / "full", served_models, max_queued=3)
    try:
        stack.valkey()
        stack.api()
        for _ in range(3):
            stack.generate(class_label=1, steps=300)
        answer = stack.http.post("/generate", json={"model": "tiny", "class_label": 1})
        assert (answer.status_code, answer.headers["content-type"]) == (429, "application/problem+json")
        assert int(answer.headers["retry-after"]) >= 1
        stack.worker()
        eventually(lambda: stack.http.post("/generate", json={"model": "tiny", "steps": 1}).status_code == 202)
    finally:
        stack.close()


def test_what_has_ended_is_deleted_after_its_time(tmp_path: Path, served_models: Path) -> None:
    stack = Stack(tmp_path / "short", served_models, result_ttl_s=2)
    try:
        stack.valkey()
        stack.api()
        stack.worker()
        job = stack.generate(expect=200, headers={"Prefer": "wait=30"}, class_label=1, steps=2)
        folder = stack.folder / "artifacts" / job["id"]
        assert folder.is_dir()
        eventually(lambda: not folder.exists(), 15, "the sweep")
        eventually(lambda: stack.http.get(f"/jobs/{job['id']}").status_code == 404, 5, "the record's end")
        assert stack.http.get("/jobs").json()["jobs"] == []
    finally:
        stack.close()


def test_a_new_version_is_served_without_a_restart(tmp_path: Path, served_models: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(served_models, models)
    stack = Stack(tmp_path / "stack", models, model_poll_s=0.2)
    try:
        stack.valkey()
        stack.api()
        stack.worker()
        old = stack.generate(**LONG)
        started(stack, old["id"])
        publish(models, "tiny", tiny_config())
        eventually(lambda: stack.wait(stack.generate(steps=1)["id"])["version"] == "2", 20, "the new version")
        ended = stack.wait(old["id"])
        assert (ended["status"], ended["version"]) == ("finished", "1")
        pinned = stack.wait(stack.generate(model="tiny@1", steps=1)["id"])
        assert (pinned["status"], pinned["version"]) == ("finished", "1")
        Store(models).set_latest("tiny", "1")
        eventually(lambda: stack.wait(stack.generate(steps=1)["id"])["version"] == "1", 20, "the way back")
    finally:
        stack.close()


def test_processes_may_start_before_valkey(tmp_path: Path, served_models: Path) -> None:
    stack = Stack(tmp_path / "stack", served_models)
    try:
        stack.api()
        worker = stack.worker(wait=False)
        eventually(lambda: "waiting for Redis" in worker.log.read_text(), what="the worker's wait")
        ready = stack.http.get("/readyz")
        assert (ready.status_code, ready.json()["redis"]) == (503, False)
        stack.valkey()
        eventually(lambda: stack.http.get("/readyz").status_code == 200, what="readiness")
    finally:
        stack.close()


def rq_info(stack: Stack) -> str:
    command = [sys.executable, "-m", "rq.cli", "info", "--url", stack.redis_url, "--raw"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def test_rq_info_tells_the_truth(own_stack: Stack) -> None:
    own_stack.worker(width=2, window=2)
    jobs = [own_stack.generate(**{**LONG, "steps": 800, "seed": seed}) for seed in range(5)]
    started(own_stack, jobs[0]["id"])
    info = rq_info(own_stack)
    assert "queue tiny:default 3" in info
    connection: Redis = own_stack.redis()
    queue = Queue("tiny:default", connection=connection, serializer=JSONSerializer)
    assert queue.started_job_registry.count == 2
    (worker,) = [line for line in info.splitlines() if line.startswith("worker")]
    assert "busy" in worker
    for job in jobs:
        own_stack.http.delete(f"/jobs/{job['id']}")
    eventually(lambda: queue.started_job_registry.count == 0, 10, "the end of the jobs")
    assert "queue tiny:default 0" in rq_info(own_stack)
    eventually(lambda: "idle" in rq_info(own_stack), 10, "idleness")
    assert len(queue.canceled_job_registry.get_job_ids()) == 5
