"""The short way from Python into the kernels takes what it can read, and nothing else."""

import gc
import sys
import threading

import numpy as np
import pytest
from support.random_models import normal, same_bits

import nncore
from nncore import python_calls
from nncore.forward import PlainEvaluator

RNG = np.random.default_rng(0)
MLP = nncore.Mlp([nncore.Layer(normal(RNG, (6, 20)), None, "tanh"), nncore.Layer(normal(RNG, (20, 3)))])
X = normal(RNG, (5, 6))


class Subclass(np.ndarray):
    pass


def fresh():
    return np.full((5, 3), 7, np.float32)


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(np.float32).reshape(array.shape)
    view[:] = array
    return view


def test_arrays_lie_in_memory_as_the_kernels_read_them():
    """Else every call would take the long way, unnoticed."""
    assert python_calls.layout_is_known()


def test_what_fits_is_evaluated_into_out():
    """The very same object comes back; read-only rows, an empty batch and views of whole rows fit."""
    evaluate_at_once = MLP._evaluator.evaluate_at_once
    expected = np.empty((5, 3), np.float32)
    PlainEvaluator([layer for layer in MLP.layers if isinstance(layer, nncore.Layer)]).evaluate(X, expected)
    for x in (X, read_only(X), np.vstack([X, X])[5:], np.frombuffer(X.tobytes(), np.float32).reshape(5, 6)):
        y = fresh()
        assert evaluate_at_once(x, y) is y
        assert same_bits(y, expected)
    empty = np.empty((0, 3), np.float32)
    assert evaluate_at_once(np.empty((0, 6), np.float32), empty) is empty


def test_without_out_there_is_a_new_array():
    y = MLP._evaluator.evaluate_at_once(X, None)
    assert type(y) is np.ndarray
    assert y.flags.carray
    assert y.flags.owndata
    assert same_bits(y, MLP.forward(X, fresh()))


def test_what_an_allocation_raises_is_raised():
    """Results of 10^15 bytes fit into no memory."""
    wide = nncore.Mlp([nncore.Layer(normal(RNG, (1, 300_000)))])
    endless = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (10**9, 1), (4, 4))
    with pytest.raises(MemoryError):
        wide._evaluator.evaluate_at_once(endless, None)


@pytest.mark.parametrize(
    "x",
    [
        None,
        1,
        [1.0],
        "x",
        object(),
        np.float32(1),
        np.array(1.0, np.float32),
        X[0],
        X[None],
        X.astype(np.float64),
        X.astype(np.int32),
        X.astype(">f4"),
        X.view(Subclass),
        X[:4],
        X[:, :5].copy(),
        np.asfortranarray(X),
        np.hstack([X, X])[:, :6],
        np.vstack([X, X])[::2],
        unaligned(X),
    ],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')} {getattr(x, 'shape', '')}",
)
def test_rows_that_do_not_fit_are_refused(x):
    """None comes back and nothing is written."""
    y = fresh()
    assert MLP._evaluator.evaluate_at_once(x, y) is None
    assert (y == 7).all()


@pytest.mark.parametrize(
    "y",
    [
        1.5,
        fresh()[0],
        fresh().astype(np.float64),
        fresh()[:4],
        np.zeros((5, 4), np.float32),
        read_only(fresh()),
        fresh().view(Subclass),
        np.asfortranarray(fresh()),
    ],
    ids=lambda y: f"{type(y).__name__} {getattr(y, 'dtype', '')} {getattr(y, 'shape', '')}",
)
def test_destinations_that_do_not_fit_are_refused(y):
    """None comes back and nothing is written."""
    before = np.array(y)
    assert MLP._evaluator.evaluate_at_once(X, y) is None
    assert np.array_equal(y, before)


def test_shared_memory_is_refused():
    """x and out may touch, but not by a single number."""
    memory = np.zeros(5 * 6 + 5 * 3, np.float32)
    x = memory[:30].reshape(5, 6)
    assert MLP._evaluator.evaluate_at_once(x, memory[30:].reshape(5, 3)) is not None
    assert MLP._evaluator.evaluate_at_once(x, memory[29:44].reshape(5, 3)) is None
    memory[:] = 0
    x = memory[15:].reshape(5, 6)
    assert MLP._evaluator.evaluate_at_once(x, memory[:15].reshape(5, 3)) is not None
    assert MLP._evaluator.evaluate_at_once(x, memory[1:16].reshape(5, 3)) is None


@pytest.mark.parametrize("arguments", [(), (X,), (X, fresh(), 1)])
def test_any_other_count_of_arguments_is_refused(arguments):
    assert MLP._evaluator.evaluate_at_once(*arguments) is None


def test_references_are_counted():
    """10,000 calls leave the counts of both arrays, and of None, where they were."""
    y = fresh()
    before = sys.getrefcount(X), sys.getrefcount(y)
    none_before = sys.getrefcount(None)
    for _ in range(10_000):
        MLP._evaluator.evaluate_at_once(X, y)
        MLP._evaluator.evaluate_at_once(X, 1.5)
        z = MLP._evaluator.evaluate_at_once(X, None)
    assert sys.getrefcount(z) == 2
    assert (sys.getrefcount(X), sys.getrefcount(y)) == before
    assert abs(sys.getrefcount(None) - none_before) < 1_000


def test_the_callable_keeps_what_it_needs():
    """It may outlive its model."""
    mlp = nncore.Mlp(MLP.layers)
    expected = mlp.forward(X)
    evaluate_at_once = mlp._evaluator.evaluate_at_once
    del mlp
    gc.collect()
    y = fresh()
    evaluate_at_once(X, y)
    assert same_bits(y, expected)


def test_a_long_call_lets_other_threads_run():
    """While one thread is in the kernel, another one counts on."""
    wide = nncore.Mlp([nncore.Layer(normal(RNG, (512, 512))), nncore.Layer(normal(RNG, (512, 512)))])
    x, y = normal(RNG, (4000, 512)), np.empty((4000, 512), np.float32)
    wide.forward(x, y)
    seen, stop = [0], threading.Event()

    def count():
        while not stop.is_set():
            seen[0] += 1

    thread = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    thread.start()
    try:
        # Were the lock held, the other thread could not run before the call has ended.
        sys.setswitchinterval(1e-6)
        before = seen[0]
        for _ in range(20):
            wide._evaluator.evaluate_at_once(x, y)
            after = seen[0]
            if after - before > 10_000:
                break
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert after - before > 10_000
