"""The verbs that talk to a server: ``guided generate``, ``fetch``, ``jobs``, ``cancel``, ``models served``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from clients import DEFAULT_URL, KEY_VARIABLE, completion
from model_core.completion import samplers
from model_core.terminal import can_show, show

if TYPE_CHECKING:
    from clients.client import Client
    from server.schemas import JobSummary, JobView, TrainProgress, TrainView
    from server.schemas import Progress as Steps

WHAT, HOW, JOB, OUTPUT = "What", "How it is sampled", "The job", "Output"
"""Groups of the options of ``generate``."""

Url = Annotated[str, typer.Option(envvar="GUIDED_URL", help="The server.", rich_help_panel=OUTPUT)]
Key = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        envvar=KEY_VARIABLE,
        show_envvar=True,
        help="Where the server asks for one.",
        rich_help_panel=OUTPUT,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.", rich_help_panel=OUTPUT)]
Show = Annotated[
    bool | None,
    typer.Option(
        "--show/--no-show", help="Show the pictures here; default: if the terminal can.", rich_help_panel=OUTPUT
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help=".png, .jpg or .webp (several: numbered), or .npz for all in one.", rich_help_panel=OUTPUT
    ),
]
RETRIES = 3
"""Times a call is tried again: someone waits at a terminal."""
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".npz": "npz"}


def _connect(url: str, api_key: str | None) -> Client:
    from clients.client import Client

    return Client(url, api_key=api_key, retries=RETRIES)


def generate(
    model: Annotated[
        str, typer.Option(help="NAME or NAME@VERSION.", rich_help_panel=WHAT, autocompletion=completion.models)
    ] = "emoji32",
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            help="Class name or index; may be repeated. Default: random.",
            rich_help_panel=WHAT,
            autocompletion=completion.classes,
        ),
    ] = None,
    num: Annotated[int | None, typer.Option(help="Pictures; default: one per class, or 1.", rich_help_panel=WHAT)] = (
        None
    ),
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first picture; picture i has seed + i.", rich_help_panel=WHAT)
    ] = None,
    upsample: Annotated[
        str | None,
        typer.Option(
            help="Upsampler to run on the pictures.", rich_help_panel=WHAT, autocompletion=completion.upsamplers
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps; default: the model's.", rich_help_panel=HOW)
    ] = None,
    respacing: Annotated[
        str | None, typer.Option(help="'90,60,60,20,20' or 'ddim25', instead of --steps.", rich_help_panel=HOW)
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="ddpm, ddim or dpmpp_2m; default: the model's.", rich_help_panel=HOW, autocompletion=samplers
        ),
    ] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM noise, 0 to 1.", rich_help_panel=HOW)] = None,
    scale: Annotated[
        float | None, typer.Option(help="Guidance scale; 0 turns the classifier off.", rich_help_panel=HOW)
    ] = None,
    guidance_interval: Annotated[
        tuple[int, int] | None, typer.Option(help="Guide only at timesteps from LOW to HIGH.", rich_help_panel=HOW)
    ] = None,
    guidance_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Compute the classifier's gradient at every so many guided steps.", rich_help_panel=HOW
        ),
    ] = None,
    clip: Annotated[
        bool | None, typer.Option("--clip/--no-clip", help="Clip predicted x_0 to [-1, 1].", rich_help_panel=HOW)
    ] = None,
    upsample_respacing: Annotated[
        str | None, typer.Option(help="Respacing of the upsampler.", rich_help_panel=HOW)
    ] = None,
    priority: Annotated[
        str | None,
        typer.Option(help="low, default or high.", rich_help_panel=JOB, autocompletion=completion.priorities),
    ] = None,
    deadline: Annotated[
        float | None, typer.Option(help="Seconds after which the job fails.", rich_help_panel=JOB)
    ] = None,
    webhook: Annotated[
        str | None, typer.Option(help="URL that gets a POST when the job has ended.", rich_help_panel=JOB)
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--idempotency-key", help="Calls with the same key get the same job, for a day.", rich_help_panel=JOB
        ),
    ] = None,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Print the job's id and leave; 'guided fetch' gets it.", rich_help_panel=JOB),
    ] = False,
    out: Out = Path("sample.png"),
    show: Show = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Have a server make pictures, and save them."""
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
        "webhook_url": webhook,
        "format": _format(out),
    }
    shown = not detach and _shown(show, as_json)
    with _connect(url, api_key) as client:
        asked = {name: value for name, value in given.items() if value is not None}
        job = client.generate(idempotency_key=key, **asked)
        if detach:
            print(job.model_dump_json(indent=2) if as_json else job.id)
            return
        _deliver(client, job, out, shown, as_json)


