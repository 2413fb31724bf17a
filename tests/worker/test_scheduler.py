from __future__ import annotations

from dataclasses import dataclass

from worker.scheduler import Policy, choose


@dataclass
class Waiting:
    remaining: int
    arrived: float = 0.0
    priority: int = 1
    running: bool = False


def test_everyone_runs_when_there_is_room() -> None:
    assert choose([Waiting(9), Waiting(3)], 4, Policy(), 0.0) == [0, 1]


def test_least_work_goes_first() -> None:
    assert choose([Waiting(250), Waiting(10), Waiting(50)], 2, Policy(), 0.0) == [1, 2]


def test_arrival_order() -> None:
    samples = [Waiting(10, arrived=2.0), Waiting(250, arrived=1.0), Waiting(10, arrived=3.0)]
    assert choose(samples, 2, Policy("arrival"), 3.0) == [1, 0]


def test_priority_goes_before_the_policy() -> None:
    samples = [Waiting(10, priority=0), Waiting(10), Waiting(250, priority=2)]
    assert choose(samples, 2, Policy(), 0.0) == [2, 1]


def test_with_equal_work_whoever_runs_goes_on() -> None:
    assert choose([Waiting(10), Waiting(10, running=True)], 1, Policy(), 0.0) == [1]


def test_ageing_lets_a_long_request_pass_the_short_ones_that_keep_coming() -> None:
    def passed(ageing: float) -> bool:
        policy, long = Policy(ageing=ageing, promote_after=1e9), Waiting(250)
        return any(choose([Waiting(10, arrived=now), long], 1, policy, now) == [1] for now in range(300))

    assert passed(1.0)
    assert not passed(0.0)


def test_long_waiting_counts_as_higher_priority() -> None:
    samples = [Waiting(10, arrived=100.0, priority=2), Waiting(10, arrived=0.0, priority=0)]
    assert choose(samples, 1, Policy("arrival", promote_after=50.0), 99.0) == [0]
    assert choose(samples, 1, Policy("arrival", promote_after=50.0), 101.0) == [1]
