"""Layer and Mlp: what they accept, what they refuse and in which words, and what an Mlp answers with."""

import copy
import pickle

import numpy as np
import pytest
from support.models import random_mlp

from nncore import DtypeError, Layer, Mlp, ModelError, ShapeError

ONES = np.ones((2, 3), np.float32)


# Layers


def test_layer_holds_read_only_copies():
    """Changing the arrays a layer was built from does not change the layer; its own cannot be changed."""
    weights, bias, alpha = np.ones((2, 3)), np.ones(3), np.ones(3)
    layer = Layer(weights, bias, "prelu", alpha)
    weights[0, 0] = bias[0] = alpha[0] = 7
    for array in (layer.weights, layer.bias, np.asarray(layer.alpha)):
        assert (array == 1).all()
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        ([[1, 2]], "float64"),
        ([[1.5, 2.5]], "float64"),
        (np.ones((1, 2), np.float32), "float32"),
        (np.ones((1, 2), np.float16), "float32"),
        (np.ones((1, 2), bool), "float64"),
        (np.ones((2, 1), ">f4").T, "float32"),
        (np.asfortranarray(np.ones((3, 2), ">f8")), "float64"),
    ],
)
def test_layer_takes_its_dtype_from_the_weights(weights, dtype):
    """Weights of any real type become native, C-contiguous float32 or float64, with their values kept."""
    layer = Layer(weights, [1, 2])
    assert layer.dtype == layer.weights.dtype == layer.bias.dtype == np.dtype(dtype)
    assert layer.weights.dtype.isnative
    assert layer.weights.flags.c_contiguous
    np.testing.assert_array_equal(layer.weights, weights)


def test_layer_without_bias_has_zeros():
    """A layer that is given no bias adds zero."""
    np.testing.assert_array_equal(Layer(ONES).bias, np.zeros(3, np.float32))


def test_layer_fills_in_the_default_alpha():
    """An activation with a parameter gets its default; one without has none."""
    assert Layer(ONES, activation="leaky_relu").alpha == 0.01
    assert Layer(ONES, activation="relu").alpha is None
    assert Layer(ONES, activation="softmax").alpha is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0],), ShapeError, r"weights has shape \(2,\); expected \(n_in, n_out\), each at least 1"),
        ((np.ones((0, 3)),), ShapeError, r"weights has shape \(0, 3\)"),
        (([[1.0], [2.0, 3.0]],), ShapeError, "weights is not a rectangular array of numbers"),
        (([[1j]],), DtypeError, "weights has dtype complex128; expected real numbers"),
        (([["1"]],), DtypeError, "weights has dtype <U1; expected real numbers"),
        ((np.ones((1, 1), np.longdouble),), DtypeError, "weights has dtype .*; expected float32 or float64"),
        (([[1.0, 2.0], [np.nan, 1.0]],), ModelError, r"weights\[1, 0\] is nan; .* must be finite"),
        (
            (ONES, [1.0, 2.0]),
            ShapeError,
            r"bias has shape \(2,\); expected \(3,\), one an output",
        ),
        ((ONES, [0.0, -np.inf, 0.0]), ModelError, r"bias\[1\] is -inf"),
        ((ONES, np.ones(3)), DtypeError, "bias is float64 but weights is float32"),
        ((ONES, None, "tanhh"), ModelError, "unknown activation 'tanhh'; known are .*sigmoid.*softmax"),
        ((ONES, None, None), ModelError, "unknown activation None; known are "),
        ((ONES, None, "relu", 0.1), ModelError, "activation relu takes no alpha"),
        ((ONES, None, "softmax", 0.1), ModelError, "activation softmax takes no alpha"),
        ((ONES, None, "elu", [1.0, 2.0]), ShapeError, r"alpha has shape \(2,\); expected \(3,\)"),
        ((ONES, None, "elu", np.ones(3)), DtypeError, "alpha is float64 but weights is float32"),
        ((ONES, None, "elu", [1.0, np.nan, 1.0]), ModelError, r"alpha\[1\] is nan"),
        (
            (ONES, None, "elu", np.inf),
            ModelError,
            "alpha is inf; expected a number that is finite",
        ),
        (
            (ONES, None, "elu", 1e300),
            ModelError,
            "alpha is .*; expected a number that is finite in float32",
        ),
        ((ONES, None, "elu", "1"), DtypeError, "alpha has dtype <U1; expected real numbers"),
    ],
)
def test_layer_says_what_does_not_fit(arguments, error, message):
    """Each argument that does not fit is refused with its name and what was expected."""
    with pytest.raises(error, match=message):
        Layer(*arguments)


def test_layer_counts_learned_alphas_as_parameters():
    """prelu's alpha and per-output alphas are learned; elu's single one is a setting."""
    assert Layer(ONES, activation="elu").parameter_count == 6 + 3
    assert Layer(ONES, activation="prelu").parameter_count == 6 + 3 + 1
    assert Layer(ONES, activation="elu", alpha=[1, 2, 3]).parameter_count == 6 + 3 + 3


