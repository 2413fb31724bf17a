"""Settings of the queue and the workers: environment variables (``GUIDED_...``) and a TOML file."""

from __future__ import annotations

import base64
import os
import re
import tomllib
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from worker.scheduler import PolicyName

CONFIG_VARIABLE = "GUIDED_CONFIG"
CONFIG_FILE = "guided.toml"


def config_file() -> Path:
    """The settings file: named by ``GUIDED_CONFIG``, else ``guided.toml`` here."""
    return Path(os.environ.get(CONFIG_VARIABLE, CONFIG_FILE))


class CommonSettings(BaseSettings):
    """What server and workers must agree on."""

    model_config = SettingsConfigDict(env_prefix="GUIDED_", extra="ignore", frozen=True)

    redis_url: str | None = Field(
        default=None, description="Redis or Valkey, such as redis://:password@host:6379/0 or rediss://... for TLS."
    )
    data_dir: Path = Field(default=Path(".guided"), description="Folder for results and the embedded Valkey's data.")
    models_dir: Path = Field(default=Path("models"), description="Folder of published models.")
    artifacts_url: str | None = Field(
        default=None,
        description="Where pictures go: a folder or an fsspec URL such as s3://bucket/path; default: in data_dir.",
    )
    result_ttl_s: int = Field(
        default=86_400, ge=1, description="Seconds for which finished jobs and pictures are kept."
    )
    webhook_hosts: tuple[str, ...] = Field(
        default=(), description="Hosts webhooks may go to, as a JSON list; default: none."
    )
    webhook_private: bool = Field(
        default=False, description="Whether those hosts may be at loopback, private or link-local addresses."
    )
    webhook_secret: SecretStr | None = Field(
        default=None, description="Key that signs webhooks (Standard Webhooks): whsec_ and base64 of 24 to 64 bytes."
    )

    @field_validator("webhook_secret")
    @classmethod
    def _decodes(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is None:
            return None
        prefix, _, encoded = secret.get_secret_value().partition("_")
        try:
            size = len(base64.b64decode(encoded, validate=True))
        except ValueError:
            size = 0
        if prefix != "whsec" or not 24 <= size <= 64:
            raise ValueError("expected whsec_ and the base64 of 24 to 64 random bytes")
        return secret

    @property
    def artifacts(self) -> str:
        """Where pictures go."""
        return self.artifacts_url or str(self.data_dir / "artifacts")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments first, then the environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, config_file())


def without_password(url: str) -> str:
    """A Redis URL as it may be shown."""
    return re.sub(r"([?&]password=)[^&]*", r"\1***", re.sub(r"(://[^/@]*:)[^/@]*@", r"\1***@", url))


def unknown_keys(*classes: type[BaseSettings]) -> list[str]:
    """Keys of the settings file that none of the classes knows: typing errors."""
    path = config_file()
    if not path.exists():
        return []
    known = {name for cls in classes for name in cls.model_fields}
    return sorted(set(tomllib.loads(path.read_text())) - known)


class WorkerSettings(CommonSettings):
    """One worker process."""

    models: tuple[str, ...] = Field(
        default=(), description="Models to serve, as a JSON list of names; default: all diffusion models there are."
    )
    device: str = Field(default="auto", description="auto (CUDA if there is any), cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="Type of the convolutions; auto: float16 on CUDA, bfloat16 on CPUs with bf16 units, else float32.",
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of a worker; default: all cores.")
    width: int | None = Field(default=None, ge=1, description="Samples in flight at once; default: measured.")
    max_width: int = Field(default=64, ge=1, description="Widest batch that is tried when measuring.")
    pad_batches: bool | None = Field(
        default=None, description="Pad batches to few sizes, for compiled networks; default: on CUDA."
    )
    window: int | None = Field(
        default=None, ge=1, description="Pictures to hold, running and waiting; default: twice the width, at least 8."
    )
    policy: PolicyName = Field(
        default="shortest", description="Order within a priority: shortest (least work first, with ageing) or arrival."
    )
    ageing: float = Field(default=3.0, ge=0, description="Steps of work each second of waiting counts for (shortest).")
    promote_after_s: float = Field(
        default=120.0, gt=0, description="Seconds of waiting that count as one priority higher."
    )
    memory_limit_mb: int | None = Field(
        default=None, ge=1, description="Weights to hold at once, MiB; models not in use are unloaded for others."
    )
    grace_s: float = Field(default=30.0, ge=0, description="Seconds to finish what runs after SIGTERM; then requeued.")
    heartbeat_ttl_s: int = Field(
        default=15, ge=3, description="Seconds without a sign of life after which a worker's jobs go to others."
    )
    model_poll_s: float = Field(default=2.0, gt=0, description="Seconds between looks for new model versions.")
    training_dir: Path | None = Field(
        default=None,
        description="Folder of training runs, shared by all training workers; default: training in data_dir.",
    )
    train_processes: int = Field(default=1, ge=1, description="Processes that train together (torchrun).")
    train_grace_s: float = Field(default=60.0, ge=0, description="Seconds a training run has to save its state.")
    metrics_port: int | None = Field(
        default=None, ge=0, le=65535, description="Port of the worker's Prometheus metrics; 0: any free; default: none."
    )
    metrics_host: str = Field(default="127.0.0.1", description="Address the metrics port listens on.")

    @property
    def training_folder(self) -> Path:
        """Where training runs have their folders."""
        return (self.training_dir or self.data_dir / "training").resolve()

    @field_validator("metrics_port", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value
