"""FairQueue: nothing lost, order within an origin, turns by rows between them, and who loses if full."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.jobs import RecordedJob, job_of

from nnserver.fair_queue import FairQueue, Share


def queue_of(*jobs: RecordedJob) -> FairQueue:
    queue = FairQueue()
    queue.arrived.extend(jobs)
    return queue


def served(queue: FairQueue, count: int) -> list[RecordedJob]:
    """The next *count* jobs in turn, or as many as there are."""
    found: list[RecordedJob] = []
    while len(found) < count and (job := queue.head()) is not None:
        found.append(job)
        queue.pop()
    return found


def origins(jobs: list[RecordedJob]) -> str:
    return "".join(str(job.origin) for job in jobs)


def requests_of(share: Share) -> int:
    return len(share.jobs)


def test_who_takes_all_takes_it_in_order_of_arrival():
    """Without turns nothing is sorted: the order is that of the callers' requests."""
    jobs = [job_of(1, origin=name) for name in "abacba"]
    queue = queue_of(*jobs)
    assert queue.pop_all() == jobs
    assert len(queue) == 0


def test_origins_take_turns():
    """A hundred requests of one origin do not stand before the two of another that came later."""
    queue = queue_of(*(job_of(1, origin="a") for _ in range(100)), *(job_of(1, origin="b") for _ in range(2)))
    assert origins(served(queue, 6)) == "ababaa"


def test_turns_count_rows_not_requests():
    """An origin with large batches gets as many rows as one with small ones, not as many requests."""
    large = [job_of(10, origin="a") for _ in range(3)]
    small = [job_of(1, origin="b") for _ in range(40)]
    queue = queue_of(*large, *small)
    first = served(queue, 22)
    assert sum(job.rows for job in first if job.origin == "a") == 20
    assert sum(job.rows for job in first if job.origin == "b") == 20


def test_who_comes_late_has_no_claim_on_the_past():
    """A thousand rows of one origin, served before another comes, do not give that one a thousand."""
    queue = queue_of(*(job_of(1, origin="a") for _ in range(1200)))
    served(queue, 1000)
    queue.arrived.extend(job_of(1, origin="b") for _ in range(100))
    assert origins(served(queue, 10)).count("b") in (5, 6)


def test_one_giant_at_a_time_does_not_get_around_the_turns():
    """An origin whose only job was served stays charged for it while the others wait."""
    queue = queue_of(
        job_of(1, origin="b"), job_of(50, origin="a"), *(job_of(1, origin="b") for _ in range(99))
    )
    assert origins(served(queue, 2)) == "ba"
    queue.arrived.append(job_of(50, origin="a"))
    assert origins(served(queue, 49)) == 49 * "b"


def test_a_job_that_is_not_served_costs_nothing():
    """What expired in the queue does not put its origin behind."""
    queue = queue_of(*(job_of(5, origin=name) for name in "aabb"))
    assert queue.head().origin == "a"
    queue.pop(is_served=False)
    assert origins(served(queue, 3)) == "bab"


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9)), max_size=60), st.lists(st.integers(0, 9))
)
def test_nothing_is_lost_and_origins_keep_their_order(arrivals, rounds):
    """However puts and turns mix, each job comes out once, those of one origin in order of arrival."""
    queue, out, waiting = FairQueue(), [], [job_of(rows, origin=origin) for origin, rows in arrivals]
    jobs = list(waiting)
    for count in rounds:
        queue.arrived.extend(waiting[:count])
        del waiting[:count]
        out += served(queue, count // 2)
    queue.arrived.extend(waiting)
    out += queue.pop_all()
    assert len(queue) == 0
    for origin in "abcd":
        assert [job for job in out if job.origin == origin] == [job for job in jobs if job.origin == origin]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(1, 20), min_size=30, max_size=30), min_size=2, max_size=5))
def test_origins_that_wait_are_served_alike(rows_by_origin):
    """While all wait, no origin has got more rows than another by more than the largest job of each."""
    queue = FairQueue()
    for origin, rows in enumerate(rows_by_origin):
        queue.arrived.extend(job_of(n, origin=origin) for n in rows)
    got, left = [0] * len(rows_by_origin), [30] * len(rows_by_origin)
    while all(left):
        (job,) = served(queue, 1)
        got[job.origin] += job.rows
        left[job.origin] -= 1
        largest = [max(rows) for rows in rows_by_origin]
        for a in range(len(got)):
            for b in range(a):
                assert abs(got[a] - got[b]) <= largest[a] + largest[b]


def test_rows_before_a_new_job_are_what_turns_leave_before_it():
    """All of its own, and as many of each other's: a modest one waits for little of a greedy one's rows."""
    queue = queue_of(*(job_of(1, origin="greedy") for _ in range(100)), job_of(3, origin="modest"))
    assert queue.rows_before("greedy", 1) == (100, 103)
    assert queue.rows_before("modest", 2) == (3, 5 + 3)
    assert queue.rows_before("new", 1) == (0, 2)


def test_the_newest_job_of_the_greediest_makes_room():
    """Not its oldest, which has waited longest, and not that of one that has as little as who asks."""
    greedy = [job_of(1, origin="greedy") for _ in range(5)]
    queue = queue_of(*greedy, job_of(1, origin="modest"))
    assert queue.shed_for("new", 1, requests_of) is greedy[-1]
    assert queue.shed_for("modest", 1, requests_of) is greedy[-2]
    assert queue.shed_for("modest", 1, requests_of) is greedy[-3]
    assert queue.shed_for("modest", 1, requests_of) is None
    assert queue.shed_for("greedy", 1, requests_of) is None
    assert len(queue) == 3


def test_a_share_that_was_shed_whole_can_wait_again():
    """A job that comes after its origin's only one was shed is served, once."""
    queue = queue_of(job_of(1, origin="a"))
    assert queue.shed_for("b", 0, requests_of) is not None
    assert queue.head() is None
    job = job_of(1, origin="a")
    queue.arrived.append(job)
    assert queue.pop_all() == [job]


def test_origins_that_have_gone_are_forgotten_while_others_wait():
    """A thousand connections that each sent one request leave no trace, though the queue never empties."""
    queue = queue_of(*(job_of(1, origin="stays") for _ in range(5000)))
    served(queue, 1)
    for number in range(1000):
        queue.arrived.append(job_of(1, origin=number))
        served(queue, 4)
    assert len(queue._shares) < 200
