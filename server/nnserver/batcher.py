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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnserver.errors import Cancelled, Expired, QueueFull, ServerError
from nnserver.statistics import ModelStatistics

logger = logging.getLogger(__name__)

Array = NDArray[Any]


@dataclass(slots=True, eq=False)
class Job:
    """
    Rows that wait for their outputs, and who to tell.

    x: (rows, n_in) in the model's dtype, C-contiguous. *succeed* gets outputs (rows, n_out),
    a view that is good during the call only. Exactly one of *succeed* and *fail* is called, once.
    """

    x: Array
    succeed: Callable[[Array], None]
    fail: Callable[[BaseException], None]
    is_cancelled: Callable[[], bool]
    # On time.monotonic()'s clock, in seconds.
    deadline: float | None = None
    # When it was queued, on the batcher's clock; put() sets it.
    queued: float = 0.0


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
        try:
            self._put(job)
        except ServerError:
            self.statistics.note_failures(1)
            raise

    def _put(self, job: Job) -> None:
        self._refuse_if_dead(job)
        job.queued = self.clock()
        with self._lock:
            if len(self._jobs) >= self.limits.max_requests:
                raise QueueFull(
                    f"the queue of model '{self.model_name}' is full ({len(self._jobs)} requests, "
                    "max_queue_requests); try again later"
                )
            if self._jobs and self._bytes + job.x.nbytes > self.limits.max_bytes:
                raise QueueFull(
                    f"the queue of model '{self.model_name}' is full ({self._bytes} bytes of rows, "
                    "max_queue_bytes); try again later"
                )
            self._jobs.append(job)
            self._bytes += job.x.nbytes
            self._rows += len(job.x)

    def take(self) -> list[Job]:
        """
        Remove the next batch: jobs in order of arrival, together at most max_batch_rows rows.

        A single larger job comes alone. Empty when nothing waits. Jobs that expired or were
        cancelled meanwhile are failed here and are not part of the batch.
        """
        batch: list[Job] = []
        dead: list[tuple[Job, Exception]] = []
        rows = 0
        with self._lock:
            while self._jobs:
                job = self._jobs[0]
                try:
                    self._refuse_if_dead(job)
                except (Expired, Cancelled) as error:
                    dead.append((job, error))
                else:
                    if batch and rows + len(job.x) > self.limits.max_batch_rows:
                        break
                    batch.append(job)
                    rows += len(job.x)
                self._jobs.popleft()
                self._bytes -= job.x.nbytes
                self._rows -= len(job.x)
        if dead:
            now = self.clock()
            self.statistics.note_failures(len(dead), sum(now - job.queued for job, _ in dead))
        for job, reason in dead:
            fail(job, reason)
        return batch

    def _refuse_if_dead(self, job: Job) -> None:
        if job.is_cancelled():
            raise Cancelled("the call was cancelled before its rows were run")
        if job.deadline is not None and self.clock() >= job.deadline:
            raise Expired("the deadline passed before the rows were run; nothing was computed")


def fail(job: Job, error: BaseException) -> None:
    """Tell *job* that it failed; a fault of its callback stays with it."""
    try:
        job.fail(error)
    except Exception:
        logger.exception("a job could not be failed")


def gather(batch: list[Job]) -> Array:
    """Return the rows of all jobs of *batch*, in order: (rows, n_in)."""
    return batch[0].x if len(batch) == 1 else np.concatenate([job.x for job in batch])
