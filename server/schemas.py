"""The API's requests and answers (pydantic only): the server's contract, and the client's types."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, model_validator

from model_core.bundle import SamplingDefaults
from model_core.config import SamplerName
from model_core.seeds import MAX_SEED
from model_core.training.config import Kind

Status = Literal["queued", "running", "finished", "failed", "cancelled"]
ImageFormat = Literal["png", "jpeg", "webp", "npz"]
ModelReference = Annotated[
    str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}(@[1-9][0-9]{0,8})?$", strict=True)
]
ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$", strict=True)]
Respacing = Annotated[
    str, StringConstraints(pattern=r"^((ddim|stride|quad)?[0-9]{1,9}|[0-9]{1,9}(,[0-9]{1,9}){1,20})$", strict=True)
]
ClassName = Annotated[str, StringConstraints(min_length=1, max_length=200, strict=True)]
ClassIndex = Annotated[int, Field(ge=0, le=1_000_000, strict=True)]
ClassLabel = ClassIndex | ClassName
Timestep = Annotated[int, Field(ge=0, le=1_000_000, strict=True)]


class Answer(BaseModel):
    """What the API answers."""

    model_config = ConfigDict(frozen=True)


class SamplingOptions(BaseModel):
    """How to sample: what every request for pictures may say."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    steps: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Denoising steps. For `ddpm` they are spread from the first timestep to the last (respacing by "
        "count), for `ddim` by stride (`ddimN`, or `strideN` where no whole stride gives N), for `dpmpp_2m` "
        "quadratically (`quadN`).",
    )
    respacing: Respacing | None = Field(
        default=None,
        description="Instead of `steps`: a count `250`, counts per equal section, least noisy first "
        "(`90,60,60,20,20`), `ddimN`, `strideN`, or `quadN` (few steps where there is only noise).",
        examples=["ddim25"],
    )
    sampler: SamplerName | None = Field(
        default=None,
        description="`ddpm` (ancestral), `ddim`, or `dpmpp_2m` (DPM-Solver++, second order: for 10 to 20 steps).",
    )
    eta: float | None = Field(default=None, ge=0, le=1, description="Noise of DDIM; 0 is deterministic.")
    guidance_scale: float | None = Field(
        default=None,
        ge=-1000,
        le=1000,
        allow_inf_nan=False,
        description="Weight of the classifier's gradient; 0 turns the classifier off.",
    )
    guidance_interval: Annotated[list[Timestep], Field(min_length=2, max_length=2)] | None = Field(
        default=None,
        description="`[low, high]`: guide only at timesteps of the original process within, both included.",
    )
    guidance_every: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Compute the classifier's gradient at every so many guided steps, and use it again at those "
        "between. Default: 1, at each of them.",
    )
    clip_denoised: bool | None = Field(default=None, description="Clip the predicted x_0 to [-1, 1] at every step.")
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the first picture; picture i has seed + i. Default: random, told in the job.",
    )
    priority: Literal["low", "default", "high"] = "default"
    deadline_s: float | None = Field(
        default=None, gt=0, le=10_000_000, description="Seconds after which the job fails if it is not done."
    )
    upsample: ModelReference | None = Field(default=None, description="An upsampler to run on the pictures.")
    upsample_respacing: Respacing | None = Field(default=None, description="The upsampler's respacing.")

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.steps is not None and self.respacing is not None:
            raise ValueError("steps: give steps or respacing, not both")
        if self.upsample is None and self.upsample_respacing is not None:
            raise ValueError("upsample_respacing: needs upsample")
        return self


