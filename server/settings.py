"""Settings of the HTTP server."""

from __future__ import annotations

from pydantic import Field, field_validator

from server.keys import ApiKey, Rates
from worker.settings import CommonSettings


class ServerSettings(CommonSettings):
    """One API process."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0: any free.")
    max_images: int = Field(default=256, ge=1, description="Largest num_images of a request.")
    part_images: int = Field(
        default=8, ge=1, description="Pictures per part; a request of more is split over workers that are free."
    )
    max_queued: int = Field(
        default=10_000, ge=1, description="Parts that may wait per model; then requests are answered with 429."
    )
    max_wait_s: float = Field(default=120.0, ge=0, description="Longest 'Prefer: wait'.")
    max_deadline_s: float = Field(default=86_400.0, gt=0, description="Longest deadline_s.")
    idempotency_ttl_s: int = Field(default=86_400, ge=1, description="Seconds an Idempotency-Key is remembered.")
    data_roots: tuple[str, ...] = Field(
        default=(),
        description="Folders and URL prefixes training jobs may read from, as a JSON list; default: data_dir/datasets.",
    )
    max_training_queued: int = Field(default=100, ge=1, description="Training jobs that may wait; then 429.")
    api_keys: tuple[ApiKey, ...] = Field(
        default=(),
        description="Keys that may use the API, as 'guided keys new' prints them; default: none, and all may.",
    )
    allow_unauthenticated: bool = Field(
        default=False, description="Listen on an address others can reach although there are no api_keys."
    )
    open_metrics: bool = Field(default=False, description="Answer /metrics without a key, too.")
    rate_limit: Rates | None = Field(
        default=None,
        description="Requests per key (without keys: per address), such as '60/minute' or '5/second; 1000/day'.",
    )
    images_per_day: int | None = Field(default=None, ge=1, description="Pictures per key (or address) in a day.")
    steps_per_day: int | None = Field(
        default=None, ge=1, description="Denoising steps of all pictures per key (or address) in a day."
    )
    cors_origins: tuple[str, ...] = Field(
        default=(), description="Origins whose pages may call the API, as a JSON list ('*': all); default: none."
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(),
        description="Names the API may be called by (Host header), as a JSON list ('*.example.com' works); default: "
        "any, but without keys on a loopback address only the names of this machine.",
    )

    @field_validator("api_keys")
    @classmethod
    def _names_differ(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        names = [key.name for key in keys]
        if len(set(names)) < len(names):
            raise ValueError(f"two keys have the same name: {', '.join(names)}")
        return keys
