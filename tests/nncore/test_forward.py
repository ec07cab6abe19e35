"""The forward pass against its slow twin, and what it promises about bits, threads and inputs."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import naive
from support.models import random_mlp

import nncore
from nncore import DtypeError, Layer, Mlp, ShapeError

# Largest slope of each activation, for alpha up to 1.5 in size: how much of an error it can pass on.
# step is left out: where it jumps, no bound holds.
SLOPES = {name: 1.5 if nncore.ACTIVATIONS[name].default_alpha else 1.2 for name in nncore.ACTIVATIONS}
SLOPES["selu"] = 1.76
ALPHAS = [None, 0.0, -0.5, 1.5]


def error_bound(mlp, x):
    """
    How far float rounding can take the kernel's outputs from the exact ones: (rows, n_out).

    Dot products: n_in + 1 roundings, each at most u relative to the sum of magnitudes (Higham 2002, eq. 3.5).
    Activations: 4 ULP of their own, and their slope times the error of their argument.
    """
    u = np.finfo(mlp.dtype).eps / 2
    h, error = np.asarray(x, np.float64), np.zeros(x.shape)
    for layer in mlp.layers:
        w, b = np.asarray(layer.weights, np.float64), np.asarray(layer.bias, np.float64)
        roundings = (layer.n_in + 1) * u / (1 - (layer.n_in + 1) * u)
        error = error @ np.abs(w) + roundings * ((np.abs(h) + error) @ np.abs(w) + np.abs(b))
        h = naive.layer_forward(layer, h)
        error = SLOPES[layer.activation] * error + 8 * u * (np.abs(h) + error) + np.finfo(mlp.dtype).tiny
    return error


def assert_close(mlp, x):
    """mlp.forward(x) is within its error bound of the slow twin."""
    excess = np.abs(mlp.forward(x) - naive.forward(mlp, x)) - error_bound(mlp, x)
    assert excess.max(initial=-1) <= 0


sizes = st.lists(st.integers(1, 40), min_size=2, max_size=5).map(tuple)
dtypes = st.sampled_from(["float32", "float64"])
seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=150, deadline=None)
@given(seeds, sizes, st.integers(0, 20), st.sampled_from(sorted(SLOPES.keys() - {"step"})), st.data())
def test_forward_agrees_with_its_slow_twin(seed, sizes, rows, activation, data):
    """Any shape, depth, activation and alpha gives what NumPy gives in float64, within rounding."""
    dtype = data.draw(dtypes)
    alpha = None
    if nncore.ACTIVATIONS[activation].default_alpha is not None:
        # celu is defined for alpha > 0 only; below, it grows like an exponential, and no bound here holds.
        alpha = data.draw(st.sampled_from([None, 0.5, 1.5] if activation == "celu" else ALPHAS))
    mlp = random_mlp(seed, sizes, activation, "identity", alpha, dtype)
    x = np.random.default_rng(seed).standard_normal((rows, sizes[0])).astype(dtype)
    assert_close(mlp, x)


@pytest.mark.parametrize("n_in", [1, 2, 3, 4, 5, 784])
@pytest.mark.parametrize("n_out", [1, 7, 8, 16, 17, 65])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_remainder_of_the_blocks_is_right(n_in, n_out, dtype):
    """Widths on both sides of every vector and unrolling width are summed in full."""
    mlp = random_mlp(n_in, (n_in, n_out), last="identity", dtype=dtype)
    assert_close(mlp, np.random.default_rng(1).standard_normal((3, n_in)).astype(dtype))


def test_step_layers_are_exact():
    """A net of steps computes logic: exclusive or, without any rounding."""
    hidden = Layer([[1.0, 1.0], [1.0, 1.0]], [-0.5, -1.5], "step")
    mlp = Mlp([hidden, Layer([[1.0], [-1.0]], [-0.5], "step")])
    np.testing.assert_array_equal(mlp.forward([[0, 0], [0, 1], [1, 0], [1, 1]])[:, 0], [0, 1, 1, 0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_alpha_vector_goes_to_its_output(dtype):
    """With one alpha an output, each output uses its own."""
    mlp = Mlp([Layer(np.eye(3), None, "prelu", [0.5, 2.0, -1.0]).astype(dtype)])
    np.testing.assert_array_equal(mlp.forward([[-1, -1, -1], [4, 4, 4]]), [[-0.5, -2, 1], [4, 4, 4]])


@settings(max_examples=60, deadline=None)
@given(seeds, sizes, dtypes, st.sampled_from(["sigmoid", "relu", "gelu", "elu"]), st.data())
def test_a_row_has_the_same_bits_in_every_batch(seed, sizes, dtype, activation, data):
    """However rows are split into batches, outputs and probabilities keep every bit."""
    mlp = random_mlp(seed, sizes, activation, dtype=dtype)
    x = np.random.default_rng(seed).standard_normal((40, sizes[0])).astype(dtype)
    whole = mlp.forward(x)
    cuts = sorted(data.draw(st.lists(st.integers(0, 40), max_size=6)))
    parts = np.split(x, cuts)
    np.testing.assert_array_equal(np.concatenate([mlp.forward(part) for part in parts]), whole)
    split_probabilities = np.concatenate([mlp.predict_proba(part) for part in parts])
    np.testing.assert_array_equal(split_probabilities, mlp.predict_proba(x))
    row = data.draw(st.integers(0, 39))
    np.testing.assert_array_equal(mlp.forward(x[row]), whole[row])


def test_many_threads_get_the_right_bits():
    """Eight threads that call one model at once, with batches of their own, get every bit right."""
    mlp = random_mlp(0, (64, 64, 32, 10), "tanh", "softmax")
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((1 + 7 * i, 64)).astype(np.float32) for i in range(8)]
    expected = [mlp.forward(batch) for batch in batches]
    start = threading.Barrier(8)
    wrong = []

    def call(first):
        start.wait()
        for i in range(first, first + 400):
            if mlp.forward(batches[i % 8]).tobytes() != expected[i % 8].tobytes():
                wrong.append(i)  # noqa: PERF401

    threads = [threading.Thread(target=call, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_first_call_by_many_threads_at_once():
    """A model that is new to all threads gives each the right answer."""
    x = np.ones((2, 5))
    for seed in range(20):
        mlp = random_mlp(seed, (5, 4, 3))
        expected = random_mlp(seed, (5, 4, 3)).forward(x)
        start = threading.Barrier(4)
        answers: list[np.ndarray] = []

        def call(mlp=mlp, start=start, answers=answers):
            start.wait()
            answers.append(mlp.forward(x))

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        np.testing.assert_array_equal(answers, [expected] * 4)


def test_kernel_runs_without_the_gil():
    """While one thread is inside the kernel, another runs Python."""
    mlp = random_mlp(0, (512, 1024, 1024, 256), "tanh")
    mlp.forward(np.zeros((1, 512)))
    x = np.zeros((400, 512), np.float32)
    inside, counted = threading.Event(), 0

    def call():
        inside.set()
        mlp.forward(x)

    thread = threading.Thread(target=call)
    thread.start()
    inside.wait()
    while thread.is_alive():
        counted += 1
    # With the GIL held for the whole kernel (about 50 ms), the loop would run a handful of times.
    assert counted > 1000


def test_nan_and_infinite_rows_leave_others_alone():
    """NaN in a row reaches that row's outputs and no other row."""
    mlp = random_mlp(0, (8, 16, 3), "tanh", "softmax")
    x = np.random.default_rng(0).standard_normal((9, 8)).astype(np.float32)
    clean = mlp.forward(x)
    x[4, 2], x[6, 1] = np.nan, np.inf
    dirty = mlp.forward(x)
    others = [0, 1, 2, 3, 5, 7, 8]
    assert np.isnan(dirty[4]).all()
    assert np.isfinite(dirty[6]).all()  # tanh of an infinity is 1
    np.testing.assert_array_equal(dirty[others], clean[others])


