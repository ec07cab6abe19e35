"""
Waiting batches in, outputs delivered: runs kernels, at once where that is cheap.

Whoever calls *run_waiting* runs the first waiting batch of each model itself: no hand-off
to another thread, which costs more than a small kernel does. If more is waiting after that,
a kernel thread goes on with it, so that no caller is kept from its own work; and a caller that
cannot wait, an event loop, hands over every batch that is estimated to take long. Kernel threads
give the models turns, a batch each. Kernels run without the GIL.

A model whose batches are short is run by one thread at a time: what arrives meanwhile makes
the next batch. From *PARALLEL_FROM_S* of estimated work up, further threads take batches of
the same model.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnserver.batcher import Batcher, Job, fail, gather
from nnserver.call import is_late
from nnserver.errors import Cancelled, Expired, KernelFault, Status, status_of
from nnserver.statistics import ModelStatistics

logger = logging.getLogger(__name__)

Array = NDArray[Any]

# Waking an idle thread costs about 100 us: below twice that, a second thread slows things down.
PARALLEL_FROM_S = 200e-6
# What a batch may take, about, so that a model whose batches are long does not keep the others waiting.
TURN_S = 20e-3
# From this time on it pays to look who has gone while a batch was run, and to learn what a row costs in all.
LONG_S = 1e-3
# Larger batches of a model are hardly quicker a row: the float32 kernels go through its weights once for
# each group of this many.
GROUP_ROWS = 192

_form_of, _queued = attrgetter("form"), attrgetter("queued")


@dataclass(eq=False)
class Lane:
    """One model's way through the engine: its queue, its kernel and who is running it."""

    batcher: Batcher
    # (rows, n_in) -> (rows, n_out), or what else gives rows for [start:stop] and [indices]; must be safe to
    # call from several threads.
    forward: Callable[[Array], Any]
    n_in: int
    dtype: np.dtype[Any]
    runners: int = 0
    # Smoothed kernel time a row, in seconds; 0 until measured or estimated.
    row_cost_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def rows_of_a_turn(self) -> int | None:
        """Rows of a batch that takes about TURN_S; None as long as it is not known what one costs."""
        return max(GROUP_ROWS, int(TURN_S / self.row_cost_s)) if self.row_cost_s else None

    def note_cost(self, rows: int, elapsed_s: float) -> None:
        cost = elapsed_s / max(rows, 1)
        self.row_cost_s = cost if self.row_cost_s == 0.0 else 0.9 * self.row_cost_s + 0.1 * cost


