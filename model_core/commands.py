"""The verbs ``guided models ...`` and ``guided sample``. Torch is imported when one runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from model_core.bundle import Bundle, Store

models_app = typer.Typer(help="Models on disk: import, list, show, verify, publish.", no_args_is_help=True)

ModelsDir = Annotated[
    Path, typer.Option("--models-dir", envvar="GUIDED_MODELS_DIR", help="Folder of published models.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Reference = Annotated[str, typer.Argument(help="A model: NAME, NAME@VERSION, or the path of a bundle.")]

MODELS_DIR = Path("models")
DTYPE_HELP = "float32, float16 or bfloat16"


def open_reference(reference: str, models_dir: Path) -> Bundle:
    """Open a bundle by name, name@version or path (a path has a separator in it).

    Raises:
        BundleError: if there is none.
    """
    from model_core.bundle import Store, open_bundle

    if "/" in reference:
        return open_bundle(Path(reference))
    return Store(models_dir).find(reference)


def _store(models_dir: Path) -> Store:
    from model_core.bundle import Store

    return Store(models_dir)


@models_app.command("list")
def list_models(models_dir: ModelsDir = MODELS_DIR, as_json: AsJson = False) -> None:
    """List published models and their versions."""
    store = _store(models_dir)
    rows: list[dict[str, Any]] = []
    for name in store.names():
        bundle = store.find(name)
        rows.append(
            {
                "name": name,
                "latest": bundle.version,
                "versions": store.versions(name),
                "kind": bundle.config.kind,
                "image_size": bundle.config.unet.image_size,
                "num_classes": bundle.config.num_classes,
                "classifier": bundle.config.classifier is not None,
            }
        )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("name", "latest", "versions", "kind", "size", "classes", "classifier")
    for row in rows:
        cells = [row["name"], row["latest"], ", ".join(row["versions"]), row["kind"], row["image_size"]]
        table.add_row(*map(str, cells), str(row["num_classes"] or "-"), "yes" if row["classifier"] else "no")
    Console().print(table if rows else f"No models in {models_dir}.")


@models_app.command()
def show(model: Reference, models_dir: ModelsDir = MODELS_DIR) -> None:
    """Print a model's configuration as JSON."""
    bundle = open_reference(model, models_dir)
    shown = {"name": bundle.name, "version": bundle.version, "path": str(bundle.path)}
    print(json.dumps({**shown, **bundle.config.model_dump(mode="json")}, indent=2))


@models_app.command()
def verify(model: Reference, models_dir: ModelsDir = MODELS_DIR) -> None:
    """Check a model's files: hashes, and that every weight fits the configured networks."""
    from model_core.weights import verify as verify_bundle

    bundle = open_reference(model, models_dir)
    verify_bundle(bundle)
    print(f"{bundle.path}: whole")


@models_app.command()
def publish(
    source: Annotated[Path, typer.Argument(help="Folder of a bundle, from training or another machine.")],
    name: Annotated[str, typer.Argument(help="Model to publish it as.")],
    models_dir: ModelsDir = MODELS_DIR,
) -> None:
    """Check a bundle and publish it as the newest version of a model."""
    import shutil

    from model_core.bundle import open_bundle
    from model_core.weights import verify as verify_bundle

    verify_bundle(open_bundle(source))
    store = _store(models_dir)
    with store.staging(name) as staged:
        for path in source.iterdir():
            if path.is_file():
                shutil.copy2(path, staged)
        bundle = store.publish(name, staged)
    print(f"published {bundle.name}@{bundle.version}")


@models_app.command()
def rollback(
    name: Annotated[str, typer.Argument(help="A model.")],
    to: Annotated[str | None, typer.Option(help="Version; default: the one before the latest.")] = None,
    models_dir: ModelsDir = MODELS_DIR,
) -> None:
    """Make an earlier version the latest again; running workers go back to it."""
    was, now = _store(models_dir).rollback(name, to)
    print(f"{name}: version {now} is the latest now (was {was})")


