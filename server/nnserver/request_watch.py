"""
Requests that were decoded, or refused, in; counts for metrics out, and some of them to be observed.

What becomes of a request once it is queued is counted by its model's statistics. Here is the rest: how long
decoding took, and what was refused before there was anything to queue. A model's name is a label only if it
was found in the repository: what clients send would fill the memory of whoever collects the metrics.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from nnserver.access_log import RequestFacts
from nnserver.batcher import Caller, Job
from nnserver.engine import Lane
from nnserver.errors import Status, blamed_model, status_of
from nnserver.observation import Observer

# Model, version, kind, status; no model: none that is known was asked for.
Refusal = tuple[str, str, str, Status]


class RequestWatch:
    """
    What apis tell of requests. Methods may be called from any thread.

    counts: whether it counts for metrics.  observer: who observes some of the requests, if anybody does.
    """

    def __init__(
        self,
        *,
        counts: bool,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._counts = counts
        self._observer = observer
        self._lock = threading.Lock()
        self._refusals: Counter[Refusal] = Counter()

    def refused(self, kind: str, caller: Caller, error: BaseException, began: float) -> None:
        """Take note of a request of *kind* that could not be decoded, or asks for what there is not."""
        name, version = blamed_model(error)
        status = status_of(error)
        if self._counts:
            with self._lock:
                self._refusals[name, version, kind, status] += 1
        if self._observer is not None:
            facts = RequestFacts(kind, name, version, 0, "")
            self._observer.refused(facts, caller, status, began)

    def decoded(self, jobs: Mapping[Lane, Sequence[Job]], began: float, requests: int) -> None:
        """Note that *jobs* are about to be queued; decoding of *requests* requests began then, on *clock*."""
        if self._counts:
            seconds = (self.clock() - began) / requests
            for lane, together in jobs.items():
                lane.batcher.statistics.note_decoded(len(together), seconds)
        if self._observer is not None:
            for together in jobs.values():
                self._observer.observe(together, began)

    def refusals(self) -> dict[Refusal, int]:
        """Return how many were refused so far."""
        with self._lock:
            return dict(self._refusals)
