"""
Waiting jobs of one model in, batches out: a bounded queue.

No timer and no delay: a batch is what is waiting when the engine asks. A lone job goes at
once, and under load batches grow by themselves. Expired and cancelled jobs are failed when
they are met, before any kernel time is spent on them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nnserver.errors import Cancelled, Expired, QueueFull, ServerError
from nnserver.statistics import ModelStatistics

logger = logging.getLogger(__name__)

Array = NDArray[Any]
Rows = Array | bytes | memoryview


class Form(Protocol):
    """What jobs of one kind have in common. Jobs of one form that wait together are answered together."""

    # Of each job, and the bytes they take in the model's dtype.
    rows: int
    nbytes: int

    def deliver(self, jobs: Sequence[Job], y: Array) -> int:
        """
        Tell the callers of *jobs* their outputs; return how many could not be told.

        y: (len(jobs) * rows, n_out), in order; good during the call only. If it raises, the callers of all
        jobs are told of the error: one job's own fault is to be kept to that job.
        """


class Caller(Protocol):
    """Who waits for a job."""

    # On time.monotonic()'s clock, in seconds; None: the caller waits for ever.
    deadline: float | None

    def is_cancelled(self) -> bool:
        """Whether nobody waits any more."""

    def answer(self, message: bytes) -> Settler | None:
        """Send the answer; return who wants to be told when the others of the batch are answered, too."""

    def fail(self, error: BaseException) -> None:
        """Say that there is none."""


class Settler(Protocol):
    """Who sends several answers together."""

    def settle(self) -> None:
        """Send what has been answered."""


class Job:
    """
    Rows that wait for their outputs, and who waits for them: *caller* is told once, of one or the other.

    data: (rows, n_in) in the model's dtype, row-major: an array or its bytes.  note: what the form wants to
    know of this job.
    """

    __slots__ = ("caller", "data", "form", "note", "queued")

    def __init__(self, form: Form, data: Rows, caller: Caller, note: bytes = b"") -> None:
        self.form = form
        self.data = data
        self.caller = caller
        self.note = note
        # When it was queued, on the batcher's clock; put() sets it.
        self.queued = 0.0


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of one model's queue and of its batches."""

    max_requests: int = 4096
    max_bytes: int = 256 << 20
    max_batch_rows: int = 4096


@dataclass
class Batcher:
    """The bounded queue of one model. Methods may be called from any thread."""

    model_name: str
    limits: QueueLimits = field(default_factory=QueueLimits)
    clock: Callable[[], float] = time.monotonic
    statistics: ModelStatistics = field(default_factory=ModelStatistics)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._bytes = 0
        self._rows = 0

    def __len__(self) -> int:
        """Jobs waiting."""
        return len(self._jobs)

    @property
    def waiting_rows(self) -> int:
        """Rows waiting, over all jobs."""
        return self._rows

    def put(self, job: Job) -> None:
        """
        Queue *job*.

        Raises QueueFull at once when a bound is met, Expired or Cancelled when nobody would
        wait for the result. A job larger than the byte bound is taken when nothing else waits.
        """
        for _, error in self._put((job,)):
            raise error

    def put_all(self, jobs: Sequence[Job]) -> None:
        """Queue *jobs*; those that `put` would refuse are failed."""
        for job, error in self._put(jobs):
            fail(job, error)

    def _put(self, jobs: Sequence[Job]) -> list[tuple[Job, ServerError]]:
        """Queue *jobs*; return those that are refused, with the reason."""
        refused: list[tuple[Job, ServerError]] = []
        now = self.clock()
        queue, most_jobs, most_bytes = self._jobs, self.limits.max_requests, self.limits.max_bytes
        with self._lock:
            for job in jobs:
                form, caller = job.form, job.caller
                if caller.is_cancelled():
                    refused.append((job, _cancelled()))
                elif caller.deadline is not None and now >= caller.deadline:
                    refused.append((job, _expired()))
                elif len(queue) >= most_jobs:
                    held = f"{len(queue)} requests, max_queue_requests"
                    refused.append((job, self._is_full(held)))
                elif queue and self._bytes + form.nbytes > most_bytes:
                    refused.append((job, self._is_full(f"{self._bytes} bytes of rows, max_queue_bytes")))
                else:
                    job.queued = now
                    queue.append(job)
                    self._bytes += form.nbytes
                    self._rows += form.rows
        if refused:
            self.statistics.note_failures(len(refused))
        return refused

    def take(self, most_rows: int | None = None) -> list[Job]:
        """
        Remove the next batch: jobs in order of arrival, together at most max_batch_rows rows, or *most_rows*.

        A single larger job comes alone. Empty when nothing waits. Jobs that expired or were
        cancelled meanwhile are failed here and are not part of the batch.
        """
        batch: list[Job] = []
        dead: list[tuple[Job, ServerError]] = []
        rows = 0
        most = self.limits.max_batch_rows
        if most_rows is not None:
            most = min(most, most_rows)
        now = self.clock()
        with self._lock:
            jobs = self._jobs
            while jobs:
                job = jobs[0]
                form = job.form
                caller = job.caller
                if caller.is_cancelled():
                    dead.append((job, _cancelled()))
                elif caller.deadline is not None and now >= caller.deadline:
                    dead.append((job, _expired()))
                elif batch and rows + form.rows > most:
                    break
                else:
                    batch.append(job)
                    rows += form.rows
                jobs.popleft()
                self._bytes -= form.nbytes
                self._rows -= form.rows
        if dead:
            self.statistics.note_failures(len(dead), sum(now - job.queued for job, _ in dead))
        for job, error in dead:
            fail(job, error)
        return batch

    def _is_full(self, held: str) -> QueueFull:
        return QueueFull(f"the queue of model '{self.model_name}' is full ({held}); try again later")


def _cancelled() -> Cancelled:
    return Cancelled("the call was cancelled before its rows were run")


def _expired() -> Expired:
    return Expired("the deadline passed before the rows were run; nothing was computed")


def fail(job: Job, error: BaseException) -> None:
    """Tell *job*'s caller that it failed; a fault of the caller's stays with it."""
    try:
        job.caller.fail(error)
    except Exception:
        logger.exception("a job could not be failed")


def gather(batch: Sequence[Job], n_in: int, dtype: np.dtype[Any]) -> Array:
    """Return the rows of all jobs of *batch*, in order: (rows, n_in) of *dtype*."""
    # join takes arrays, too, whatever its type says.
    data = batch[0].data if len(batch) == 1 else b"".join([job.data for job in batch])  # type: ignore[misc]
    rows: Array = np.frombuffer(data, dtype).reshape(-1, n_in)
    return rows
