"""Shell completion from the models folder. No torch: a shell waits for it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import typer

from model_core.presets import PRESETS

MODELS_DIR = Path("models")


def models(context: typer.Context, incomplete: str) -> list[str]:
    """Models on disk; after an @, their versions."""
    from model_core.bundle import Store

    store = Store(folder(context))
    name, at, _ = incomplete.partition("@")
    if at:
        found = [f"{name}@{version}" for version in reversed(store.versions(name))] if name in store.names() else []
    else:
        found = store.names()
    return beginning(incomplete, found)


def class_list(context: typer.Context, incomplete: str) -> list[str]:
    """Classes of the model named before, for a list with commas."""
    before, comma, last = incomplete.rpartition(",")
    # An option that waits for its value leaves the arguments before it unread.
    names = class_names(context, str(context.params.get("model") or next(iter(context.args), "")))
    if not comma:
        names = ("all", "random", *names)
    return [f"{before}{comma}{name}" for name in beginning(last, names)]


def class_names(context: typer.Context, reference: str) -> tuple[str, ...]:
    """Names of a model's classes; none if there is no such model."""
    from model_core.bundle import BundleError, Store, open_bundle

    try:
        bundle = open_bundle(Path(reference)) if "/" in reference else Store(folder(context)).find(reference)
    except (BundleError, OSError):
        return ()
    return bundle.config.class_names or ()


def folder(context: typer.Context) -> Path:
    """The models folder that the option, the environment or the default names."""
    return Path(context.params.get("models_dir") or os.environ.get("GUIDED_MODELS_DIR") or MODELS_DIR)


def samplers(incomplete: str) -> list[str]:
    """Samplers by name."""
    from model_core.config import SamplerName

    return beginning(incomplete, get_args(SamplerName))


def presets(incomplete: str) -> list[str]:
    """Published checkpoints."""
    return beginning(incomplete, PRESETS)


def dtypes(incomplete: str) -> list[str]:
    """Types by name."""
    return beginning(incomplete, ("float32", "float16", "bfloat16"))


def beginning(incomplete: str, words: Iterable[str]) -> list[str]:
    """The words that begin so, upper and lower case alike."""
    return [word for word in words if word.lower().startswith(incomplete.lower())]
