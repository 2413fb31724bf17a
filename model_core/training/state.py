"""States of a run on disk: written aside, synced and renamed; the two newest are kept."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from model_core.bundle import sync

KEPT = 2
"""How many states a run keeps."""

logger = logging.getLogger(__name__)


def state_files(run_dir: Path) -> list[Path]:
    """The complete states of a run, oldest first."""
    return sorted(run_dir.glob("state-*.pt"))


def save_state(run_dir: Path, step: int, state: dict[str, Any]) -> Path:
    """Save a state so that at every moment the newest ``state-*.pt`` is complete."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / f"state-{step:09d}.pt"
    aside = path.with_suffix(".tmp")
    torch.save(state, aside)
    sync(aside)
    aside.rename(path)
    sync(run_dir)
    for old in state_files(run_dir)[:-KEPT]:
        old.unlink()
    return path


def load_state(run_dir: Path) -> dict[str, Any] | None:
    """The newest readable state, or ``None`` if there is none; unreadable ones are named and passed over."""
    for path in reversed(state_files(run_dir)):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            logger.warning("unreadable state %s passed over: %s", path, error)
            continue
        return state
    return None
