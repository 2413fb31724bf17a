"""Shell completion from a server, or from the models folder where none answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import typer

from clients import DEFAULT_URL
from model_core import completion as local

if TYPE_CHECKING:
    from clients.client import Client

T = TypeVar("T")
PATIENCE_S = 1.0
"""A shell waits for the answer."""
JOBS = 50
PRIORITIES = ("high", "default", "low")
STATUSES = ("queued", "running", "finished", "failed", "cancelled")


def _ask(context: typer.Context, question: Callable[[Client], T]) -> T | None:
    from clients.client import Client

    url = context.params.get("url") or os.environ.get("GUIDED_URL") or DEFAULT_URL
    try:
        with Client(str(url), timeout=PATIENCE_S, retries=0) as client:
            return question(client)
    except (OSError, ValueError):
        return None


def models(context: typer.Context, incomplete: str) -> list[str]:
    """Models that can be sampled."""
    return _models(context, incomplete, "diffusion")


def upsamplers(context: typer.Context, incomplete: str) -> list[str]:
    """Models for ``--upsample``."""
    return _models(context, incomplete, "upsampler")


def _models(context: typer.Context, incomplete: str, kind: str) -> list[str]:
    served = _ask(context, lambda client: client.models())
    if served is None:
        return local.models(context, incomplete)
    name, at, _ = incomplete.partition("@")
    if at:
        found = [f"{name}@{version}" for m in served if m.name == name for version in reversed(m.versions)]
    else:
        found = [m.name for m in served if m.kind == kind]
    return local.beginning(incomplete, found)


def classes(context: typer.Context, incomplete: str) -> list[str]:
    """Classes of the model, which is named before or the shipped one."""
    name = str(context.params.get("model") or "emoji32")
    about = _ask(context, lambda client: client.model(name.partition("@")[0]))
    if about is None:
        return local.beginning(incomplete, local.class_names(context, name))
    return local.beginning(incomplete, about.class_names or ())


def jobs(context: typer.Context, incomplete: str) -> list[str]:
    """Ids of the newest jobs."""

    def newest(client: Client) -> list[str]:
        return [job.id for job, _ in zip(client.jobs(page=JOBS), range(JOBS), strict=False)]

    return local.beginning(incomplete, _ask(context, newest) or [])


def priorities(incomplete: str) -> list[str]:
    """Priorities of jobs."""
    return local.beginning(incomplete, PRIORITIES)


def statuses(incomplete: str) -> list[str]:
    """Statuses of jobs."""
    return local.beginning(incomplete, STATUSES)
