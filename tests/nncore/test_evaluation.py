"""The SIMD forward pass has the plain kernel's bits, at every width, batch, position and thread count."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_models import normal, random_model, same_bits

import nncore
from nncore.evaluation import Evaluator
from nncore.forward import PlainEvaluator
from nncore.threads import usable_cores

SPECIAL = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42, -0.0]


def plain(mlp, x):
    """What the plain kernel answers."""
    y = np.empty((len(x), mlp.n_out), np.float32)
    PlainEvaluator(mlp.layers).evaluate(x, y)
    return y


@settings(max_examples=300)
@given(st.integers(0, 2**32 - 1), st.one_of(st.integers(0, 20), st.integers(0, 600)), st.booleans())
def test_bits_are_the_plain_kernels(seed, rows, with_special):
    """Any model and any batch, infinities, NaN, huge and tiny inputs included."""
    rng = np.random.default_rng(seed)
    mlp = random_model(rng)
    x = normal(rng, (rows, mlp.n_in))
    if with_special and rows:
        x[rng.integers(rows), rng.integers(mlp.n_in)] = rng.choice(SPECIAL)
    assert isinstance(mlp._evaluator, Evaluator)
    assert same_bits(mlp.forward(x), plain(mlp, x))


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.data())
def test_a_row_has_the_same_bits_wherever_it_travels(seed, rows, data):
    """Alone, in any part of the batch, and on two threads; outputs and probabilities."""
    rng = np.random.default_rng(seed)
    mlp = random_model(rng)
    x = normal(rng, (rows, mlp.n_in))
    begin = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(begin + 1, rows))
    y, p = mlp.forward(x), mlp.predict_proba(x)
    assert same_bits(mlp.forward(x[begin:end]), y[begin:end])
    assert same_bits(mlp.forward(x[begin]), y[begin])
    assert same_bits(mlp.forward(x, threads=2), y)
    assert same_bits(mlp.predict_proba(x[begin:end]), p[begin:end])


def test_a_nan_row_touches_no_other():
    rng = np.random.default_rng(0)
    mlp = nncore.Mlp(
        [
            nncore.Layer(normal(rng, (30, 40)), None, "tanh"),
            nncore.Layer(normal(rng, (40, 7)), None, "softmax"),
        ]
    )
    for rows in (2, 8, 9, 100, 300):
        x = normal(rng, (rows, 30))
        expected = mlp.forward(x)
        x[rows // 2, 3] = np.nan
        y = mlp.forward(x)
        assert np.isnan(y[rows // 2]).all()
        others = np.arange(rows) != rows // 2
        assert same_bits(y[others], expected[others])


def test_sums_longer_than_a_chunk_keep_their_order():
    """Inputs up to 3,000 wide: several chunks, whole and broken ones."""
    rng = np.random.default_rng(1)
    for n_in in (255, 256, 257, 512, 513, 1000, 3000):
        mlp = nncore.Mlp([nncore.Layer(normal(rng, (n_in, 33)), normal(rng, 33), "relu")])
        for rows in (1, 2, 5, 8, 9, 50):
            x = normal(rng, (rows, n_in))
            assert same_bits(mlp.forward(x), plain(mlp, x))


def test_eight_threads_at_once_get_no_wrong_bit():
    """They share the model and take different batches, 500 each."""
    rng = np.random.default_rng(2)
    mlp = nncore.Mlp(
        [
            nncore.Layer(normal(rng, (20, 64)), None, "swish"),
            nncore.Layer(normal(rng, (64, 10)), None, "softmax"),
        ]
    )
    x = normal(rng, (300, 20))
    y = plain(mlp, x)

    def call(k):
        wrong = 0
        for i in range(500):
            begin = (k * 37 + i * 11) % 250
            end = begin + 1 + (i * 7 + k) % 50
            wrong += not same_bits(mlp.forward(x[begin:end], threads=1 + i % 2), y[begin:end])
        return wrong

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(call, range(8))) == 0


def test_threads_pay_only_where_there_is_work():
    rng = np.random.default_rng(3)
    small = nncore.Mlp([nncore.Layer(normal(rng, (10, 10)))])
    assert small.threads_for(1) == 1
    assert small.threads_for(100) == 1
    assert 1 <= small.threads_for(10_000_000) <= 1024


def test_bytes_are_read_without_a_copy_and_with_the_same_bits():
    """A read-only view of a message's bytes is answered as the array that it shows; odd ones, too."""
    rng = np.random.default_rng(4)
    mlp = nncore.Mlp([nncore.Layer(normal(rng, (6, 300)), None, "elu"), nncore.Layer(normal(rng, (300, 3)))])
    x = normal(rng, (20, 6))
    y = mlp.forward(x)
    view = np.frombuffer(x.tobytes(), np.float32).reshape(20, 6)
    assert not view.flags.writeable
    assert same_bits(mlp.forward(view), y)
    assert same_bits(mlp.forward(view, out=np.empty_like(y)), y)
    unaligned = np.frombuffer(b"?" + x.tobytes(), np.float32, offset=1).reshape(20, 6)
    assert same_bits(mlp.forward(unaligned), y)
    assert same_bits(mlp.forward(view[::2]), y[::2])


def test_calls_by_several_threads_reuse_their_memory(monkeypatch):
    """Three hundred calls on two threads make no more workspaces than the threads need at once."""
    made = []
    new_workspace = Evaluator._new_workspace

    def counted(self):
        made.append(1)
        return new_workspace(self)

    monkeypatch.setattr(Evaluator, "_new_workspace", counted)
    rng = np.random.default_rng(5)
    mlp = nncore.Mlp([nncore.Layer(normal(rng, (64, 64)), None, "relu")])
    for rows in (5, 100, 1000):
        x = normal(rng, (rows, 64))
        for _ in range(100):
            mlp.forward(x, threads=2)
    # One for calls by a single thread, one for the caller of two, and one for every helper: there are as many
    # as cores at most, each late at worst.
    assert 1 <= len(made) <= 2 + usable_cores()
