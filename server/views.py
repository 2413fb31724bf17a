"""Jobs as the API shows them."""

from __future__ import annotations

from datetime import UTC, datetime
from time import time

from server.catalog import Catalog
from server.schemas import (
    ImageView,
    JobFailure,
    JobLinks,
    JobSummary,
    JobView,
    Progress,
    StageView,
    Timings,
)
from server.store import Fleet, Seen, SeenTraining
from worker.records import ABANDONED, Record


def progress(record: Record) -> Progress:
    """Steps of all pictures together."""
    total = record.job.steps * record.job.num_images
    done = sum(record.steps_done.values())
    return Progress(steps_done=done, steps_total=total, fraction=done / total)


def summary(seen: Seen) -> JobSummary:
    """A job in a list."""
    record, job = seen.record, seen.record.job
    ended = record.outcome.at if record.outcome else None
    return JobSummary(
        id=job.id,
        status=seen.status,
        model=job.stages[0].model,
        version=record.versions[0],
        num_images=job.num_images,
        priority=job.priority.name,
        created_at=date(job.created),
        started_at=date(record.started) if record.started else None,
        ended_at=date(ended) if ended else None,
        progress=progress(record),
        error=failure(seen),
        links=JobLinks(
            self=f"/jobs/{job.id}",
            events=f"/jobs/{job.id}/events",
            cancel=f"/jobs/{job.id}",
            samples=f"/jobs/{job.id}/samples.npz" if seen.status == "finished" else None,
        ),
    )


def view(seen: Seen, fleet: Fleet, catalog: Catalog) -> JobView:
    """A job in full."""
    record, job = seen.record, seen.record.job
    return JobView(
        **dict(summary(seen)),
        queue_position=seen.position,
        eta_s=estimate(seen, fleet),
        timings=_timings(record),
        stages=[
            StageView(
                model=plan.model,
                version=version,
                respacing=plan.respacing,
                steps=plan.steps,
                sampler=plan.sampler,
                eta=plan.eta,
                guidance_scale=plan.guidance_scale,
                guidance_interval=plan.guidance_interval,
                guidance_every=plan.guidance_every,
                clip_denoised=plan.clip_denoised,
            )
            for plan, version in zip(job.stages, record.versions, strict=True)
        ],
        images=_images(record, catalog),
        deadline_at=date(job.deadline) if job.deadline else None,
        format=job.format,
    )


def estimate(seen: Seen, fleet: Fleet) -> float | None:
    """Seconds until the job is done: its own steps and those before it, at the workers' measured rate."""
    model = seen.record.job.stages[0].model
    rate = fleet.steps_per_second(model)
    if seen.status not in ("queued", "running") or not rate:
        return None
    now = progress(seen.record)
    left = float(now.steps_total - now.steps_done)
    if seen.position is not None:
        left += fleet.remaining_steps(model) + seen.position * fleet.steps_per_part(model)
    return round(left / rate, 2)


def _images(record: Record, catalog: Catalog) -> list[ImageView]:
    job = record.job
    latest = catalog.latest().get(job.stages[0].model)
    names = latest.config.class_names if latest else None
    images = []
    for index, label in enumerate(job.labels):
        named = names is not None and label is not None and label < len(names)
        ready = index in record.done
        images.append(
            ImageView(
                index=index,
                seed=job.seed_of(index),
                class_label=label,
                class_name=names[label] if named else None,  # type: ignore[index]
                steps_done=record.steps_done[index],
                steps_total=job.steps,
                ready=ready,
                url=f"/jobs/{job.id}/images/{index}" if ready else None,
            )
        )
    return images


def _timings(record: Record) -> Timings:
    ended = record.outcome.at if record.outcome else time()
    if record.started is None:
        return Timings(queued_s=ended - record.job.created, running_s=None)
    return Timings(queued_s=record.started - record.job.created, running_s=ended - record.started)


def failure(seen: Seen | SeenTraining) -> JobFailure | None:
    """Why a job of either kind failed, if it did."""
    outcome = seen.record.outcome
    if outcome and outcome.error:
        return JobFailure(kind=outcome.error.kind, message=outcome.error.message)
    return JobFailure(kind="abandoned", message=ABANDONED) if seen.status == "failed" else None


def date(at: float) -> datetime:
    """A Unix time, s."""
    return datetime.fromtimestamp(at, UTC)
