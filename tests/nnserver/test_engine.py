"""Engine: every job is answered once, faults stay in their batch, and lanes share the threads."""

import random
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from support.jobs import RecordedJob, job_of

from nnserver.batcher import Batcher, QueueLimits
from nnserver.engine import PARALLEL_FROM_S, Engine, Lane
from nnserver.errors import Cancelled, Expired, KernelFault, QueueFull, Status, status_and_text

LONG = 10 * PARALLEL_FROM_S


@pytest.fixture
def engine():
    engine = Engine(threads=2)
    yield engine
    engine.close()


@pytest.fixture
def quick_switches():
    """Threads are switched after 10 us instead of 5 ms: many more interleavings a second."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def lane_of(forward, name="m", **limits):
    return Lane(Batcher(name, QueueLimits(**limits)), forward, 1, np.dtype(np.float32))


def noting(log, note, forward=lambda x: x):
    """A forward pass that first appends note(x) to *log*."""

    def noted_forward(x):
        log.append(note(x))
        return forward(x)

    return noted_forward


def this_thread(_):
    return threading.current_thread()


class Gate:
    """A forward pass that stops at a gate until the test opens it."""

    def __init__(self):
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.batches = []

    def __call__(self, x):
        self.batches.append(len(x))
        self.entered.release()
        assert self.open.wait(10), "the gate was not opened"
        return x

    def wait_for_runner(self):
        assert self.entered.acquire(timeout=10), "nobody ran the batch"


def run_in_thread(engine):
    thread = threading.Thread(target=engine.run_waiting)
    thread.start()
    return thread


# Answers


def test_the_caller_runs_what_waits(engine):
    """A lone job is answered in the thread that called run_waiting: no hand-off."""
    threads: list[threading.Thread] = []
    lane = lane_of(noting(threads, this_thread, lambda x: x + 1))
    job = RecordedJob([[1], [2]])
    engine.submit(lane, job)
    engine.run_waiting()
    np.testing.assert_array_equal(job.outputs, [[2], [3]])
    assert threads == [threading.current_thread()]


def test_nothing_waiting_is_nothing_to_do(engine):
    """run_waiting with nothing queued returns."""
    engine.run_waiting()


def test_waiting_jobs_share_one_kernel_call_and_get_their_own_rows(engine):
    """Jobs of 1, 0, 3 and 2 rows: one kernel call, and each job is given exactly its rows."""
    calls: list[int] = []
    lane = lane_of(noting(calls, len, lambda x: 10 * x))
    jobs = [
        RecordedJob(np.arange(start, start + n).reshape(n, 1))
        for start, n in ((1, 1), (0, 0), (2, 3), (7, 2))
    ]
    for job in jobs:
        engine.submit(lane, job)
    engine.run_waiting()
    assert calls == [6]
    for job in jobs:
        np.testing.assert_array_equal(job.outputs, 10 * job.x)


def test_each_lane_runs_its_own_kernel(engine):
    """One run_waiting serves every model that has jobs."""
    lanes = [lane_of(lambda x, factor=factor: factor * x) for factor in (2, 3)]
    jobs = [RecordedJob([[1]]) for _ in lanes]
    for lane, job in zip(lanes, jobs, strict=True):
        engine.submit(lane, job)
    engine.run_waiting()
    assert [float(job.outputs[0, 0]) for job in jobs] == [2, 3]


def test_more_than_one_batch_is_finished_by_a_kernel_thread(engine):
    """The caller runs the first batch and is let go; a kernel thread runs what is left."""
    threads: list[threading.Thread] = []
    lane = lane_of(noting(threads, this_thread), max_batch_rows=2)
    jobs = [job_of(2) for _ in range(5)]
    for job in jobs:
        engine.submit(lane, job)
    engine.run_waiting()
    for job in jobs:
        job.wait()
    assert threads[0] is threading.current_thread()
    assert threading.current_thread() not in threads[1:]
    assert len(threads) == 5


def test_who_has_gone_while_the_kernel_ran_costs_no_answer(engine):
    """After a long batch, the expired and the cancelled are failed, not delivered; others get their rows."""
    now = [0.0]
    jobs = [RecordedJob([[n]]) for n in range(5)]

    def forward(x):
        now[0] += 1.0
        jobs[1].has_gone = True
        return 10 * x

    lane = Lane(Batcher("m", clock=lambda: now[0]), forward, 1, np.dtype(np.float32))
    jobs[3].deadline = 0.5
    for job in jobs:
        engine.submit(lane, job)
    engine.run_waiting()
    assert [job.answers for job in jobs] == [1] * 5
    assert isinstance(jobs[1].error, Cancelled)
    assert isinstance(jobs[3].error, Expired)
    assert [job.outputs is None for job in jobs] == [False, True, False, True, False]
    assert [float(jobs[n].outputs[0, 0]) for n in (0, 2, 4)] == [0, 20, 40]
    assert lane.batcher.statistics.totals().fail.count == 2


def test_who_goes_between_two_batches_costs_no_kernel_time(engine):
    """Of requests that expire or are cancelled while an earlier batch runs the kernel sees nothing."""
    now, rows = [0.0], []
    jobs = [job_of(2, deadline=deadline) for deadline in (None, 0.5, None, None)]

    def forward(x):
        rows.append(len(x))
        now[0] += 1.0
        jobs[2].has_gone = True
        return x

    lane = Lane(
        Batcher("m", QueueLimits(max_batch_rows=2), clock=lambda: now[0]), forward, 1, np.dtype(np.float32)
    )
    for job in jobs:
        engine.submit(lane, job)
    engine.run_waiting()
    for job in jobs:
        job.wait()
    assert rows == [2, 2]
    assert [type(job.error) for job in jobs] == [type(None), Expired, Cancelled, type(None)]


def test_jobs_that_nobody_waits_for_reach_no_kernel(engine):
    """Expired and cancelled jobs are failed without a kernel call, and the lane goes on."""
    now = [0.0]
    calls: list[int] = []
    lane = Lane(Batcher("m", clock=lambda: now[0]), noting(calls, len), 1, np.dtype(np.float32))
    expiring, leaving = job_of(4, deadline=1.0), job_of(4)
    for job in (expiring, leaving):
        engine.submit(lane, job)
    now[0], leaving.has_gone = 2.0, True
    engine.run_waiting()
    assert calls == []
    assert isinstance(expiring.error, Expired)
    assert isinstance(leaving.error, Cancelled)
    job = job_of(1)
    engine.submit(lane, job)
    engine.run_waiting()
    assert calls == [1]


def test_submit_passes_on_the_queue_refusal(engine):
    """A full queue is the submitter's error, and what was queued before is run."""
    lane = lane_of(lambda x: x, max_requests=1)
    job = job_of(1)
    engine.submit(lane, job)
    with pytest.raises(QueueFull):
        engine.submit(lane, job_of(1))
    engine.run_waiting()
    assert job.answers == 1


