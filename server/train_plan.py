"""From a training request to a training job: everything checked, paths kept inside the data roots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model_core.bundle import BundleError, Store
from model_core.config import UNetConfig, UpsamplerConfig
from model_core.training.config import KINDS
from model_core.training.sources import expand
from server.problems import ProblemError, invalid
from server.schemas import TrainRequest
from server.settings import ServerSettings
from worker.training import TrainJob

_SERVER_SETS = ("run_dir", "publish", "init")
_TAGS = (UNetConfig.__name__, UpsamplerConfig.__name__)


def plan(request: TrainRequest, settings: ServerSettings, now: float, owner: str | None = None) -> TrainJob:
    """The job of a request; ``owner`` is the name of the key that asks.

    Raises:
        ProblemError: 422 naming the fields at fault, 404 for a model to begin with that is not there.
    """
    config: dict[str, Any] = dict(request.config)
    if mine := [name for name in _SERVER_SETS if name in config]:
        raise invalid((f"config.{name}", "is not set here: see the fields of the request") for name in mine)
    data = config.get("data")
    if isinstance(data, dict):
        if "cache" in data:
            raise invalid([("config.data.cache", "is set by the server")])
        roots = settings.data_roots or (str(settings.data_dir / "datasets"),)
        for field in ("train", "val"):
            if isinstance(data.get(field), str):
                data = data | {field: resolve(data[field], roots, f"config.data.{field}")}
        config["data"] = data
    try:
        checked = KINDS[request.what].model_validate(config | {"run_dir": "run"})
    except ValidationError as error:
        raise invalid(_fields(error)) from None
    if request.publish is None and (request.publish_every or request.publish_defaults):
        raise invalid([("publish", "is needed with publish_every and publish_defaults")])
    _check_models(request, settings)
    return TrainJob(
        id=TrainJob.new_id(),
        created=now,
        what=request.what,
        config=checked.model_dump(mode="json", exclude={"run_dir", "publish", "init"}, exclude_unset=True),
        init=request.init,
        publish=request.publish,
        publish_every=request.publish_every,
        publish_defaults=request.publish_defaults,
        owner=owner,
    )


def _fields(error: ValidationError) -> list[tuple[str, str]]:
    found = []
    for item in error.errors():
        where = ["config", *(str(part) for part in item["loc"] if part not in _TAGS)]
        message = str(item["msg"]).removeprefix("Value error, ")
        field, colon, rest = message.partition(": ")
        if colon and field.replace(".", "_").isidentifier():  # a validator over several fields names the one at fault
            where, message = [*where, field], rest
        found.append((".".join(where), message[:1].lower() + message[1:]))
    return found


def _check_models(request: TrainRequest, settings: ServerSettings) -> None:
    store = Store(settings.models_dir)
    try:
        if request.init:
            store.find(request.init)
    except BundleError as error:
        raise ProblemError(404, f"init: {error}") from None
    if request.what == "classifier" and request.publish and not store.versions(request.publish):
        raise invalid([("publish", f"{request.publish!r} has no diffusion model yet that a classifier could guide")])


def resolve(where: str, roots: tuple[str, ...], field: str) -> str:
    """A data source's full name, if it is below one of the roots.

    Args:
        where: folder or shards, relative to a root that is a folder, or absolute.
        roots: folders and URL prefixes.
        field: for messages.

    Raises:
        ProblemError: 422, if it is not, or the root is here and it is not there.
    """
    return "::".join(_resolve(part, roots, field) for part in where.split("::"))


def _resolve(where: str, roots: tuple[str, ...], field: str) -> str:
    refused = invalid([(field, f"must be below one of the data roots: {', '.join(roots)}")])
    if not where or "\0" in where or ".." in where.replace("\\", "/").replace("{", "/").split("/"):
        raise refused
    if "://" in where:
        if any("://" in root and where.startswith(root.rstrip("/") + "/") for root in roots):
            return where
        raise refused
    try:
        expand(where)
    except ValueError as error:
        raise invalid([(field, str(error).removeprefix("data: "))]) from None
    for root in (Path(root).resolve() for root in roots if "://" not in root):
        path, shards = root / where, ".tar" in where
        names = expand(str(path)) if shards else [str(path)]
        try:
            inside = all(Path(name).resolve().is_relative_to(root) for name in names)  # links lead out, too
            if inside and (shards or path.is_dir() or not root.is_dir()):
                return str(path)
        except (OSError, ValueError):  # no name for a file
            raise refused from None
    raise invalid([(field, f"there is no folder {where[:200]!r} below the data roots: {', '.join(roots)}")])
