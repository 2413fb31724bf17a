"""Webhooks: telling a URL that a job has ended, signed, and only at addresses that are allowed."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import httpcore
import httpx
from standardwebhooks import Webhook

from worker.jobs import SampleJob
from worker.records import Outcome
from worker.settings import CommonSettings

log = logging.getLogger(__name__)

ATTEMPTS = 3
PATIENCE_S = 10.0
"""Seconds for one attempt, from the first packet to the answer's head."""


_NAT64 = ip_network("64:ff9b::/96")


def refusal(url: str, settings: CommonSettings) -> str | None:
    """Why a webhook must not go to a URL, as far as the URL itself tells; ``None`` if it may."""
    allowed = ", ".join(settings.webhook_hosts) or "none"
    try:
        parsed = httpx.URL(url)
        host = parsed.host
    except (httpx.InvalidURL, UnicodeError):
        return "is not a URL"
    if host not in settings.webhook_hosts:
        return f"its host must be one of those allowed here ({allowed})"
    if parsed.userinfo:
        return "must not hold a user name or password"
    try:
        literal = ip_address(host)
    except ValueError:
        return None  # a name: looked at when it is resolved
    if not settings.webhook_private and not is_public(literal):
        return f"{host} is not a public address, and webhook_private is off"
    return None


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is on the internet: not loopback, private, link-local, multicast or reserved."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is None and address in _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


class _Stream(httpcore.NetworkStream):
    """A connection whose every operation ends before a common deadline."""

    def __init__(self, inner: httpcore.NetworkStream, until: float) -> None:
        self._inner, self._until = inner, until

    def _left(self) -> float:
        left = self._until - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("no answer in time")
        return left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._left())

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, self._left()), self._until)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _CheckedBackend(httpcore.NetworkBackend):
    """Resolves a name once, and connects to an address it has checked: a second answer cannot lead elsewhere.

    Args:
        private: whether addresses that are not public are allowed.
    """

    def __init__(self, private: bool) -> None:
        self._inner, self._private = httpcore.SyncBackend(), private

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        until = time.monotonic() + PATIENCE_S
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(f"{host}: {error}") from None
        addresses = [str(item[4][0]) for item in found]
        if not self._private and (inside := [a for a in addresses if not is_public(ip_address(a.partition("%")[0]))]):
            raise httpcore.ConnectError(f"{host} is at {inside[0]}, not a public address, and webhook_private is off")
        for address in addresses[:-1]:
            try:
                return _Stream(self._inner.connect_tcp(address, port, PATIENCE_S / len(addresses)), until)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return _Stream(self._inner.connect_tcp(addresses[-1], port, PATIENCE_S / len(addresses)), until)


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def send_webhook(job: SampleJob, outcome: Outcome, settings: CommonSettings) -> None:
    """Tell the request's URL, if it has one, how it ended: a POST of JSON, tried three times.

    No redirect is followed, and of the answer only its head is read.
    """
    if job.webhook_url is None:
        return
    if why := refusal(job.webhook_url, settings):
        log.warning("job %s: no webhook: %s", job.id, why)
        return
    error = outcome.error.model_dump() if outcome.error else None
    body = json.dumps({"id": job.id, "status": outcome.status, "error": error})
    for attempt in range(ATTEMPTS):
        try:
            status = _post(job.webhook_url, body, signed_headers(f"msg_{job.id}", body, settings), settings)
            if 200 <= status < 300:
                return
            told = f"it answered {status}"
        except (OSError, httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as failed:
            told = str(failed)
        log.warning("job %s: webhook failed: %s", job.id, told)
        if attempt < ATTEMPTS - 1:
            time.sleep(2.0**attempt)


def signed_headers(message_id: str, body: str, settings: CommonSettings) -> dict[str, str]:
    """The headers of Standard Webhooks; without a secret there is no signature."""
    now = datetime.now(UTC)
    headers = {"webhook-id": message_id, "webhook-timestamp": str(int(now.timestamp()))}
    if settings.webhook_secret is not None:
        secret = Webhook(settings.webhook_secret.get_secret_value())
        headers["webhook-signature"] = secret.sign(message_id, now, body)
    return headers


def _post(url: str, body: str, headers: dict[str, str], settings: CommonSettings) -> int:
    """The status of the answer.

    Raises:
        httpcore.NetworkError: and its likes, without an answer in time, or at an address that is not allowed.
    """
    parsed = httpx.URL(url)  # the parser whose host was checked
    target = httpcore.URL(
        scheme=parsed.raw_scheme, host=parsed.raw_host, port=parsed.port, target=parsed.raw_path or b"/"
    )
    head = {
        "Host": parsed.netloc.decode(),
        "Content-Type": "application/json",
        "User-Agent": "guided-sampling-server",
        **headers,
    }
    encoded = [(name.encode(), value.encode()) for name, value in head.items()]
    backend = _CheckedBackend(settings.webhook_private)
    with (
        httpcore.ConnectionPool(ssl_context=_tls(), network_backend=backend) as pool,
        pool.stream("POST", target, headers=encoded, content=body.encode()) as answer,
    ):
        return answer.status
