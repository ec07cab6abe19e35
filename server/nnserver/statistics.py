"""
Batches and failures of one model in, running totals out: how many, and where their time went.

A request's time has four parts: it waits in the queue, its rows are gathered into a batch (input), the
kernel runs (infer), its answer is made and handed to the transport (output). Every request of a batch
is charged with the batch's whole input and infer time, as Triton's statistics do; a batch itself counts
them once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

# Batch sizes that are told apart: what clients send chooses them, and memory is bounded.
MAX_BATCH_SIZES = 1024


@dataclass(frozen=True, slots=True)
class Duration:
    """So many times, together so long."""

    count: int
    ns: int


@dataclass(slots=True)
class Tally:
    """What is known of the batches of one size; times in seconds."""

    batches: int = 0
    jobs: int = 0
    rows: int = 0
    # Of the batches.
    input_s: float = 0.0
    infer_s: float = 0.0
    output_s: float = 0.0
    # Of their jobs: each has its own wait, and the whole of its batch's input and infer time.
    jobs_queued_s: float = 0.0
    jobs_input_s: float = 0.0
    jobs_infer_s: float = 0.0

    def add(self, other: Tally) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """Executions of one batch size."""

    input: Duration
    infer: Duration
    output: Duration


@dataclass(frozen=True, slots=True)
class Totals:
    """Everything since the model was loaded."""

    # Rows that were computed, and kernel runs that computed them.
    rows: int
    executions: int
    # Milliseconds since the epoch; 0: never.
    last_inference_ms: int
    success: Duration
    fail: Duration
    queue: Duration
    input: Duration
    infer: Duration
    output: Duration
    # By rows of the batch; the first MAX_BATCH_SIZES sizes that were seen.
    batches: dict[int, BatchTimes]


class ModelStatistics:
    """
    The totals of one model. Methods may be called from any thread.

    Noting a batch is on every request's way: a lock and ten additions, under 1 us; sums are made when asked.
    """

    def __init__(self, wall_clock: Callable[[], float] = time.time) -> None:
        self._wall_clock = wall_clock
        self._lock = threading.Lock()
        self._by_rows: dict[int, Tally] = {}
        self._other_sizes = Tally()
        self._last_inference_s = 0.0
        self._failures = 0
        self._failures_s = 0.0

    def note_batch(self, jobs: int, rows: int, queued_s: float, input_s: float, infer_s: float) -> Tally:
        """
        Count a batch whose rows are computed: before it is answered, so that who asks next finds it.

        queued_s: the sum of what its jobs waited. Returns what note_output wants.
        """
        with self._lock:
            tally = self._by_rows.get(rows)
            if tally is None:
                tally = self._new_tally(rows)
            tally.batches += 1
            tally.jobs += jobs
            tally.rows += rows
            tally.input_s += input_s
            tally.infer_s += infer_s
            tally.jobs_queued_s += queued_s
            tally.jobs_input_s += jobs * input_s
            tally.jobs_infer_s += jobs * infer_s
            self._last_inference_s = self._wall_clock()
        return tally

    def note_output(self, tally: Tally, output_s: float, unanswered: int) -> None:
        """Add the time it took to answer a batch; *unanswered* of its jobs failed in that."""
        with self._lock:
            tally.output_s += output_s
            tally.jobs -= unanswered
            self._failures += unanswered

    def note_failures(self, count: int, waited_s: float = 0.0) -> None:
        """Count requests that were refused by the queue, expired, were cancelled or met a fault."""
        with self._lock:
            self._failures += count
            self._failures_s += waited_s

    def totals(self) -> Totals:
        """Return everything so far, all of one moment."""
        with self._lock:
            total = Tally()
            for tally in (*self._by_rows.values(), self._other_sizes):
                total.add(tally)
            return Totals(
                rows=total.rows,
                executions=total.batches,
                last_inference_ms=round(self._last_inference_s * 1e3),
                success=_duration(
                    total.jobs,
                    total.jobs_queued_s + total.jobs_input_s + total.jobs_infer_s + total.output_s,
                ),
                fail=_duration(self._failures, self._failures_s),
                queue=_duration(total.jobs, total.jobs_queued_s),
                input=_duration(total.jobs, total.jobs_input_s),
                infer=_duration(total.jobs, total.jobs_infer_s),
                output=_duration(total.jobs, total.output_s),
                batches={
                    rows: BatchTimes(
                        input=_duration(tally.batches, tally.input_s),
                        infer=_duration(tally.batches, tally.infer_s),
                        output=_duration(tally.batches, tally.output_s),
                    )
                    for rows, tally in sorted(self._by_rows.items())
                },
            )

    def _new_tally(self, rows: int) -> Tally:
        if len(self._by_rows) >= MAX_BATCH_SIZES:
            return self._other_sizes
        self._by_rows[rows] = tally = Tally()
        return tally


def _duration(count: int, seconds: float) -> Duration:
    return Duration(count, round(seconds * 1e9))
