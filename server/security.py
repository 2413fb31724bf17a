"""Who may do what: API keys, their scopes, and what is open to all."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import ip_address, ip_network
from socket import getaddrinfo
from typing import Annotated, Any

from fastapi import Depends, Request
from itsdangerous import BadSignature, TimestampSigner
from redis import Redis
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from server import keys
from server.headers import adding
from server.keys import ApiKey
from server.problems import ProblemError, redis_away, respond
from server.rates import Limiter
from server.settings import ServerSettings

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/docs", "/openapi.json", "/favicon.ico"})
"""Paths that need no key: health for probes, the page and the description for people."""
PROBES = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that may be asked for by any name of this machine: containers and Prometheus use their own."""
OPEN_FOLDERS = ("/playground/", "/docs/static/")
LINK_S = 3600
"""Seconds for which a link to a picture stands for the key that got it."""
_PICTURE = re.compile(r"/jobs/[0-9a-f]{32}/images/[0-9]{1,6}")
_SECRET = "guided:link-secret"


@dataclass(frozen=True)
class Caller:
    """Who makes a request.

    Attributes:
        who: name under which what it does is counted.
        key: the API key; ``None`` where none is needed.
    """

    who: str
    key: ApiKey | None = None

    @property
    def owner(self) -> str | None:
        """Name to write into jobs."""
        return self.key.name if self.key else None

    def may(self, scope: keys.Scope) -> bool:
        """Whether the key has a scope; ``admin`` has all."""
        return self.key is None or scope in self.key.scopes or "admin" in self.key.scopes

    def sees(self, owner: str | None) -> bool:
        """Whether jobs of this owner are the caller's to see and to cancel."""
        return self.may("admin") or owner == self.owner


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


Who = Annotated[Caller, Depends(_caller)]
"""Who makes the request."""


def requires(scope: keys.Scope) -> Any:
    """A dependency: 403 unless the caller's key has the scope."""

    def check(caller: Who) -> None:
        if not caller.may(scope):
            assert caller.key is not None
            has = ", ".join(caller.key.scopes)
            raise ProblemError(403, f"this needs a key with the scope {scope!r}; {caller.key.name!r} has {has}")

    return Depends(check)


class Links:
    """Links to pictures that work without a key for a while, for callers that cannot send one.

    Args:
        redis: holds the secret, which all API processes share (blocking; call it on a thread).
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._signer: TimestampSigner | None = None

    def sign(self, path: str) -> str:
        """The path with a token."""
        return f"{path}?token={self._signed_by().sign(path).decode().removeprefix(path + '.')}"

    def check(self, path: str, token: str) -> bool:
        """Whether a token was made for this path, not too long ago."""
        try:
            self._signed_by().unsign(f"{path}.{token}", max_age=LINK_S)
        except BadSignature:
            return False
        return True

    def _signed_by(self) -> TimestampSigner:
        if self._signer is None:
            self._redis.set(_SECRET, secrets.token_bytes(32), nx=True)
            secret: Any = self._redis.get(_SECRET)
            self._signer = TimestampSigner(secret, digest_method=hashlib.sha256)
        return self._signer


class GuardMiddleware:
    """Lets through who has a key, and not more often than allowed; all but what is listed as open needs one."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, limiter: Limiter, links: Links) -> None:
        self._app, self._settings, self._limiter, self._links = app, settings, limiter, links
        self._hosts = allowed_hosts(settings)
        self._rated = settings.rate_limit is not None or any(key.rate_limit for key in settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its caller in ``request.state.caller``, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        try:
            request.state.caller, headers = await self._admit(request)
        except ProblemError as problem:
            await respond(request, problem)(scope, receive, send)
            return
        except RedisError:
            await respond(request, redis_away())(scope, receive, send)
            return
        await self._app(scope, receive, adding(headers, send))

    async def _admit(self, request: Request) -> tuple[Caller, dict[str, str]]:
        """Who makes a request, and headers that tell how many more there may be.

        Raises:
            ProblemError: 400 for a name this server is not called by, 401 without a valid key where one is needed,
                429 for one request too many.
        """
        host = request.url.hostname or ""
        if request.scope["path"] not in PROBES and not any(fnmatchcase(host, name) for name in self._hosts):
            raise ProblemError(
                400, f"this server is not called {host[:200]!r}; the setting allowed_hosts says how it is"
            )
        nobody = Caller(address_of(request))
        if is_open(request.scope["path"], self._settings):
            return nobody, {}
        caller, refused, headers = nobody, None, {}
        if self._settings.api_keys:
            try:
                caller = await self._authenticate(request)
            except ProblemError as problem:
                refused = problem  # counted all the same
        if self._rated:
            headers = await run_in_threadpool(self._limiter.request, caller.key, caller.who)
        if refused is not None:
            raise refused
        return caller, headers

    async def _authenticate(self, request: Request) -> Caller:
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        path, token = request.scope["path"], request.query_params.get("token")
        if not kind and token and _PICTURE.fullmatch(path):
            if await run_in_threadpool(self._links.check, path, token):
                return Caller(address_of(request))
            raise _unauthorized("the link is no longer valid")
        if kind.lower() != "bearer" or not given:
            raise _unauthorized("an API key is needed, as 'Authorization: Bearer KEY'")
        key = keys.find(given.strip(), self._settings.api_keys)
        if key is None:
            raise _unauthorized("the API key is not valid")
        return Caller(f"key {key.name}", key)


def _unauthorized(detail: str) -> ProblemError:
    return ProblemError(401, detail, headers={"WWW-Authenticate": "Bearer"}, code="invalid_api_key")


def is_open(path: str, settings: ServerSettings) -> bool:
    """Whether a path needs no key."""
    if path == "/metrics":
        return settings.open_metrics
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)


def address_of(request: Request) -> str:
    """The caller's address; of an IPv6 one its network, which is what one caller has."""
    host = request.client.host if request.client else "unknown"
    try:
        address = ip_address(host)
    except ValueError:
        return host
    return str(ip_network(f"{host}/64", strict=False)) if address.version == 6 else host


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        found = {str(item[4][0]) for item in getaddrinfo(host or "0.0.0.0", None)}
    except OSError:
        return False  # listening on it will fail, and say why
    return all(ip_address(address.partition("%")[0]).is_loopback for address in found)


def check_exposure(settings: ServerSettings) -> None:
    """Refuse to serve everybody by mistake.

    Raises:
        ValueError: for an address others can reach, without keys and without leave.
    """
    if settings.api_keys or settings.allow_unauthenticated or is_loopback(settings.host):
        return
    raise ValueError(
        f"host: {settings.host} can be reached from other machines, and there are no api_keys: anybody could use this "
        "server. Make a key ('guided keys new NAME'), listen on 127.0.0.1, or set allow_unauthenticated"
    )


def allowed_hosts(settings: ServerSettings) -> list[str]:
    """Names the API may be called by.

    Where there are no keys, a page of another site that has its own name lead to 127.0.0.1 must not get through.
    """
    if settings.allowed_hosts:
        return list(settings.allowed_hosts)
    if settings.api_keys or settings.allow_unauthenticated:
        return ["*"]
    return ["localhost", "127.0.0.1", "::1", settings.host]
