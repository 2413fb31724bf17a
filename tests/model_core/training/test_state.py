"""States of a run on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model_core.training.state import load_state, save_state, state_files


def test_two_newest_states_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 200):
        save_state(tmp_path, step, {"step": step})
    assert [path.name for path in state_files(tmp_path)] == ["state-000000010.pt", "state-000000200.pt"]
    assert load_state(tmp_path) == {"step": 200}


def test_no_state(tmp_path: Path) -> None:
    assert load_state(tmp_path / "nowhere") is None


def test_torn_write_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_state(tmp_path, 1, {"step": 1, "weights": torch.arange(1000)})
    torn = save_state(tmp_path, 2, {"step": 2, "weights": torch.arange(1000)})
    torn.write_bytes(torn.read_bytes()[:700])
    (tmp_path / "state-000000003.tmp").write_bytes(b"killed while writing")
    state = load_state(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert "state-000000002.pt" in caplog.text
