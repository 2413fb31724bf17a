"""The training loop on a toy task."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from model_core.bundle import Part
from model_core.training.commands import last_end
from model_core.training.config import DataConfig, OptimizerConfig, TrainingConfig
from model_core.training.data import Batches
from model_core.training.loop import learning_rate, train
from model_core.training.parallel import Processes
from model_core.training.state import load_state, state_files
from model_core.training.task import Draw, Judgement, Network
from model_core.training.timesteps import LossSecondMomentSampler


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Colours:
    """Pictures in two colours."""

    classes: tuple[str, ...] = ("blue", "red")
    labels: np.ndarray | None = np.arange(10) % 2

    def __len__(self) -> int:
        return 10

    def order(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(10)

    def read(self, index: int) -> tuple[Image.Image, int]:
        colour = (200, 10 * index, 0) if index % 2 else (0, 10 * index, 200)
        return Image.new("RGB", (4, 4), colour), index % 2


class Toy:
    """Tells two colours apart, through dropout and noise; may send itself a signal or fail."""

    part: Part = "classifier"

    def __init__(self, *, stop_at: int | None = None, poison: bool = False, dropout: float = 0.2) -> None:
        torch.manual_seed(7)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(dropout), nn.Flatten(), nn.Linear(16, 2))
        self.sampler = LossSecondMomentSampler(20, history=2)
        self.stop_at = stop_at
        self.poison = poison
        self.calls = 0
        self.seen: list[float] = []

    def losses(self, network: Network, draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls += 1
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        logits = network(draw.x + draw.noise * draw.t.view(-1, 1, 1, 1) / 20)
        losses = nn.functional.cross_entropy(logits, draw.y, reduction="none")
        if self.poison:
            losses = losses * torch.nan
        self.seen.append(losses.mean().item())
        return losses, {"twice": 2 * losses.detach()}

    def evaluate(self, model: nn.Module) -> Judgement:
        assert not model.training
        return Judgement({"judged": 1.0})


def run(folder: Path, toy: Toy, **changes: Any) -> bool:
    values: dict[str, Any] = {
        "run_dir": folder,
        "steps": 40,
        "batch_size": 8,
        "data": DataConfig(train="", workers=0),
        "optimizer": OptimizerConfig(lr=0.02, warmup=5, schedule="cosine", grad_clip=1.0),
        "compute": {"threads": 1},
        "ema": (0.9, 0.99),
        "eval_every": 20,
        "tensorboard": False,
    }
    config = TrainingConfig(**(values | changes))
    folder.mkdir(parents=True, exist_ok=True)
    batches = Batches(Colours(), config.data, 4, config.batch_size, config.seed)
    return train(config, toy, batches, Processes(0, 1, torch.device("cpu")))


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    whole = Toy()
    assert run(tmp_path / "whole", whole)
    first, second = Toy(stop_at=13), Toy()
    assert not run(tmp_path / "parts", first)  # SIGTERM: finishes the step, saves, and says it is not done
    assert [path.name for path in state_files(tmp_path / "parts")] == ["state-000000013.pt"]
    assert records(tmp_path / "parts")[-1]["complete"] is False
    assert run(tmp_path / "parts", second)
    assert first.seen + second.seen == whole.seen
    assert equal(load_state(tmp_path / "whole"), load_state(tmp_path / "parts"))


def test_resume_forgets_what_was_logged_after_the_state(tmp_path: Path) -> None:
    assert not run(tmp_path, Toy(stop_at=10))
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "step": 30, "loss": 5}\n{"kind": "tr')
    assert run(tmp_path, Toy())
    assert [line["step"] for line in records(tmp_path) if line["kind"] == "train"] == [10, 20, 30, 40]
    assert [line["judged"] for line in records(tmp_path) if line["kind"] == "eval"] == [1.0, 1.0]


def test_a_finished_run_does_nothing_more(tmp_path: Path) -> None:
    assert run(tmp_path, Toy())
    again = Toy()
    assert run(tmp_path, again)
    assert again.calls == 0


def test_only_what_this_process_said_tells_how_it_ended(tmp_path: Path) -> None:
    began = time.time()
    assert not run(tmp_path, Toy(stop_at=10))
    assert last_end(tmp_path / "log.jsonl", began) is False
    assert last_end(tmp_path / "log.jsonl", time.time() + 1) is None  # a later one that says nothing broke off


def test_loss_falls(tmp_path: Path) -> None:
    toy = Toy()
    run(tmp_path, toy, steps=100)
    assert np.mean(toy.seen[-20:]) < 0.5 * np.mean(toy.seen[:5])


def test_microbatches_average_the_gradient(tmp_path: Path) -> None:
    states = []
    for shares in (1, 4):
        toy = Toy(dropout=0.0)
        run(tmp_path / str(shares), toy, steps=3, compute={"threads": 1, "microbatches": shares})
        states.append(toy.model.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_a_loss_that_is_not_finite_stops_the_run_without_saving(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="step 0"):
        run(tmp_path, Toy(poison=True))
    assert state_files(tmp_path) == []


def test_learning_rate() -> None:
    config = OptimizerConfig(lr=1.0, warmup=10, schedule="linear")
    assert [learning_rate(config, step, 110) for step in (0, 9, 10, 60, 109)] == pytest.approx([0.1, 1, 1, 0.5, 0.01])
    cosine = config.model_copy(update={"schedule": "cosine"})
    assert learning_rate(cosine, 60, 110) == pytest.approx(0.5)
    assert learning_rate(config.model_copy(update={"schedule": "constant"}), 100, 110) == 1.0
