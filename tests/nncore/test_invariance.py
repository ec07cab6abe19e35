"""A row's bits depend on the row and the model: not on batch, position, threads or schedule."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_models import normal, random_model, same_bits

import nncore
from nncore import layers, schedule, threads
from nncore.evaluation import Evaluator
from nncore.forward import PlainEvaluator

SPECIAL = [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42, -0.0]
# Around a vector of rows, a block, a group and two groups, at 16, 8 and 4 lanes; and few rows.
EDGES = [1, 2, 4, 7, 8, 9, 15, 16, 17, 24, 25, 47, 48, 49, 95, 96, 97, 191, 192, 193, 200, 385, 577]

seeds = st.integers(0, 2**32 - 1)
batches = st.one_of(st.sampled_from(EDGES), st.integers(1, 600))


@pytest.fixture(scope="module", autouse=True)
def four_cores():
    """Helpers as on a machine of four cores, whatever this one has."""
    patch = pytest.MonkeyPatch()
    patch.setattr(threads, "usable_cores", lambda: 4)
    yield
    patch.undo()


def model_and_rows(seed, rows):
    """A random model and rows of normal numbers, a tenth of the rows with a special one."""
    rng = np.random.default_rng(seed)
    mlp = random_model(rng)
    x = normal(rng, (rows, mlp.n_in))
    for row in np.flatnonzero(rng.random(rows) < 0.1):
        x[row, rng.integers(mlp.n_in)] = rng.choice(SPECIAL)
    return mlp, x


@settings(max_examples=150)
@given(seeds, batches, st.integers(1, 5), st.data())
def test_outputs_and_probabilities_are_the_row_s_own(seed, rows, count, data):
    """Any cut of the batch, any order of its rows, any number of threads."""
    mlp, x = model_and_rows(seed, rows)
    y, p = mlp.forward(x), mlp.predict_proba(x)
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=4).map(sorted))
    for begin, end in itertools.pairwise([0, *cuts, rows]):
        part = mlp.forward(x[begin:end], threads=count)
        assert same_bits(part, y[begin:end])
        assert same_bits(mlp.probabilities_from(part), p[begin:end])
    order = np.random.default_rng(seed).permutation(rows)
    assert same_bits(mlp.forward(x[order]), y[order])
    assert same_bits(mlp.predict_proba(x[order]), p[order])
    row = data.draw(st.integers(0, rows - 1))
    assert same_bits(mlp.forward(x[row]), y[row])
    assert same_bits(mlp.predict_proba(x[row]), p[row])
    # The same row a hundred times, among itself.
    copies = mlp.forward(np.repeat(x[row : row + 1], 100, axis=0), threads=count)
    assert same_bits(copies, np.repeat(y[row : row + 1], 100, axis=0))


@settings(max_examples=150)
@given(seeds, batches, st.integers(2, 5), st.integers(0, 20))
def test_every_schedule_has_the_same_bits(seed, rows, count, part_panels):
    """Threads that share a batch by rows (0), or a layer by any number of its panels."""
    mlp, x = model_and_rows(seed, rows)
    y = mlp.forward(x)
    assert isinstance(mlp._evaluator, Evaluator)
    evaluator: Any = mlp._evaluator
    # Panels are shared within a group of rows only.
    panels = part_panels if rows <= evaluator.group_rows else 0
    evaluator.part_panels = lambda rows, threads: panels
    assert same_bits(mlp.forward(x, threads=count), y)


@settings(max_examples=60)
@given(seeds, st.integers(1, 300))
def test_the_ways_in_have_the_same_bits(seed, rows):
    """A new array or a given one, a read-only view, strides, another byte order, float64."""
    mlp, x = model_and_rows(seed, rows)
    y = mlp.forward(x)
    out = np.empty_like(y)
    mlp.forward(x, out=out)
    assert same_bits(out, y)
    view = np.frombuffer(x.tobytes(), np.float32).reshape(x.shape)
    # A signalling NaN or a number beyond float32 is none of these: the conversion is exact.
    for form in (view, np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2], x.astype(">f4"), x.astype(float)):
        assert same_bits(mlp.forward(form), y)


@settings(max_examples=40)
@given(seeds, st.sampled_from(EDGES))
def test_float64_models_keep_their_bits_too(seed, rows):
    """The plain kernel: batches, positions, single rows, threads."""
    mlp, x = model_and_rows(seed, rows)
    mlp, x = mlp.astype("float64"), x.astype(float)
    y, p = mlp.forward(x), mlp.predict_proba(x)
    middle = rows // 2
    for part in (slice(0, middle), slice(middle, rows), slice(middle, middle + 1)):
        np.testing.assert_array_equal(mlp.forward(x[part], threads=2), y[part])
        np.testing.assert_array_equal(mlp.predict_proba(x[part]), p[part])


@settings(max_examples=40)
@given(seeds, st.integers(1, 300), st.booleans())
def test_layers_of_whole_rows_keep_their_bits_too(seed, rows, ends_in_log_softmax):
    """Layer normalization and log_softmax: batches, positions, single rows, threads."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 80))
    mlp = nncore.Mlp(
        [
            nncore.Layer(normal(rng, (9, n)), normal(rng, n), "tanh"),
            nncore.LayerNorm(normal(rng, n), normal(rng, n), activation="gelu"),
            nncore.Layer(normal(rng, (n, 5)), None, "log_softmax" if ends_in_log_softmax else "identity"),
        ]
    )
    x = normal(rng, (rows, 9))
    y, p = mlp.forward(x), mlp.predict_proba(x)
    middle = rows // 2
    for part in (slice(0, middle), slice(middle, rows), slice(middle, middle + 1)):
        assert same_bits(mlp.forward(x[part], threads=2), y[part])
        assert same_bits(mlp.predict_proba(x[part]), p[part])
    assert same_bits(mlp.forward(x[middle]), y[middle])


@pytest.mark.parametrize("n_in", [255, 256, 257, 512, 513, 1000])
def test_sums_over_several_chunks_have_one_order(n_in):
    """Whole and broken chunks of k, in the tiles for few rows, for many, and in the plain kernel."""
    rng = np.random.default_rng(n_in)
    mlp = nncore.Mlp([nncore.Layer(normal(rng, (n_in, 50)), normal(rng, 50), "relu")])
    x = normal(rng, (230, n_in))
    y = np.empty((230, 50), np.float32)
    dense: Any = mlp.layers
    PlainEvaluator(dense).evaluate(x, y)
    for rows in EDGES[:-3]:
        for count in (1, 2, 4):
            assert same_bits(mlp.forward(x[:rows], threads=count), y[:rows]), (rows, count)


def test_a_group_of_rows_is_as_the_tests_think():
    """The edges above are those of the schedule; if it changes, they should."""
    assert (schedule.GROUP, layers.BLOCK_VECTORS, layers.FEW_ROWS) == (4, 3, 8)
