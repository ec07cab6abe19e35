"""LinedPool: runs everything in order, and knows how long a new call would wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from nnserver.transport.lined_pool import LinedPool


class Line:
    """A pool of one thread whose calls end when the test says so, at 0.1 s each on its clock."""

    def __init__(self, max_wait_s: float = 10.0) -> None:
        self.now = 100.0
        self.pool = LinedPool(1, max_wait_s, clock=lambda: self.now)
        self._begun = threading.Semaphore(0)
        self._may_end = threading.Semaphore(0)

    def submit(self, count: int) -> None:
        for _ in range(count):
            self.pool.submit(self._call)

    def run(self, count: int) -> None:
        """Let *count* calls begin; all but the last of them have ended."""
        for _ in range(count):
            assert self._begun.acquire(timeout=10)
            self.now += 0.1
            self._may_end.release()

    def close(self, count: int) -> None:
        self.run(count)
        self.pool.shutdown()

    def _call(self) -> None:
        self._begun.release()
        assert self._may_end.acquire(timeout=10)


@pytest.fixture
def line() -> Iterator[Line]:
    found = Line()
    yield found
    found.pool.shutdown()


def test_nobody_waits_before_anything_was_measured(line: Line) -> None:
    """A new pool promises no wait, whatever stands in its line."""
    line.submit(3)
    assert line.pool.wait_s() == 0.0
    line.close(3)


def test_the_wait_is_that_of_the_line(line: Line) -> None:
    """Starts are 0.1 s apart: with so many in the line, a new call waits for all of them."""
    line.submit(12)
    line.run(4)
    assert line._begun.acquire(timeout=10)  # The fifth runs; seven wait.
    assert line.pool.wait_s() == pytest.approx(0.7)
    line._begun.release()
    line.close(8)
    assert line.pool.wait_s() == 0.0


def test_late_calls_shorten_the_line_and_others_lengthen_it_again() -> None:
    """The wait that is allowed falls with calls that are late, not below 2 ms, and returns to the setting."""
    pool = LinedPool(1, 0.5)
    pool.note_end(was_late=False)
    assert pool.most_s == 0.5
    pool.note_end(was_late=True)
    assert pool.most_s == pytest.approx(0.35)
    for _ in range(50):
        pool.note_end(was_late=True)
    assert pool.most_s == 2e-3
    for _ in range(10_000):
        pool.note_end(was_late=False)
    assert pool.most_s == 0.5
    pool.shutdown()


def test_calls_in_a_hurry_do_not_shorten_the_line_for_others() -> None:
    """Who gives 10 ms is late without a line, too; who gives 50 and is late has waited in it."""
    pool = LinedPool(1, 0.5)
    for _ in range(50):
        pool.note_end(was_late=True, allowed_s=0.01)
    assert pool.most_s == 0.5
    pool.note_end(was_late=True, allowed_s=0.05)
    assert pool.most_s == pytest.approx(0.35)
    pool.shutdown()


def test_a_call_knows_how_long_it_has_waited(line: Line) -> None:
    """0.1 s for each that was before it."""
    waited: list[float] = []
    line.submit(2)
    future = line.pool.submit(lambda: waited.append(line.pool.waited_s()))
    line.run(2)
    future.result(10)
    assert waited == [pytest.approx(0.2)]


def test_what_a_call_returns_or_raises_is_the_futures(line: Line) -> None:
    """The pool is one of concurrent.futures to whoever uses it."""
    assert line.pool.submit(lambda a, b: a + b, 1, b=2).result(10) == 3
    with pytest.raises(ZeroDivisionError):
        line.pool.submit(lambda: 1 // 0).result(10)
