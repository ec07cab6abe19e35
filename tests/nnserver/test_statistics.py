"""ModelStatistics: counts and nanoseconds, as the batcher and the engine note them."""

import numpy as np
import pytest
from support.jobs import RecordedJob, job_of

from nnserver.batcher import Batcher, QueueLimits
from nnserver.engine import Engine, Lane
from nnserver.errors import Cancelled, Expired, KernelFault, QueueFull, Status
from nnserver.statistics import MAX_BATCH_SIZES, ROWS, SECONDS, Duration, ModelStatistics


class Clock:
    """Time passes only when a test says so; in whole milliseconds, which floats add exactly enough."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def pass_ms(self, ms):
        self.now += ms / 1e3


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def engine():
    engine = Engine(threads=1)
    yield engine
    engine.close()


def lane_with(clock, forward, **limits):
    statistics = ModelStatistics(wall_clock=lambda: 1234.5)
    return Lane(Batcher("m", QueueLimits(**limits), clock, statistics), forward, 1, np.dtype(np.float32))


def ms(count, milliseconds):
    return Duration(count, round(milliseconds * 1e6))


def near(duration, expected):
    """Equal counts, and equal nanoseconds but for the rounding of the clock's floats."""
    assert duration.count == expected.count
    assert duration.ns == pytest.approx(expected.ns, abs=1000)


def test_a_batch_charges_each_of_its_requests(clock, engine):
    """Two requests wait 5 and 2 ms, share a kernel run of 3 ms, and are answered in 1 ms each."""

    def forward(x):
        clock.pass_ms(3)
        return x

    lane = lane_with(clock, forward)

    class SlowToAnswer(RecordedJob):
        def deliver(self, jobs, y):
            clock.pass_ms(1)
            return super().deliver(jobs, y)

    jobs = [SlowToAnswer(np.zeros((2, 1))), SlowToAnswer(np.zeros((3, 1)))]
    engine.submit(lane, jobs[0])
    clock.pass_ms(3)
    engine.submit(lane, jobs[1])
    clock.pass_ms(2)
    engine.run_waiting()
    totals = lane.batcher.statistics.totals()
    assert (totals.rows, totals.executions, totals.last_inference_ms) == (5, 1, 1_234_500)
    near(totals.queue, ms(2, 5 + 2))
    near(totals.input, ms(2, 0))
    near(totals.infer, ms(2, 2 * 3))
    near(totals.output, ms(2, 2))
    near(totals.success, ms(2, 7 + 6 + 2))
    near(totals.fail, ms(0, 0))
    assert list(totals.batches) == [5]
    near(totals.batches[5].infer, ms(1, 3))
    near(totals.batches[5].output, ms(1, 2))


def test_a_request_is_counted_before_it_is_answered(clock, engine):
    """Whoever has an answer and asks for the statistics finds the request in them."""
    lane = lane_with(clock, lambda x: x)
    seen = []

    class Curious(RecordedJob):
        def deliver(self, jobs, y):
            seen.append(lane.batcher.statistics.totals().success.count)
            return super().deliver(jobs, y)

    engine.submit(lane, Curious(np.zeros((1, 1))))
    engine.run_waiting()
    assert seen == [1]


def test_what_is_refused_or_dies_in_the_queue_is_a_failure(clock, engine):
    """A full queue, a passed deadline and a cancelled call each count once, and cost no execution."""
    lane = lane_with(clock, lambda x: x, max_requests=2)
    expiring, leaving = job_of(1, deadline=clock.now + 1e-3), job_of(1)
    engine.submit(lane, expiring)
    engine.submit(lane, leaving)
    with pytest.raises(QueueFull):
        engine.submit(lane, job_of(1))
    with pytest.raises(Expired):
        engine.submit(lane, job_of(1, deadline=clock.now - 1))
    clock.pass_ms(4)
    leaving.has_gone = True
    engine.run_waiting()
    assert (type(expiring.error), type(leaving.error)) == (Expired, Cancelled)
    totals = lane.batcher.statistics.totals()
    assert (totals.executions, totals.success.count) == (0, 0)
    near(totals.fail, ms(4, 2 * 4))


def test_a_kernel_fault_fails_the_batch(clock, engine):
    """Its requests are failures; nothing is counted as computed."""

    def forward(x):
        raise ArithmeticError

    lane = lane_with(clock, forward)
    jobs = [job_of(1), job_of(1)]
    for job in jobs:
        engine.submit(lane, job)
    engine.run_waiting()
    assert all(isinstance(job.error, KernelFault) for job in jobs)
    totals = lane.batcher.statistics.totals()
    assert (totals.fail.count, totals.success.count, totals.executions) == (2, 0, 0)


