"""``guided evaluate nll`` on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from clients.cli import app
from tests.models import publish, tiny_config, upsampler_config


def write(folder: Path, classes: list[str], count: int = 3) -> None:
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / name / f"{index}.png")


def nll(root: Path, model: str, data: Path, *options: str) -> dict[str, float]:
    arguments = ["evaluate", "nll", model, "--data", str(data), "--models-dir", str(root), "--json", *options]
    result = CliRunner().invoke(app, arguments)
    if isinstance(result.exception, Exception):
        raise result.exception
    found: dict[str, float] = json.loads(result.stdout)
    return found


def test_same_figure_however_it_is_batched(tmp_path: Path) -> None:
    publish(tmp_path / "models", "tiny", tiny_config())
    write(tmp_path / "data", ["class 1", "class 4"])
    options = ["--respacing", "10"]
    one = nll(tmp_path / "models", "tiny", tmp_path / "data", *options, "--batch", "1")
    all_at_once = nll(tmp_path / "models", "tiny", tmp_path / "data", *options)
    assert one["pictures"] == 6
    assert one["bits_per_dim"] == pytest.approx(all_at_once["bits_per_dim"], rel=1e-4)
    assert one["bits_per_dim"] > one["decoder"] > 0
    fewer = nll(tmp_path / "models", "tiny", tmp_path / "data", *options, "--num", "2")
    assert fewer["pictures"] == 2


def test_the_bound_is_that_of_the_classes_named(tmp_path: Path) -> None:
    publish(tmp_path / "models", "tiny", tiny_config())
    write(tmp_path / "one", ["class 1"])
    write(tmp_path / "two", ["class 2"])
    one, two = (nll(tmp_path / "models", "tiny", tmp_path / name, "--respacing", "10") for name in ("one", "two"))
    assert one["bits_per_dim"] != two["bits_per_dim"]


def test_classes_without_names_are_told_by_their_indices(tmp_path: Path) -> None:
    publish(tmp_path / "models", "named", tiny_config())
    publish(tmp_path / "models", "nameless", tiny_config(class_names=None))
    write(tmp_path / "by name", ["class 2"])
    write(tmp_path / "by index", ["2"])
    found = [
        nll(tmp_path / "models", *given, "--respacing", "10")
        for given in (("named", tmp_path / "by name"), ("nameless", tmp_path / "by index"))
    ]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="class 2: not among the model's classes"):
        nll(tmp_path / "models", "nameless", tmp_path / "by name")


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "models", "tiny", tiny_config())
    publish(tmp_path / "models", "up", upsampler_config())
    write(tmp_path / "data", ["fish"])
    with pytest.raises(ValueError, match="fish: not among the model's classes"):
        nll(tmp_path / "models", "tiny", tmp_path / "data")
    with pytest.raises(ValueError, match="upsampler has no likelihood"):
        nll(tmp_path / "models", "up", tmp_path / "data")
    with pytest.raises(ValueError, match="no such folder"):
        nll(tmp_path / "models", "tiny", tmp_path / "absent")
