"""What ``GET /workers`` answers (pydantic only)."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class WorkerLane(_Answer):
    """One model on a worker."""

    model: str
    version: str
    width: int = Field(description="Pictures it samples at once, at most.")
    running: int = Field(description="Pictures it samples now.")
    waiting: int = Field(description="Pictures it holds that wait for a place.")


class WorkerView(_Answer):
    """A live sampling worker."""

    name: str
    hostname: str
    started_at: datetime
    device: str
    dtype: str
    models: list[str] = Field(description="Models it takes jobs of.")
    steps_per_second: float = Field(description="Denoising steps per second while busy; 0 before the first.")
    remaining_steps: int = Field(description="Steps left of all it holds.")
    lanes: list[WorkerLane] = Field(description="Models it has loaded.")


class QueueView(_Answer):
    """What waits for a worker."""

    model: str
    priority: Literal["low", "default", "high"]
    parts: int = Field(description="Parts of jobs that no worker has taken.")
    oldest_age_s: float = Field(description="Seconds since the job at the front was created.")


class WorkerList(_Answer):
    """The live workers, and their queues."""

    workers: list[WorkerView]
    queues: list[QueueView]