# Faults


def test_a_kernel_fault_fails_its_batch_only(engine):
    """An exception of the kernel fails each job of that batch; the next batch and lane are served."""

    def forward(x):
        if (x < 0).any():
            raise RuntimeError("kernel")
        return x

    lane, other = lane_of(forward, max_batch_rows=2), lane_of(lambda x: x)
    bad = [job_of(1), job_of(1, value=-1)]
    good, elsewhere = job_of(2), job_of(1)
    for job in (*bad, good):
        engine.submit(lane, job)
    engine.submit(other, elsewhere)
    engine.run_waiting()
    good.wait()
    elsewhere.wait()
    assert [type(job.error) for job in bad] == [KernelFault, KernelFault]
    assert [job.answers for job in (*bad, good, elsewhere)] == [1, 1, 1, 1]
    assert good.error is None
    assert elsewhere.error is None


def test_a_kernel_fault_is_logged_once_and_told_to_no_client(engine, caplog):
    """One traceback a batch, with the model's name, however many jobs failed; clients get generic text."""

    def forward(x):
        raise RuntimeError("kernel")

    lane = lane_of(forward, "iris")
    jobs = [job_of(1) for _ in range(5)]
    for job in jobs:
        engine.submit(lane, job)
    with caplog.at_level("INFO"):
        engine.run_waiting()
        answers = {status_and_text(job.error) for job in jobs}
    assert answers == {(Status.INTERNAL, "internal error; the server's log has the details")}
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.getMessage() == "kernel failed model=iris jobs=5 rows=5"
    assert str(record.exc_info[1]) == "kernel"


def test_a_callback_fault_is_told_to_its_own_job(engine):
    """If delivering one answer raises, that job is failed and its neighbours are answered."""
    lane = lane_of(lambda x: x)
    before, broken, after = job_of(1), job_of(1), job_of(1)
    fault = ValueError("encoder")

    def raise_fault(jobs, y):
        raise fault

    broken.deliver = raise_fault
    for job in (before, broken, after):
        engine.submit(lane, job)
    engine.run_waiting()
    assert broken.error is fault
    assert [job.answers for job in (before, broken, after)] == [1, 1, 1]


@pytest.mark.parametrize("kernel_fails", [False, True])
def test_a_job_whose_every_callback_raises_strands_nobody(engine, kernel_fails):
    """A job that cannot even be failed leaves its batch's other jobs and the lane usable."""

    def forward(x):
        if kernel_fails and len(x) > 1:
            raise RuntimeError("kernel")
        return x

    def raise_error(*_):
        raise RuntimeError("callback")

    lane = lane_of(forward)
    broken, neighbour, later = job_of(1), job_of(1), job_of(1)
    broken.deliver = broken.fail = raise_error
    engine.submit(lane, broken)
    engine.submit(lane, neighbour)
    engine.run_waiting()
    engine.submit(lane, later)
    engine.run_waiting()
    assert (neighbour.answers, later.answers) == (1, 1)


# Threads


