"""Training jobs as the API shows them."""

from __future__ import annotations

from server.schemas import TrainLinks, TrainProgress, TrainView
from server.store import SeenTraining
from server.views import date, failure


def train_progress(seen: SeenTraining) -> TrainProgress:
    """How far the run is."""
    figures, steps = dict(seen.record.figures), seen.record.job.steps
    step = steps if seen.status == "finished" else int(figures.get("step", 0))
    skip = ("kind", "step", "time", "images_per_s", "seconds_left")
    running = seen.status == "running"
    return TrainProgress(
        step=step,
        steps=steps,
        fraction=step / steps,
        images_per_s=figures.get("images_per_s"),
        eta_s=figures.get("seconds_left") if running else None,
        figures={name: value for name, value in figures.items() if name not in skip},
    )


def train_view(seen: SeenTraining) -> TrainView:
    """A training job in full."""
    record, job = seen.record, seen.record.job
    return TrainView(
        id=job.id,
        status=seen.status,
        what=job.what,
        publish=job.publish,
        published=list(record.published),
        created_at=date(job.created),
        started_at=date(record.started) if record.started else None,
        ended_at=date(record.outcome.at) if record.outcome else None,
        progress=train_progress(seen),
        run_dir=record.output,
        error=failure(seen),
        links=TrainLinks(
            self=f"/jobs/{job.id}",
            events=f"/jobs/{job.id}/events",
            cancel=f"/jobs/{job.id}",
            log=f"/jobs/{job.id}/log",
            figures=f"/jobs/{job.id}/figures",
        ),
    )