def test_an_answer_that_cannot_be_made_moves_from_success_to_failure(clock, engine):
    """One of two requests fails when its outputs are encoded; the other stays a success."""
    lane = lane_with(clock, lambda x: x)

    class Broken(RecordedJob):
        def deliver(self, jobs, y):
            raise ValueError("cannot be encoded")

    good = job_of(1)
    engine.submit(lane, Broken(np.zeros((1, 1))))
    engine.submit(lane, good)
    engine.run_waiting()
    assert good.answers == 1
    totals = lane.batcher.statistics.totals()
    assert (totals.success.count, totals.fail.count, totals.executions) == (1, 1, 1)


def test_batch_sizes_are_bounded():
    """A client that never sends the same size twice fills no memory; the totals go on."""
    statistics = ModelStatistics()
    for rows in range(MAX_BATCH_SIZES + 10):
        statistics.note_batch([0.0], 0.0, rows, 0.0, 0.0)
    totals = statistics.totals()
    assert len(totals.batches) == MAX_BATCH_SIZES
    assert totals.executions == MAX_BATCH_SIZES + 10


def test_totals_stand_still():
    """What is noted later does not change it."""
    statistics = ModelStatistics()
    statistics.note_batch([0.0], 0.0, 1, 0.0, 0.0)
    before = statistics.totals()
    statistics.note_batch([0.0], 0.0, 1, 0.0, 0.0)
    assert (before.executions, before.batches[1].infer.count) == (1, 1)


# In detail, for metrics


def test_details_tell_times_apart_by_request_and_batch(clock, engine):
    """Three requests that waited 3, 3 and 0.2 ms share one batch of 40 ms: each wait is in its own bucket."""

    def forward(x):
        clock.pass_ms(40)
        return x

    statistics = ModelStatistics(is_detailed=True)
    lane = Lane(Batcher("m", QueueLimits(), clock, statistics), forward, 1, np.dtype(np.float32))
    engine.submit_all(lane, [job_of(1), job_of(2)])
    clock.pass_ms(2.8)
    engine.submit(lane, job_of(3))
    clock.pass_ms(0.2)
    assert lane.batcher.in_flight() == 3
    engine.run_waiting()
    assert lane.batcher.in_flight() == 0
    details = statistics.details()
    assert details.outcomes == {("predict", Status.OK): 3}
    assert in_buckets(details.queue, SECONDS) == {250e-6: 1, 5e-3: 2}
    assert details.queue.sum == pytest.approx(6.2e-3)
    assert in_buckets(details.compute, SECONDS) == {50e-3: 1}
    assert in_buckets(details.batch_rows, ROWS) == {8: 1}
    assert details.batch_rows.sum == 6


def test_details_have_every_failure_by_its_status(clock, engine):
    """Refused, expired, cancelled, cancelled because it expired, and met by a fault: each with its own."""

    def forward(x):
        raise ArithmeticError

    statistics = ModelStatistics(is_detailed=True)
    lane = Lane(Batcher("m", QueueLimits(4), clock, statistics), forward, 1, np.dtype(np.float32))
    expired, left, late, doomed = (job_of(1, deadline=clock.now + 1e-3), job_of(1), job_of(1), job_of(1))
    late.deadline = expired.deadline
    engine.submit_all(lane, [expired, left, late, doomed, job_of(1)])
    clock.pass_ms(2)
    left.has_gone = late.has_gone = True
    engine.run_waiting()
    assert statistics.details().outcomes == {
        ("predict", Status.RESOURCE_EXHAUSTED): 1,
        ("predict", Status.DEADLINE_EXCEEDED): 2,
        ("predict", Status.CANCELLED): 1,
        ("predict", Status.INTERNAL): 1,
    }
    assert lane.batcher.in_flight() == 0


def test_batch_sizes_beyond_the_bound_keep_their_bucket():
    statistics = ModelStatistics(is_detailed=True)
    for rows in (*range(MAX_BATCH_SIZES), 2000, 100_000):
        statistics.note_batch([0.0], 0.0, rows, 0.0, 0.0)
    found = in_buckets(statistics.details().batch_rows, ROWS)
    assert (found[2048], found[float("inf")]) == (1, 1)


def in_buckets(distribution, bounds):
    """Upper bound -> observations, of the buckets that have any."""
    pairs = zip((*bounds, float("inf")), distribution.counts, strict=True)
    return {bound: count for bound, count in pairs if count}
