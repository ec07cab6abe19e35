"""Requests in, seconds to wait out: so many a second, and so many at once after a pause."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class TokenBucket:
    """Holds up to *burst* requests and gains *per_s* of them a second. From any thread."""

    def __init__(self, per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s = per_s
        self.burst = burst
        self._clock = clock
        self._level = float(burst)
        self._then = clock()
        self._lock = threading.Lock()

    def take(self) -> float:
        """Take one and return 0; or, if there is none, return the seconds until there is."""
        with self._lock:
            level = self._fill()
            if level < 1:
                return (1 - level) / self.per_s
            self._level = level - 1
            return 0.0

    def charge(self, n: int) -> None:
        """Take *n* that have been used already, even if there are fewer."""
        with self._lock:
            self._level = self._fill() - n

    def level(self) -> float:
        """Return how many there are; negative if more were used."""
        with self._lock:
            return self._fill()

    def wait_s(self) -> float:
        """Return the seconds until there is one."""
        return max(0.0, (1 - self.level()) / self.per_s)

    def _fill(self) -> float:
        now = self._clock()
        self._level = min(float(self.burst), self._level + (now - self._then) * self.per_s)
        self._then = now
        return self._level
