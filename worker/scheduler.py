"""Who gets a slot (pure Python): priority first, then the policy's order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

PolicyName = Literal["shortest", "arrival"]


class Candidate(Protocol):
    """A sample that runs or waits, as the scheduler sees it."""

    @property
    def priority(self) -> int:
        """Larger goes first."""

    @property
    def arrived(self) -> float:
        """When its request came, s."""

    @property
    def remaining(self) -> int:
        """Steps left in its whole request: what stands between now and a finished job."""

    @property
    def running(self) -> bool:
        """Whether it has a slot now."""


@dataclass(frozen=True)
class Policy:
    """The order among samples of one priority.

    Attributes:
        name: ``shortest``: least remaining work first. ``arrival``: first come, first served.
        ageing: ``shortest``: steps of work that each second since arrival counts for, so that a long
            request is passed over only so long.
        promote_after: seconds after which a sample counts as one priority higher.
    """

    name: PolicyName = "shortest"
    ageing: float = 3.0
    promote_after: float = 120.0

    def rank(self, sample: Candidate, now: float) -> tuple[float, float, bool, float]:
        """Sort key: the smallest runs first."""
        waited = now - sample.arrived
        level = min(2, sample.priority + int(waited / self.promote_after))
        work = sample.remaining - self.ageing * waited if self.name == "shortest" else 0.0
        # At equal work: whoever runs goes on, then whoever came first.
        return (-level, work, not sample.running, sample.arrived)


def choose(samples: Sequence[Candidate], width: int, policy: Policy, now: float) -> list[int]:
    """Indices of the samples to run, at most ``width``: the others wait, parked if they had begun."""
    if len(samples) <= width:
        return list(range(len(samples)))
    ranks = [policy.rank(sample, now) for sample in samples]
    return sorted(range(len(samples)), key=ranks.__getitem__)[:width]
