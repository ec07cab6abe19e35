"""The numbers of the primer (tests/data/primer.json) come out to their printed digits."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import nncore

PRIMER = json.loads((Path(__file__).parents[1] / "data" / "primer.json").read_text())
NETWORK = PRIMER["three_layer"]

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def assert_prints_as(actual, printed, decimals=None, digits=None):
    """
    *actual* rounds to *printed*, which has *decimals* digits after the point or *digits* significant ones.

    float64 must round to exactly that, with trailing zeros dropped as in print. float32 may be 4 of its
    roundings away: its own error, which the printed digits are too many to hide.
    """
    actual, printed = np.asarray(actual), np.asarray(printed, np.float64)
    assert actual.shape == printed.shape
    unit = 10.0**-decimals if decimals else 10.0 ** (np.floor(np.log10(np.abs(printed))) + 1 - digits)
    # 1e-6 of the unit: the printed decimal is not a binary number itself.
    slack = 1e-6 * unit if actual.dtype == np.float64 else 4 * np.spacing(np.abs(printed).astype(np.float32))
    assert (np.abs(actual - printed) <= unit / 2 + slack).all(), f"{actual} is not {printed}"


def primer_network(dtype):
    """The network of the primer, built from its numbers."""
    return nncore.three_layer(
        [NETWORK["w1"], NETWORK["w2"], NETWORK["w3"]],
        [NETWORK["b1"], NETWORK["b2"], NETWORK["b3"]],
        hidden_activation=NETWORK["hidden_activation"],
        output_activation=NETWORK["output_activation"],
        dtype=dtype,
    )


@DTYPES
def test_sigmoid(dtype):
    """sigmoid at nine points, to nine significant digits."""
    x = np.array(PRIMER["sigmoid"]["x"], dtype)
    assert_prints_as(nncore.sigmoid(x), PRIMER["sigmoid"]["y"], digits=9)


@DTYPES
def test_three_layer_network(dtype):
    """The network's answer, to eight decimals."""
    y = primer_network(dtype).forward(NETWORK["x"])
    assert y.dtype == np.dtype(dtype)
    assert_prints_as(y, NETWORK["y"], decimals=8)


@DTYPES
def test_three_layer_intermediate_values(dtype):
    """Every pre-activation and activation on the way, to eight decimals."""
    first, second, last = primer_network(dtype).trace(NETWORK["x"])
    assert_prints_as(first.pre_activation, NETWORK["a1"], decimals=8)
    assert_prints_as(first.activation, NETWORK["z1"], decimals=8)
    assert_prints_as(second.pre_activation, NETWORK["a2"], decimals=8)
    assert_prints_as(second.activation, NETWORK["z2"], decimals=8)
    assert_prints_as(last.activation, NETWORK["y"], decimals=8)


@DTYPES
def test_softmax(dtype):
    """softmax of moderate logits, to eight decimals, and of large ones, to nine digits."""
    moderate, large = PRIMER["softmax"]
    assert_prints_as(nncore.softmax(np.array(moderate["x"], dtype)), moderate["y"], decimals=8)
    assert_prints_as(nncore.softmax(np.array(large["x"], dtype)), large["y"], digits=9)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# The definitions in primer.json["activations"], as a person would type them: (function, derivative).
DEFINITIONS: dict[str, tuple[Callable[..., float], Callable[..., float]]] = {
    "step": (lambda x: 0 if x <= 0 else 1, lambda x: 0),
    "sigmoid": (sigmoid, lambda x: sigmoid(x) * (1 - sigmoid(x))),
    "relu": (lambda x: max(0, x), lambda x: 1 if x > 0 else 0),
    "leaky_relu": (lambda x: x if x > 0 else 0.01 * x, lambda x: 1 if x > 0 else 0.01),
    "prelu": (lambda x, alpha: x if x > 0 else alpha * x, lambda x, alpha: 1 if x > 0 else alpha),
    "elu": (
        lambda x, alpha: x if x >= 0 else alpha * (math.exp(x) - 1),
        lambda x, alpha: 1 if x >= 0 else alpha * (math.exp(x) - 1) + alpha,
    ),
    "tanh": (math.tanh, lambda x: 1 - math.tanh(x) ** 2),
    "swish": (
        lambda x: x * sigmoid(x),
        lambda x: x * sigmoid(x) + sigmoid(x) * (1 - x * sigmoid(x)),
    ),
    "identity": (lambda x: x, lambda x: 1),
}
POINTS = [-6.0, -3.5, -1.0, -0.25, -0.0, 0.0, 0.25, 1.0, 3.5, 6.0]
ALPHAS = {"prelu": [0.25, 0.0, -0.5, 2.0], "elu": [1.0, 0.5, 2.0]}


