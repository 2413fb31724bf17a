"""The verbs ``guided up``, ``demo``, ``server``, ``worker`` and ``config``."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

RedisUrl = Annotated[str | None, typer.Option(help="Redis or Valkey; 'up' and 'demo' bring their own without one.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder for results and the embedded Valkey's data.")]
ModelsDir = Annotated[Path | None, typer.Option("--models-dir", help="Folder of published models.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on.")]
Port = Annotated[int | None, typer.Option(help="Port to listen on; 0: any free.")]
Workers = Annotated[int, typer.Option(min=1, help="Worker processes.")]
TrainingWorkers = Annotated[int, typer.Option(min=0, help="Worker processes that take training jobs.")]


def _given(**options: Any) -> dict[str, Any]:
    """Options that were given: they go before environment and file."""
    return {name: value for name, value in options.items() if value is not None}


def _log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    for noisy in ("httpx", "rq.worker", "asyncio", "stamina"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def up(
    workers: Workers = 1,
    training_workers: TrainingWorkers = 1,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
    models_dir: ModelsDir = None,
    host: Host = None,
    port: Port = None,
) -> None:
    """Run everything on this machine: Valkey, the API and workers."""
    with _group(workers, training_workers, redis_url, data_dir, models_dir, host, port) as group:
        print(f"API at {group.url} (documentation at {group.url}/docs); Ctrl-C stops", flush=True)
        group.wait()


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture.")] = Path("demo.png"),
    exit_after: Annotated[bool, typer.Option("--exit", help="Stop after the picture.")] = False,
    model: Annotated[str, typer.Option(help="Model to show.")] = "emoji32",
    workers: Workers = 1,
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
    models_dir: ModelsDir = None,
    host: Host = None,
    port: Port = None,
) -> None:
    """As 'up', then make a grid of all classes at three guidance scales through the API, and go on serving."""
    from clients.demo import make_grid

    with _group(workers, 0, redis_url, data_dir, models_dir, host, port) as group:
        make_grid(group.url, model, out)
        if not exit_after:
            print(f"API at {group.url} (documentation at {group.url}/docs); Ctrl-C stops", flush=True)
            group.wait()


def _group(
    workers: int,
    training_workers: int,
    redis_url: str | None,
    data_dir: Path | None,
    models_dir: Path | None,
    host: str | None,
    port: int | None,
) -> Any:
    from server.settings import ServerSettings
    from server.up import Group
    from worker.settings import WorkerSettings

    _log()
    common = _given(redis_url=redis_url, data_dir=data_dir, models_dir=models_dir)
    return Group(
        ServerSettings(**common, **_given(host=host, port=port)), WorkerSettings(**common), workers, training_workers
    )


def server(
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
    models_dir: ModelsDir = None,
    host: Host = None,
    port: Port = None,
) -> None:
    """Run the HTTP API alone."""
    import uvicorn

    from server.app import create_app
    from server.limits import MAX_HEAD
    from server.settings import ServerSettings

    _log()
    given = _given(redis_url=redis_url, data_dir=data_dir, models_dir=models_dir, host=host, port=port)
    settings = ServerSettings(**given)
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_keep_alive=75,  # as proxies and clients expect; short ones close under a client's next request
        timeout_graceful_shutdown=5,
        http="h11",
        h11_max_incomplete_event_size=MAX_HEAD,
        server_header=False,
    )


def worker(
    redis_url: RedisUrl = None,
    data_dir: DataDir = None,
    models_dir: ModelsDir = None,
    models: Annotated[list[str] | None, typer.Option("--model", help="Model to serve; may be repeated.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, float16 or bfloat16.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    queues: Annotated[
        Literal["sampling", "training"], typer.Option(help="Which jobs to take: pictures, or training runs.")
    ] = "sampling",
) -> None:
    """Run one worker."""
    from worker.settings import WorkerSettings

    _log()
    given = _given(redis_url=redis_url, data_dir=data_dir, models_dir=models_dir, device=device, dtype=dtype)
    settings = WorkerSettings(**given, **_given(threads=threads, models=tuple(models) if models else None))
    if settings.threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))  # before torch is imported
    if queues == "training":
        from worker.training_worker import run_training_worker

        run_training_worker(settings)
    else:
        from worker.process import run_worker

        run_worker(settings)


def config(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Print all settings: value, environment variable, meaning."""
    import json

    from server.settings import ServerSettings
    from worker.settings import CommonSettings, WorkerSettings, config_file, unknown_keys

    found = {
        "both": CommonSettings(),
        "server": ServerSettings(),
        "worker": WorkerSettings(),
    }
    unknown = unknown_keys(*(type(settings) for settings in found.values()))
    if unknown:
        raise ValueError(f"{config_file()}: unknown settings: {', '.join(unknown)}")
    rows = []
    for part, settings in found.items():
        for name, info in type(settings).model_fields.items():
            if part == "both" or name not in CommonSettings.model_fields:
                value = _shown(name, settings.model_dump(mode="json")[name])
                rows.append({"of": part, "name": name, "value": value, "meaning": info.description})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print(f"# {config_file()}{'' if config_file().exists() else ' (not there)'}; environment variables go before it")
    for row in rows:
        print(f"\n# {row['of']}: {row['meaning']}  [GUIDED_{str(row['name']).upper()}]")
        print(f"{row['name']} = {json.dumps(row['value'])}")


def _shown(name: str, value: Any) -> Any:
    """A setting as it may be printed: without the password in a URL."""
    if name == "redis_url" and isinstance(value, str):
        from worker.settings import without_password

        return without_password(value)
    return value
