"""Requests that were made in, an account of them out: each is answered rightly, or failed with a status."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

ANSWERED = "answered"
# More of them say nothing new.
_MOST_WRONGS = 20


class Ledger:
    """What became of every request, by its kind. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: Counter[str] = Counter()
        self._ends: Counter[tuple[str, str]] = Counter()
        self._rows = 0
        self.wrongs: list[str] = []

    def make(self, kind: str, requests: int = 1) -> None:
        """Note that *requests* of *kind* are about to be made."""
        with self._lock:
            self._made[kind] += requests

    def answer(self, kind: str, rows: int) -> None:
        """Note that one was answered, with the right bits."""
        with self._lock:
            self._ends[kind, ANSWERED] += 1
            self._rows += rows

    def fail(self, kind: str, status: str, allowed: Sequence[str], requests: int = 1) -> None:
        """Note that *requests* failed with *status*, which was to be one of *allowed*."""
        with self._lock:
            self._ends[kind, status] += requests
        if status not in allowed:
            self.wrong(kind, f"{requests} failed with {status}; allowed: {', '.join(allowed) or 'none'}")

    def wrong(self, kind: str, what: str) -> None:
        """Note what must not be: an answer to another request, a status that nothing explains."""
        with self._lock:
            if len(self.wrongs) < _MOST_WRONGS:
                self.wrongs.append(f"{kind}: {what}")

    @property
    def made(self) -> int:
        return self._made.total()

    @property
    def answered(self) -> int:
        return sum(n for (_, end), n in self._ends.items() if end == ANSWERED)

    @property
    def failed(self) -> int:
        return self._ends.total() - self.answered

    @property
    def lost(self) -> int:
        """Requests of which nothing was heard."""
        return self.made - self._ends.total()

    @property
    def rows(self) -> int:
        """Rows that were answered."""
        return self._rows

    def table(self) -> list[str]:
        """A line for each kind: how many were made, and how they ended."""
        lines = []
        for kind, made in sorted(self._made.items()):
            ends = sorted((end, n) for (of, end), n in self._ends.items() if of == kind)
            lines.append(f"{kind:34} {made:>9,}   " + ", ".join(f"{n:,} {end}" for end, n in ends))
        return lines
