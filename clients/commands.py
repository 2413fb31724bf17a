"""The verbs that talk to a server: ``guided generate``, ``jobs``, ``cancel``, ``models served``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from clients.calls import DEFAULT_URL, KEY_VARIABLE
from clients.client import Client
from server.schemas import JobSummary, JobView, TrainProgress, TrainView
from server.schemas import Progress as Steps

Url = Annotated[str, typer.Option(envvar="GUIDED_URL", help="The server.")]
Key = Annotated[
    str | None, typer.Option("--api-key", envvar=KEY_VARIABLE, show_envvar=True, help="Where the server asks for one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
RETRIES = 3
"""Times a call is tried again: someone waits at a terminal."""
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".npz": "npz"}


def generate(
    model: Annotated[str, typer.Option(help="NAME or NAME@VERSION.")] = "emoji32",
    classes: Annotated[
        list[str] | None, typer.Option("--class", help="Class name or index; may be repeated. Default: random.")
    ] = None,
    num: Annotated[int | None, typer.Option(help="Pictures; default: one per class, or 1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; default: the model's.")] = None,
    respacing: Annotated[str | None, typer.Option(help="'90,60,60,20,20' or 'ddim25', instead of --steps.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddpm, ddim or dpmpp_2m; default: the model's.")] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM noise, 0 to 1.")] = None,
    scale: Annotated[float | None, typer.Option(help="Guidance scale; 0 turns the classifier off.")] = None,
    guidance_interval: Annotated[
        tuple[int, int] | None, typer.Option(help="Guide only at timesteps from LOW to HIGH.")
    ] = None,
    guidance_every: Annotated[
        int | None, typer.Option(min=1, help="Compute the classifier's gradient at every so many guided steps.")
    ] = None,
    clip: Annotated[bool | None, typer.Option("--clip/--no-clip", help="Clip predicted x_0 to [-1, 1].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first picture; picture i has seed + i.")] = None,
    priority: Annotated[str | None, typer.Option(help="low, default or high.")] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds after which the job fails.")] = None,
    upsample: Annotated[str | None, typer.Option(help="Upsampler to run on the pictures.")] = None,
    upsample_respacing: Annotated[str | None, typer.Option(help="Its respacing.")] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help=".png, .jpg or .webp (several: numbered), or .npz for all in one.")
    ] = Path("sample.png"),
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Have a server make pictures, and save them."""
    format = FORMATS.get(out.suffix.lower())
    if format is None:
        raise ValueError(f"out: {out} must end in {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise ValueError(f"out: the folder {out.parent} does not exist")
    given: dict[str, Any] = {
        "model": model,
        "class_label": _labels(classes),
        "num_images": num,
        "steps": steps,
        "respacing": respacing,
        "sampler": sampler,
        "eta": eta,
        "guidance_scale": scale,
        "guidance_interval": list(guidance_interval) if guidance_interval else None,
        "guidance_every": guidance_every,
        "clip_denoised": clip,
        "seed": seed,
        "priority": priority,
        "deadline_s": deadline,
        "upsample": upsample,
        "upsample_respacing": upsample_respacing,
        "format": format,
    }
    with Client(url, api_key=api_key, retries=RETRIES) as client:
        job = _follow(client, client.generate(**{name: value for name, value in given.items() if value is not None}))
        paths = _save(client, job, out, format)
    print(job.model_dump_json(indent=2) if as_json else "\n".join(map(str, paths)))


def _labels(classes: list[str] | None) -> int | str | list[int | str] | None:
    """Numbers are indices, everything else is a name."""
    labels: list[int | str] = [int(text) if text.isdigit() else text for text in classes or []]
    return labels[0] if len(labels) == 1 else labels or None


def _follow(client: Client, job: JobView) -> JobView:
    """Wait for the job with a bar; Ctrl-C cancels it.

    Raises:
        ValueError: if it fails or is cancelled.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(job.status, total=job.progress.steps_total)

        def show(state: JobView | TrainView | Steps | TrainProgress) -> None:
            if isinstance(state, JobView):
                place = f", {state.queue_position} before it" if state.queue_position else ""
                bar.update(task, description=f"{state.status}{place}", completed=state.progress.steps_done)
            elif isinstance(state, Steps):
                bar.update(task, description="running", completed=state.steps_done)

        try:
            job = client.wait(job, on_progress=show, check_outcome=False)
        except KeyboardInterrupt:
            client.cancel(job.id)
            print(f"guided: cancelled job {job.id}", file=sys.stderr)
            raise typer.Exit(130) from None
    if job.status != "finished":
        reason = f": {job.error.message}" if job.error else ""
        raise ValueError(f"job {job.id} {job.status}{reason}")
    return job


def _save(client: Client, job: JobView, out: Path, format: str) -> list[Path]:
    if format == "npz":
        out.write_bytes(client.samples(job))
        return [out]
    several = job.num_images > 1
    paths = [out.with_stem(f"{out.stem}-{i}") if several else out for i in range(job.num_images)]
    for index, path in enumerate(paths):
        path.write_bytes(client.image(job, index, format))
    return paths


def jobs(
    job_id: Annotated[str | None, typer.Argument(help="Show this job; default: a list.")] = None,
    status: Annotated[
        str | None, typer.Option(help="Only queued, running, finished, failed or cancelled ones.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show a server's jobs."""
    with Client(url, api_key=api_key, retries=RETRIES) as client:
        if job_id is not None:
            print(client.any_job(job_id).model_dump_json(indent=2))
            return
        listed = client.jobs(status, page=min(limit, 100))  # type: ignore[arg-type]  # the server checks it
        found = [job for job, _ in zip(listed, range(limit), strict=False)]
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in found], indent=2))
        return
    whole = {"no_wrap": True, "overflow": "ignore"}  # ids are there to be copied
    first = (Column("id", min_width=32, **whole), Column("status", min_width=9, **whole))  # type: ignore[arg-type]
    table = Table(*first, "model", "done", "error", box=None)
    for job in found:
        table.add_row(*_row(job))
    Console().print(table if found else "No jobs.")


def _row(job: JobSummary | TrainView) -> list[str]:
    if isinstance(job, TrainView):
        error = job.error.message if job.error else ""
        return [job.id, job.status, job.publish or f"({job.what})", f"{job.progress.fraction:.0%} trained", error]
    version = f"@{job.version}" if job.version else ""
    return [
        job.id,
        job.status,
        f"{job.model}{version}",
        f"{job.progress.fraction:.0%} of {job.num_images}",
        job.error.message if job.error else "",
    ]


def cancel(
    job_ids: Annotated[list[str], typer.Argument(help="Jobs to cancel.")],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
) -> None:
    """Cancel jobs, queued or running."""
    with Client(url, api_key=api_key, retries=RETRIES) as client:
        for job_id in job_ids:
            print(f"{job_id} {client.cancel(job_id).status}")


def served(url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """List the models a server has."""
    with Client(url, api_key=api_key, retries=RETRIES) as client:
        models = client.models()
    if as_json:
        print(json.dumps([model.model_dump(mode="json") for model in models], indent=2))
        return
    table = Table("name", "version", "kind", "size", "classes", "guidance", "steps", "workers")
    for m in models:
        classes, guidance = str(m.num_classes or "-"), "yes" if m.guidance else "no"
        size, steps = str(m.image_size), f"{m.defaults.sampler} {m.defaults.respacing}"
        table.add_row(m.name, m.version, m.kind, size, classes, guidance, steps, str(m.workers))
    Console().print(table if models else "No models.")