# Inputs and outputs


X = np.arange(12.0).reshape(4, 3) - 5


@pytest.mark.parametrize(
    "x",
    [
        X.tolist(),
        X.astype(np.float64),
        X.astype(">f4"),
        X.astype(">f8"),
        X.astype(np.float16),
        X.astype(np.longdouble),
        X.astype(np.int8),
        X.astype(np.int64),
        X.astype(np.float32).T.copy().T,
        np.asfortranarray(X),
        np.repeat(X, 2, axis=0)[::2],
        np.repeat(X, 2, axis=1)[:, ::2],
        X[::-1][::-1],
        np.frombuffer(b"?" + X.tobytes(), np.float64, offset=1).reshape(4, 3),
        np.frombuffer(X.astype(np.float32).tobytes(), np.float32).reshape(4, 3),
    ],
    ids=lambda x: getattr(getattr(x, "dtype", None), "str", "list"),
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_real_array_is_accepted(x, dtype):
    """Lists, other dtypes, byte orders, strides and alignments give the same bits; the input is untouched."""
    mlp = random_mlp(0, (3, 5, 2), dtype=dtype)
    before = np.array(x)
    np.testing.assert_array_equal(mlp.forward(x), mlp.forward(X))
    np.testing.assert_array_equal(x, before)


def test_booleans_are_numbers():
    """True is 1 and False is 0."""
    mlp = random_mlp(0, (3, 2))
    np.testing.assert_array_equal(mlp.forward([[True, False, True]]), mlp.forward([[1, 0, 1]]))


def test_values_beyond_float32_become_infinite():
    """A float64 input that a float32 model cannot hold is an infinity, silently."""
    mlp = Mlp([Layer(np.ones((1, 1), np.float32))])
    assert mlp.forward([[1e300]]) == np.inf


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_model_answers_in_its_own_dtype(dtype):
    """Whatever the input's dtype, outputs and probabilities have the model's."""
    mlp = random_mlp(0, (3, 2), dtype=dtype)
    for x in (X.astype(np.float32), X.astype(np.float64)):
        assert mlp.forward(x).dtype == mlp.predict_proba(x).dtype == np.dtype(dtype)


def test_a_single_row_is_answered_as_a_row():
    """(n_in,) in, (n_out,) out; calling the model is forward."""
    mlp = random_mlp(0, (3, 5, 2))
    assert mlp.forward(X[0]).shape == (2,)
    np.testing.assert_array_equal(mlp(X[0]), mlp.forward(X[:1])[0])


def test_no_rows_give_no_rows():
    """An empty batch is answered with an empty batch."""
    mlp = random_mlp(0, (3, 5, 2))
    assert mlp.forward(np.empty((0, 3))).shape == (0, 2)
    assert mlp.predict_proba(np.empty((0, 3))).shape == (0, 2)
    assert [trace.activation.shape for trace in mlp.trace(np.empty((0, 3)))] == [(0, 5), (0, 2)]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (
            np.ones((3, 7)),
            ShapeError,
            r"inputs has shape \(3, 7\); model 'iris' expects \(rows, 4\) or \(4,\)",
        ),
        (np.ones(3), ShapeError, r"inputs has shape \(3,\); model 'iris' expects"),
        (np.ones((1, 1, 4)), ShapeError, r"inputs has shape \(1, 1, 4\); model 'iris' expects"),
        (1.0, ShapeError, r"inputs has shape \(\); model 'iris' expects"),
        ([[1, 2, 3, 4], [1, 2, 3]], ShapeError, "inputs is not a rectangular array of numbers"),
        (np.ones((1, 4), complex), DtypeError, "inputs has dtype complex128; expected real numbers"),
        ([["1", "2", "3", "4"]], DtypeError, "inputs has dtype <U1; expected real numbers"),
        (np.ones((1, 4), object), DtypeError, "inputs has dtype object; expected real numbers"),
        (np.ones((1, 4), "M8[s]"), DtypeError, r"inputs has dtype datetime64\[s\]; expected real numbers"),
        (None, DtypeError, "inputs has dtype object; expected real numbers"),
    ],
)
def test_forward_says_what_is_wrong_with_its_input(x, error, message):
    """A wrong shape or dtype is refused with the model's name and what it expects."""
    with pytest.raises(error, match=message):
        random_mlp(0, (4, 3), name="iris").forward(x)


