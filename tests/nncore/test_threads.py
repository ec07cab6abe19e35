"""Threads that call one model at once, threads that share a call, and the pool that they come from."""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import soak
from support.random_models import normal, same_bits

import nncore
from nncore import threads
from nncore.evaluation import Evaluator


def test_twenty_thousand_calls_by_eight_threads_have_no_wrong_bit():
    """By every way in, with batches of their own. (A million: make test-soak-kernels.)"""
    assert soak.wrong_calls(soak.model(), 20_000) == 0


def test_the_soak_finds_a_workspace_that_is_shared(monkeypatch):
    """If calls that overlap were given the same memory, it would say so."""
    mlp = soak.model()
    evaluator = mlp._evaluator
    assert isinstance(evaluator, Evaluator)
    shared = evaluator.take_workspace()
    monkeypatch.setattr(evaluator, "take_workspace", lambda: shared)
    monkeypatch.setattr(evaluator, "return_workspace", lambda workspace: None)
    # Only the calls that go by way of take_workspace: as if each were such a one.
    monkeypatch.setattr(evaluator, "evaluate_at_once", lambda x, out: None)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        assert soak.wrong_calls(mlp, 20_000) > 0
    finally:
        sys.setswitchinterval(interval)


@pytest.fixture
def helpers(monkeypatch):
    """A pool of its own for the test, of as many helpers as four cores would allow."""
    # Helpers of calls before this one may be on their way back; they are not to come to the new pool.
    pause, end = threading.Event(), time.monotonic() + 30
    while len(threads._idle) < threads._started:
        assert time.monotonic() < end
        pause.wait(0.001)
    monkeypatch.setattr(threads, "_idle", [])
    monkeypatch.setattr(threads, "_started", 0)
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    return threads


def test_helpers_are_borrowed_and_never_queued_for(helpers):
    """As many as there are cores; who finds none idle gets none; who is done can be borrowed again."""
    first = helpers.borrow_helpers(3)
    second = helpers.borrow_helpers(3)
    assert (len(first), len(second)) == (3, 1)
    assert helpers.borrow_helpers(1) == []
    gate, done = threading.Event(), threading.Semaphore(0)

    def task():
        gate.wait(30)
        done.release()

    for helper in first + second:
        helper.start(task)
    assert helpers.borrow_helpers(4) == []
    gate.set()
    for _ in range(4):
        assert done.acquire(timeout=30)
    # A helper is idle just after its task has ended.
    borrowed: list[threads.Helper] = []
    while len(borrowed) < 4:
        borrowed += helpers.borrow_helpers(4 - len(borrowed))
    assert set(borrowed) == set(first + second)
    for helper in borrowed:
        helper.start(lambda: None)


def test_no_helper_is_started_before_there_is_work_for_one(helpers):
    """One thread asks for nobody, and so does a batch of no rows."""
    before = threading.active_count()
    mlp = soak.model()
    mlp.forward(np.zeros((100, 64), np.float32))
    mlp.forward(np.zeros((0, 64), np.float32), threads=4)
    assert threading.active_count() == before


@pytest.mark.parametrize("count", [2, 3, 4, 5, 100])
def test_any_number_of_threads_shares_any_batch(helpers, count):
    """Rows are shared in parts or layers in panels: the bits of one thread alone, call after call."""
    rng = np.random.default_rng(count)
    mlp = nncore.Mlp(
        [
            nncore.Layer(normal(rng, (33, 200)), normal(rng, 200), "elu"),
            nncore.Layer(normal(rng, (200, 90)), normal(rng, 90), "tanh"),
            nncore.Layer(normal(rng, (90, 7)), normal(rng, 7), "softmax"),
        ]
    )
    x = normal(rng, (1500, 33))
    y = mlp.forward(x)
    for rows in (1, 2, 8, 9, 47, 48, 49, 191, 192, 193, 500, 1500):
        for _ in range(5):
            assert same_bits(mlp.forward(x[:rows], threads=count), y[:rows]), rows


def test_shared_calls_at_once_take_what_helpers_there_are(helpers):
    """Eight callers, each of whom asks for four threads: right bits, and no deadlock."""
    mlp = soak.model()
    x = normal(np.random.default_rng(3), (700, 64))
    y = mlp.forward(x)

    def call(index):
        rows = 1 + 97 * index
        return all(same_bits(mlp.forward(x[:rows], threads=4), y[:rows]) for _ in range(60))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(8)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_has_helpers_of_its_own():
    """The parent's threads do not live in it; a call that is shared ends all the same."""
    mlp = soak.model()
    x = normal(np.random.default_rng(4), (600, 64))
    y = mlp.forward(x, threads=2)
    child = os.fork()
    if child == 0:
        os._exit(0 if same_bits(mlp.forward(x, threads=2), y) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
