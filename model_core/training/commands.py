"""The verb ``guided train``. Torch is imported when it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from model_core.training.config import TrainingConfig

LOG = "log.jsonl"
STOPPED = 3
"""Exit code of a run that a signal stopped; the same command goes on."""
SHUTDOWN_S = 600
"""Time torchrun gives the processes of a stopped run to save its state: they may be in the middle of a sample grid."""


def train(
    what: Annotated[
        Literal["diffusion", "classifier", "upsampler"], typer.Argument(help="What to train.", show_default=False)
    ],
    config: Annotated[Path, typer.Option(help="TOML or JSON file.", show_default=False)],
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a field: optimizer.lr=2e-4.")
    ] = None,
    publish: Annotated[str | None, typer.Option(help="Model to publish new versions of.")] = None,
    publish_every: Annotated[int | None, typer.Option(min=1, help="Steps between publications.")] = None,
    models_dir: Annotated[
        Path | None, typer.Option("--models-dir", envvar="GUIDED_MODELS_DIR", help="Folder of published models.")
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine that share each batch.")] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what came of it as JSON at the end; all else goes to stderr.")
    ] = False,
) -> None:
    """Train a model, or go on training it.

    Ctrl-C and SIGTERM save a state and end with exit code 3; the same command goes on from there.
    """
    from model_core.training.config import KINDS, load_config

    overrides = list(override or ())
    given = {"publish.model": publish, "publish.every": publish_every}
    overrides += [f"{key}={value}" for key, value in given.items() if value is not None]
    loaded = load_config(KINDS[what], config, overrides)
    if loaded.publish and models_dir and "models_dir" not in loaded.publish.model_fields_set:
        loaded = loaded.model_copy(update={"publish": loaded.publish.model_copy(update={"models_dir": models_dir})})
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        code = _run(loaded, processes, as_json)
    if as_json and "WORLD_SIZE" not in os.environ:
        print(json.dumps(summary(loaded.run_dir), indent=2))
    if code:
        sys.exit(code)


def _run(config: TrainingConfig, processes: int, quiet: bool) -> int:
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        return _torchrun(processes, sys.argv[1:], config.run_dir / LOG, quiet)
    from model_core.training.run import run

    return 0 if run(config) else STOPPED


def summary(run_dir: Path) -> dict[str, Any]:
    """What came of a run, from its log: the last step, whether that was all, and what it published."""
    log = run_dir / LOG
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    published = [line["model"] for line in lines if line["kind"] == "published"]
    figures: dict[str, Any] = next((line for line in reversed(lines) if line["kind"] == "train"), {})
    return {
        "run_dir": str(run_dir),
        "step": lines[-1]["step"] if lines else 0,
        "complete": last_end(log) is True,
        "published": published,
        "figures": {name: value for name, value in figures.items() if name not in ("kind", "step", "time")},
    }


def torchrun_command(processes: int, arguments: list[str]) -> list[str]:
    """Command that runs ``guided`` with some arguments in several processes of this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*torchrun, "-m", "clients", *arguments]


def _torchrun(processes: int, arguments: list[str], log: Path, quiet: bool) -> int:
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    environment = {"OMP_NUM_THREADS": threads, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_S), **os.environ}
    began = time.time()
    child = subprocess.Popen(
        torchrun_command(processes, arguments), env=environment, stdout=sys.stderr if quiet else None
    )

    def forward(number: int, frame: FrameType | None) -> Any:
        child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    # torchrun has codes of its own; whether the run is complete, stopped or broken is in its log.
    code, ended = child.wait(), last_end(log, began)
    if ended is None:
        return code or 1
    return 0 if ended else STOPPED


def last_end(log: Path, since: float = 0.0) -> bool | None:
    """Whether a run's last process ended with the run complete; ``None`` if it broke off.

    Args:
        log: of the run.
        since: when that process was started, Unix s: what an earlier one said does not count.
    """
    lines = log.read_text().splitlines() if log.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    ended = last.get("kind") == "end" and last["time"] >= since
    return bool(last["complete"]) if ended else None
