"""Batcher: bounds, order, grouping, and what becomes of jobs that nobody waits for any more."""

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.jobs import RecordedJob, job_of

from nnserver.batcher import Batcher, QueueLimits, QueueTotal, gather
from nnserver.errors import Cancelled, Expired, QueueFull


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def batcher_with(clock: Clock | None = None, **limits: Any) -> Batcher:
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


def test_the_row_bound_counts_waiting_rows():
    """max_queue_rows bounds the rows of all that waits, however few requests they are."""
    batcher = batcher_with(max_rows=10)
    batcher.put(job_of(7))
    with pytest.raises(QueueFull, match=r"\(7 rows, max_queue_rows\)"):
        batcher.put(job_of(4))
    batcher.put(job_of(3))
    assert batcher.waiting_rows == 10


def test_all_models_together_are_bounded():
    """What waits for one model leaves less room for another, which may still have one request waiting."""
    total = QueueTotal(max_requests=3, max_bytes=1 << 20)
    busy, other = (batcher_with(total=total) for _ in range(2))
    for _ in range(3):
        busy.put(job_of(1))
    with pytest.raises(QueueFull, match=r"\(3 requests for all models, max_total_queue_requests\)"):
        busy.put(job_of(1))
    other.put(job_of(1))
    with pytest.raises(QueueFull):
        other.put(job_of(1))
    assert (len(busy.take()), len(other.take())) == (3, 1)
    assert (total.requests, total.nbytes) == (0, 0)
    busy.put(job_of(1))


def test_all_models_bytes_together_are_bounded():
    """max_total_queue_bytes is kept whoever has put what."""
    total = QueueTotal(max_requests=100, max_bytes=40)
    busy, other = (batcher_with(total=total) for _ in range(2))
    busy.put(job_of(9))
    other.put(job_of(1))
    with pytest.raises(QueueFull, match=r"\(40 bytes for all models, max_total_queue_bytes\)"):
        other.put(job_of(1))


@given(
    jobs=st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6)), max_size=60),
    takes=st.lists(st.integers(1, 8), max_size=20),
)
def test_the_bounds_hold_and_the_books_are_right(jobs, takes):
    """Whoever puts and takes: no bound is passed, each job is taken or refused once, nothing is left over."""
    total = QueueTotal(max_requests=6, max_bytes=60)
    batcher = batcher_with(max_requests=5, max_rows=12, max_bytes=40, total=total)
    put, taken = [], []
    for origin, rows in jobs:
        job = job_of(rows, origin=origin)
        put.append(job)
        batcher.put_all([job])
        assert len(batcher) <= 5
        assert batcher.waiting_rows <= 12
        assert (total.requests, total.nbytes) == (len(batcher), 4 * batcher.waiting_rows)
        if takes and rows % 2:
            taken += batcher.take(takes.pop())
    while batch := batcher.take(3):
        taken += batch
    assert all(job.answers == (job not in taken) for job in put)
    assert (total.requests, total.nbytes, batcher.waiting_rows, len(batcher)) == (0, 0, 0, 0)


# Waiting too long


def paced(row_s: float, **limits: Any) -> tuple[Clock, Batcher]:
    """A batcher that has learned that a row takes *row_s*."""
    clock = Clock()
    batcher = batcher_with(clock, **limits)
    batcher.note_run(1000, 1000 * row_s)
    return clock, batcher


def test_a_wait_that_is_too_long_is_refused_with_the_time_to_come_back():
    """At 10 ms a row and 50 ms at most, the seventh row is refused and told when the six have been run."""
    _, batcher = paced(0.01, max_wait_s=0.05)
    for _ in range(6):
        batcher.put(job_of(1))
    with pytest.raises(QueueFull, match=r"\(60 ms of work, max_queue_ms\); try again later$") as caught:
        batcher.put(job_of(1))
    assert caught.value.retry_after_s == pytest.approx(0.06)
    batcher.take()
    batcher.put(job_of(1))


def test_before_anything_was_measured_no_wait_is_too_long():
    """The first requests after a start are not refused for want of a measurement."""
    batcher = batcher_with(max_wait_s=1e-9)
    for _ in range(100):
        batcher.put(job_of(1))


def test_small_batches_do_not_say_what_a_row_of_a_large_one_takes():
    """A row alone takes 50 us, or 20 ms on a busy machine; ten thousand together take less than each so."""
    batcher = batcher_with(max_wait_s=0.5)
    for elapsed_s in (0.02, *[50e-6] * 100):
        batcher.note_run(1, elapsed_s)
    for _ in range(20):
        batcher.put(job_of(10_000))


