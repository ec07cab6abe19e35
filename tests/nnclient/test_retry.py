"""Failed calls -> pauses, until the attempts or the deadline are used up."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnclient import DeadlineExceeded, InvalidInput, Overloaded, RetryPolicy, Unavailable
from nnclient.retry import Deadline, Patience

UNAVAILABLE = Unavailable("gone")
FULL = Overloaded("full")
FULL_FOR_A_WHILE = Overloaded("full", retry_after_s=0.5)


@settings(deadline=None, max_examples=50)
@given(failures=st.integers(1, 4))
def test_backoff_doubles_with_jitter(failures: int) -> None:
    """0.1, 0.2, 0.4 ... s, each up to a fifth more or less."""
    pause_s = RetryPolicy().pause_s(failures)
    assert pause_s is not None
    assert 0.8 <= pause_s / (0.1 * 2 ** (failures - 1)) <= 1.2


def test_backoff_is_bounded() -> None:
    """No pause is longer than max_backoff_s and its jitter."""
    policy = RetryPolicy(initial_backoff_s=1.0, max_backoff_s=1.5, multiplier=10.0)
    assert all((policy.pause_s(4) or 9.0) <= 1.5 * 1.2 for _ in range(50))


def test_attempts_are_counted() -> None:
    """With five attempts, the fifth failure is the last."""
    assert RetryPolicy(attempts=5).pause_s(4) is not None
    assert RetryPolicy(attempts=5).pause_s(5) is None
    assert RetryPolicy(attempts=1).pause_s(1) is None


def test_only_what_is_safe_and_wanted_is_retried() -> None:
    """A full queue is not pressed without being asked to; the core retries unary calls by itself."""
    policy, unlimited = RetryPolicy(), Deadline(None)

    def retried(error: Exception, *, is_stream: bool) -> bool:
        return policy.pause_before_retry(error, 1, unlimited, is_stream=is_stream) is not None  # type: ignore[arg-type]

    assert retried(UNAVAILABLE, is_stream=True)
    assert not retried(UNAVAILABLE, is_stream=False)
    assert not retried(FULL, is_stream=True)
    assert not retried(FULL, is_stream=False)
    assert retried(FULL_FOR_A_WHILE, is_stream=False)
    assert not retried(InvalidInput("no"), is_stream=True)


def test_the_servers_pause_is_kept() -> None:
    """Never earlier than asked."""
    for _ in range(50):
        pause_s = RetryPolicy().pause_before_retry(FULL_FOR_A_WHILE, 1, Deadline(None), is_stream=False)
        assert pause_s is not None
        assert 0.5 <= pause_s <= 0.6


def test_no_pause_beyond_the_deadline() -> None:
    """A retry that could not be answered in time is not waited for."""
    hour = Overloaded("full", retry_after_s=3600.0)
    assert RetryPolicy().pause_before_retry(hour, 1, Deadline(60), is_stream=False) is None


def test_deadline_counts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds left never fall below 0; no limit stays none."""
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    deadline = Deadline(2.0)
    assert deadline.left_s() == 2.0
    now = 101.5
    assert deadline.left_s() == 0.5
    assert deadline.allows(0.4)
    assert not deadline.allows(0.5)
    now = 200.0
    assert deadline.left_s() == 0.0
    assert Deadline(None).left_s() is None
    assert Deadline(None).allows(1e9)


def test_patience_ends_with_what_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the time, the target and the last failure."""
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    patience = Patience("host:1", 3.0)
    pauses = []

    def wait_in_vain() -> None:
        nonlocal now
        while True:
            pauses.append(patience.pause_s(UNAVAILABLE))
            now += pauses[-1]

    with pytest.raises(DeadlineExceeded, match=r"^waited 3 s for the server at host:1 to be ready: gone$"):
        wait_in_vain()
    assert pauses[0] == 0.05
    assert max(pauses) == 0.5
    assert sum(pauses) <= 3.0
