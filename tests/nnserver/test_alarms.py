"""Actions run at their times, in order, and a failed one stops nothing."""

from __future__ import annotations

import threading

import pytest

from nnserver.alarms import Alarms


def test_actions_run_in_the_order_of_their_times() -> None:
    alarms = Alarms()
    order: list[str] = []
    done = threading.Event()
    alarms.after(0.06, done.set)
    alarms.after(0.04, lambda: order.append("second"))
    alarms.after(0.02, lambda: order.append("first"))
    assert done.wait(10)
    assert order == ["first", "second"]
    alarms.close()


def test_a_failed_action_is_logged_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    alarms = Alarms()
    done = threading.Event()

    def fail() -> None:
        raise RuntimeError("as asked")

    alarms.after(0, fail)
    alarms.after(0.01, done.set)
    assert done.wait(10)
    alarms.close()
    assert "internal error in what was due" in caplog.text


def test_closing_forgets_what_is_not_due() -> None:
    """It does not wait for it either, and takes nothing more."""
    alarms = Alarms()
    run: list[int] = []
    alarms.after(1000, lambda: run.append(1))
    alarms.close()
    alarms.after(0, lambda: run.append(2))
    assert run == []
