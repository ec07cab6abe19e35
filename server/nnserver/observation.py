"""
Some of the requests in, what became of each out: to the access log, and as a trace.

A request that is to be observed is wrapped when it has been decoded: the wrapper is its form and its caller
at once, so that it hears of everything. All others go their way as if nobody watched.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nnserver.access_log import RequestFacts, is_fault, log_request
from nnserver.batcher import Caller, Form, Job, Settler, Watcher
from nnserver.call import Metadata
from nnserver.errors import Status, status_of


@dataclass(slots=True)
class Times:
    """Moments of a request, on time.monotonic()'s clock; 0: it never came to that."""

    began: float
    queued: float = 0.0
    taken: float = 0.0
    started: float = 0.0
    computed: float = 0.0
    ended: float = 0.0

    def note_run(self, taken: float, started: float, computed: float) -> None:
        """Take the times of the request's batch."""
        self.taken, self.started, self.computed = taken, started, computed


class Tracer(Protocol):
    """Who makes traces of requests."""

    def wanted(self, metadata: Metadata) -> Any | None:
        """Return what the trace of a request with *metadata* belongs to; None: it is not to be traced."""

    def record(
        self, parent: Any, facts: RequestFacts, metadata: Metadata, status: Status, times: Times
    ) -> None:
        """Take the trace of a request that has ended."""


class Sampler:
    """Picks a *share* of what passes by, in [0, 1], at random; costs next to nothing for the rest."""

    def __init__(self, share: float, draw: Callable[[], float] = random.random) -> None:
        self._share = share
        self._draw = draw
        self._lock = threading.Lock()
        # So many pass by before the next is picked.
        self._gap = self._next_gap()

    def pick(self, n: int) -> Iterator[int]:
        """Yield the positions of those picked of the next *n*."""
        with self._lock:
            while self._gap < n:
                yield int(self._gap)
                self._gap += 1 + self._next_gap()
            self._gap -= n

    def _next_gap(self) -> float:
        if self._share >= 1:
            return 0
        if self._share <= 0:
            return math.inf
        return math.floor(math.log(1 - self._draw()) / math.log(1 - self._share))


class Observer:
    """Observes a *share* of requests for the access log, and those that *tracer* wants."""

    def __init__(
        self, share: float, tracer: Tracer | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sampler = Sampler(share)
        self._tracer = tracer
        self._clock = clock

    def observe(self, jobs: Sequence[Job], began: float) -> None:
        """Wrap those of *jobs*, about to be queued, that are to be observed; their decoding began then."""
        logged = set(self._sampler.pick(len(jobs)))
        if self._tracer is None:
            for index in logged:
                Observed(jobs[index], Times(began), self._clock, is_logged=True)
            return
        for index, job in enumerate(jobs):
            parent = self._tracer.wanted(job.caller.metadata)
            if parent is not None:
                trace = (self._tracer, parent)
                Observed(job, Times(began), self._clock, trace, is_logged=index in logged)
            elif index in logged:
                Observed(job, Times(began), self._clock, is_logged=True)

    def refused(self, facts: RequestFacts, caller: Caller, status: Status, began: float) -> None:
        """Take note of a request that could not be decoded, or asks for what there is not."""
        metadata, now = caller.metadata, self._clock()
        if is_fault(status) or any(True for _ in self._sampler.pick(1)):
            log_request(facts, metadata, status, now - began)
        if self._tracer is not None:
            parent = self._tracer.wanted(metadata)
            if parent is not None:
                self._tracer.record(parent, facts, metadata, status, Times(began, ended=now))


class Observed:
    """
    *job*'s form and caller, in the place of its own, which it passes everything on to.

    is_logged: whether its end goes to the access log. That of a fault does in any case: see batcher.fail.
    """

    __slots__ = (
        *("_caller", "_clock", "_form", "_is_logged", "_job", "_times", "_trace"),
        *("deadline", "is_cancelled", "is_patient", "kind", "nbytes", "origin", "rows", "watcher"),
    )

    def __init__(
        self,
        job: Job,
        times: Times,
        clock: Callable[[], float],
        trace: tuple[Tracer, Any] | None = None,
        *,
        is_logged: bool,
    ) -> None:
        # Until it has ended: they hold each other.
        self._job: Job | None = job
        self._form: Form = job.form
        self._caller: Caller = job.caller
        self._times = times
        self._clock = clock
        self._trace = trace
        self._is_logged = is_logged
        self.kind, self.rows, self.nbytes = job.form.kind, job.form.rows, job.form.nbytes
        caller = job.caller
        self.deadline, self.is_cancelled = caller.deadline, caller.is_cancelled
        self.origin, self.is_patient = caller.origin, caller.is_patient
        self.watcher: Watcher | None = self._times.note_run
        job.form = job.caller = self

    @property
    def metadata(self) -> Metadata:
        return self._caller.metadata

    def facts(self, job: Job) -> RequestFacts:
        return self._form.facts(job)

    def deliver(self, jobs: Sequence[Job], y: Any) -> int:
        return self._form.deliver(jobs, y)

    def answer(self, message: bytes) -> Settler | None:
        settler = self._caller.answer(message)
        self._end(Status.OK)
        return settler

    def fail(self, error: BaseException) -> None:
        self._caller.fail(error)
        self._end(status_of(error))

    def _end(self, status: Status) -> None:
        job, times, self._job = self._job, self._times, None
        if job is None:
            return
        times.queued, times.ended = job.queued, self._clock()
        facts, metadata = self._form.facts(job), self._caller.metadata
        if self._is_logged and not is_fault(status):
            log_request(facts, metadata, status, times.ended - times.began)
        if self._trace is not None:
            tracer, parent = self._trace
            tracer.record(parent, facts, metadata, status, times)