@models_app.command("import")
def import_model(
    name: Annotated[str, typer.Argument(help="Model to publish.")],
    unet: Annotated[Path, typer.Option(help="Published .pt file of the diffusion model or upsampler.")],
    preset: Annotated[str | None, typer.Option(help="What it is, such as 64x64_diffusion; default: its name.")] = None,
    flags: Annotated[str | None, typer.Option(help="... or the published flag string it was trained with.")] = None,
    classifier: Annotated[Path | None, typer.Option(help="Published .pt file of the noisy classifier.")] = None,
    classifier_preset: Annotated[str | None, typer.Option(help="What it is, such as 64x64_classifier.")] = None,
    classifier_flags: Annotated[str | None, typer.Option(help="... or its flag string.")] = None,
    class_names: Annotated[Path | None, typer.Option(help="Text file, one class name per line.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Store weights as {DTYPE_HELP}; default: as they are.")] = None,
    models_dir: ModelsDir = MODELS_DIR,
) -> None:
    """Turn published checkpoints into a model."""
    from model_core.importing import DTYPES, Checkpoint, import_checkpoints

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {DTYPE_HELP}")
    if classifier is None and (classifier_preset or classifier_flags):
        raise ValueError("classifier: its preset or flags were given, but no file")
    bundle = import_checkpoints(
        _store(models_dir),
        name,
        Checkpoint(unet, preset, flags),
        Checkpoint(classifier, classifier_preset, classifier_flags) if classifier else None,
        class_names=class_names.read_text().splitlines() if class_names else None,
        dtype=dtype,
    )
    print(f"published {bundle.name}@{bundle.version}")


def sample(
    model: Reference,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG grid, or .npz in the published layout.")] = Path(
        "samples.png"
    ),
    classes: Annotated[
        str, typer.Option(help="'cat,7,0-9' (names, indices, ranges), 'all', or 'random'; repeated to fill --num.")
    ] = "random",
    num: Annotated[int | None, typer.Option(min=1, help="Pictures; default: one per class, or 4.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps; default: the model's.")] = None,
    respacing: Annotated[str | None, typer.Option(help="'90,60,60,20,20' or 'ddim25', instead of --steps.")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddpm, ddim or dpmpp_2m; default: the model's.")] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM noise, 0 to 1.")] = None,
    scale: Annotated[float | None, typer.Option(help="Guidance scale; 0 turns the classifier off.")] = None,
    guidance_interval: Annotated[
        tuple[int, int] | None, typer.Option(help="Guide only at timesteps from LOW to HIGH.")
    ] = None,
    guidance_every: Annotated[
        int, typer.Option(min=1, help="Compute the classifier's gradient at every so many guided steps.")
    ] = 1,
    clip: Annotated[bool | None, typer.Option("--clip/--no-clip", help="Clip predicted x_0 to [-1, 1].")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture; picture i has seed + i.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per forward pass.")] = 8,
    upsample: Annotated[str | None, typer.Option(help="Upsampler to run on the pictures.")] = None,
    upsample_respacing: Annotated[str | None, typer.Option(help="Its steps; default: the upsampler's.")] = None,
    input_file: Annotated[
        Path | None, typer.Option("--input", help="With an upsampler as MODEL: .npz or PNG to upsample.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Convolutions in {DTYPE_HELP}.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    models_dir: ModelsDir = MODELS_DIR,
) -> None:
    """Sample a model here, without a server."""
    from model_core.runs import SampleOptions, run

    if steps is not None and respacing is not None:
        raise ValueError("steps: give --steps or --respacing, not both")
    options = SampleOptions(
        classes=classes,
        num=num,
        steps=steps,
        respacing=respacing,
        sampler=sampler,
        eta=eta,
        guidance_scale=scale,
        guidance_interval=guidance_interval,
        guidance_every=guidance_every,
        clip_denoised=clip,
        seed=seed,
        batch_size=batch_size,
        upsample_respacing=upsample_respacing,
        dtype=dtype,
        device=device,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        upsampler = open_reference(upsample, models_dir) if upsample else None
        run(open_reference(model, models_dir), options, out, upsampler=upsampler, source=input_file, bar=bar)
    print(out)
