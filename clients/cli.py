"""The ``guided`` command. Verbs import what is heavy (torch, FastAPI, HTTP) when they run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from clients.commands import cancel, fetch, generate, jobs, served
from clients.exits import report
from model_core.commands import models_app, sample
from model_core.evaluation.commands import evaluate_app
from model_core.training.commands import train
from server.commands import config, demo, server, up, worker

SERVE, PICTURES, OPERATE, TRAIN, MODELS = "Serve", "Make pictures", "Operate", "Train and evaluate", "Models"
CODES = (
    "Exit codes: 0 done, 1 failed, 2 bad input, 3 training stopped and saved, 4 refused by the server, "
    "5 nobody answers, 130 interrupted. GUIDED_DEBUG=1 shows where an error came from."
)


def _epilog(*examples: str) -> str:
    """Examples below a verb's options, each on a line of its own."""
    return "\n".join(("Examples:", *(f"  {example}" for example in examples)))


app = typer.Typer(
    name="guided",
    help="Classifier-guided diffusion: serve it, make pictures, train it.",
    epilog=_epilog("guided up", "guided generate --class heart --scale 4 --out heart.png", "guided jobs")
    + f"\n\n{CODES}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"guided-sampling-server {version('guided-sampling-server')}")
        raise typer.Exit


@app.callback()
def _guided(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


VERBS: tuple[tuple[str, Callable[..., None], tuple[str, ...]], ...] = (
    (SERVE, up, ("guided up", "guided up --port 8080 --workers 2 --training-workers 0")),
    (SERVE, demo, ("guided demo", "guided demo --exit --out grid.png")),
    (SERVE, server, ("guided server --redis-url redis://queue.example:6379/0 --host 0.0.0.0",)),
    (
        SERVE,
        worker,
        (
            "guided worker --redis-url redis://queue.example:6379/0",
            "guided worker --redis-url redis://queue.example:6379/0 --queues training",
        ),
    ),
    (
        PICTURES,
        generate,
        (
            "guided generate --class heart --scale 4 --seed 7 --out heart.png",
            "guided generate --class clock --class flag --num 8 --steps 50 --out pictures.npz",
            "guided generate --class face --detach",
        ),
    ),
    (PICTURES, fetch, ("guided fetch $(guided generate --class face --detach) --out face.png",)),
    (
        PICTURES,
        sample,
        (
            "guided sample emoji32 --classes all --scale 4 --out grid.png",
            "guided sample emoji32@2 --classes heart,clock --num 64 --steps 50 --out samples.npz",
        ),
    ),
    (OPERATE, jobs, ("guided jobs --status running", "guided jobs --json | jq .[].id")),
    (OPERATE, cancel, ("guided cancel 0f3a5c...",)),
    (OPERATE, config, ("guided config", "GUIDED_PORT=8080 guided config --json")),
    (
        TRAIN,
        train,
        (
            "guided train diffusion --config examples/emoji/diffusion.toml",
            "guided train classifier --config run.toml --set optimizer.lr=2e-4 --publish mine",
        ),
    ),
)

for panel, verb, examples in VERBS:
    app.command(rich_help_panel=panel, epilog=_epilog(*examples))(verb)
models_app.command(epilog=_epilog("guided models served", "guided models served --json"))(served)
app.add_typer(evaluate_app, name="evaluate", rich_help_panel=TRAIN)
app.add_typer(models_app, name="models", rich_help_panel=MODELS)


def main() -> None:
    """Run the command; an error is one line and an exit code (:class:`clients.exits.ExitCode`)."""
    logging.getLogger("stamina").setLevel(logging.ERROR)  # it would tell of every time a call is tried again
    try:
        code = app(prog_name="guided", standalone_mode=False)
    except Exception as error:
        code = report(error)
    sys.exit(code or 0)
