"""Batcher: bounds, order, grouping, and what becomes of jobs that nobody waits for any more."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.jobs import RecordedJob, job_of

from nnserver.batcher import Batcher, QueueLimits, gather
from nnserver.errors import Cancelled, Expired, QueueFull


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def batcher_with(clock: Clock | None = None, **limits: int) -> Batcher:
    return Batcher("m", QueueLimits(**limits), clock or Clock())


def test_batch_holds_what_waits_in_order_of_arrival():
    """Three jobs that wait come as one batch, in the order in which they were put."""
    batcher = batcher_with()
    jobs = [job_of(rows) for rows in (1, 3, 2)]
    for job in jobs:
        batcher.put(job)
    assert (len(batcher), batcher.waiting_rows) == (3, 6)
    assert batcher.take() == jobs
    assert (len(batcher), batcher.waiting_rows) == (0, 0)


def test_nothing_waiting_is_an_empty_batch():
    """take() of an empty queue is an empty list, not a wait."""
    assert batcher_with().take() == []


def test_batch_ends_before_the_row_bound_is_passed():
    """A job that would carry the batch over max_batch_rows opens the next batch."""
    batcher = batcher_with(max_batch_rows=4)
    jobs = [job_of(rows) for rows in (2, 2, 1, 4)]
    for job in jobs:
        batcher.put(job)
    assert [batcher.take(), batcher.take(), batcher.take()] == [jobs[:2], jobs[2:3], jobs[3:]]


def test_a_job_over_the_row_bound_comes_alone():
    """A single job with more rows than max_batch_rows is taken whole, with nothing beside it."""
    batcher = batcher_with(max_batch_rows=4)
    small, large, after = job_of(1), job_of(9), job_of(1)
    for job in (small, large, after):
        batcher.put(job)
    assert [batcher.take(), batcher.take(), batcher.take()] == [[small], [large], [after]]


@given(rows=st.lists(st.integers(0, 9), max_size=40), max_batch_rows=st.integers(1, 12))
def test_batches_are_the_jobs_cut_into_pieces(rows, max_batch_rows):
    """Batches joined are the jobs in order; each is within the bound or one job; none could be longer."""
    batcher = batcher_with(max_batch_rows=max_batch_rows)
    jobs = [job_of(n) for n in rows]
    for job in jobs:
        batcher.put(job)
    batches = []
    while batch := batcher.take():
        batches.append(batch)
    assert [job for batch in batches for job in batch] == jobs
    for index, batch in enumerate(batches):
        total = sum(job.form.rows for job in batch)
        assert total <= max_batch_rows or len(batch) == 1
        if index + 1 < len(batches):
            assert total + batches[index + 1][0].form.rows > max_batch_rows
    assert (len(batcher), batcher.waiting_rows) == (0, 0)


def test_a_full_queue_refuses_at_once_and_names_the_setting():
    """The request over max_queue_requests is refused, the ones before it stay, and room is usable again."""
    batcher = batcher_with(max_requests=2)
    first, second, third = job_of(1), job_of(1), job_of(1)
    batcher.put(first)
    batcher.put(second)
    with pytest.raises(
        QueueFull,
        match=r"^the queue of model 'm' is full \(2 requests, max_queue_requests\); try again later$",
    ):
        batcher.put(third)
    assert third.answers == 0
    assert batcher.take() == [first, second]
    batcher.put(third)
    assert batcher.take() == [third]


def test_the_byte_bound_counts_waiting_rows():
    """max_queue_bytes bounds the rows that wait; taking them makes room."""
    batcher = batcher_with(max_bytes=16)
    batcher.put(job_of(3))
    with pytest.raises(
        QueueFull, match=r"^the queue of model 'm' is full \(12 bytes of rows, max_queue_bytes\); try again"
    ):
        batcher.put(job_of(2))
    batcher.put(job_of(1))
    assert len(batcher.take()) == 2
    batcher.put(job_of(4))


def test_a_job_over_the_byte_bound_is_taken_when_nothing_else_waits():
    """A request larger than the whole queue can be served at all, but only into an empty queue."""
    batcher = batcher_with(max_bytes=16)
    large = job_of(100)
    batcher.put(large)
    with pytest.raises(QueueFull):
        batcher.put(job_of(1))
    assert batcher.take() == [large]


@pytest.mark.parametrize("late_by", [0.0, 1.0])
def test_expired_on_arrival_is_not_queued(late_by):
    """A job whose deadline has come is refused by put() and takes no room."""
    clock = Clock()
    batcher = batcher_with(clock)
    with pytest.raises(
        Expired, match=r"^the deadline passed before the rows were run; nothing was computed$"
    ):
        batcher.put(job_of(1, deadline=clock.now - late_by))
    assert (len(batcher), batcher.waiting_rows) == (0, 0)


def test_cancelled_on_arrival_is_not_queued():
    """A job whose caller has gone is refused by put() and takes no room."""
    batcher = batcher_with()
    job = job_of(1)
    job.has_gone = True
    with pytest.raises(Cancelled):
        batcher.put(job)
    assert (len(batcher), job.answers) == (0, 0)


def test_expired_and_cancelled_jobs_are_failed_once_and_cost_nothing():
    """Jobs that die in the queue are failed when met, once each, and the batch is made of the living."""
    clock = Clock()
    batcher = batcher_with(clock, max_batch_rows=2)
    expiring, leaving = job_of(2, deadline=clock.now + 1), job_of(2)
    alive = [job_of(1, deadline=clock.now + 60), job_of(1)]
    for job in (expiring, alive[0], leaving, alive[1]):
        batcher.put(job)
    clock.now += 1
    leaving.has_gone = True
    # The dead had two rows each: had they been counted, the batch would have been full before alive[1].
    assert batcher.take() == alive
    assert isinstance(expiring.error, Expired)
    assert isinstance(leaving.error, Cancelled)
    assert batcher.take() == []
    assert [job.answers for job in (expiring, leaving, *alive)] == [1, 1, 0, 0]
    assert batcher.waiting_rows == 0


def test_a_callback_may_use_the_queue():
    """fail() of a dead job is called without the queue's lock: it may put the next request."""
    clock = Clock()
    batcher = batcher_with(clock)
    follower = job_of(1)
    expiring = job_of(1, deadline=clock.now + 1)
    expiring.fail = lambda error: batcher.put(follower)
    batcher.put(expiring)
    clock.now += 1
    assert batcher.take() == []
    assert batcher.take() == [follower]


