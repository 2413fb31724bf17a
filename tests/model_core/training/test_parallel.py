"""Several processes, precisions and interruptions of whole runs, by the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model_core.bundle import Store
from model_core.training.state import load_state, state_files
from model_core.weights import verify

UNET = {
    "image_size": 8,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 1],
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "num_classes": 2,
}


def write_config(folder: Path, **values: Any) -> Path:
    """A run on noise pictures of two classes."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / "data" / name).mkdir(parents=True, exist_ok=True)
        for index in range(4):
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(
                folder / "data" / name / f"{index}.png"
            )
    config = {
        "run_dir": str(folder / "run"),
        "steps": 3,
        "batch_size": 4,
        "log_every": 1,
        "eval_every": 3,
        "ema": [0.9],
        "tensorboard": False,
        "data": {"train": str(folder / "data"), "workers": 0},
        "optimizer": {"lr": 1e-3},
        "compute": {"threads": 1},
        "diffusion": {"noise_schedule": "cosine"},
        "sample": {"per_class": 1, "steps": 2},
        "unet": UNET,
    }
    file = folder / "config.json"
    file.write_text(json.dumps(config | values))
    return file


def command(config: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "clients", "train", "diffusion", "--config", str(config), *options]


def train(config: Path, *options: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(config, *options), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def state(folder: Path) -> dict[str, Any]:
    found = load_state(folder)
    assert found is not None
    return found


def assert_close(left: Any, right: Any, atol: float = 2e-6) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_close(left[key], right[key], atol)
    elif isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does(tmp_path: Path, strategy: str) -> None:
    # The first moment after one step is the gradient (times 0.1); dropout is off, so all must agree.
    config = write_config(tmp_path, steps=1, timestep_sampler="loss_second_moment")
    train(config, "--set", f"run_dir={tmp_path}/one")
    options = ["--processes", "2", "--set", f"compute.strategy={strategy}"]
    train(config, "--set", f"run_dir={tmp_path}/two", *options)
    one, two = state(tmp_path / "one"), state(tmp_path / "two")
    for name, moments in one["optimizer"]["state"].items():
        torch.testing.assert_close(two["optimizer"]["state"][name]["exp_avg"], moments["exp_avg"], rtol=1e-3, atol=1e-7)
    assert_close(one["sampler"], two["sampler"])
    # A run goes on with another number of processes.
    train(config, "--set", f"run_dir={tmp_path}/one", "--set", "steps=2", *options)
    train(config, "--set", f"run_dir={tmp_path}/two", "--set", "steps=2")
    for name in ("model", "ema_0.9"):
        # Adam's step has the size lr = 1e-3 even where a gradient is all rounding.
        assert_close(state(tmp_path / "one")[name], state(tmp_path / "two")[name], atol=1e-4)


def test_fp16_lowers_its_loss_scale_and_goes_on(tmp_path: Path) -> None:
    train(write_config(tmp_path, compute={"threads": 1, "precision": "fp16"}))
    saved = state(tmp_path / "run")
    assert saved["scaler"]["scale"] >= 1
    assert all(torch.isfinite(value).all() for value in saved["model"].values())


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    train(config, "--set", f"run_dir={tmp_path}/plain")
    train(config, "--set", f"run_dir={tmp_path}/less", "--set", "compute.gradient_checkpointing=true")
    assert_close(state(tmp_path / "plain")["model"], state(tmp_path / "less")["model"])


@pytest.mark.slow
def test_killed_in_the_middle_of_saving(tmp_path: Path) -> None:
    # A state every step; killed while one is being written, again and again, the run still ends as if never touched.
    config = write_config(tmp_path, steps=60, save_minutes=1e-9, eval_every=60)
    train(config, "--set", f"run_dir={tmp_path}/whole")
    torn = 0
    for _ in range(40):
        child = subprocess.Popen(command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while time.monotonic() < until and child.poll() is None and not list((tmp_path / "run").glob("*.tmp")):
            pass
        child.kill()
        child.wait()
        torn += bool(list((tmp_path / "run").glob("*.tmp")))
        if torn >= 2 and state_files(tmp_path / "run"):
            break
    assert torn >= 2
    train(config)
    assert len(state_files(tmp_path / "run")) == 2
    assert_equal(state(tmp_path / "run"), state(tmp_path / "whole"))


def assert_equal(left: Any, right: Any) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=100_000, eval_every=100_000)
    child = subprocess.Popen(command(config, "--processes", "2"), stdout=subprocess.PIPE, text=True)
    assert child.stdout
    while "step 3/" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 3
    stopped = state(tmp_path / "run")["step"]
    train(config, "--set", f"steps={stopped + 2}")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, stopped + 3))


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, steps=100_000, eval_every=100_000)
    first = subprocess.Popen(command(config), stdout=subprocess.PIPE, text=True)
    assert first.stdout
    first.stdout.readline()
    second = subprocess.run(command(config), capture_output=True, text=True, check=False)
    first.terminate()
    first.communicate(timeout=60)
    assert second.returncode == 2
    assert "run_dir: another process trains" in second.stderr