def test_short_work_has_one_runner(engine):
    """While a short model runs, what arrives waits for the next batch instead of waking a thread."""
    gate = Gate()
    lane = lane_of(gate)
    lane.row_cost_s = 1e-6
    first, second, third = job_of(1), job_of(1), job_of(1)
    engine.submit(lane, first)
    runner = run_in_thread(engine)
    gate.wait_for_runner()
    for job in (second, third):
        engine.submit(lane, job)
        engine.run_waiting()  # returns at once: the runner will see to it
    assert gate.batches == [1]
    gate.open.set()
    runner.join()
    for job in (first, second, third):
        job.wait()
    assert gate.batches == [1, 2]


def test_long_work_gets_a_second_runner(engine):
    """From PARALLEL_FROM_S of waiting work up, another thread runs a batch of the same model."""
    gate = Gate()
    lane = lane_of(gate)
    lane.row_cost_s = LONG
    jobs = [job_of(1), job_of(1)]
    threads = []
    for job in jobs:
        engine.submit(lane, job)
        threads.append(run_in_thread(engine))
        gate.wait_for_runner()  # the second one enters while the first is inside
    assert gate.batches == [1, 1]
    gate.open.set()
    for thread in threads:
        thread.join()
    for job in jobs:
        job.wait()


def test_runners_of_a_lane_are_no_more_than_the_threads(engine):
    """With two threads, a third long batch waits for one of the first two."""
    gate = Gate()
    lane = lane_of(gate)
    lane.row_cost_s = LONG
    jobs = [job_of(1) for _ in range(3)]
    threads = []
    for job in jobs[:2]:
        engine.submit(lane, job)
        threads.append(run_in_thread(engine))
        gate.wait_for_runner()
    engine.submit(lane, jobs[2])
    engine.run_waiting()
    assert gate.batches == [1, 1]
    gate.open.set()
    for thread in threads:
        thread.join()
    for job in jobs:
        job.wait()


def test_lanes_take_turns_on_the_kernel_threads():
    """A model whose queue never empties keeps another one's batches waiting for one batch, not for ever."""
    engine = Engine(threads=1)
    caller = threading.current_thread()
    both_wait = threading.Event()
    order = []

    def flood(x):
        # Each batch queues the next while the other model waits, as busy clients do.
        order.append("busy")
        if len(order) < 100:
            engine.submit(busy, job_of(1))
        if threading.current_thread() is not caller:
            assert both_wait.wait(10)
        return x

    busy = lane_of(flood, "busy", max_batch_rows=1)
    other = lane_of(noting(order, lambda x: "other"), "other", max_batch_rows=1)
    # Two jobs a model: the caller runs the first, the second needs the only kernel thread.
    jobs = [job_of(1) for _ in range(4)]
    for job, lane in zip(jobs, (busy, busy, other, other), strict=True):
        engine.submit(lane, job)
    engine.run_waiting()
    both_wait.set()
    for job in jobs:
        job.wait()
    engine.close()
    # The caller's two, then one of each at least: no third "busy" before the second "other".
    assert [name for name in order if name == "other"] == ["other"] * 2
    assert order[: order.index("other", order.index("other") + 1)].count("busy") <= 2


@pytest.mark.usefixtures("quick_switches")
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("row_cost_s", [0.0, LONG], ids=["short", "long"])
def test_no_job_is_stranded_or_answered_twice(threads, row_cost_s):
    """Eight callers, three models, faults, cancellations and full queues: one answer a job."""
    engine = Engine(threads)
    per_thread = 300

    def forward(x):
        if (x == 13).any():
            raise RuntimeError("kernel")
        return x + 0.5

    lanes = [lane_of(forward, str(index), max_batch_rows=4, max_requests=64) for index in range(3)]
    for lane in lanes:
        lane.row_cost_s = row_cost_s
        lane.note_cost = lambda rows, elapsed_s: None  # keep to the estimate that this run is about
    jobs = []

    def call(seed):
        dice = random.Random(seed)
        mine = []
        for _ in range(per_thread):
            job = job_of(dice.randrange(4), value=dice.choice((1, 2, 3, 13)))
            try:
                engine.submit(dice.choice(lanes), job)
            except QueueFull:
                continue
            mine.append(job)
            job.has_gone = dice.random() < 0.1
            if dice.random() < 0.7:
                engine.run_waiting()
        engine.run_waiting()
        jobs.extend(mine)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for job in jobs:
        job.wait()
    engine.close()
    assert Counter(job.answers for job in jobs) == {1: len(jobs)}
    assert [(lane.runners, len(lane.batcher)) for lane in lanes] == [(0, 0)] * 3
    for job in jobs:
        if job.error is None:
            np.testing.assert_array_equal(job.outputs, job.x + 0.5)
        else:
            assert isinstance(job.error, KernelFault | Cancelled)
    assert any(job.error is None for job in jobs)


def test_close_waits_for_what_is_running():
    """close() returns after the batches that kernel threads are running, not before."""
    engine = Engine(threads=1)
    gate = Gate()
    lane = lane_of(gate, max_batch_rows=1)
    jobs = [job_of(1), job_of(1)]
    for job in jobs:
        engine.submit(lane, job)
    gate.open.set()
    engine.run_waiting()
    engine.close()
    assert [job.answers for job in jobs] == [1, 1]