def test_layer_nbytes_counts_every_array():
    """A layer's memory is that of weights, bias and alpha."""
    assert Layer(ONES, activation="elu", alpha=[1, 2, 3]).nbytes == 4 * (6 + 3 + 3)


# Models


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ModelError, "a model needs at least one layer"),
        (([Layer(ONES), "relu"],), ModelError, "layer 1 is a str; expected a Layer"),
        (
            ([Layer(np.ones((3, 4))), Layer(np.ones((5, 2)))],),
            ShapeError,
            "layer 1 takes 5 inputs but layer 0 gives 4",
        ),
        (([Layer(ONES), Layer(np.ones((3, 1)))],), DtypeError, "layer 1 is float64 but layer 0 is float32"),
        (
            ([Layer(ONES, activation="softmax"), Layer(ONES.T)],),
            ModelError,
            "layer 0 has activation softmax, which only the last layer may have",
        ),
        (([Layer(ONES)], ["a", "b"]), ModelError, "labels has 2 entries; the model has 3 outputs"),
        (
            ([Layer([[1.0]])], ["a"]),
            ModelError,
            "labels has 1 entries; the model has 2 classes of a",
        ),
        (([Layer(ONES)], ["a", "b", "a"]), ModelError, r"labels\[2\] repeats labels\[0\]: 'a'"),
        (([Layer(ONES)], ["a", "b", 3]), ModelError, r"labels\[2\] is 3; expected a string"),
        (([Layer(ONES)], "abc"), ModelError, "labels is one string; expected a sequence of strings"),
        (
            ([Layer(ONES)], ["a", "b", "\ud800"]),
            ModelError,
            r"labels\[2\] is .*, which is not valid Unicode",
        ),
        (([Layer(ONES)], None, ["a"]), ModelError, "feature_names has 1 entries; the model has 2 inputs"),
        (([Layer(ONES)], None, None, ""), ModelError, "name is ''; expected printable text"),
        (([Layer(ONES)], None, None, "a\nb"), ModelError, "name is 'a\\\\nb'; expected printable text"),
    ],
)
def test_mlp_says_what_does_not_fit(arguments, error, message):
    """Layers, labels and names that do not fit together are refused, naming the index."""
    with pytest.raises(error, match=message):
        Mlp(*arguments)


def test_mlp_describes_itself():
    """Sizes, dtype, parameters and memory are those of the layers."""
    mlp = Mlp(
        [Layer(np.ones((4, 3)), activation="relu"), Layer(np.ones((3, 2)))], ["no", "yes"], name="answer"
    )
    assert (mlp.n_in, mlp.n_out, str(mlp.dtype)) == (4, 2, "float64")
    assert mlp.parameter_count == 4 * 3 + 3 + 3 * 2 + 2
    assert mlp.nbytes == 8 * mlp.parameter_count
    assert repr(mlp) == "<Mlp 'answer' 4-3-2 (relu, identity), float64, 23 parameters>"
    assert repr(mlp.layers[0]) == "<Layer 4 -> 3 relu, float64>"


def test_mlp_is_immutable():
    """Neither a model nor a layer takes a new attribute value."""
    mlp = Mlp([Layer(ONES)])
    with pytest.raises(AttributeError, match="immutable"):
        mlp.name = "other"
    with pytest.raises(AttributeError):
        mlp.layers[0].activation = "relu"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("n_out", "labels", "expected"),
    [
        (3, None, ("0", "1", "2")),
        (3, ["a", "b", "c"], ("a", "b", "c")),
        (1, None, ("0", "1")),
        (1, ["n", "y"], ("n", "y")),
    ],
)
def test_class_labels(n_out, labels, expected):
    """Without labels, classes are called by their index; a single output has two classes."""
    assert Mlp([Layer(np.ones((2, n_out)))], labels).class_labels == expected


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda mlp: pickle.loads(pickle.dumps(mlp))])
def test_copies_answer_the_same_and_stay_read_only(clone):
    """copy and pickle give an equal model whose arrays are read-only, too."""
    mlp = random_mlp(0, (5, 4, 3), "prelu", alpha=[0.1, 0.2, 0.3, 0.4], labels=["a", "b", "c"])
    x = np.random.default_rng(0).standard_normal((6, 5))
    before = mlp.forward(x)
    cloned = clone(mlp)
    np.testing.assert_array_equal(cloned.forward(x), before)
    assert cloned.labels == mlp.labels
    assert not cloned.layers[0].weights.flags.writeable


def test_astype_rounds_once():
    """astype gives the nearest float32 of every number and keeps names and labels."""
    mlp = random_mlp(
        0, (3, 2), "elu", last="elu", alpha=[0.1, 0.2], dtype="float64", labels=["a", "b"], name="m"
    )
    narrow = mlp.astype("float32")
    assert (str(narrow.dtype), narrow.labels, narrow.name) == ("float32", ("a", "b"), "m")
    np.testing.assert_array_equal(narrow.layers[0].weights, mlp.layers[0].weights.astype(np.float32))
    np.testing.assert_array_equal(narrow.layers[0].alpha, np.array([0.1, 0.2], np.float32))
    with pytest.raises(DtypeError, match="dtype is 'int8'; expected float32 or float64"):
        mlp.astype("int8")
