"""What the routes share."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from server.catalog import Catalog
from server.metrics import ServerMetrics
from server.plan import Planner
from server.problems import ProblemError
from server.rates import Limiter
from server.security import Links, Who
from server.settings import ServerSettings
from server.store import JobStore, Seen, SeenTraining
from worker.artifacts import ArtifactStore
from worker.jobs import SampleJob
from worker.records import Outcome
from worker.training import PREFIX
from worker.webhooks import send_webhook


@dataclass(frozen=True)
class Context:
    """One application's parts."""

    settings: ServerSettings
    catalog: Catalog
    planner: Planner
    store: JobStore
    artifacts: ArtifactStore
    metrics: ServerMetrics
    limiter: Limiter
    links: Links
    calling: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, thread_name_prefix="webhook"))
    """Sends webhooks: threads of its own, so that a slow receiver holds up no request."""

    def tell(self, job: SampleJob, outcome: Outcome) -> None:
        """Send a job's webhook, if it has one."""
        self.calling.submit(send_webhook, job, outcome, self.settings)


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Ctx = Annotated[Context, Depends(_context)]


async def _find_any(job_id: str, context: Ctx, caller: Who) -> Seen | SeenTraining:
    training = job_id.startswith(PREFIX)
    return await (_find_training if training else _find_job)(job_id, context, caller)


async def _find_training(job_id: str, context: Ctx, caller: Who) -> SeenTraining:
    seen = await context.store.see_training(job_id) if len(job_id) <= 64 and job_id.startswith(PREFIX) else None
    if seen is None or not caller.sees(seen.record.job.owner):
        raise ProblemError(404, "there is no training job of this id; ended jobs are kept for a limited time")
    return seen


async def _find_job(job_id: str, context: Ctx, caller: Who) -> Seen:
    known = len(job_id) <= 64 and not job_id.startswith(PREFIX)
    seen = await context.store.see(job_id) if known else None
    if seen is None or not caller.sees(seen.record.job.owner):
        raise ProblemError(404, "there is no job of this id; ended jobs are kept for a limited time")
    return seen


FoundJob = Annotated[Seen, Depends(_find_job)]
"""The sampling job a path names, or 404."""
FoundTraining = Annotated[SeenTraining, Depends(_find_training)]
"""The training job a path names, or 404."""
FoundAny = Annotated[Seen | SeenTraining, Depends(_find_any)]
"""The job a path names, or 404."""
