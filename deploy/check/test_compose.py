"""``docker compose up`` with the project's file, by the real Compose."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest

from tests.deploy.test_monitoring import panels

from .conftest import API, PASSWORDS, PROJECT, compose, eventually, inspect, make_picture, run

SERVICES = ("redis", "api", "worker", "trainer", "prometheus")
"""All but the GPU worker, for want of one, and Grafana, for want of its image."""


@pytest.fixture(scope="module", autouse=True)
def project() -> Iterator[None]:
    """Everything up and healthy, with two workers."""
    compose(
        "up", "--detach", "--no-build", "--pull=never", "--wait", "--wait-timeout=180", "--scale=worker=2", *SERVICES
    )
    yield
    compose("--profile=*", "down", "--volumes", "--timeout=20")


def query(expression: str) -> list[dict[str, Any]]:
    """Prometheus' answer."""
    url = httpx.URL("http://127.0.0.1:9090/api/v1/query", params={"query": expression})
    answer = json.loads(compose("exec", "--no-tty", "prometheus", "wget", "-qO-", str(url)))
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def promtool(*arguments: str, stdin: str = "") -> str:
    """Prometheus' own checker, over what is in ``deploy``."""
    options = (
        "--rm",
        "--interactive",
        "--network=none",
        "--entrypoint=promtool",
        f"--volume={PROJECT}/deploy:/deploy:ro",
    )
    image = inspect("guided-prometheus-1")["ImageName"]
    return run("podman", "run", *options, "--workdir=/deploy", image, *arguments, stdin=stdin)


def test_the_api_sees_both_workers() -> None:
    assert httpx.get(f"{API}/readyz").json()["workers"] == {"emoji32": 2}


def test_a_picture_is_the_same_for_the_same_seed() -> None:
    assert make_picture(seed=3) == make_picture(seed=3) != make_picture(seed=4)


def test_pages_of_other_names_cannot_reach_it() -> None:
    assert httpx.get(f"{API}/models", headers={"Host": "evil.example"}).status_code == 400


def test_redis_wants_its_password_and_is_not_published() -> None:
    ping = ("exec", "--no-tty", "--env=REDISCLI_AUTH=wrong", "redis", "valkey-cli", "ping")
    assert "NOAUTH" in compose(*ping)
    with pytest.raises(httpx.ConnectError):
        httpx.get("http://127.0.0.1:6379")


def test_no_process_shows_the_password() -> None:
    shown = compose("exec", "--no-tty", "redis", "sh", "-c", "cat /proc/*/cmdline | tr '\\0' ' '")
    assert "valkey-server" in shown
    assert PASSWORDS["REDIS_PASSWORD"] not in shown


def test_jobs_outlive_a_restart_of_redis() -> None:
    asked = {"model": "emoji32", "class_label": "heart", "steps": 5}
    job = httpx.post(f"{API}/generate", json=asked, headers={"Prefer": "wait=60"}, timeout=70).json()
    compose("restart", "redis")

    def finished() -> bool:
        answer = httpx.get(f"{API}/jobs/{job['id']}", timeout=10)
        return answer.status_code == 200 and answer.json()["status"] == "finished"

    eventually(finished, 60, "Redis' return")


def test_a_training_job_publishes_a_model_that_workers_take_up() -> None:
    make_set = (
        "import os; from PIL import Image\n"
        "for name in 'ab':\n"
        "    os.makedirs(f'/data/datasets/set/{name}')\n"
        "    Image.new('RGB', (8, 8), {'a': 'red', 'b': 'blue'}[name]).save(f'/data/datasets/set/{name}/0.png')"
    )
    compose("exec", "--no-tty", "trainer", "python", "-c", make_set)
    unet: dict[str, Any] = {
        "image_size": 8,
        "model_channels": 32,
        "out_channels": 6,
        "num_res_blocks": 1,
        "num_classes": 2,
    }
    unet |= {"attention_resolutions": [], "channel_mult": [1]}
    config = {"steps": 2, "batch_size": 2, "data": {"train": "set", "workers": 1}, "unet": unet}
    asked = {"what": "diffusion", "publish": "fresh", "config": config | {"diffusion": {"noise_schedule": "cosine"}}}
    answer = httpx.post(f"{API}/train", json=asked)
    assert answer.status_code == 202, answer.text

    def ended() -> Any:
        job = httpx.get(API + answer.json()["links"]["self"]).json()
        return job if job["status"] in ("finished", "failed") else None

    job = eventually(ended, 120, "the training job's end")
    assert job["status"] == "finished", job
    eventually(lambda: httpx.get(f"{API}/readyz").json()["workers"].get("fresh") == 2, 60, "the workers' loading it")
    assert make_picture(model="fresh", class_label="b", steps=2)


def test_prometheus_finds_the_api_and_every_worker() -> None:
    def jobs() -> bool:
        return sorted(row["metric"]["job"] for row in query("up == 1")) == ["api", "worker", "worker"]

    eventually(jobs, 90, "the scrapes")
    assert query('ALERTS{alertstate="firing"}') == []


def test_prometheus_understands_every_panel_and_has_its_figures() -> None:
    for title, expression in panels():
        for variable, value in {"$model": ".*", "$__rate_interval": "5m"}.items():
            expression = expression.replace(variable, value)
        if title in {"Put back", "Redis errors"}:  # nothing of the kind has happened
            query(expression)
        else:
            eventually(partial(query, expression), 60, f"{title}: {expression}")


def test_promtool_accepts_the_configuration_and_the_alerts_do_as_they_should() -> None:
    assert "rules found" in promtool("check", "config", "prometheus.yml")
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml")


def test_promtool_accepts_the_metrics() -> None:
    worker = compose("exec", "--no-tty", "worker", "curl", "-s", "http://127.0.0.1:9100/metrics")
    for text in (httpx.get(f"{API}/metrics").text, worker):
        assert promtool("check", "metrics", stdin=text) == ""


def test_with_keys_others_may_come_but_need_one() -> None:
    made = json.loads(compose("run", "--rm", "--no-TTY", "--no-deps", "api", "keys", "new", "alice", "--json"))
    keys = json.dumps([made["entry"]])
    # Not 0.0.0.0, as one would: with that, Debian 12's podman accepts connections and never answers.
    other = "127.0.0.2"
    compose("up", "--detach", "--no-build", "--wait", "api", API_ADDRESS=other, GUIDED_API_KEYS=keys)
    api = f"http://{other}:8000"
    assert httpx.get(f"{api}/models", headers={"Host": "pictures.example"}).status_code == 401
    assert make_picture(made["key"], api)
    eventually(lambda: query('up{job="api"} == 1'), 60, "a scrape without a key")


def test_stopping_ends_everything_in_order() -> None:
    compose("--profile=*", "stop")
    for name in ("redis-1", "api-1", "worker-1", "worker-2", "trainer-1"):
        assert inspect(f"guided-{name}")["State"]["ExitCode"] == 0, run("podman", "logs", f"guided-{name}")


def test_it_refuses_to_start_without_a_password() -> None:
    assert "set REDIS_PASSWORD" in compose("config", expect=1, REDIS_PASSWORD="")


def test_it_refuses_an_open_address_without_keys() -> None:
    assert "GUIDED_API_KEYS" in compose("config", expect=1, API_ADDRESS="0.0.0.0")
    given = compose("config", "--format=json", API_ADDRESS="0.0.0.0", GUIDED_API_KEYS="[...]")
    assert json.loads(given)["services"]["api"]["environment"]["GUIDED_API_KEYS"] == "[...]"
