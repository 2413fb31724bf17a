"""A model on disk: ``models/<name>/<version>/`` with ``config.json``, safetensors weights and a model card.

Versions never change. Publishing writes beside, syncs and renames, then moves the ``latest`` file, so
a reader sees a whole version or none. Weights are read through safetensors, which cannot hold code.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, JsonValue, Tag, ValidationError, model_validator

from model_core.config import (
    ClassifierConfig,
    DiffusionConfig,
    FrozenModel,
    SamplerName,
    UNetConfig,
    UpsamplerConfig,
    check_variance,
    explain,
)
from model_core.schedule import respaced_timesteps

Part = Literal["unet", "classifier"]
CONFIG, LATEST, CARD, EXAMPLES = "config.json", "latest", "README.md", "examples.png"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class BundleError(ValueError):
    """A bundle or checkpoint that cannot be used; the message names the file and what is wrong."""


class SamplingDefaults(FrozenModel):
    """How a model is sampled when a request does not say."""

    sampler: SamplerName = "ddpm"
    respacing: str = "250"
    eta: float = Field(default=0.0, ge=0.0, le=1.0)
    guidance_scale: float = Field(default=0.0, allow_inf_nan=False)
    clip_denoised: bool = True


class WeightsRecord(FrozenModel):
    """What ``verify`` checks a weights file against."""

    sha256: str
    bytes: int


def _network_kind(value: Any) -> str:
    """Tag of the network a configuration is for: upsamplers say their low-resolution size."""
    upsampler = "low_res_size" in value if isinstance(value, dict) else isinstance(value, UpsamplerConfig)
    return UpsamplerConfig.__name__ if upsampler else UNetConfig.__name__


AnyUNetConfig = Annotated[
    Annotated[UpsamplerConfig, Tag(UpsamplerConfig.__name__)] | Annotated[UNetConfig, Tag(UNetConfig.__name__)],
    Discriminator(_network_kind),
]


class BundleConfig(FrozenModel):
    """Contents of ``config.json``: everything about a model but its weights."""

    format: Literal[1] = 1
    unet: AnyUNetConfig
    classifier: ClassifierConfig | None = None
    diffusion: DiffusionConfig
    class_names: tuple[str, ...] | None = None
    defaults: SamplingDefaults = SamplingDefaults()
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    weights: dict[Part, WeightsRecord] = Field(default_factory=dict)

    @property
    def kind(self) -> Literal["diffusion", "upsampler"]:
        """Whether pictures start from noise alone or from smaller pictures."""
        return "upsampler" if isinstance(self.unet, UpsamplerConfig) else "diffusion"

    @property
    def num_classes(self) -> int | None:
        """Classes a label may name, if the model knows any."""
        if self.unet.num_classes is not None:
            return self.unet.num_classes
        return self.classifier.num_classes if self.classifier else None

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        check_variance(self.unet, self.diffusion)
        if self.classifier:
            for field in ("image_size", "in_channels"):
                mine, other = getattr(self.classifier, field), getattr(self.unet, field)
                if mine != other:
                    raise ValueError(f"classifier.{field}: {mine} differs from the UNet's {other}")
            if self.unet.num_classes not in (None, self.classifier.num_classes):
                raise ValueError(
                    f"classifier.out_channels: {self.classifier.num_classes} classes, "
                    f"but the UNet has {self.unet.num_classes}"
                )
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names: {len(self.class_names)} names for {self.num_classes} classes")
        if self.defaults.guidance_scale and not self.classifier:
            raise ValueError("defaults.guidance_scale: a model without a classifier cannot be guided, so only 0 fits")
        try:
            respaced_timesteps(self.diffusion.diffusion_steps, self.defaults.respacing)
        except ValueError as error:
            raise ValueError(f"defaults.{error}") from None
        return self


@dataclass(frozen=True)
class Bundle:
    """A bundle's place and configuration; weights are read by :func:`model_core.weights.load`."""

    path: Path
    config: BundleConfig

    @property
    def parts(self) -> tuple[Part, ...]:
        """Networks this bundle holds."""
        return ("unet", "classifier") if self.config.classifier else ("unet",)

    def weights_path(self, part: Part) -> Path:
        """File of a network's weights."""
        return self.path / f"{part}.safetensors"

    def digest(self, part: Part) -> str:
        """Names the contents of a network's weights: their recorded hash, or where and when they were written."""
        if record := self.config.weights.get(part):
            return record.sha256
        path = self.weights_path(part).resolve()
        return f"{path} {path.stat().st_mtime_ns}"

    @property
    def examples(self) -> Path:
        """A picture with an example of each class, row by row; it may be absent."""
        return self.path / EXAMPLES

    @property
    def name(self) -> str:
        """Model name, from the folder."""
        return self.path.parent.name

    @property
    def version(self) -> str:
        """Version, from the folder."""
        return self.path.name