def test_every_activation_of_the_primer_is_defined():
    """No function of the primer is left out below."""
    assert {*DEFINITIONS, "softmax"} == set(PRIMER["activations"])


@DTYPES
@pytest.mark.parametrize("name", DEFINITIONS)
def test_activations_and_derivatives(name, dtype):
    """Each function and its derivative are what the primer says, kinks included."""
    x = np.array(POINTS, dtype)
    # The definitions subtract nearly equal numbers (1 - tanh^2 at 6): their own error is up to 1e-15.
    atol = 4e-15 if dtype == "float64" else 1e-7
    for alpha in ALPHAS.get(name, [None]):
        arguments = [] if alpha is None else [alpha]
        ufuncs = (nncore.ACTIVATIONS[name].function, nncore.ACTIVATIONS[name].derivative)
        for ufunc, definition in zip(ufuncs, DEFINITIONS[name], strict=True):
            expected = [definition(float(v), *arguments) for v in x]
            actual = ufunc(x, *(np.array(a, dtype) for a in arguments))
            assert actual.dtype == np.dtype(dtype)
            np.testing.assert_allclose(actual, expected, rtol=4 * np.finfo(dtype).eps, atol=atol)


def test_three_layer_draws_the_same_weights_for_the_same_seed():
    """Random networks are normal, scaled, without bias, and repeat with their seed."""
    first = nncore.three_layer(sizes=(200, 100, 50, 10), seed=3, scale=0.1)
    again = nncore.three_layer(sizes=(200, 100, 50, 10), seed=3, scale=0.1)
    other = nncore.three_layer(sizes=(200, 100, 50, 10), seed=4, scale=0.1)
    assert [layer.activation for layer in first.layers] == ["sigmoid", "sigmoid", "identity"]
    for a, b, c in zip(first.layers, again.layers, other.layers, strict=True):
        np.testing.assert_array_equal(a.weights, b.weights)
        assert (a.weights != c.weights).all()
        assert not a.bias.any()
    weights = first.layers[0].weights  # 20,000 of them: their deviation is known to 0.5 %
    assert abs(weights.std() - 0.1) < 0.002
    assert abs(weights.mean()) < 0.003


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": [[[1.0]]] * 2}, nncore.ArgumentError, "weights has 2 arrays; expected 3"),
        ({"weights": [[[1.0]]] * 3, "biases": []}, nncore.ArgumentError, "biases has 0 arrays; expected 3"),
        (
            {"sizes": (1, 2, 3)},
            nncore.ArgumentError,
            r"sizes is \(1, 2, 3\); expected 4 numbers of at least 1",
        ),
        ({"sizes": (1, 2, 0, 3)}, nncore.ArgumentError, "expected 4 numbers of at least 1"),
        ({"weights": [[[1.0]], [[np.nan]], [[1.0]]]}, nncore.ModelError, r"layer 1: weights\[0, 0\] is nan"),
        ({"weights": [[[1.0]], [[1.0], [1.0]], [[1.0]]]}, nncore.ShapeError, "layer 1 takes 2 inputs"),
        ({"weights": [[[1.0]]] * 3, "biases": [[1, 2]] * 3}, nncore.ShapeError, "layer 0: bias has shape"),
        ({"hidden_activation": "sigmoidal"}, nncore.ModelError, "layer 0: unknown activation 'sigmoidal'"),
        ({"dtype": "float16"}, nncore.DtypeError, "dtype is 'float16'; expected float32 or float64"),
    ],
)
def test_three_layer_says_what_does_not_fit(arguments, error, message):
    """Wrong counts, sizes and numbers are refused, naming the layer."""
    with pytest.raises(error, match=message):
        nncore.three_layer(**arguments)