class GenerateRequest(SamplingOptions):
    """What to sample; whatever is left out comes from the model's defaults."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "emoji32", "class_label": "heart", "steps": 25, "guidance_scale": 4.0, "seed": 7},
                {"model": "emoji32", "class_label": [0, "clock"], "num_images": 4, "respacing": "ddim25"},
            ]
        },
    )

    model: ModelReference = Field(description="`name` (its newest version) or `name@version`.", examples=["emoji32"])
    class_label: ClassLabel | Annotated[list[ClassLabel], Field(min_length=1, max_length=1000)] | None = Field(
        default=None,
        description="Class index or name, or a list of them, repeated in order to fill `num_images`. Absent: no class "
        "for an unconditional model; for a class-conditional one a random class per picture, which its seed decides.",
        examples=["heart"],
    )
    num_images: int | None = Field(
        default=None, ge=1, le=100_000, description="Pictures; default: one per class listed, or 1."
    )
    format: ImageFormat = Field(
        default="png", description="What the job's picture links lead to; `npz`: one file of all pictures."
    )
    preview_every: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Steps between `preview` events with the predicted x_0."
    )
    webhook_url: Annotated[str, StringConstraints(pattern=r"^https?://", max_length=2000)] | None = Field(
        default=None, description="Gets a POST when the job has ended. Its host must be allowed in the settings."
    )


class FieldError(Answer):
    """What is wrong with one field."""

    field: str = Field(description="Path of the field, such as `guidance_interval.0`; empty: the whole body.")
    message: str = Field(description="What is wrong, and what is allowed.")


class Problem(Answer):
    """An error (RFC 9457)."""

    type: str = Field(default="about:blank", description="Names the kind of error.")
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: list[FieldError] = Field(default_factory=list)


class JobFailure(Answer):
    """Why a job failed."""

    kind: Literal["error", "deadline", "abandoned"]
    message: str


class ImageView(Answer):
    """One picture of a job."""

    index: int
    seed: int
    class_label: int | None
    class_name: str | None
    steps_done: int
    steps_total: int
    ready: bool = Field(description="Whether it can be fetched.")
    url: str | None


class Progress(Answer):
    """Denoising steps over all pictures."""

    steps_done: int
    steps_total: int
    fraction: float


class Timings(Answer):
    """Seconds spent; `null` until known."""

    queued_s: float
    running_s: float | None


class StageView(Answer):
    """How one model of the job is sampled, defaults filled in."""

    model: str
    version: str | None = Field(description="`null` until a worker has taken the job, unless the request named it.")
    respacing: str
    steps: int
    sampler: SamplerName
    eta: float
    guidance_scale: float
    guidance_interval: tuple[int, int] | None
    guidance_every: int
    clip_denoised: bool


class JobLinks(Answer):
    """Paths below this server."""

    self: str
    events: str
    cancel: str
    samples: str | None = Field(description="All pictures as `.npz`, once the job is finished.")


class JobSummary(Answer):
    """A sampling job in a list."""

    kind: Literal["sample"] = "sample"
    id: str
    status: Status
    model: str
    version: str | None
    num_images: int
    priority: Literal["low", "default", "high"]
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    progress: Progress
    error: JobFailure | None
    links: JobLinks


class JobView(JobSummary):
    """A job."""

    queue_position: int | None = Field(description="Parts of other jobs before it; `null` unless queued.")
    eta_s: float | None = Field(description="Estimated seconds until it is done; `null` if over or unknown.")
    timings: Timings
    stages: list[StageView]
    images: list[ImageView]
    deadline_at: datetime | None
    format: ImageFormat


class TrainRequest(BaseModel):
    """What to train, and where the result goes."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={
            "examples": [
                {
                    "what": "classifier",
                    "publish": "emoji32",
                    "config": {
                        "steps": 2500,
                        "batch_size": 64,
                        "data": {"train": "emoji/train", "val": "emoji/val"},
                        "classifier": {
                            "image_size": 32,
                            "model_channels": 32,
                            "out_channels": 11,
                            "num_res_blocks": 2,
                            "attention_resolutions": [4],
                            "channel_mult": [1, 2, 4],
                            "num_head_channels": 32,
                            "pool": "attention",
                        },
                        "diffusion": {"noise_schedule": "cosine"},
                    },
                }
            ]
        },
    )

    what: Kind = Field(description="What the run trains.")
    config: dict[str, JsonValue] = Field(
        description="The run's configuration, as in a file for `guided train`, without `run_dir` and `publish`; "
        "`GET /train/{what}/schema` describes it. `data.train` is below one of the server's data roots."
    )
    init: ModelReference | None = Field(default=None, description="Model whose weights the run begins with.")
    publish: ModelName | None = Field(default=None, description="Model to publish new versions of.")
    publish_every: Annotated[int, Field(ge=1, le=1_000_000_000, strict=True)] | None = Field(
        default=None, description="Steps between publications; the last step always publishes."
    )
    publish_defaults: SamplingDefaults | None = Field(
        default=None, description="How the published model is sampled when a request does not say."
    )