def test_a_stream_may_wait_longer():
    """Its client is held back by the stream's window, so its requests are refused for other bounds only."""
    _, batcher = paced(0.01, max_wait_s=0.05, max_requests=20)
    jobs = [job_of(1) for _ in range(21)]
    for job in jobs:
        job.is_patient = True
    for job in jobs[:20]:
        batcher.put(job)
    with pytest.raises(QueueFull, match="max_queue_requests"):
        batcher.put(jobs[20])


def test_a_modest_connection_does_not_wait_for_all_of_a_greedy_one():
    """With 60 ms of a greedy connection's rows waiting, another's request is taken: its turn comes soon."""
    _, batcher = paced(0.01, max_wait_s=0.05)
    for _ in range(6):
        batcher.put(job_of(1, origin="greedy"))
    modest = job_of(1, origin="modest")
    batcher.put(modest)
    assert modest in batcher.take(2)


def test_what_could_not_be_run_by_its_deadline_is_refused_at_once():
    """A request with 30 ms left is not queued behind 40 ms of work; one with 50 ms is."""
    clock, batcher = paced(0.01)
    for _ in range(4):
        batcher.put(job_of(1))
    with pytest.raises(QueueFull, match=r"\(40 ms of work, more than the deadline allows\)") as caught:
        batcher.put(job_of(1, deadline=clock.now + 0.03))
    assert caught.value.retry_after_s == pytest.approx(0.04)
    batcher.put(job_of(1, deadline=clock.now + 0.05))


def test_lateness_makes_cautious_and_cancelling_does_not():
    """When requests miss their deadlines the estimate grows; when callers just go it does not."""

    def taken_with(left_s: float, after: str) -> bool:
        clock, batcher = paced(0.01)
        for _ in range(10):
            job = job_of(1, deadline=clock.now + 1.0)
            batcher.put(job)
            job.has_gone = after == "cancelled"
            clock.now += 2.0 if after == "expired" else 0.0
            batcher.take()
        batcher.put_all([job_of(1) for _ in range(4)])
        last = job_of(1, deadline=clock.now + left_s)
        batcher.put_all([last])
        return last.error is None

    # Four rows before it: 40 ms, and four times as much for the cautious.
    assert taken_with(0.07, after="cancelled")
    assert not taken_with(0.07, after="expired")
    assert taken_with(0.25, after="expired")


def test_what_a_row_costs_is_learned_from_the_time_between_batches():
    """As long as batches leave rows behind, their distance counts, with all that happens between them."""
    clock = Clock()
    batcher = batcher_with(clock, max_wait_s=0.1)
    batcher.put_all([job_of(1) for _ in range(1200)])
    assert len(batcher.take(200)) == 200
    clock.now += 0.2
    batcher.note_run(200, 0.1)  # The other half went to another model.
    assert len(batcher.take(200)) == 200
    with pytest.raises(QueueFull) as caught:
        batcher.put(job_of(1))
    assert caught.value.retry_after_s == pytest.approx(0.001 * (800 + 200))


def test_a_small_batch_before_a_large_one_does_not_say_what_a_row_takes():
    """One row is taken, six thousand are left, and the thread sleeps: they do not take two minutes now."""
    clock = Clock()
    batcher = batcher_with(clock)
    batcher.put_all([job_of(1), job_of(6000)])
    assert len(batcher.take(192)) == 1
    clock.now += 0.02
    batcher.take(192)
    batcher.put(job_of(6000))
    batcher.put(job_of(1, deadline=clock.now + 2))


# Greedy and modest connections


def test_a_full_queue_makes_room_for_who_has_least():
    """The greediest connection's newest request goes, with a hint, so that another's can be queued."""
    batcher = batcher_with(max_requests=4)
    greedy = [job_of(1, origin="greedy") for _ in range(4)]
    batcher.put_all(greedy)
    modest = job_of(1, origin="modest")
    batcher.put(modest)
    assert isinstance(greedy[-1].error, QueueFull)
    assert (greedy[-1].error.retry_after_s or 0) > 0
    assert "others have less waiting" in str(greedy[-1].error)
    with pytest.raises(QueueFull):
        batcher.put(job_of(1, origin="greedy"))
    assert set(batcher.take()) == {*greedy[:3], modest}


def test_a_greedy_connection_cannot_starve_another():
    """
    One connection always has a thousand requests waiting or refused; another asks for a row a batch.

    Every request of the second is in the next batch, whichever bound is met.
    """
    for bound in ("max_requests", 50), ("max_rows", 400), ("max_bytes", 1600):
        batcher = batcher_with(None, max_batch_rows=16, **dict([bound]))
        for _ in range(50):
            batcher.put_all([job_of(8, origin="greedy") for _ in range(100)])
            modest = job_of(1, origin="modest")
            batcher.put(modest)
            assert modest in batcher.take()


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
