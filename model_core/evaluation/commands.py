"""The verbs ``guided evaluate ...``. Torch is imported when one runs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from model_core.commands import AsJson, ModelsDir, Reference, open_reference
from model_core.completion import MODELS_DIR

evaluate_app = typer.Typer(help="Measure models.", no_args_is_help=True)


@evaluate_app.callback()
def _verbs() -> None:
    """Measure models."""


@evaluate_app.command(epilog="Examples:\n  guided evaluate nll emoji32 --data data/val --num 64")
def nll(
    model: Reference,
    data: Annotated[
        Path,
        typer.Option(help="Folder of pictures; of class folders for class-conditional models.", show_default=False),
    ],
    num: Annotated[int | None, typer.Option(min=1, help="Pictures to measure; default: all.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 16,
    respacing: Annotated[str, typer.Option(help="Measure this respaced process; default: every step.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    models_dir: ModelsDir = MODELS_DIR,
    as_json: AsJson = False,
) -> None:
    """Bits per dimension of a folder of pictures (the variational bound); lower is better."""
    from model_core.evaluation.nll import evaluate

    bundle = open_reference(model, models_dir)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("pictures")
        found = evaluate(
            bundle,
            data,
            num=num,
            batch_size=batch,
            respacing=respacing,
            seed=seed,
            device=device,
            on_batch=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for name in found.skipped:
        print(f"skipped {name}", file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    print(f"{found.bits_per_dim:.4f} bits per dimension (standard error {found.standard_error:.4f})")
    print(f"{found.pictures} pictures; prior {found.prior:.2e}, last step {found.decoder:.4f}")
