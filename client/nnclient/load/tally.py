"""What happened to each request -> counts, which add up over processes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from nnclient.load.histogram import Histogram


@dataclass(frozen=True, slots=True)
class Window:
    """When traffic starts, when measuring begins and when both end, on time.monotonic's clock."""

    start: float
    begin: float
    end: float


@dataclass
class Tally:
    """
    Counts of one process, or of several added up.

    latency: of the right answers to requests that were due in the window.
    lag: how much later than due requests were sent, in an open loop.
    answered: right answers that came in the window: what throughput is counted from.
    errors: statuses of the requests due in the window that failed, WRONG_ANSWER among them.
    examples: the first text of each status.
    loop_cpu, cpu: share of the window that the event loop's thread, and all threads, were computing.
    """

    latency: Histogram = field(default_factory=Histogram)
    lag: Histogram = field(default_factory=Histogram)
    answered: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    loop_cpu: float = 0.0
    cpu: float = 0.0

    def note_answer(self, window: Window, due: float, now: float) -> None:
        """Count a right answer at *now* to a request that was due at *due*."""
        if window.begin <= now < window.end:
            self.answered += 1
        if window.begin <= due < window.end:
            self.latency.record(now - due)

    def note_error(self, window: Window, due: float, status: str, text: str) -> None:
        """Count a request that failed."""
        # Texts of the warm-up are kept as well: they say why there is nothing else.
        self.examples.setdefault(status, text)
        if window.begin <= due < window.end:
            self.errors[status] += 1

    def note_lag(self, window: Window, due: float, now: float) -> None:
        """Count how much later than due a request was sent."""
        if window.begin <= due < window.end:
            self.lag.record(now - due)

    def add(self, other: Tally) -> None:
        """Count everything that *other* has counted; loop_cpu becomes the greater, cpu the sum."""
        self.latency.add(other.latency)
        self.lag.add(other.lag)
        self.answered += other.answered
        self.errors += other.errors
        self.examples = {**other.examples, **self.examples}
        self.loop_cpu = max(self.loop_cpu, other.loop_cpu)
        self.cpu += other.cpu