def test_a_callback_that_raises_harms_no_other_job():
    """If failing a dead job raises, the other dead are still failed and the living still come."""
    clock = Clock()
    batcher = batcher_with(clock)
    broken, expiring, alive = job_of(1, clock.now + 1), job_of(1, clock.now + 1), job_of(1)

    def raise_error(error: BaseException) -> None:
        raise RuntimeError("callback")

    broken.fail = raise_error
    for job in (broken, expiring, alive):
        batcher.put(job)
    clock.now += 1
    assert batcher.take() == [alive]
    assert expiring.answers == 1


def test_many_threads_lose_and_double_nothing():
    """Eight putters and four takers: every job that was put is taken exactly once."""
    batcher = batcher_with(max_requests=1 << 20, max_batch_rows=7)
    per_thread, taken, done = 500, [], threading.Event()

    def put() -> None:
        for _ in range(per_thread):
            batcher.put(job_of(1))

    def take() -> None:
        while not done.is_set() or len(batcher):
            taken.append(batcher.take())  # list.append is atomic

    putters = [threading.Thread(target=put) for _ in range(8)]
    takers = [threading.Thread(target=take) for _ in range(4)]
    for thread in putters + takers:
        thread.start()
    for thread in putters:
        thread.join()
    done.set()
    for thread in takers:
        thread.join()
    jobs = [id(job) for batch in taken for job in batch]
    assert len(jobs) == len(set(jobs)) == 8 * per_thread
    assert batcher.waiting_rows == 0


def test_gather_joins_rows_in_order():
    """The batch's array is the jobs' rows, one after the other."""
    jobs = [RecordedJob([[1, 2], [3, 4]]), RecordedJob(np.empty((0, 2))), RecordedJob([[5, 6]])]
    np.testing.assert_array_equal(gather(jobs, 2, np.dtype(np.float32)), [[1, 2], [3, 4], [5, 6]])


def test_gather_of_one_job_copies_nothing():
    """A lone job's rows go to the kernel as they are."""
    job = RecordedJob([[1, 2]])
    assert np.shares_memory(gather([job], 2, np.dtype(np.float32)), job.x)
