"""API keys: what the settings hold of them, and how one is made."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import Annotated, Literal

from limits import parse_many
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

Scope = Literal["generate", "train", "admin"]
PREFIX = "gss_"
"""What keys begin with, so that scanners for leaked secrets can know them."""


def _check_rates(text: str) -> str:
    try:
        parse_many(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no rate; one looks like '60/minute', several like '5/second; 1000/day'"
        ) from None
    return text


Rates = Annotated[str, AfterValidator(_check_rates)]
"""Requests per time, such as ``60/minute`` or ``5/second; 1000/day``."""


class ApiKey(BaseModel):
    """One key: its hash, never itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    hash: Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = Field(min_length=1)
    rate_limit: Rates | None = None
    """Instead of the setting of this name; so are the two below."""
    images_per_day: int | None = Field(default=None, ge=1)
    steps_per_day: int | None = Field(default=None, ge=1)


def new_key() -> str:
    """A key nobody can guess: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def hashed(key: str) -> str:
    """What the settings hold of a key. It is random and long, so one round of SHA-256 is enough."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def find(key: str, keys: Iterable[ApiKey]) -> ApiKey | None:
    """The entry of a key, in a time that does not depend on which one it is."""
    digest, found = hashed(key), None
    for entry in keys:
        if hmac.compare_digest(digest, entry.hash):
            found = entry
    return found
