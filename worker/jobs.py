"""What a sampling job says (pydantic, no torch): written by the server, read by the workers."""

from __future__ import annotations

from enum import IntEnum
from typing import Literal, NoReturn

from pydantic import Field

from model_core.config import FrozenModel, SamplerName
from model_core.seeds import image_seed

SAMPLE_FUNCTION = "worker.jobs.sample"
"""Name of the RQ job function of sampling jobs."""

ImageFormat = Literal["png", "jpeg", "webp", "npz"]


class Priority(IntEnum):
    """Who goes first; each model has one RQ queue per priority."""

    low = 0
    default = 1
    high = 2


def queue_name(model: str, priority: Priority) -> str:
    """RQ queue of a model's jobs of one priority."""
    return f"{model}:{priority.name}"


class StagePlan(FrozenModel):
    """How one model of a cascade is sampled; nothing is left to a default."""

    model: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    version: str | None = Field(pattern=r"^[1-9][0-9]{0,8}$")
    """``None``: the newest version the worker serves; fixed when a worker first takes the job."""
    respacing: str
    steps: int
    """Steps that ``respacing`` keeps, per picture."""
    sampler: SamplerName
    eta: float
    guidance_scale: float
    guidance_interval: tuple[int, int] | None
    guidance_every: int = 1
    clip_denoised: bool
    labelled: bool
    """Whether this model is shown the pictures' classes."""


class SampleJob(FrozenModel):
    """One request: its pictures, and how they are made. Complete: a worker adds no defaults."""

    id: str = Field(pattern=r"^[0-9a-f]{32}$")
    created: float
    """Unix time, s."""
    stages: tuple[StagePlan, ...] = Field(min_length=1)
    """The base model, then perhaps an upsampler."""
    seed: int
    labels: tuple[int | None, ...] = Field(min_length=1)
    """Class of each picture."""
    priority: Priority
    deadline: float | None
    """Unix time after which the job fails, s."""
    format: ImageFormat
    preview_every: int | None
    """Steps between previews."""
    webhook_url: str | None
    part_images: int
    """Pictures per part: the unit in which workers take the request."""
    owner: str | None = None
    """Name of the API key that asked."""

    @property
    def queue(self) -> str:
        """RQ queue the request waits in."""
        return queue_name(self.stages[0].model, self.priority)

    @property
    def num_images(self) -> int:
        """Pictures of the request."""
        return len(self.labels)

    @property
    def steps(self) -> int:
        """Steps per picture, over all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def parts(self) -> list[range]:
        """Indices of the pictures of each part."""
        size = self.part_images
        return [range(i, min(i + size, self.num_images)) for i in range(0, self.num_images, size)]

    def part_id(self, part: int) -> str:
        """Id of the RQ job of a part; a request of one part has one RQ job of its own id."""
        return self.id if part == 0 else f"{self.id}-{part}"

    def seed_of(self, index: int) -> int:
        """Seed of a picture."""
        return image_seed(self.seed, index)


def sample(job_id: str, part: int) -> NoReturn:
    """The RQ job function of sampling jobs; ``guided worker`` recognises its name and samples.

    Raises:
        RuntimeError: always, for a plain RQ worker cannot run it.
    """
    raise RuntimeError(f"job {job_id}, part {part}: sampling jobs run on 'guided worker', not on 'rq worker'")
