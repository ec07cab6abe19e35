"""Whole passes by the kernels: the values of forward(), the derivatives of single steps, in every batch."""

import itertools
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_models import normal, random_model, same_bits

import nncore
from nncore.dense_gradients import DenseDifferentiator
from nncore.gradients import Differentiator

# Around a vector of rows, a block and a group, at 16, 8 and 4 lanes; and few rows.
EDGES = [1, 2, 4, 5, 8, 9, 16, 17, 24, 25, 47, 48, 49, 96, 97, 191, 192, 193, 200, 385]

seeds = st.integers(0, 2**32 - 1)
batches = st.one_of(st.sampled_from(EDGES), st.integers(1, 420))
kinds = st.sampled_from(["outputs", "probabilities"])


def close(got: Any, expected: Any) -> bool:
    """Within some float32 roundings of the largest entry; NaN and infinities in the same places."""
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(got)):
        return False
    return not finite.any() or bool(
        np.abs(got[finite] - expected[finite]).max() <= 2e-5 * np.abs(expected[finite]).max()
    )


@settings(max_examples=60, deadline=None)
@given(seeds, batches, kinds)
def test_passes_give_what_single_steps_give(seed: int, rows: int, of: str) -> None:
    """Any depth, width, activation and alpha; values bit for bit those of the model."""
    rng = np.random.default_rng(seed)
    mlp = random_model(rng, most_width=80)
    steps = Differentiator(mlp.layers, of == "probabilities")
    x, v, t = normal(rng, (rows, mlp.n_in)), normal(rng, (rows, mlp.n_out)), normal(rng, (rows, mlp.n_in))
    y = mlp.forward(x) if of == "outputs" else mlp.predict_proba(x)
    few = slice(0, max(1, 2000 // (mlp.n_in * mlp.n_out)))
    for (values, got), expected in (
        (mlp.value_and_vjp(x, v, of=of), steps.vjp(x, v)[1]),
        (mlp.value_and_jvp(x, t, of=of), steps.jvp(x, t)[1]),
        (mlp.value_and_jacobian(x[few], of=of), steps.jacobian(x[few], np.arange(mlp.n_out), None)[1]),
    ):
        assert same_bits(values, y[: len(values)])
        assert close(got, expected)


@settings(max_examples=40, deadline=None)
@given(seeds, batches, kinds, st.data())
def test_derivatives_are_the_row_s_own(seed: int, rows: int, of: str, data: Any) -> None:
    """Any cut of the batch, any order of its rows; a row of the Jacobian is the product with its unit."""
    rng = np.random.default_rng(seed)
    mlp = random_model(rng, most_width=40)
    x, v, t = normal(rng, (rows, mlp.n_in)), normal(rng, (rows, mlp.n_out)), normal(rng, (rows, mlp.n_in))

    def derivatives(at: Any) -> list[Any]:
        products = [mlp.vjp(x[at], v[at], of=of), mlp.jvp(x[at], t[at], of=of), mlp.jacobian(x[at], of=of)]
        return [*products, *mlp.value_and_grad(x[at], mlp.n_out - 1, of=of)]

    whole = derivatives(slice(None))
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=3).map(sorted))
    for begin, end in itertools.pairwise([0, *cuts, rows]):
        for part, expected in zip(derivatives(slice(begin, end)), whole, strict=True):
            assert same_bits(part, expected[begin:end])
    order = np.random.default_rng(seed).permutation(rows)
    for part, expected in zip(derivatives(order), whole, strict=True):
        assert same_bits(part, expected[order])
    unit = np.eye(mlp.n_out, dtype=np.float32)[[mlp.n_out - 1] * rows]
    assert same_bits(mlp.vjp(x, unit, of=of), whole[-1])