def test_forward_writes_into_out():
    """The answer is in *out*, which is also what is returned."""
    mlp = random_mlp(0, (3, 5, 2))
    out = np.full((4, 2), 7, np.float32)
    assert mlp.forward(X, out) is out
    np.testing.assert_array_equal(out, mlp.forward(X))
    row = np.empty(2, np.float32)
    assert mlp.forward(X[1], out=row) is row
    np.testing.assert_array_equal(row, out[1])


BUFFER = np.zeros((8, 3), np.float32)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.empty((4, 3)), DtypeError, "out is float64; model 'mlp' writes a float32 array"),
        (np.empty((4, 3), ">f4"), DtypeError, "out is >f4; model 'mlp' writes a float32 array"),
        ([[0.0]], DtypeError, "out is list; model 'mlp' writes a float32 array"),
        (np.empty((3, 3), np.float32), ShapeError, r"out has shape \(3, 3\); expected \(4, 3\)"),
        (np.empty(3, np.float32), ShapeError, r"out has shape \(3,\); expected \(4, 3\)"),
        (np.empty((4, 6), np.float32)[:, ::2], ShapeError, "out must be C-contiguous, aligned and writeable"),
        (np.empty((4, 3), np.float32, order="F"), ShapeError, "out must be C-contiguous"),
        (
            np.broadcast_to(np.float32(0), (4, 3)),
            ShapeError,
            "out must be C-contiguous, aligned and writeable",
        ),
        (BUFFER[:4], ShapeError, "out shares memory with inputs"),
        (BUFFER[3:7], ShapeError, "out shares memory with inputs"),
    ],
)
def test_forward_says_what_is_wrong_with_out(out, error, message):
    """An *out* of another type, shape or layout, or one that overlaps x, is refused."""
    with pytest.raises(error, match=message):
        random_mlp(0, (3, 3)).forward(BUFFER[:4], out)


def test_out_beside_the_input_is_no_overlap():
    """Neighbours in one buffer do not share memory."""
    mlp = random_mlp(0, (3, 3))
    buffer = np.ones((8, 3), np.float32)
    mlp.forward(buffer[:4], buffer[4:])
    np.testing.assert_array_equal(buffer[4:], mlp.forward(np.ones((4, 3))))


def test_trace_gives_every_intermediate_value():
    """Every layer's values are those of the slow twin; the last are forward's, bit by bit."""
    mlp = random_mlp(0, (3, 5, 4, 2), "tanh", "softmax", dtype="float64")
    traces = mlp.trace(X)
    h = X
    for layer, trace in zip(mlp.layers, traces, strict=True):
        # 1e-14: dozens of roundings of values near 1.
        np.testing.assert_allclose(trace.pre_activation, h @ layer.weights + layer.bias, rtol=0, atol=1e-14)
        h = naive.layer_forward(layer, h)
        np.testing.assert_allclose(trace.activation, h, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(traces[-1].activation, mlp.forward(X))
    assert [trace.activation.shape for trace in mlp.trace(X[0])] == [(5,), (4,), (2,)]