def test_publishes_parts_into_one_model(tmp_path: Path) -> None:
    models = tmp_path / "models"
    config = write_config(tmp_path, steps=4, publish={"defaults": {"guidance_scale": 2.0}, "model": "x"})
    train(config, "--publish", "toy", "--publish-every", "2", "--models-dir", str(models))
    store = Store(models)
    assert store.versions("toy") == ["1", "2"]
    first = store.find("toy")
    assert first.config.class_names == ("a", "b")
    assert first.config.classifier is None
    assert first.config.defaults.guidance_scale == 0.0
    values = json.loads(config.read_text())
    network = {k: v for k, v in UNET.items() if k != "num_classes"} | {"out_channels": 2, "pool": "attention"}
    values["classifier"] = network
    values["publish"] = {"model": "toy", "models_dir": str(models), "defaults": {"guidance_scale": 2.0}}
    values |= {"run_dir": str(tmp_path / "classifier"), "ema": []}
    for name in ("unet", "sample"):
        del values[name]
    config.write_text(json.dumps(values))
    other = [*command(config)[:4], "classifier", "--config", str(config)]
    subprocess.run(other, check=True, capture_output=True)
    both = store.find("toy")
    assert both.version == "3"
    assert both.config.defaults.guidance_scale == 2.0
    assert both.weights_path("unet").read_bytes() == first.weights_path("unet").read_bytes()
    verify(both)
    assert {path.stat().st_mode & 0o777 for path in both.path.iterdir()} == {0o644}
    refused = subprocess.run([*other, "--set", "diffusion.noise_schedule=linear"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "diffusion.noise_schedule: linear differs" in refused.stderr


def test_upsampler_trains_and_publishes(tmp_path: Path) -> None:
    unet = UNET | {"low_res_size": 4}
    config = write_config(tmp_path, unet=unet, data={"train": str(tmp_path / "data"), "val": str(tmp_path / "data")})
    arguments = command(config, "--publish", "up", "--models-dir", str(tmp_path / "models"))
    arguments[4] = "upsampler"
    subprocess.run(arguments, check=True, capture_output=True)
    assert Store(tmp_path / "models").find("up").config.kind == "upsampler"
    with Image.open(tmp_path / "run" / "samples" / "00000003.png") as grid:
        assert grid.height > 2 * 8 * 2  # small pictures enlarged, above what was made of them


def test_tensorboard_and_skipped_pictures(tmp_path: Path) -> None:
    config = write_config(tmp_path, tensorboard=True)
    (tmp_path / "data" / "a" / "bad.png").write_bytes(b"no picture")
    train(config, "--set", "batch_size=12")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (skipped,) = (line for line in lines if line["kind"] == "skipped")
    assert str(skipped["picture"]).startswith(str(tmp_path / "data" / "a" / "bad.png"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert events.Images("samples")
