"""Rate limits and quotas, counted in Redis, so that several API processes share them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from limits import RateLimitItem, RateLimitItemPerDay, parse_many
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis import Redis
from redis.exceptions import RedisError

from server.keys import ApiKey
from server.problems import ProblemError
from server.settings import ServerSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Allowance:
    """What one caller may do."""

    rates: tuple[RateLimitItem, ...]
    images_per_day: int | None
    steps_per_day: int | None


class Limiter:
    """Counts what callers do (blocking; call it on a thread).

    Args:
        redis: where it is counted.
        settings: what is allowed where a key does not say.
    """

    def __init__(self, redis: Redis, settings: ServerSettings) -> None:
        storage = RedisStorage("redis://", connection_pool=redis.connection_pool, key_prefix="guided:limits")
        self._windows = SlidingWindowCounterRateLimiter(storage)
        self._settings = settings
        self._known: dict[ApiKey | None, Allowance] = {}

    def allowance(self, key: ApiKey | None) -> Allowance:
        """What a key may do; ``None``: a caller without one."""
        if key not in self._known:
            base = self._settings
            rates = (key.rate_limit if key else None) or base.rate_limit
            self._known[key] = Allowance(
                rates=tuple(parse_many(rates)) if rates else (),
                images_per_day=(key.images_per_day if key else None) or base.images_per_day,
                steps_per_day=(key.steps_per_day if key else None) or base.steps_per_day,
            )
        return self._known[key]

    def request(self, key: ApiKey | None, who: str) -> dict[str, str]:
        """Count one request.

        Args:
            key: of the caller.
            who: name under which it is counted.

        Returns:
            Headers that tell what is left, of the limit that is nearest.

        Raises:
            ProblemError: 429, if it is one too many.
        """
        nearest, headers = 2.0, {}
        for rate in self.allowance(key).rates:
            try:
                allowed = self._windows.hit(rate, "requests", who)
                left, after = self._left(rate, "requests", who)
            except RedisError as error:  # nothing can be queued anyway; whoever needs Redis says so
                log.warning("requests are not counted: %s", error)
                return {}
            if not allowed:
                told = f"{who} may make {rate.amount} requests per {_span(rate)}; try again in {after} s"
                raise ProblemError(429, told, retry_after=after, headers=_headers(rate, 0, after))
            if left / rate.amount < nearest:
                nearest, headers = left / rate.amount, _headers(rate, left, after)
        return headers

    def work(self, key: ApiKey | None, who: str, images: int, steps: int) -> None:
        """Count pictures and their denoising steps.

        Raises:
            ProblemError: 429, if they are more than the quota has left; then none are counted.
            RedisError: if Redis cannot be reached.
        """
        may = self.allowance(key)
        wanted = [("pictures", may.images_per_day, images), ("denoising steps", may.steps_per_day, steps)]
        items = [(what, RateLimitItemPerDay(quota), cost) for what, quota, cost in wanted if quota]
        for what, item, cost in items:  # none is counted if another would be too much
            if cost > self._left(item, what, who)[0]:
                raise self._used_up(item, what, who, cost)
        for what, item, cost in items:
            if not self._windows.hit(item, what, who, cost=cost):  # another request was quicker
                raise self._used_up(item, what, who, cost)

    def _used_up(self, item: RateLimitItem, what: str, who: str, cost: int) -> ProblemError:
        left, after = self._left(item, what, who)
        told = f"{who} may have {item.amount} {what} a day, and {left} are left; this asks for {cost}"
        return ProblemError(429, told, retry_after=after, code="insufficient_quota")

    def _left(self, item: RateLimitItem, what: str, who: str) -> tuple[int, int]:
        """How much is left, and the seconds until there is more."""
        stats = self._windows.get_window_stats(item, what, who)
        return stats.remaining, max(1, round(stats.reset_time - time.time()))


def _span(rate: RateLimitItem) -> str:
    return rate.GRANULARITY.name if rate.multiples == 1 else f"{rate.multiples} {rate.GRANULARITY.name}s"


def _headers(rate: RateLimitItem, left: int, after: int) -> dict[str, str]:
    """The fields of the IETF's draft on rate limits."""
    return {
        "RateLimit-Policy": f'"default";q={rate.amount};w={rate.get_expiry()}',
        "RateLimit": f'"default";r={left};t={after}',
    }
