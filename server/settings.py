"""Settings of the HTTP server."""

from __future__ import annotations

from pydantic import Field

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
    webhook_hosts: tuple[str, ...] = Field(
        default=(), description="Hosts webhooks may go to, as a JSON list; default: none."
    )
