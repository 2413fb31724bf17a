"""Configuration files and overrides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from model_core.training.config import DiffusionTraining, load_config

EMOJI = Path(__file__).parents[3] / "examples" / "emoji"


def test_overrides() -> None:
    config = load_config(
        DiffusionTraining, EMOJI / "diffusion.toml", ["optimizer.lr=1e-3", "run_dir=elsewhere", "ema=[0.9]"]
    )
    assert config.optimizer.lr == 1e-3
    assert config.run_dir == Path("elsewhere")
    assert config.ema == (0.9,)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.speed=1", "optimizer.speed"),
        ("steps=0", "steps"),
        ("steps.many=3", "steps in 'steps.many=3' is not a table"),
        ("steps", "expected key=value"),
        ("data.crop=[0.9,0.5]", "low <= high"),
        ("compute.microbatches=5", "does not divide batch_size"),
        ("unet.out_channels=3", "out_channels"),
    ],
)
def test_mistakes_are_refused_by_name(override: str, message: str) -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "clients",
            "train",
            "diffusion",
            "--config",
            EMOJI / "diffusion.toml",
            "--set",
            override,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_configuration_imports_no_torch() -> None:
    code = "import sys, model_core.training.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
