"""``guided up``, ``demo`` and ``config`` as a newcomer runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from server.up import free_port
from tests.stack import eventually, heed_interrupts

ENVIRONMENT = {"GUIDED_DTYPE": "float32", "GUIDED_WIDTH": "4", "OMP_NUM_THREADS": "1", "GUIDED_CONFIG": "absent.toml"}


def start(*arguments: object, folder: Path, models: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "clients", *map(str, arguments), "--data-dir", str(folder)]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, "--models-dir", str(models)],
            env={**os.environ, **ENVIRONMENT},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=heed_interrupts,
        )


def children(process: subprocess.Popen[bytes]) -> set[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it has just ended
    return {pid for pid, parent in parents.items() if parent == process.pid}


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_up_serves_restarts_the_dead_stops_cleanly_and_keeps_the_queue(tmp_path: Path, served_models: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    url = f"http://127.0.0.1:{port}"
    process = start("up", "--workers", 2, "--port", port, folder=tmp_path / "data", models=served_models, log=log)
    try:
        eventually(lambda: ready(url), 60, "readiness")
        eventually(lambda: log.read_text().count("takes jobs of") == 2, 30, "both workers")
        assert {"api", "worker-1", "worker-2"} <= {line.split("|")[0].strip() for line in log.read_text().splitlines()}
        body = {"model": "tiny", "class_label": 1, "steps": 3}
        done = httpx.post(f"{url}/generate", json=body, headers={"Prefer": "wait=30"}, timeout=40).json()
        assert done["status"] == "finished"
        (api,) = re.findall(r"Started server process \[(\d+)\]", log.read_text())
        os.kill(int(api), signal.SIGKILL)
        eventually(lambda: "api ended with code -9; starting it again" in log.read_text(), 20, "the restart")
        eventually(lambda: ready(url), 20, "readiness again")
        running = children(process)
        waiting = httpx.post(f"{url}/generate", json={**body, "steps": 1000, "num_images": 16}).json()["id"]
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)  # puts back at once what runs
        assert process.wait(40) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in running)
        process = start("up", "--port", port, folder=tmp_path / "data", models=served_models, log=log)
        eventually(lambda: ready(url), 60, "readiness after a restart")
        assert httpx.get(f"{url}/jobs/{waiting}").json()["status"] in ("queued", "running")
        assert httpx.get(f"{url}/jobs/{done['id']}/images/0").status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        process.send_signal(signal.SIGTERM)
        process.wait(40)


def test_demo_makes_a_grid_through_http_and_exits(tmp_path: Path, served_models: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "demo.png"
    arguments = ["demo", "--exit", "--model", "tiny", "--out", out, "--port", 0]
    process = start(*arguments, folder=tmp_path / "data", models=served_models, log=log)
    assert process.wait(120) == 0, log.read_text()
    told = log.read_text()
    assert re.search(r"first picture \d+\.\d s after the start", told)
    assert f"30 pictures {re.findall(r'30 pictures (.*) s after', told)[0]} s after the start: {out}" in told
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 10 * 48
    assert pixels.std() > 10


def test_a_taken_port_is_told(tmp_path: Path, served_models: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port, log = taken.getsockname()[1], tmp_path / "log"
        process = start("up", "--port", port, folder=tmp_path / "data", models=served_models, log=log)
        assert process.wait(30) == 2
    assert log.read_text().strip() == f"guided: port: cannot listen on 127.0.0.1:{port} (Address already in use)"


def config(environment: dict[str, str], *arguments: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "clients", "config", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=30)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def test_config_tells_every_setting_with_value_and_meaning(tmp_path: Path) -> None:
    file = tmp_path / "guided.toml"
    file.write_text('port = 9001\nwindow = 5\nmodels = ["a"]\n')
    given = {"GUIDED_CONFIG": str(file), "GUIDED_PORT": "9002"}
    rows = {row["name"]: row for row in json.loads(config(given, "--json"))}
    assert rows["port"]["value"] == 9002  # the environment goes before the file
    assert (rows["window"]["value"], rows["models"]["value"]) == (5, ["a"])
    assert all(row["meaning"] for row in rows.values())
    text = config(given)
    for name, row in rows.items():
        assert f"[GUIDED_{name.upper()}]" in text
        assert row["meaning"] in text


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "guided.toml"
    file.write_text("prot = 1\n")
    assert "unknown settings: prot" in config({"GUIDED_CONFIG": str(file)}, code=2)
    assert "port: " in config({"GUIDED_CONFIG": "absent.toml", "GUIDED_PORT": "x"}, code=2)
    command = [sys.executable, "-m", "clients", "worker"]
    environment = {**os.environ, "GUIDED_CONFIG": "absent.toml"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "redis_url: a worker needs one" in done.stderr