class Engine:
    """
    Runs the lanes' batches. Methods may be called from any thread.

    inline_limit_s: the longest batch, in estimated seconds, that run_waiting runs in its caller's thread.
    """

    def __init__(self, threads: int, inline_limit_s: float = math.inf) -> None:
        self._threads = threads
        self._inline_limit_s = inline_limit_s
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="nnserver-kernel")
        self._lock = threading.Lock()
        self._waiting: dict[Lane, None] = {}
        # Lanes that wait for a kernel thread. The pool was given one call of _take_turns for each.
        self._turns: deque[Lane] = deque()

    def submit(self, lane: Lane, job: Job) -> None:
        """Queue *job*; a later run_waiting runs it. Raises what Batcher.put raises."""
        lane.batcher.put(job)
        self._note_waiting(lane)

    def submit_all(self, lane: Lane, jobs: Sequence[Job]) -> None:
        """Queue *jobs*; a later run_waiting runs them. Those that submit would refuse are failed."""
        lane.batcher.put_all(jobs)
        self._note_waiting(lane)

    def _note_waiting(self, lane: Lane) -> None:
        # Who takes the lane out of it after this look finds the job: it was put before.
        if lane not in self._waiting:
            with self._lock:
                self._waiting[lane] = None

    def run_waiting(self) -> bool:
        """
        Run, or see to it that another thread runs, everything that is waiting.

        Return whether other threads are at it.
        """
        if not self._waiting:
            return False
        with self._lock:
            lanes = list(self._waiting)
            self._waiting.clear()
        others_run = False
        for lane in lanes:
            if not self._enter(lane):
                others_run = True
                continue
            if lane.row_cost_s * lane.batcher.waiting_rows <= self._inline_limit_s:
                self._run_batch(lane)
            others_run |= self._go_on(lane)
        return others_run

    def close(self) -> None:
        """Wait for running batches and end the kernel threads."""
        self._pool.shutdown(wait=True)

    def _enter(self, lane: Lane) -> bool:
        """Whether the caller becomes a runner of *lane*."""
        with lane.lock:
            if lane.runners and not self._pays_in_parallel(lane):
                return False
            lane.runners += 1
            return True

    def _pays_in_parallel(self, lane: Lane) -> bool:
        if lane.runners >= self._threads:
            return False
        return lane.row_cost_s * lane.batcher.waiting_rows >= PARALLEL_FROM_S

    def _go_on(self, lane: Lane) -> bool:
        """Leave *lane*, or hand it over to a kernel thread if more is waiting; return whether it was."""
        with lane.lock:
            # Under the lane's lock: a job queued after this look finds runners lowered, and
            # one queued before it is seen here, so none is left behind.
            if not len(lane.batcher):
                lane.runners -= 1
                return False
        self._turns.append(lane)
        self._pool.submit(self._take_turns)
        return True

    def _take_turns(self) -> None:
        """Run batches of the lane whose turn it is, until a lane is empty."""
        lane = self._turns.popleft()
        while True:
            self._run_batch(lane)
            with lane.lock:
                if not len(lane.batcher):
                    lane.runners -= 1
                    return
            # Without this look, a lane that never empties would keep the thread for itself. Handing
            # every batch to the pool instead would wake another thread for each.
            if self._turns:
                self._turns.append(lane)
                lane = self._turns.popleft()

    def _run_batch(self, lane: Lane) -> None:
        """Run one batch; a fault fails its jobs and nobody else's."""
        batch = lane.batcher.take(lane.rows_of_a_turn())
        if not batch:
            return
        clock, statistics = lane.batcher.clock, lane.batcher.statistics
        taken = clock()
        queued = list(map(_queued, batch))
        try:
            x = gather(batch, lane.n_in, lane.dtype)
            started = clock()
            y = lane.forward(x)
            computed = clock()
        except Exception:
            rows = sum(job.form.rows for job in batch)
            name = lane.batcher.model_name
            logger.exception("kernel failed model=%s jobs=%d rows=%d", name, len(batch), rows)
            waited_s = sum(taken - moment for moment in queued)
            statistics.note_failures(len(batch), waited_s, were_taken=True)
            for job in batch:
                _fail(statistics, job, KernelFault())
            return
        rows = len(x)
        lane.note_cost(rows, computed - started)
        tally = statistics.note_batch(queued, taken, rows, started - taken, computed - started)
        start = unanswered = 0
        answered: list[tuple[str, int]] = []
        was_late = False
        if computed - taken > LONG_S:
            living, y = _drop_dead(statistics, batch, y, computed)
            unanswered = len(batch) - len(living)
            if unanswered:
                was_late = any(is_late(job.caller.deadline, computed) for job in {*batch} - {*living})
            batch = living
        for form, group in groupby(batch, _form_of):
            jobs = list(group)
            stop = start + len(jobs) * form.rows
            if form.watcher is not None:
                form.watcher(taken, started, computed)
            try:
                failed = form.deliver(jobs, y[start:stop])
                if statistics.is_detailed:
                    answered.append((form.kind, len(jobs) - failed))
                    for _ in range(failed):
                        statistics.note_failed(form.kind, Status.INTERNAL)
            except Exception as error:
                failed = len(jobs)
                for job in jobs:
                    _fail(statistics, job, error)
            start = stop
            unanswered += failed
        ended = clock()
        statistics.note_output(tally, ended - computed, unanswered, answered)
        if ended - taken > LONG_S:
            lane.batcher.note_run(rows, ended - taken, was_late)


def _fail(statistics: ModelStatistics, job: Job, error: Exception) -> None:
    """Tell *job*'s caller that it failed, and count that where statistics are detailed."""
    if statistics.is_detailed:
        statistics.note_failed(job.form.kind, status_of(error))
    fail(job, error)


def _drop_dead(statistics: ModelStatistics, batch: list[Job], y: Any, now: float) -> tuple[list[Job], Any]:
    """Return the jobs of *batch* that somebody still waits for, and their rows of *y*; fail the others."""
    living = []
    kept: list[int] = []
    start = 0
    for job in batch:
        stop = start + job.form.rows
        deadline = job.caller.deadline
        if deadline is not None and now >= deadline:
            _fail(statistics, job, Expired("the deadline passed while the rows were run"))
        elif job.caller.is_cancelled():
            _fail(statistics, job, Cancelled("the call was cancelled while its rows were run"))
        else:
            living.append(job)
            kept += range(start, stop)
        start = stop
    return (batch, y) if len(living) == len(batch) else (living, y[np.array(kept, np.intp)])
