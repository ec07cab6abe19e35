"""
Batches and failures of one model in, running totals out: how many, and where their time went.

A request's time has four parts: it waits in the queue, its rows are gathered into a batch (input), the
kernel runs (infer), its answer is made and handed to the transport (output). Every request of a batch
is charged with the batch's whole input and infer time, as Triton's statistics do; a batch itself counts
them once.

Where metrics are asked for, the statistics are *detailed*: what became of requests is counted by kind and
status, too, and their times are told apart by buckets. The sums are the same ones.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nnserver.errors import Status

# Upper bounds of the buckets of times, in seconds, and of rows of a batch; one more bucket is beyond them.
SECONDS = (
    *(10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6),
    *(1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3),
    *(1.0, 2.5, 5.0, 10.0),
)
ROWS = tuple(2**i for i in range(13))

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


@dataclass(frozen=True, slots=True)
class Distribution:
    """Observations in each bucket, the last of them beyond all bounds; and the sum of what was observed."""

    counts: tuple[int, ...]
    sum: float


# What became of a request: its kind, and the status it was answered with.
Outcome = tuple[str, Status]


@dataclass(frozen=True, slots=True)
class Details:
    """Everything since the model was loaded, in the detail of metrics; times in seconds."""

    outcomes: dict[Outcome, int]
    # Of batches.
    batch_rows: Distribution
    compute: Distribution
    encode: Distribution
    # Of requests.
    decode: Distribution
    queue: Distribution


class _Buckets:
    """Observations of times, by bucket."""

    __slots__ = ("compute", "decode", "encode", "queue")

    def __init__(self) -> None:
        self.decode, self.queue, self.compute, self.encode = (
            [0] * (len(SECONDS) + 1) for _ in self.__slots__
        )


class ModelStatistics:
    """
    The totals of one model. Methods may be called from any thread.

    Noting a batch is on every request's way: a lock and ten additions, under 1 us; sums are made when asked.
    *is_detailed* adds to each note a few tenths of a microsecond.
    """

    def __init__(self, wall_clock: Callable[[], float] = time.time, *, is_detailed: bool = False) -> None:
        self._wall_clock = wall_clock
        self.is_detailed = is_detailed
        self._lock = threading.Lock()
        self._by_rows: dict[int, Tally] = {}
        # By the bucket of their rows.
        self._other_sizes: defaultdict[int, Tally] = defaultdict(Tally)
        self._last_inference_s = 0.0
        self._failures = 0
        self._failures_s = 0.0
        # Jobs that were taken for a batch, and those of batches that came to their end, good or bad.
        self._taken = 0
        self._finished = 0
        self._buckets = _Buckets()
        self._decode_s = 0.0
        # By kind: answered, and failed by status, too. One dictionary would cost the hash of a status.
        self._answered: dict[str, int] = {}
        self._failed: Counter[Outcome] = Counter()

    def note_batch(
        self, queued: Sequence[float], taken: float, rows: int, input_s: float, infer_s: float
    ) -> Tally:
        """
        Count a batch whose rows are computed: before it is answered, so that who asks next finds it.

        queued: when each of its jobs was.  taken: when all of them were taken from the queue, on the same
        clock. Returns what note_output wants.
        """
        jobs = len(queued)
        queued_s = jobs * taken - sum(queued)
        with self._lock:
            tally = self._by_rows.get(rows)
            if tally is None:
                tally = self._new_tally(rows)
            if self.is_detailed:
                buckets = self._buckets
                buckets.compute[bisect_left(SECONDS, infer_s)] += 1
                if queued.count(queued[0]) == jobs:  # All of one tick.
                    buckets.queue[bisect_left(SECONDS, taken - queued[0])] += jobs
                else:
                    for moment, count in Counter(queued).items():
                        buckets.queue[bisect_left(SECONDS, taken - moment)] += count
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

    def note_output(
        self, tally: Tally, output_s: float, unanswered: int, answered: Iterable[tuple[str, int]] = ()
    ) -> None:
        """
        Add the time it took to answer a batch; *unanswered* of its jobs failed in that.

        answered: kinds of its other jobs, and how many were of each; for detailed statistics.
        """
        with self._lock:
            tally.output_s += output_s
            tally.jobs -= unanswered
            self._failures += unanswered
            if self.is_detailed:
                self._finished += unanswered
                self._buckets.encode[bisect_left(SECONDS, output_s)] += 1
                for kind, count in answered:
                    self._finished += count
                    self._answered[kind] = self._answered.get(kind, 0) + count

    def note_failures(self, count: int, waited_s: float = 0.0, *, were_taken: bool = False) -> None:
        """
        Count requests that were refused by the queue, expired, were cancelled or met a fault.

        were_taken: for a batch, which came to nothing.
        """
        with self._lock:
            if were_taken:
                self._finished += count
            self._failures += count
            self._failures_s += waited_s

    def note_failed(self, kind: str, status: Status) -> None:
        """Count a request by its failure, before it was queued or after; for detailed statistics."""
        with self._lock:
            self._failed[kind, status] += 1

    def note_decoded(self, count: int, seconds: float) -> None:
        """Count requests that were decoded together, *seconds* each; for detailed statistics."""
        with self._lock:
            self._buckets.decode[bisect_left(SECONDS, seconds)] += count
            self._decode_s += count * seconds

    def totals(self) -> Totals:
        """Return everything so far, all of one moment."""
        with self._lock:
            total = self._total()
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

    def note_taken(self, count: int) -> None:
        """Count requests that were taken for a batch; for detailed statistics."""
        with self._lock:
            self._taken += count

    def running(self) -> int:
        """Return how many requests were taken for a batch that has not come to its end; detailed."""
        with self._lock:
            return self._taken - self._finished

    def details(self) -> Details:
        """Return everything so far, all of one moment; for detailed statistics."""
        with self._lock:
            total, buckets = self._total(), self._buckets
            batch_rows = [0] * (len(ROWS) + 1)
            for rows, tally in self._by_rows.items():
                batch_rows[bisect_left(ROWS, rows)] += tally.batches
            for bucket, tally in self._other_sizes.items():
                batch_rows[bucket] += tally.batches
            return Details(
                outcomes={(kind, Status.OK): count for kind, count in self._answered.items()} | self._failed,
                batch_rows=Distribution(tuple(batch_rows), total.rows),
                compute=Distribution(tuple(buckets.compute), total.infer_s),
                encode=Distribution(tuple(buckets.encode), total.output_s),
                decode=Distribution(tuple(buckets.decode), self._decode_s),
                queue=Distribution(tuple(buckets.queue), total.jobs_queued_s),
            )

    def _total(self) -> Tally:
        total = Tally()
        for tally in (*self._by_rows.values(), *self._other_sizes.values()):
            total.add(tally)
        return total

    def _new_tally(self, rows: int) -> Tally:
        if len(self._by_rows) >= MAX_BATCH_SIZES:
            return self._other_sizes[bisect_left(ROWS, rows)]
        self._by_rows[rows] = tally = Tally()
        return tally


def _duration(count: int, seconds: float) -> Duration:
    return Duration(count, round(seconds * 1e9))
