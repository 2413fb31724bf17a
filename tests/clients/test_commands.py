"""The command line that talks to a server, as users run it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from clients.cli import app
from clients.commands import _list
from server.schemas import GenerateRequest, JobFailure, JobView
from server.up import free_port
from tests.stack import Stack, eventually, heed_interrupts


def guided(*arguments: object, url: str, code: int = 0) -> str:
    """Run the command; its output, or its errors if it should fail with ``code``."""
    command = [sys.executable, "-m", "clients", *map(str, arguments), "--url", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if code else done.stdout


def test_generate_saves_one_several_or_all_in_one(stack: Stack, tmp_path: Path) -> None:
    make = ["generate", "--model", "tiny", "--steps", 2, "--seed", 3]
    assert guided(*make, "--class", "class 4", "--out", tmp_path / "a.png", url=stack.url) == f"{tmp_path}/a.png\n"
    with Image.open(tmp_path / "a.png") as image:
        recipe = json.loads(image.info["recipe"])
    assert (recipe["class_label"], recipe["seed"]) == (4, 3)
    printed = guided(*make, "--class", 1, "--class", "class 2", "--out", tmp_path / "b.jpg", url=stack.url)
    assert printed == f"{tmp_path}/b-0.jpg\n{tmp_path}/b-1.jpg\n"
    with Image.open(tmp_path / "b-1.jpg") as image:
        assert image.format == "JPEG"
    guided(*make, "--class", 1, "--num", 3, "--out", tmp_path / "c.npz", url=stack.url)
    with np.load(tmp_path / "c.npz") as file:
        assert file["arr_1"].tolist() == [1, 1, 1]


def test_every_option_reaches_the_job(stack: Stack, tmp_path: Path) -> None:
    options = ["--respacing", "ddim5", "--sampler", "ddim", "--eta", 0.5, "--scale", 3, "--guidance-interval", 100, 800]
    options += [
        "--no-clip",
        "--guidance-every",
        2,
        "--priority",
        "high",
        "--deadline",
        60,
        "--upsample",
        "up",
        "--upsample-respacing",
        "2",
    ]
    make = ["generate", "--model", "tiny", "--class", 1, *options, "--json", "--out", tmp_path / "x.webp"]
    job = json.loads(guided(*make, url=stack.url))
    base, upper = job["stages"]
    assert (base["respacing"], base["sampler"], base["eta"], base["guidance_scale"]) == ("ddim5", "ddim", 0.5, 3.0)
    assert (base["guidance_interval"], base["guidance_every"], base["clip_denoised"]) == ([100, 800], 2, False)
    assert (upper["model"], upper["respacing"], job["priority"], job["format"]) == ("up", "2", "high", "webp")
    assert job["deadline_at"] is not None
    with Image.open(tmp_path / "x.webp") as image:
        assert image.size == (32, 32)


def test_every_field_of_a_request_has_an_option() -> None:
    named = {"class_label": "classes", "num_images": "num", "guidance_scale": "scale", "clip_denoised": "clip"}
    named |= {"deadline_s": "deadline", "webhook_url": "webhook", "format": "out"}
    verb = typer.main.get_command(app).get_command(None, "generate")  # type: ignore[attr-defined]
    options = {parameter.name for parameter in verb.params}
    fields = set(GenerateRequest.model_fields) - {"preview_every"}  # nobody sees previews here
    assert {named.get(field, field) for field in fields} <= options


def test_detach_and_fetch(stack: Stack, tmp_path: Path) -> None:
    make = ["generate", "--model", "tiny", "--class", 5, "--steps", 2, "--idempotency-key", tmp_path.name]
    job_id = guided(*make, "--detach", url=stack.url).strip()
    assert guided(*make, "--detach", url=stack.url).strip() == job_id  # the same key: the same job
    assert guided("fetch", job_id, "--out", tmp_path / "a.png", url=stack.url) == f"{tmp_path}/a.png\n"
    with Image.open(tmp_path / "a.png") as image:
        assert json.loads(image.info["recipe"])["class_label"] == 5
    shown = guided("jobs", job_id, url=stack.url)
    assert "class 5 (seed " in shown
    assert "2 steps" in shown


def test_jobs_cancel_and_models(stack: Stack) -> None:
    job = stack.generate(class_label=1, steps=1000, num_images=4)
    assert json.loads(guided("jobs", job["id"], "--json", url=stack.url))["id"] == job["id"]
    assert guided("cancel", job["id"], url=stack.url) == f"{job['id']} cancelled\n"
    assert json.loads(guided("cancel", job["id"], "--json", url=stack.url))[0]["status"] == "cancelled"
    (listed,) = json.loads(guided("jobs", "--status", "cancelled", "--limit", 1, "--json", url=stack.url))
    assert listed["id"] == job["id"]
    table = guided("jobs", url=stack.url)
    assert job["id"] in table  # whole, to be copied
    assert "cancelled" in table
    assert [m["name"] for m in json.loads(guided("models", "served", "--json", url=stack.url))] == ["tiny", "up"]
    assert "upsampler" in guided("models", "served", url=stack.url)


def test_brackets_in_an_error_are_shown_as_they_are(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    job = JobView.model_validate(stack.generate(class_label=1, steps=2))
    _list([job.model_copy(update={"error": JobFailure(kind="error", message="no [/x]")})])
    assert "[/x]" in capsys.readouterr().out


def test_errors_are_one_line(stack: Stack, tmp_path: Path) -> None:
    make = ["generate", "--model", "tiny", "--out", tmp_path / "a.png"]
    for extra, message, *code in (
        (["--class", "dog"], "class_label: 'dog' is no class of this model"),
        (["--steps", 5000], "steps: 5000 is not between 1 and 1000"),
        (["--eta", 2], "eta: "),
        (["--model", "absent"], "there is no model 'absent'"),
        (["--steps", 1000, "--num", 4, "--deadline", 0.3], "failed: the deadline passed", 1),
        (["--out", tmp_path / "a.gif"], "must end in .png"),
        (["--out", tmp_path / "no" / "a.png"], "does not exist"),
    ):
        error = guided(*make, *extra, url=stack.url, code=code[0] if code else 2)
        assert message in error
        assert error.count("\n") == 1, error
    assert "there is no job" in guided("cancel", "absent", url=stack.url, code=2)
    assert "webhook_url: its host" in guided(*make, "--webhook", "http://absent.example/", url=stack.url, code=2)
    assert "see 'guided jobs --help'" in guided("jobs", "--limit", "x", url=stack.url, code=2)
    assert list(tmp_path.iterdir()) == []


def test_without_a_server_it_says_how_to_start_one() -> None:
    error = guided("jobs", url=f"http://127.0.0.1:{free_port()}", code=5)
    assert re.fullmatch(r"guided: cannot reach http://127.0.0.1:\d+ .*'guided up' starts a server\n", error)


def test_ctrl_c_cancels_the_job(stack: Stack, tmp_path: Path) -> None:
    before = {job["id"] for job in stack.http.get("/jobs", params={"limit": 100}).json()["jobs"]}
    command = [sys.executable, "-m", "clients", "generate", "--model", "tiny", "--steps", "1000", "--num", "8"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "a.png"), "--url", stack.url],
        stderr=subprocess.PIPE,
        preexec_fn=heed_interrupts,
    )

    def new() -> str | None:
        jobs = stack.http.get("/jobs", params={"limit": 100, "status": "running"}).json()["jobs"]
        return next((job["id"] for job in jobs if job["id"] not in before), None)

    with process:
        job_id = eventually(new, what="the job")
        process.send_signal(signal.SIGINT)
        try:
            _, error = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert b"cancelled job" in error
    assert stack.wait(job_id)["status"] == "cancelled"