def test_the_short_way_and_the_long_way_have_the_same_bits() -> None:
    """Other dtypes, strides and lists are converted first; a call with values takes the long way."""
    rng = np.random.default_rng(0)
    mlp = random_model(rng, most_width=60)
    x, v, t = normal(rng, (30, mlp.n_in)), normal(rng, (30, mlp.n_out)), normal(rng, (30, mlp.n_in))
    wide = np.repeat(x, 2, axis=1)[:, ::2]
    assert not wide.flags.c_contiguous or mlp.n_in == 1
    for other in (wide, x.astype(np.float64), x.tolist(), np.asfortranarray(x)):
        assert same_bits(mlp.vjp(other, v), mlp.vjp(x, v))
        assert same_bits(mlp.jvp(other, t), mlp.jvp(x, t))
        assert same_bits(mlp.jacobian(other), mlp.jacobian(x))
    assert same_bits(mlp.value_and_vjp(x, v)[1], mlp.vjp(x, v))
    assert same_bits(mlp.value_and_jvp(x, t)[1], mlp.jvp(x, t))
    assert same_bits(mlp.value_and_jacobian(x)[1], mlp.jacobian(x))
    assert same_bits(mlp.vjp(x[0], v[0]), mlp.vjp(x, v)[0])


def test_what_does_not_fit_takes_the_long_way_to_its_error() -> None:
    """As many rows of cotangents as of x, of the right width, is what the short way asks for, too."""
    mlp = nncore.Mlp([nncore.Layer(np.ones((3, 2), np.float32))])
    x: Any = np.zeros((4, 3), np.float32)
    for cotangents in (np.zeros((3, 2), np.float32), np.zeros((4, 3), np.float32), np.zeros(2, np.float32)):
        with pytest.raises(nncore.ShapeError, match="cotangents has shape"):
            mlp.vjp(x, cotangents)
    with pytest.raises(nncore.ShapeError, match="inputs has shape"):
        mlp.jacobian(np.zeros((4, 2), np.float32))
    assert mlp.vjp(x[:0], np.zeros((0, 2), np.float32)).shape == (0, 3)
    assert mlp.jacobian(x[:0]).shape == (0, 2, 3)


@pytest.mark.parametrize("n_out", [3, 40])
def test_calls_at_once_do_not_share_memory(n_out: int) -> None:
    """Six threads, short calls and long ones of one model: always the same bits."""
    rng = np.random.default_rng(4)
    layers = [
        nncore.Layer(normal(rng, (12, 50)), normal(rng, 50), "gelu"),
        nncore.Layer(normal(rng, (50, n_out)), normal(rng, n_out), "softmax"),
    ]
    mlp = nncore.Mlp(layers)
    batches = [normal(rng, (rows, 12)) for rows in (1, 7, 60, 300)]
    expected = [mlp.jacobian(x) for x in batches]
    start, wrong = threading.Barrier(6), []

    def work(index: int) -> None:
        start.wait()
        for turn in range(60):
            at = (index + turn) % len(batches)
            if not same_bits(mlp.jacobian(batches[at]), expected[at]):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_which_models_have_whole_passes() -> None:
    """float32, dense layers; others go step by step."""
    dense = nncore.Layer(np.ones((2, 2), np.float32), None, "tanh")
    norm = nncore.LayerNorm(np.ones(2, np.float32))
    single = nncore.Layer(np.ones((2, 1), np.float32), None, "tanh")
    logarithms = nncore.Layer(np.ones((2, 2), np.float32), None, "log_softmax")
    cases: list[tuple[list[Any], str, type]] = [
        ([dense], "outputs", DenseDifferentiator),
        ([dense], "probabilities", DenseDifferentiator),
        ([single], "outputs", DenseDifferentiator),
        ([single], "probabilities", Differentiator),
        ([dense, norm], "outputs", Differentiator),
        ([logarithms], "outputs", Differentiator),
        ([dense.astype("float64")], "outputs", Differentiator),
    ]
    for layers, of, expected in cases:
        assert type(nncore.Mlp(layers)._differentiator(of)) is expected