class TrainProgress(Answer):
    """How far a run is, and its latest figures."""

    step: int
    steps: int
    fraction: float
    images_per_s: float | None
    eta_s: float | None
    figures: dict[str, float] = Field(description="Loss and others, means over the last `log_every` steps.")


class TrainLinks(Answer):
    """Paths below this server."""

    self: str
    events: str
    cancel: str
    log: str
    figures: str


class TrainView(Answer):
    """A training job."""

    kind: Literal["train"] = "train"
    id: str
    status: Status
    what: Kind
    publish: str | None
    published: list[str] = Field(description="Versions published so far, `name@version`.")
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    progress: TrainProgress
    run_dir: str | None = Field(description="Folder of the run on the training worker's machine.")
    error: JobFailure | None
    links: TrainLinks


class TrainLog(Answer):
    """The last lines a run said."""

    lines: list[str]


class TrainFigures(Answer):
    """What a run measured, oldest first: lines of its `log.jsonl`."""

    figures: list[dict[str, JsonValue]]


class JobList(Answer):
    """A page of jobs, newest first."""

    jobs: list[Annotated[JobSummary | TrainView, Field(discriminator="kind")]]
    next_cursor: str | None = Field(description="Pass as `cursor` for the next page; `null`: this was the last.")


class DefaultsView(Answer):
    """How a model is sampled where a request does not say."""

    sampler: SamplerName
    respacing: str
    steps: int
    eta: float
    guidance_scale: float
    clip_denoised: bool


class Limits(Answer):
    """What a request may ask for."""

    max_steps: int
    max_images: int
    max_wait_s: float
    max_deadline_s: float


class ModelView(Answer):
    """A model that can be sampled, or an upsampler for `upsample`."""

    name: str
    version: str = Field(description="Newest version: what the name alone means.")
    versions: list[str]
    kind: Literal["diffusion", "upsampler"]
    image_size: int
    low_res_size: int | None = Field(description="Size of the pictures an upsampler starts from.")
    channels: int
    num_classes: int | None
    class_names: list[str] | None
    class_conditional: bool = Field(description="Whether the diffusion model itself is shown the class.")
    guidance: bool = Field(description="Whether there is a classifier.")
    defaults: DefaultsView
    limits: Limits
    workers: int = Field(description="Live workers that take its jobs.")
    examples: str | None = Field(description="Path of a picture with an example of each class, if there is one.")


class ModelList(Answer):
    """All models."""

    models: list[ModelView]


class Health(Answer):
    """The process is up."""

    status: Literal["ok"] = "ok"


class Readiness(Answer):
    """Whether jobs would be taken now."""

    ready: bool
    redis: bool
    workers: dict[str, int] = Field(description="Live workers, by model.")
    detail: str


EVENT_DOC = """\
Server-sent events until the job has ended:

* `status`: the job, whenever its status changed (data: JobView or TrainView)
* `progress`: steps done (data: Progress or TrainProgress)
* `preview`: predicted x_0 of one picture, at most 64x64 (data: `{"index", "steps_done", "png"}`, base64)
* `done`: the ended job (data: JobView or TrainView); then the stream closes

`Last-Event-ID` resumes after that event; without it the stream begins with what has happened so far."""

AnyJob = Annotated[JobView | TrainView, Field(discriminator="kind")]

Json = dict[str, Any]
