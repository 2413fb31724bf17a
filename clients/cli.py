"""The ``guided`` command. Verbs that need torch import it when they run."""

from __future__ import annotations

import sys

import typer
from pydantic import ValidationError

from clients.commands import cancel, generate, jobs, served
from model_core.commands import models_app, sample
from model_core.config import explain
from model_core.evaluation.commands import evaluate_app
from model_core.training.commands import train
from server.commands import config, demo, server, up, worker
from server.key_commands import keys_app

app = typer.Typer(
    name="guided",
    help="Classifier-guided diffusion: serve, sample, and manage models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(models_app, name="models")
app.add_typer(evaluate_app, name="evaluate")
app.add_typer(keys_app, name="keys")
models_app.command()(served)
for verb in (up, demo, generate, jobs, cancel, server, worker, config, sample, train):
    app.command()(verb)


OPTIONAL = (
    "torch",
    "safetensors",
    "numpy",
    "PIL",
    "fastapi",
    "uvicorn",
    "redis",
    "rq",
    "fsspec",
    "pydantic_settings",
    "limits",
    "itsdangerous",
    "fastapi_offline",
    "standardwebhooks",
    "tensorboard",
)
"""Packages that come with the extras only."""


def main() -> None:
    """Run the command; expected errors print one line and exit with 2."""
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        sys.exit(f"guided: {error.name} is not installed; this verb needs: pip install 'guided-sampling-server[all]'")
    except ValidationError as error:
        print(f"guided: {explain(error)}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"guided: {error}", file=sys.stderr)
        sys.exit(2)
