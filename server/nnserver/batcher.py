"""
Waiting jobs of one model in, batches out: a bounded queue.

No timer and no delay: a batch is what is waiting when the engine asks. A lone job goes at
once, and under load batches grow by themselves. Expired and cancelled jobs are failed when
they are met, before any kernel time is spent on them.

What the queue cannot hold, or could not run in time, is refused at once with the time after which to try
again. When it is full, the connection that has most waiting loses its newest job to one that has less.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nnserver.access_log import RequestFacts, is_fault, log_request
from nnserver.call import Metadata, is_late
from nnserver.errors import Cancelled, Expired, NotInTime, QueueFull, ServerError, status_of
from nnserver.fair_queue import FairQueue, Share
from nnserver.statistics import ModelStatistics

logger = logging.getLogger(__name__)

# What a batch of fewer rows takes is not theirs: calls and answers, or a moment in which the processor was
# another's. As the price of a row it would have thousands of rows that take milliseconds refused as seconds.
_FEW_ROWS = 192

Array = NDArray[Any]
Rows = Array | bytes | memoryview


# Is told when a batch was taken, when its kernel started, and when it had computed the rows.
Watcher = Callable[[float, float, float], None]


class Form(Protocol):
    """What jobs of one kind have in common. Jobs of one form that wait together are answered together."""

    # Of each job, and the bytes they take in the model's dtype.
    rows: int
    nbytes: int
    # How the requests came: what metrics call their kind.
    kind: str
    # Who wants to hear of the batch, if anybody does.
    watcher: Watcher | None

    def facts(self, job: Job) -> RequestFacts:
        """Return what a log may say of *job*."""

    def deliver(self, jobs: Sequence[Job], y: Any) -> int:
        """
        Tell the callers of *jobs* their outputs; return how many could not be told.

        y: (len(jobs) * rows, n_out), in order, or what else the lane's kernel gives for so many rows; good
        during the call only. If it raises, the callers of all jobs are told of the error: one job's own
        fault is to be kept to that job.
        """


class Caller(Protocol):
    """Who waits for a job."""

    # On time.monotonic()'s clock, in seconds; None: the caller waits for ever.
    deadline: float | None
    # Whose turns its jobs take: those of one connection have the same.
    origin: Hashable
    # Whether its sender is held back while it waits, as a stream's is: its wait is not bounded.
    is_patient: bool

    @property
    def metadata(self) -> Metadata:
        """What its call came with."""

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


# A job that nothing is run for, and what its caller is told.
Refusal = tuple[Job, ServerError]

# What there would be too much of: by share of a connection, of the job in question, and in words.
Bound = tuple[Callable[[Share], int], int, str]

# Bounds of the pause that a refused caller is told: to wake up a client sooner is no use, and what was
# measured says little of what comes later.
_LEAST_HINT_S, _MOST_HINT_S = 1e-3, 10.0


class QueueTotal:
    """
    What waits in the queues of all models together, and the most that may.

    A model for which nothing waits may always have one request waiting, so that a busy one cannot shut the
    others out.
    """

    def __init__(self, max_requests: int = 16384, max_bytes: int = 512 << 20) -> None:
        self.max_requests = max_requests
        self.max_bytes = max_bytes
        self.requests = 0
        self.nbytes = 0
        # Inside of a queue's own.
        self.lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """Bounds of one model's queue and of its batches; *total*: of all models' queues."""

    max_requests: int = 4096
    max_bytes: int = 256 << 20
    max_batch_rows: int = 4096
    max_rows: int = 1 << 20
    # Of the wait that a request would have to expect.
    max_wait_s: float = math.inf
    total: QueueTotal = field(default_factory=QueueTotal, compare=False)


@dataclass(eq=False)
class Batcher:
    """The bounded queue of one model. Methods may be called from any thread."""

    model_name: str
    limits: QueueLimits = field(default_factory=QueueLimits)
    clock: Callable[[], float] = time.monotonic
    statistics: ModelStatistics = field(default_factory=ModelStatistics)
    # Further queues of the same model, whose requests are counted in the same statistics.
    siblings: Iterable[Batcher] = ()

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._queue = FairQueue()
        self._bytes = 0
        self._rows = 0
        # Smoothed time that a waiting row makes those behind it wait, in seconds; 0 until measured.
        self._row_s = 0.0
        # When a batch was taken that left jobs behind, and its rows; 0: the last one left none.
        self._left_at = 0.0
        self._left_rows = 0
        # Rows of the batch that was taken last, and when it is likely to be answered; 0 until measured.
        self._batch_rows = 0
        self._busy_until = 0.0
        # By how much a request with a deadline is taken to need longer than was measured: see _note_late.
        self._caution = 1.0

    def __len__(self) -> int:
        """Jobs waiting."""
        queue = self._queue
        return len(queue.arrived) + queue.sorted

    @property
    def waiting_rows(self) -> int:
        """Rows waiting, over all jobs."""
        return self._rows

    def in_flight(self) -> int:
        """Jobs that wait or are being run; where statistics are detailed."""
        return self.statistics.running() + len(self)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of rows waiting, over all jobs."""
        return self._bytes

    def put(self, job: Job) -> None:
        """
        Queue *job*.

        Raises QueueFull at once when a bound is met or the wait would be too long, Expired or Cancelled when
        nobody would wait for the result. A job larger than the bounds is taken when nothing else waits.
        """
        error = None
        for other, reason in self._put((job,)):
            if other is job:
                error = reason
            else:
                fail(other, reason)
        if error is not None:
            raise error

    def put_all(self, jobs: Sequence[Job]) -> None:
        """Queue *jobs*; those that `put` would refuse are failed."""
        for job, error in self._put(jobs):
            fail(job, error)

    def _put(self, jobs: Sequence[Job]) -> list[Refusal]:
        """Queue *jobs*; return those that are refused, and those that had to make room, with the reason."""
        refused: list[Refusal] = []
        now = self.clock()
        row_s = self._row_s
        append = self._queue.arrived.append
        total = self.limits.total
        with self._lock, total.lock:
            jobs_room, bytes_room, rows_room = room = self._room(now)
            needed_s = self._needed_s(self._rows, now) if row_s else 0.0
            for job in jobs:
                form, caller = job.form, job.caller
                deadline = caller.deadline
                if caller.is_cancelled():
                    refused.append((job, _cancelled()))
                elif (
                    jobs_room > 0
                    and form.nbytes <= bytes_room
                    and form.rows <= rows_room
                    and (deadline is None or now + needed_s < deadline)
                ):
                    job.queued = now
                    append(job)
                    jobs_room -= 1
                    bytes_room -= form.nbytes
                    rows_room -= form.rows
                    needed_s += row_s * form.rows
                else:
                    self._count(room[0] - jobs_room, room[1] - bytes_room, room[2] - rows_room)
                    self._squeeze_in(job, now, refused)
                    jobs_room, bytes_room, rows_room = room = self._room(now)
                    needed_s = self._needed_s(self._rows, now) if row_s else 0.0
            # _count, which is on the way of each request.
            bytes_added = room[1] - bytes_room
            self._bytes += bytes_added
            self._rows += room[2] - rows_room
            total.requests += room[0] - jobs_room
            total.nbytes += bytes_added
        if refused:
            self.statistics.note_failures(len(refused))
            self._note_failed(refused)
        return refused

    def _room(self, now: float) -> tuple[int, int, int]:
        """Return how many requests, bytes and rows are taken without another look."""
        # Comparisons, because calls of min() would double the price of a lone request's way through here.
        limits, queue = self.limits, self._queue
        total = limits.total
        jobs_room = limits.max_requests - len(queue.arrived) - queue.sorted
        if total.max_requests - total.requests < jobs_room:
            jobs_room = total.max_requests - total.requests
        bytes_room = limits.max_bytes - self._bytes
        if total.max_bytes - total.nbytes < bytes_room:
            bytes_room = total.max_bytes - total.nbytes
        max_rows = limits.max_rows
        if self._row_s * max_rows > limits.max_wait_s:
            max_rows = int((limits.max_wait_s - self._running_s(now)) / self._row_s)
        return jobs_room, bytes_room, max_rows - self._rows

    def _count(self, requests: int, nbytes: int, rows: int) -> None:
        self._bytes += nbytes
        self._rows += rows
        total = self.limits.total
        total.requests += requests
        total.nbytes += nbytes

    def _squeeze_in(self, job: Job, now: float, refused: list[Refusal]) -> None:
        """Queue *job* if its connection has less than others, which may lose theirs; or say why not."""
        form, caller, queue = job.form, job.caller, self._queue
        if caller.deadline is not None and now >= caller.deadline:
            refused.append((job, _expired()))
            return
        wait_s = 0.0
        if queue:
            own, before = queue.rows_before(caller.origin, form.rows)
            wait_s = self._row_s * before
            if own:  # Whoever has nothing waiting is not refused for what runs already.
                wait_s += self._running_s(now)
            needed_s = self._needed_s(before, now)
            if caller.deadline is not None and now + needed_s >= caller.deadline:
                why = f"{1e3 * needed_s:.0f} ms of work, more than the deadline allows"
                refused.append((job, self._is_full(why, wait_s, NotInTime)))
                return
            if wait_s > self.limits.max_wait_s and not caller.is_patient:
                refused.append((job, self._is_full(f"{1e3 * wait_s:.0f} ms of work, max_queue_ms", wait_s)))
                return
        while (bound := self._bound_met(form)) is not None:
            held, amount, why = bound
            shed = queue.shed_for(caller.origin, amount, held) if queue else None
            if shed is None:
                refused.append((job, self._is_full(why, wait_s)))
                return
            self._count(-1, -shed.form.nbytes, -shed.form.rows)
            refused.append((shed, self._is_full(f"{why}; others have less waiting", wait_s)))
        job.queued = now
        queue.arrived.append(job)
        self._count(1, form.nbytes, form.rows)

    def _bound_met(self, form: Form) -> Bound | None:
        """Return what there would be too much of with a job of *form*."""
        limits, total, waiting = self.limits, self.limits.total, len(self._queue)
        if waiting >= limits.max_requests:
            return requests_of, 1, f"{waiting} requests, max_queue_requests"
        if not waiting:
            return None
        if self._rows + form.rows > limits.max_rows:
            return rows_of, form.rows, f"{self._rows} rows, max_queue_rows"
        if self._bytes + form.nbytes > limits.max_bytes:
            return bytes_of, form.nbytes, f"{self._bytes} bytes of rows, max_queue_bytes"
        if total.requests >= total.max_requests:
            return requests_of, 1, f"{total.requests} requests for all models, max_total_queue_requests"
        if total.nbytes + form.nbytes > total.max_bytes:
            return bytes_of, form.nbytes, f"{total.nbytes} bytes for all models, max_total_queue_bytes"
        return None

    def _running_s(self, now: float) -> float:
        """Return what is left of the batch that runs."""
        return max(0.0, self._busy_until - now)

    def _needed_s(self, rows_before: int, now: float) -> float:
        """Return the time until a job behind so many rows is answered: with its batch, not before."""
        rows = max(rows_before, self._batch_rows)
        return self._caution * (self._running_s(now) + self._row_s * rows)

    def take(self, most_rows: int | None = None) -> list[Job]:
        """
        Remove the next batch: at most max_batch_rows rows, or *most_rows*.

        All that waits, if it is no more than that, in order of arrival; else connections take turns, see
        FairQueue. A single larger job comes alone. Empty when nothing waits. Jobs that expired or were
        cancelled meanwhile are failed here and are not part of the batch.
        """
        most = self.limits.max_batch_rows
        if most_rows is not None:
            most = min(most, most_rows)
        now = self.clock()
        dead: list[Refusal] = []
        with self._lock:
            before = self._bytes
            batch = self._take_all(now, dead) if self._rows <= most else self._take_turns(most, now, dead)
            taken = len(batch) + len(dead)
            if taken:
                total = self.limits.total
                with total.lock:
                    total.requests -= taken
                    total.nbytes -= before - self._bytes
            if self.statistics.is_detailed:
                self.statistics.note_taken(len(batch))
        if dead:
            self._note_late(any(is_late(job.caller.deadline, now) for job, _ in dead))
            self.statistics.note_failures(len(dead), sum(now - job.queued for job, _ in dead))
            self._note_failed(dead)
        for job, error in dead:
            fail(job, error)
        return batch

    def _take_all(self, now: float, dead: list[Refusal]) -> list[Job]:
        batch, rows = self._queue.pop_all(), self._rows
        self._bytes = self._rows = self._left_rows = 0
        for job in batch:
            caller = job.caller
            if caller.is_cancelled() or (caller.deadline is not None and now >= caller.deadline):
                batch = [job for job in batch if not self._is_dead(job, now, dead)]
                rows = sum(job.form.rows for job in batch)
                break
        if self._row_s and batch:
            self._note_taken(rows, now)
        return batch

    def _take_turns(self, most: int, now: float, dead: list[Refusal]) -> list[Job]:
        queue = self._queue
        batch: list[Job] = []
        rows = 0
        while (job := queue.head()) is not None:
            form = job.form
            is_dead = self._is_dead(job, now, dead)
            if not is_dead:
                if batch and rows + form.rows > most:
                    break
                batch.append(job)
                rows += form.rows
            queue.pop(is_served=not is_dead)
            self._bytes -= form.nbytes
            self._rows -= form.rows
        # From one batch that leaves jobs behind to the next: kernels, answers and other models' turns.
        if self._left_rows:
            self._note_pace(now - self._left_at, self._left_rows)
        self._left_at, self._left_rows = now, rows if queue else 0
        if batch:
            self._note_taken(rows, now)
        return batch

    def _is_dead(self, job: Job, now: float, dead: list[Refusal]) -> bool:
        """Whether nobody waits for *job* any more; then it goes to *dead*."""
        # In this order: a transport that has met the deadline first has cancelled the call, too.
        if job.caller.deadline is not None and now >= job.caller.deadline:
            dead.append((job, _expired()))
        elif job.caller.is_cancelled():
            dead.append((job, _cancelled()))
        else:
            return False
        return True

    def _note_failed(self, failed: Sequence[Refusal]) -> None:
        if self.statistics.is_detailed:
            for job, error in failed:
                self.statistics.note_failed(job.form.kind, error.status)

    def note_run(self, rows: int, elapsed_s: float, was_late: bool = False) -> None:
        """
        Learn from a batch of *rows* rows what those that wait have to expect, unless waiting has told.

        was_late: it was not ready by the deadline of one of its jobs.
        """
        with self._lock:
            self._busy_until = 0.0
            self._note_late(was_late)
            if rows and not self._left_rows:
                self._note_pace(elapsed_s, rows)

    def _note_taken(self, rows: int, now: float) -> None:
        self._batch_rows = rows
        self._busy_until = now + self._row_s * rows

    def _note_late(self, was_late: bool) -> None:
        # Up quickly, down slowly: a request that is late has cost the time of two that were not.
        self._caution = min(1.25 * self._caution, 4.0) if was_late else max(0.99 * self._caution, 1.0)

    def _note_pace(self, elapsed_s: float, rows: int) -> None:
        row_s = elapsed_s / max(rows, min(_FEW_ROWS, self.limits.max_batch_rows))
        self._row_s = 0.8 * self._row_s + 0.2 * row_s if self._row_s else row_s

    def _is_full(self, held: str, wait_s: float, kind: type[QueueFull] = QueueFull) -> QueueFull:
        return kind(
            f"the queue of model '{self.model_name}' is full ({held}); try again later",
            # When what waits has been run, there is room.
            min(max(wait_s, _LEAST_HINT_S), _MOST_HINT_S),
        )


def requests_of(share: Share) -> int:
    return len(share.jobs)


def rows_of(share: Share) -> int:
    return share.rows


def bytes_of(share: Share) -> int:
    return share.nbytes


def _cancelled() -> Cancelled:
    return Cancelled("the call was cancelled before its rows were run")


def _expired() -> Expired:
    return Expired("the deadline passed before the rows were run; nothing was computed")


def fail(job: Job, error: BaseException) -> None:
    """
    Tell *job*'s caller that it failed, and the access log if that is our fault.

    A fault of the caller's stays with it.
    """
    try:
        if is_fault(status := status_of(error)):
            log_request(job.form.facts(job), job.caller.metadata, status, time.monotonic() - job.queued)
        job.caller.fail(error)
    except Exception:
        logger.exception("a job could not be failed")


def gather(batch: Sequence[Job], n_in: int, dtype: np.dtype[Any]) -> Array:
    """Return the rows of all jobs of *batch*, in order: (rows, n_in) of *dtype*."""
    # join takes arrays, too, whatever its type says.
    data = batch[0].data if len(batch) == 1 else b"".join([job.data for job in batch])  # type: ignore[misc]
    rows: Array = np.frombuffer(data, dtype).reshape(-1, n_in)
    return rows
