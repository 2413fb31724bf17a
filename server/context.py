"""What the routes share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from server.catalog import Catalog
from server.metrics import ServerMetrics
from server.plan import Planner
from server.problems import ProblemError
from server.settings import ServerSettings
from server.store import JobStore, Seen
from worker.artifacts import ArtifactStore


@dataclass(frozen=True)
class Context:
    """One application's parts."""

    settings: ServerSettings
    catalog: Catalog
    planner: Planner
    store: JobStore
    artifacts: ArtifactStore
    metrics: ServerMetrics


def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(_context)]


async def _find_job(job_id: str, context: Ctx) -> Seen:
    seen = await context.store.see(job_id) if len(job_id) <= 64 else None
    if seen is None:
        raise ProblemError(404, "there is no job of this id; ended jobs are kept for a limited time")
    return seen


FoundJob = Annotated[Seen, Depends(_find_job)]
"""The job a path names, or 404."""