def open_bundle(path: Path) -> Bundle:
    """Read a bundle's configuration.

    Raises:
        BundleError: if it is missing or wrong; the message names the field.
    """
    file = path / CONFIG
    try:
        config = BundleConfig.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise BundleError(f"{path}: not a bundle (no {CONFIG})") from None
    except OSError as error:
        raise BundleError(f"{file}: {error.strerror}") from None
    except ValidationError as error:
        raise BundleError(f"{file}: {explain(error)}") from None
    bundle = Bundle(path, config)
    for part in bundle.parts:
        if not bundle.weights_path(part).is_file():
            raise BundleError(f"{path}: {part}.safetensors is missing")
    return bundle


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """The models folder: names, versions, and which one is the latest.

    Args:
        root: the folder; it need not exist before the first publication.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Published models, in order."""
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if _NAME.fullmatch(p.name) and self._versions(p))

    def versions(self, name: str) -> list[str]:
        """Versions of a model, oldest first."""
        return self._versions(self.root / check_name(name))

    @staticmethod
    def _versions(folder: Path) -> list[str]:
        if not folder.is_dir():
            return []
        return sorted((p.name for p in folder.iterdir() if _VERSION.fullmatch(p.name) and p.is_dir()), key=int)

    def latest(self, name: str) -> str:
        """The version that ``name`` alone means.

        Raises:
            BundleError: if there is no such model.
        """
        versions = self.versions(name)
        try:
            version = (self.root / name / LATEST).read_text().strip()
        except FileNotFoundError:
            version = versions[-1] if versions else ""
        if version not in versions:
            known = ", ".join(self.names()) or "none"
            raise BundleError(f"model {name!r}: not found in {self.root} (there: {known})")
        return version

    def find(self, reference: str) -> Bundle:
        """Open ``name`` or ``name@version``.

        Raises:
            BundleError: if there is no such model or version, or it is damaged.
        """
        name, _, version = reference.partition("@")
        check_name(name)
        if "@" not in reference:
            version = self.latest(name)
        elif version not in self.versions(name):
            known = ", ".join(self.versions(name)) or "none"
            raise BundleError(f"model {name!r}: no version {version!r} (there: {known})")
        return open_bundle(self.root / name / version)

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """A folder beside the versions to write a new one into; removed unless :meth:`publish` took it."""
        folder = self.root / check_name(name)
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f".staging-{uuid.uuid4().hex}"
        staged.mkdir()
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            for empty in (folder, self.root):
                try:
                    empty.rmdir()  # nothing was published: leave nothing behind
                except OSError:
                    break

    def publish(self, name: str, staged: Path) -> Bundle:
        """Make a complete bundle folder, on the same file system, the newest version of ``name``.

        Raises:
            BundleError: if the folder is not a complete bundle.
        """
        open_bundle(staged)
        for path in staged.iterdir():
            path.chmod(0o644)  # workers may run as someone else; safetensors writes for its user alone
            sync(path)
        sync(staged)
        folder = self.root / check_name(name)
        with exclusive(folder):  # else ``latest`` could end on the older of two versions published at once
            version = str(int((self.versions(name) or ["0"])[-1]) + 1)
            staged.rename(folder / version)
            sync(folder)
            self.set_latest(name, version)
        return open_bundle(folder / version)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other publishers of this folder waiting, for who reads the newest version to make the next."""
        self.root.mkdir(parents=True, exist_ok=True)
        with exclusive(self.root):
            yield

    def rollback(self, name: str, version: str | None = None) -> tuple[str, str]:
        """Move ``latest`` back to an earlier version; the newer ones stay.

        Args:
            name: of the model.
            version: to go back to; default: the one before the latest.

        Returns:
            The version that was the latest, and the one that is now.

        Raises:
            BundleError: if there is no such model or version, or none before.
        """
        with self.lock():
            was = self.latest(name)
            earlier = [v for v in self.versions(name) if int(v) < int(was)]
            if version is None and not earlier:
                raise BundleError(f"model {name!r}: there is no version before {was}")
            now = version or earlier[-1]
            self.set_latest(name, now)
        return was, now

    def set_latest(self, name: str, version: str) -> None:
        """Move ``latest``, atomically.

        Raises:
            BundleError: if there is no such version.
        """
        if version not in self.versions(name):
            raise BundleError(f"model {name!r}: no version {version!r}")
        folder = self.root / name
        with atomic(folder / LATEST) as temporary:
            temporary.write_text(version + "\n")
            sync(temporary)
        sync(folder)


def check_name(name: str) -> str:
    """The name itself, if it can be a model's (and so is safe in a path).

    Raises:
        BundleError: otherwise.
    """
    if not _NAME.fullmatch(name):
        raise BundleError(
            f"model name {name[:80]!r}: use 1 to 64 lower-case letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit"
        )
    return name


def write_config(path: Path, config: BundleConfig) -> BundleConfig:
    """Write ``config.json`` beside the weights already in ``path``, recording their hashes."""
    parts: Mapping[Part, Path] = {p: path / f"{p}.safetensors" for p in Bundle(path, config).parts}
    records = {part: WeightsRecord(sha256=sha256(f), bytes=f.stat().st_size) for part, f in parts.items()}
    config = config.model_copy(update={"weights": records})
    (path / CONFIG).write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    return config


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock of a file or folder that exists, once no other process does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which then takes its place: readers see the whole or nothing."""
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have a file's contents, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