def fetch(
    job_id: Annotated[str, typer.Argument(help="A sampling job.", show_default=False, autocompletion=completion.jobs)],
    out: Out = Path("sample.png"),
    show: Show = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Wait for a job of before, and save its pictures."""
    _format(out)
    shown = _shown(show, as_json)
    with _connect(url, api_key) as client:
        job = client.any_job(job_id)
        if job.kind != "sample":
            raise ValueError(f"job_id: {job_id} is a training job, which has no pictures")
        _deliver(client, job, out, shown, as_json, cancels=False)


def _format(out: Path) -> str:
    format = FORMATS.get(out.suffix.lower())
    if format is None:
        raise ValueError(f"out: {out} must end in {', '.join(FORMATS)}")
    if not out.parent.is_dir():
        raise ValueError(f"out: the folder {out.parent} does not exist")
    return format


def _shown(wanted: bool | None, as_json: bool) -> bool:
    return can_show(False if as_json and wanted is None else wanted)


def _labels(classes: list[str] | None) -> int | str | list[int | str] | None:
    """Numbers are indices, everything else is a name."""
    labels: list[int | str] = [int(text) if text.isdigit() else text for text in classes or []]
    return labels[0] if len(labels) == 1 else labels or None


def _deliver(client: Client, job: JobView, out: Path, shown: bool, as_json: bool, cancels: bool = True) -> None:
    """Wait for a job, save its pictures, and show and name them."""
    job = _follow(client, job, cancels)
    paths = _save(client, job, out, _format(out))
    if shown:
        _show(client, job)
    print(job.model_dump_json(indent=2) if as_json else "\n".join(map(str, paths)))


def _follow(client: Client, job: JobView, cancels: bool) -> JobView:
    """Wait for the job with a bar; Ctrl-C cancels it.

    Raises:
        JobEndedBadly: if it fails or is cancelled.
    """
    from server.schemas import JobView
    from server.schemas import Progress as Steps

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task(job.status, total=job.progress.steps_total)

        def tell(state: JobView | TrainView | Steps | TrainProgress) -> None:
            if isinstance(state, JobView):
                place = f", {state.queue_position} before it" if state.queue_position else ""
                bar.update(task, description=f"{state.status}{place}", completed=state.progress.steps_done)
            elif isinstance(state, Steps):
                bar.update(task, description="running", completed=state.steps_done)

        try:
            return client.wait(job, on_progress=tell)
        except KeyboardInterrupt:
            if cancels:
                client.cancel(job.id)
                print(f"guided: cancelled job {job.id}", file=sys.stderr)
            raise


def _save(client: Client, job: JobView, out: Path, format: str) -> list[Path]:
    if format == "npz":
        out.write_bytes(client.samples(job))
        return [out]
    several = job.num_images > 1
    paths = [out.with_stem(f"{out.stem}-{i}") if several else out for i in range(job.num_images)]
    for index, path in enumerate(paths):
        path.write_bytes(client.image(job, index, format))
    return paths


def _show(client: Client, job: JobView, at_most: int = 50) -> None:
    import io

    from PIL import Image

    files = [client.image(job, index, "png") for index in range(min(job.num_images, at_most))]
    show([Image.open(io.BytesIO(file)) for file in files])


def jobs(
    job_id: Annotated[
        str | None, typer.Argument(help="Show this job; default: a list.", autocompletion=completion.jobs)
    ] = None,
    status: Annotated[
        str | None,
        typer.Option(
            help="Only queued, running, finished, failed or cancelled ones.", autocompletion=completion.statuses
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Show a server's jobs."""
    with _connect(url, api_key) as client:
        if job_id is not None:
            job = client.any_job(job_id)
            if as_json:
                print(job.model_dump_json(indent=2))
            else:
                _describe(job)
            return
        listed = client.jobs(status, page=min(limit, 100))  # type: ignore[arg-type]  # the server checks it
        found = [job for job, _ in zip(listed, range(limit), strict=False)]
    if as_json:
        print(json.dumps([job.model_dump(mode="json") for job in found], indent=2))
    else:
        _list(found)


def _list(found: list[JobSummary | TrainView]) -> None:
    whole = {"no_wrap": True, "overflow": "ignore"}  # ids are there to be copied
    first = (Column("id", min_width=32, **whole), Column("status", min_width=9, **whole))  # type: ignore[arg-type]
    table = Table(*first, "model", "done", "error", box=None)
    for job in found:
        table.add_row(*map(escape, _row(job)))
    Console().print(table if found else "No jobs.")


def _row(job: JobSummary | TrainView) -> list[str]:
    error = job.error.message if job.error else ""
    if job.kind == "train":
        return [job.id, job.status, job.publish or f"({job.what})", f"{job.progress.fraction:.0%} trained", error]
    version = f"@{job.version}" if job.version else ""
    return [job.id, job.status, f"{job.model}{version}", f"{job.progress.fraction:.0%} of {job.num_images}", error]


def _describe(job: JobView | TrainView) -> None:
    """One job: what the list says, when, and of what it is made."""
    table = Table("", "", box=None, show_header=False, pad_edge=False)
    _, status, model, done, error = _row(job)
    times = {name: getattr(job, f"{name}_at") for name in ("created", "started", "ended")}
    rows = {"id": job.id, "status": status, "model": model, "done": done, "error": error}
    rows |= {name: f"{time:%Y-%m-%d %H:%M:%S} UTC" for name, time in times.items() if time}
    if job.kind == "train":
        rows |= {"published": ", ".join(job.published), "folder": job.run_dir or ""}
        rows["figures"] = "  ".join(f"{name} {value:.4g}" for name, value in job.progress.figures.items())
    else:
        for stage in job.stages:
            rows[f"stage {stage.model}"] = (
                f"{stage.sampler} {stage.respacing} ({stage.steps} steps), scale {stage.guidance_scale:g}"
            )
        rows["pictures"] = ", ".join(
            f"{image.class_name or image.class_label or ''} (seed {image.seed})".strip() for image in job.images
        )
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(value))
    Console().print(table, highlight=False)


def cancel(
    job_ids: Annotated[
        list[str], typer.Argument(help="Jobs to cancel.", show_default=False, autocompletion=completion.jobs)
    ],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Cancel jobs, queued or running."""
    ended = []
    with _connect(url, api_key) as client:
        for job_id in job_ids:
            job = client.cancel(job_id)
            ended.append(job.model_dump(mode="json"))
            if not as_json:
                print(f"{job.id} {job.status}")
    if as_json:
        print(json.dumps(ended, indent=2))


def served(url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """List the models a server has."""
    with _connect(url, api_key) as client:
        models = client.models()
    if as_json:
        print(json.dumps([model.model_dump(mode="json") for model in models], indent=2))
        return
    table = Table("name", "version", "kind", "size", "classes", "guidance", "steps", "workers", box=None)
    for m in models:
        classes, guidance = str(m.num_classes or "-"), "yes" if m.guidance else "no"
        size, steps = str(m.image_size), f"{m.defaults.sampler} {m.defaults.respacing}"
        table.add_row(m.name, m.version, m.kind, size, classes, guidance, steps, str(m.workers))
    Console().print(table if models else "No models.")
