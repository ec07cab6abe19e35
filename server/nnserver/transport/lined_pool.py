"""
Calls for a few threads in, run in order: a pool that knows how long a new call would wait.

What a call takes is measured from one start to the next while others wait: threads, kernels and the
interpreter's lock are all in it. The wait that is allowed shrinks when calls have waited too long for their
deadlines, and grows again when they do not: who waits for 50 ms is not served by a line of 500.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# However early deadlines are, as much as this may wait.
_LEAST_S = 2e-3
# A call that is given less is late for other reasons than the line. If it shortened that, clients in a hurry
# would have everybody refused.
_HURRY_S = 20e-3


class LinedPool(ThreadPoolExecutor):
    """
    *threads* threads, and the calls that wait for them.

    most_s: the wait that is allowed, at most *max_wait_s*.
    """

    def __init__(self, threads: int, max_wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(threads, thread_name_prefix="nnserver-unary")
        self.most_s = max_wait_s
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting = 0
        # Smoothed time from one start to the next while others wait; 0 until measured.
        self._call_s = 0.0
        # When a call was started that left others waiting; 0: the last one left none.
        self._left_at = 0.0
        # waited_s, for the call that a thread runs.
        self._own = threading.local()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run *fn* in a thread when those before it have begun."""
        with self._lock:
            self._waiting += 1
        return super().submit(self._run, self._clock(), fn, args, kwargs)

    def wait_s(self) -> float:
        """Return how long a call that comes now is likely to wait."""
        return self._waiting * self._call_s

    def waited_s(self) -> float:
        """Return how long the call that this thread runs has waited for it."""
        waited_s: float = self._own.waited_s
        return waited_s

    def note_end(self, was_late: bool, allowed_s: float = math.inf) -> None:
        """Take note that a call that was given *allowed_s* has ended, too late for that or not."""
        if allowed_s < _HURRY_S:
            return
        with self._lock:
            if was_late:
                self.most_s = max(0.7 * min(self.most_s, self.wait_s() or self.most_s), _LEAST_S)
            else:
                self.most_s = min(1.001 * self.most_s, self._max_wait_s)

    def _run(self, submitted: float, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self._lock:
            self._waiting -= 1
            now = self._clock()
            self._own.waited_s = now - submitted
            if self._left_at:
                call_s = now - self._left_at
                self._call_s = 0.95 * self._call_s + 0.05 * call_s if self._call_s else call_s
            self._left_at = now if self._waiting else 0.0
        return fn(*args, **kwargs)
