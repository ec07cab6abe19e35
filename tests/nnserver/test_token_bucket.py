"""A rate's arithmetic, on a clock that the test moves."""

from __future__ import annotations

import pytest

from nnserver.token_bucket import TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_at_once_and_then_the_rate() -> None:
    """Of ten a second with a burst of three, the fourth waits 0.1 s, and is told so exactly."""
    clock = Clock()
    bucket = TokenBucket(10, 3, clock)
    assert [bucket.take() for _ in range(3)] == [0, 0, 0]
    assert bucket.take() == pytest.approx(0.1)
    clock.now += 0.06
    assert bucket.take() == pytest.approx(0.04)
    clock.now += 0.041
    assert bucket.take() == 0
    assert bucket.take() > 0


def test_a_pause_earns_no_more_than_the_burst() -> None:
    clock = Clock()
    bucket = TokenBucket(10, 3, clock)
    clock.now += 1e6
    assert [bucket.take() > 0 for _ in range(4)] == [False, False, False, True]


def test_what_was_used_beforehand_is_waited_for() -> None:
    clock = Clock()
    bucket = TokenBucket(2, 4, clock)
    bucket.charge(10)
    assert bucket.level() == -6
    assert bucket.wait_s() == pytest.approx(3.5)
    clock.now += 3.5
    assert bucket.wait_s() == 0
    assert bucket.take() == 0


def test_over_any_time_no_more_than_burst_and_rate_allow() -> None:
    """A caller that asks every millisecond for ten seconds (9.999) is let in 5 + 9.999 * 7 times."""
    clock = Clock()
    bucket = TokenBucket(7, 5, clock)
    allowed = 0
    for _ in range(10_000):
        allowed += bucket.take() == 0
        clock.now += 0.001
    assert allowed == 74
