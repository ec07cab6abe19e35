"""Outputs to probabilities and top classes: which rule applies, and how ties, NaN and edges come out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.models import random_mlp

from nncore import ArgumentError, DtypeError, Layer, Mlp, ShapeError


def model(n_out, last="identity", dtype="float32"):
    """A model with *n_out* outputs; only its last activation and dtype matter here."""
    return Mlp([Layer(np.ones((1, n_out)), None, last).astype(dtype)])


def test_several_logits_go_through_softmax():
    """Probabilities of several outputs are exp(x) over the row's sum."""
    outputs = np.log([[1.0, 2.0, 5.0], [3.0, 3.0, 2.0]])
    # 3e-7: two or three roundings in float32.
    np.testing.assert_allclose(
        model(3).probabilities_from(outputs), [[0.125, 0.25, 0.625], [0.375, 0.375, 0.25]], rtol=3e-7
    )


def test_a_single_logit_goes_through_sigmoid():
    """One output keeps its shape: the probability of the second class."""
    probabilities = model(1).probabilities_from([[0.0], [np.log(3)], [-np.inf]])
    np.testing.assert_allclose(probabilities, [[0.5], [0.75], [0.0]], rtol=3e-7)


@pytest.mark.parametrize("last", ["softmax", "sigmoid"])
@pytest.mark.parametrize("n_out", [1, 3])
def test_probabilities_are_passed_on(last, n_out):
    """Outputs of softmax and sigmoid layers are answered as they are, without a copy."""
    outputs = np.full((2, n_out), 0.3, np.float32)
    assert model(n_out, last).probabilities_from(outputs) is outputs


@pytest.mark.parametrize("last", ["identity", "relu"])
def test_a_row_gives_a_row(last):
    """(n_out,) in, (n_out,) out."""
    np.testing.assert_allclose(model(2, last).probabilities_from([0, 0]), [0.5, 0.5])
    assert model(1, last).probabilities_from([0]).shape == (1,)


@pytest.mark.parametrize(("n_out", "last"), [(1, "identity"), (3, "identity"), (3, "softmax")])
def test_probabilities_are_written_into_out(n_out, last):
    """*out* is filled and returned; it may be the outputs themselves."""
    mlp = model(n_out, last)
    outputs = np.random.default_rng(0).standard_normal((5, n_out)).astype(np.float32)
    expected = mlp.probabilities_from(outputs).copy()
    out = np.empty_like(outputs)
    assert mlp.probabilities_from(outputs, out) is out
    np.testing.assert_array_equal(out, expected)
    assert mlp.probabilities_from(outputs, outputs) is outputs
    np.testing.assert_array_equal(outputs, expected)


def test_predict_proba_is_forward_then_probabilities():
    """predict_proba(x) = probabilities_from(forward(x))."""
    mlp = random_mlp(0, (4, 8, 3))
    x = np.random.default_rng(0).standard_normal((6, 4))
    np.testing.assert_array_equal(mlp.predict_proba(x), mlp.probabilities_from(mlp.forward(x)))


def test_wrong_outputs_are_refused():
    """Outputs that are not the model's are named with what was expected."""
    with pytest.raises(
        ShapeError, match=r"outputs has shape \(2, 2\); model 'mlp' expects \(rows, 3\) or \(3,\)"
    ):
        model(3).probabilities_from(np.ones((2, 2)))
    with pytest.raises(DtypeError, match="outputs has dtype complex128"):
        model(3).top_labels_from(np.ones((2, 3), complex))
    buffer = np.ones((3, 3), np.float32)
    with pytest.raises(ShapeError, match="out shares memory with outputs"):
        model(3).probabilities_from(buffer[:2], buffer[1:])


def top(probabilities, k):
    """Top classes of outputs that are probabilities already."""
    probabilities = np.asarray(probabilities)
    return model(probabilities.shape[-1], "sigmoid").top_labels_from(probabilities, k)


def test_top_labels_descend():
    """The k most probable classes come first, with their probabilities."""
    indices, scores = top([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], 2)
    assert indices.dtype == np.int32
    np.testing.assert_array_equal(indices, [[1, 2], [0, 2]])
    np.testing.assert_array_equal(scores, np.array([[0.5, 0.3], [0.6, 0.3]], np.float32))


def test_ties_go_to_the_lower_index():
    """Equal scores keep the order of their classes, zeros of either sign included."""
    np.testing.assert_array_equal(top([[0.1, 0.4, 0.1, 0.4]], 4)[0], [[1, 3, 0, 2]])
    np.testing.assert_array_equal(top([[0.0, -0.0, 0.0]], 3)[0], [[0, 1, 2]])


def test_nan_comes_last():
    """NaN scores come after all numbers, by index among themselves."""
    indices, scores = top([[np.nan, 0.1, np.nan, 0.9], [np.nan] * 4], 4)
    np.testing.assert_array_equal(indices, [[3, 1, 0, 2], [0, 1, 2, 3]])
    np.testing.assert_array_equal(scores[0], np.array([0.9, 0.1, np.nan, np.nan], np.float32))


def test_a_nan_row_does_not_touch_its_neighbours():
    """Labels of a NaN row are all NaN; the next row's are right."""
    indices, scores = model(3).top_labels_from([[np.nan, 0, 0], [0, 9, 0]], 1)
    assert np.isnan(scores[0, 0])
    assert indices[1, 0] == 1


def test_a_single_output_has_two_classes():
    """One probability p is scored as [1 - p, p]; an even chance goes to the first class."""
    indices, scores = top([[0.75], [0.25], [0.5], [np.nan]], 2)
    np.testing.assert_array_equal(indices, [[1, 0], [0, 1], [0, 1], [0, 1]])
    np.testing.assert_array_equal(scores[:3], [[0.75, 0.25], [0.75, 0.25], [0.5, 0.5]])
    assert model(1).top_labels_from([3.0], 1)[0] == [1]


def test_top_labels_of_a_row_and_of_no_rows():
    """A single row is answered as (k,), an empty batch as (0, k)."""
    assert [part.shape for part in top([0.1, 0.2, 0.7], 2)] == [(2,), (2,)]
    assert [part.shape for part in top(np.empty((0, 3)), 2)] == [(0, 2), (0, 2)]


@pytest.mark.parametrize(("n_out", "k", "count"), [(3, 0, 3), (3, 4, 3), (3, -1, 3), (1, 3, 2)])
def test_k_must_be_a_number_of_classes(n_out, k, count):
    """k below 1 or above the number of classes is refused, with the range."""
    with pytest.raises(ArgumentError, match=f"k is {k}; expected 1 to {count}, the number of classes"):
        model(n_out).top_labels_from(np.zeros((2, n_out)), k)


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float64,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(0, 1) | st.just(np.nan),
    ),
    st.data(),
)
def test_top_labels_are_a_sorted_list(probabilities, data):
    """Each row is what Python's sorted() gives by (is NaN, -score, index)."""
    if probabilities.shape[1] == 1:
        probabilities = np.hstack([probabilities, probabilities])
    k = data.draw(st.integers(1, probabilities.shape[1]))
    indices, scores = model(probabilities.shape[1], "sigmoid", "float64").top_labels_from(probabilities, k)
    for row, row_indices, row_scores in zip(probabilities, indices, scores, strict=True):
        expected = sorted(range(len(row)), key=lambda i: (np.isnan(row[i]), -np.nan_to_num(row[i]), i))[:k]
        np.testing.assert_array_equal(row_indices, expected)
        np.testing.assert_array_equal(row_scores, row[expected])
