"""Workers: who samples, and how fast."""

from __future__ import annotations

from fastapi import APIRouter

from server.context import Ctx
from server.problems import responses
from server.views import date
from server.worker_schemas import QueueView, WorkerLane, WorkerList, WorkerView
from worker.records import WorkerReport

router = APIRouter(tags=["operation"])


@router.get("/workers", operation_id="listWorkers", summary="Live workers and their queues", responses=responses(503))
async def list_workers(context: Ctx) -> WorkerList:
    """What each live sampling worker said of itself within the last seconds, and what waits in the queues."""
    fleet = await context.store.fleet()
    depths = await context.store.depths(context.catalog.served())
    return WorkerList(
        workers=[_view(report) for report in sorted(fleet.workers, key=lambda report: report.name)],
        queues=[
            QueueView(model=model, priority=priority, parts=depth, oldest_age_s=round(age, 3))
            for model, priority, depth, age in depths
        ],
    )


def _view(report: WorkerReport) -> WorkerView:
    return WorkerView(
        name=report.name,
        hostname=report.hostname,
        started_at=date(report.started),
        device=report.device,
        dtype=report.dtype,
        models=list(report.models),
        steps_per_second=report.steps_per_second,
        remaining_steps=report.remaining_steps,
        lanes=[
            WorkerLane(
                model=lane.model, version=lane.version, width=lane.width, running=lane.running, waiting=lane.waiting
            )
            for lane in report.lanes
        ],
    )
