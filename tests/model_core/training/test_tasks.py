"""Tiny runs of the two trainings, from the command line to the state on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from clients.cli import app
from model_core.training.state import load_state

NETWORK = {
    "image_size": 8,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 1],
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}


@pytest.fixture(autouse=True)
def _restore_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def main(arguments: list[str]) -> int:
    """``guided train``; its exit code."""
    result = CliRunner().invoke(app, ["train", *arguments])
    if isinstance(result.exception, Exception):
        raise result.exception
    return result.exit_code


def configuration(folder: Path, **tables: Any) -> list[str]:
    """Arguments of a run on two classes of plain colours."""
    for name, colour in {"blue": (0, 0, 255), "red": (255, 0, 0)}.items():
        (folder / "data" / name).mkdir(parents=True)
        for index in range(3):
            Image.new("RGB", (8, 8), colour).save(folder / "data" / name / f"{index}.png")
    values = {
        "run_dir": str(folder / "run"),
        "steps": 60,
        "batch_size": 16,
        "eval_every": 60,
        "data": {"train": str(folder / "data"), "val": str(folder / "data"), "workers": 0},
        "tensorboard": False,
        "optimizer": {"lr": 3e-3, "warmup": 5},
        "compute": {"threads": 1},
        "diffusion": {"noise_schedule": "cosine"},
    }
    (folder / "run.json").write_text(json.dumps(values | tables))
    return ["--config", str(folder / "run.json")]


def logged(folder: Path, kind: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.mark.parametrize("sampler", ["uniform", "loss_second_moment"])
def test_diffusion_learns(tmp_path: Path, sampler: str) -> None:
    unet = NETWORK | {"out_channels": 6, "num_classes": 2}
    arguments = configuration(
        tmp_path, unet=unet, timestep_sampler=sampler, ema=[0.9], sample={"per_class": 2, "steps": 5}
    )
    assert main(["diffusion", *arguments, "--set", "sample.per_class=3"]) == 0
    losses = [line["mse"] for line in logged(tmp_path, "train")]
    assert losses[-1] < 0.5 * losses[0]
    with Image.open(tmp_path / "run" / "samples" / "00000060.png") as grid:
        assert grid.width > grid.height  # three columns, two rows
    state = load_state(tmp_path / "run")
    assert state is not None
    assert state["step"] == 60
    assert {"model", "optimizer", "sampler", "ema_0.9"} <= state.keys()


def test_classifier_learns(tmp_path: Path) -> None:
    arguments = configuration(tmp_path, classifier=NETWORK | {"out_channels": 2, "pool": "attention"})
    assert main(["classifier", *arguments]) == 0
    losses = [line["loss"] for line in logged(tmp_path, "train")]
    assert losses[-1] < 0.5 * losses[0]
    (judged,) = logged(tmp_path, "eval")
    assert judged["top1_q0"] == judged["top5_q3"] == 1.0
    assert judged["top1_q0"] >= judged["top1_q3"]


def test_clean_classifier(tmp_path: Path) -> None:
    arguments = configuration(tmp_path, classifier=NETWORK | {"out_channels": 2, "pool": "attention"}, noised=False)
    assert main(["classifier", *arguments, "--set", "steps=30"]) == 0
    (judged,) = logged(tmp_path, "eval")
    assert judged["top1_q0"] == 1.0
    assert "top1_q1" not in judged


def test_wrong_number_of_classes_is_refused(tmp_path: Path) -> None:
    arguments = configuration(tmp_path, unet=NETWORK | {"out_channels": 6, "num_classes": 3})
    with pytest.raises(ValueError, match=r"unet\.num_classes: 3 classes"):
        main(["diffusion", *arguments])


def test_json_tells_what_came_of_a_run(tmp_path: Path) -> None:
    network = NETWORK | {"out_channels": 2, "pool": "adaptive"}
    arguments = configuration(tmp_path, steps=3, classifier=network)
    result = CliRunner().invoke(app, ["train", "classifier", *arguments, "--json"])
    told = json.loads(result.stdout)
    assert (told["run_dir"], told["step"], told["complete"]) == (str(tmp_path / "run"), 3, True)
    assert told["published"] == []
    assert told["figures"]["loss"] > 0
    assert "step 3" in result.stderr
