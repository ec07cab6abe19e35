"""
Requests that were decoded, or refused, in; counts by model, kind and status out, for metrics.

What becomes of a request once it is queued is counted by its model's statistics. Here is the rest: how long
decoding took, and what was refused before there was anything to queue. A model's name is a label only if it
was found in the repository: what clients send would fill the memory of whoever collects the metrics.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from nnserver.errors import Status, blamed_model, status_of

if TYPE_CHECKING:
    from nnserver.batcher import Job
    from nnserver.engine import Lane

# Model, version, kind, status; no model: none that is known was asked for.
Refusal = tuple[str, str, str, Status]


class RequestWatch:
    """What apis tell of requests. Methods may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._lock = threading.Lock()
        self._refusals: Counter[Refusal] = Counter()

    def refused(self, kind: str, error: BaseException) -> None:
        """Count a request of *kind* that could not be decoded, or asks for what there is not."""
        with self._lock:
            self._refusals[(*blamed_model(error), kind, status_of(error))] += 1

    def decoded(self, jobs: Mapping[Lane, Sequence[Job]], began: float, requests: int) -> None:
        """Note that *jobs* are about to be queued; decoding of *requests* requests began then, on *clock*."""
        seconds = (self.clock() - began) / requests
        for lane, together in jobs.items():
            lane.batcher.statistics.note_decoded(len(together), seconds)

    def refusals(self) -> dict[Refusal, int]:
        """Return how many were refused so far."""
        with self._lock:
            return dict(self._refusals)
