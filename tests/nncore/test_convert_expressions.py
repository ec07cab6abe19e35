"""Expressions, flows and lowering: what graphs spell is recognized, folded, or refused."""

import math
from typing import Any

import numpy as np
import pytest

from nncore import ConversionError, Layer, LayerNorm, Mlp
from nncore.convert import expressions as ex
from nncore.convert import flow as fl
from nncore.convert.flow import ROWS, Flow
from nncore.convert.lowering import layers_of

RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 3))
X = RNG.standard_normal((50, 4)) * 2
Z = X @ W


def lowered(build):
    """The model of what *build* makes of four numbers a row; its layers' activations."""
    mlp = Mlp(layers_of(build(ex.dense(ex.Input(4), W)), "float64"))
    return mlp, [layer.activation for layer in mlp.layers]


def normalized(z):
    return (z - z.mean(axis=1, keepdims=True)) / np.sqrt(z.var(axis=1, keepdims=True) + 1e-3)


def layer_norm_in_parts(z):
    centered = ex.subtract(z, ex.helper(z, "mean"))
    variance = ex.helper(ex.power(centered, 2.0), "mean")
    return ex.divide(centered, ex.helper(ex.scale(variance, 1.0, 1e-3), "sqrt"))


def tensorflow_layer_norm(z):
    mean = ex.helper(z, "mean")
    variance = ex.helper(ex.power(ex.subtract(z, mean), 2.0), "mean")
    factor = ex.power(ex.scale(variance, 1.0, 1e-3), -0.5)
    return ex.add(ex.multiply(z, factor), ex.scale(ex.multiply(mean, factor), -1.0))


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def erf(z):
    return np.vectorize(math.erf)(z)


SPELLINGS: dict[str, Any] = {
    "swish": (lambda z: ex.multiply(z, ex.activated(z, "sigmoid")), lambda z: z * sigmoid(z), ["swish"]),
    "swish the other way round": (
        lambda z: ex.multiply(ex.activated(z, "sigmoid"), z),
        lambda z: z * sigmoid(z),
        ["swish"],
    ),
    "swish by division": (
        lambda z: ex.divide(z, ex.scale(ex.helper(ex.scale(z, -1.0), "exp"), 1.0, 1.0)),
        lambda z: z * sigmoid(z),
        ["swish"],
    ),
    "sigmoid": (
        lambda z: ex.reciprocal(ex.scale(ex.helper(ex.scale(z, -1.0), "exp"), 1.0, 1.0)),
        sigmoid,
        ["sigmoid"],
    ),
    "softplus": (
        lambda z: ex.logarithm(ex.scale(ex.helper(z, "exp"), 1.0, 1.0)),
        lambda z: np.log1p(np.exp(z)),
        ["softplus"],
    ),
    "gelu": (
        lambda z: ex.scale(ex.multiply(z, ex.scale(ex.erf(ex.scale(z, 1 / math.sqrt(2))), 1.0, 1.0)), 0.5),
        lambda z: z * (1 + erf(z / math.sqrt(2))) / 2,
        ["gelu"],
    ),
    "mish": (
        lambda z: ex.multiply(z, ex.activated(ex.activated(z, "softplus"), "tanh")),
        lambda z: z * np.tanh(np.log1p(np.exp(z))),
        ["mish"],
    ),
    "hard swish": (
        lambda z: ex.scale(ex.multiply(z, ex.clip(ex.scale(z, 1.0, 3.0), 0.0, 6.0)), 1 / 6),
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        ["hard_swish"],
    ),
    "softsign": (
        lambda z: ex.divide(z, ex.scale(ex.absolute(z), 1.0, 1.0)),
        lambda z: z / (1 + np.abs(z)),
        ["softsign"],
    ),
    "leaky relu by a choice": (
        lambda z: ex.chosen(ex.compared(z, 0.0, True, False), z, ex.scale(z, 0.3)),
        lambda z: np.where(z > 0, z, 0.3 * z),
        ["leaky_relu"],
    ),
    "the same the other way round": (
        lambda z: ex.chosen(ex.compared(z, 0.0, False, True), ex.scale(z, 0.3), z),
        lambda z: np.where(z > 0, z, 0.3 * z),
        ["leaky_relu"],
    ),
    "elu by a choice": (
        lambda z: ex.chosen(ex.compared(z, 0.0, True, True), z, ex.scale(ex.helper(z, "exp"), 0.7, -0.7)),
        lambda z: np.where(z > 0, z, 0.7 * np.expm1(z)),
        ["elu"],
    ),
    "scaled elu by a choice": (
        lambda z: ex.scale(
            ex.chosen(ex.compared(z, 0.0, True, False), z, ex.scale(ex.helper(z, "exp"), 1.67, -1.67)),
            1.05,
        ),
        lambda z: 1.05 * np.where(z > 0, z, 1.67 * np.expm1(z)),
        ["elu", "identity"],
    ),
    "threshold by a choice": (
        lambda z: ex.chosen(ex.compared(z, 0.5, False, True), 0.0, z),
        lambda z: np.where(z > 0.5, z, 0.0),
        ["thresholded_relu"],
    ),
    "softplus but for large numbers": (
        lambda z: ex.chosen(
            ex.compared(ex.scale(z, 2.0), 20.0, True, False),
            z,
            ex.scale(ex.activated(ex.scale(z, 2.0), "softplus"), 0.5),
        ),
        lambda z: np.log1p(np.exp(2 * z)) / 2,
        ["softplus", "identity"],
    ),
    "clip": (lambda z: ex.clip(z, -0.5, 1.5), lambda z: np.clip(z, -0.5, 1.5), ["hard_tanh", "identity"]),
    "one minus sigmoid": (
        lambda z: ex.scale(ex.activated(z, "sigmoid"), -1.0, 1.0),
        lambda z: 1 - sigmoid(z),
        ["sigmoid"],
    ),
    "two probabilities": (
        lambda z: ex.concatenated(
            [ex.scale(p, -1.0, 1.0) for p in [ex.activated(ex.columns(z, [0]), "sigmoid")]]
            + [ex.activated(ex.columns(z, [0]), "sigmoid")]
        ),
        lambda z: np.concatenate([1 - sigmoid(z[:, :1]), sigmoid(z[:, :1])], axis=1),
        ["sigmoid"],
    ),
    "layer norm": (layer_norm_in_parts, normalized, ["identity", "identity"]),
    "TensorFlow's layer norm": (tensorflow_layer_norm, normalized, ["identity", "identity"]),
    "log of softmax": (
        lambda z: ex.logarithm(ex.softmax(z)),
        lambda z: z - np.log(np.exp(z).sum(axis=1, keepdims=True)),
        ["log_softmax"],
    ),
}


@pytest.mark.parametrize("name", list(SPELLINGS))
def test_spelled_out_activations_are_recognized(name):
    """Each spelling gives the layers that its activation has, and the numbers that it means."""
    build, expected, activations = SPELLINGS[name]
    mlp, found = lowered(build)
    assert found == activations
    np.testing.assert_allclose(mlp.forward(X), expected(Z), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "build",
    [
        lambda z: ex.multiply(z, ex.activated(ex.scale(z, 1.0, 0.1), "sigmoid")),
        lambda z: ex.multiply(z, ex.scale(ex.erf(ex.scale(z, 0.7071)), 1.0, 0.9)),
        lambda z: ex.multiply(z, ex.scale(ex.activated(z, "tanh"), 0.5, 0.5)),
        lambda z: ex.multiply(z, ex.activated(ex.dense(z, np.eye(3)), "sigmoid")),
        lambda z: ex.multiply(z, ex.scale(ex.clip(z, -1.0, 1.0), 0.5, 0.4)),
    ],
)
def test_what_only_looks_like_an_activation_is_refused(build):
    """Other constants, other arguments: no swish, gelu or hard_swish."""
    with pytest.raises(ConversionError, match="multiplies two branches"):
        lowered(build)


@pytest.mark.parametrize(
    "build",
    [
        lambda z: ex.chosen(ex.compared(z, 0.1, True, False), z, ex.scale(z, 0.3)),
        lambda z: ex.chosen(ex.compared(z, 0.0, True, False), z, 1.0),
        lambda z: ex.chosen(ex.compared(z, 0.5, True, True), z, 0.0),
        lambda z: ex.chosen(ex.compared(z, 0.0, False, False), z, ex.helper(z, "exp")),
        lambda z: ex.chosen(ex.compared(z, 0.0, True, False), z, ex.scale(ex.helper(z, "exp"), 0.7, -0.6)),
        lambda z: ex.chosen(ex.compared(z, 9.0, True, False), z, ex.activated(z, "softplus")),
        lambda z: ex.chosen(ex.compared(ex.dense(z, np.eye(3)), 0.0, True, False), z, 0.0),
        lambda z: ex.chosen(z, z, 0.0),
    ],
)
def test_other_choices_are_refused(build):
    """A jump, a bound that is not the kink, a condition on something else: no activation of ours."""
    with pytest.raises(ConversionError, match="together are no activation"):
        lowered(build)


def test_a_product_with_something_else_is_refused_with_its_origin():
    """The part of the source is named that was given as the expression's origin."""
    z = ex.dense(ex.Input(4), W)
    y = ex.multiply(z, ex.activated(z, "relu"))
    y.origin = "node 7"
    with pytest.raises(ConversionError, match=r"^node 7: multiplies two branches"):
        layers_of(ex.activated(y, "tanh"), "float64")


def test_scales_are_folded_into_the_nearest_layer():
    """Before the first layer, between, and after an activation; alone they are a layer."""
    x: ex.Expression = ex.Input(4)
    x = ex.activated(ex.dense(ex.scale(x, 2.0, 1.0), W), "relu")
    x = ex.scale(ex.dense(ex.scale(x, [1.0, 2.0, 3.0], -1.0), W[:3, :2]), 0.5)
    layers = layers_of(x, "float64")
    assert [layer.n_out for layer in layers] == [3, 2]
    h = np.maximum((2 * X + 1) @ W, 0)
    expected = ((h * [1, 2, 3] - 1) @ W[:3, :2]) * 0.5
    np.testing.assert_allclose(Mlp(layers).forward(X), expected, rtol=1e-12, atol=1e-12)
    assert len(layers_of(ex.scale(ex.Input(4), 2.0), "float32")) == 1


def test_a_scaled_row_keeps_its_standardization():
    """Before a layer normalization a scale of the whole row becomes its epsilon's; others a layer."""
    layers = layers_of(ex.standardized(ex.scale(ex.Input(4), 2.0, 5.0), 1e-3), "float64")
    assert [type(layer) for layer in layers] == [LayerNorm]
    np.testing.assert_allclose(Mlp(layers).forward(X), normalized(2 * X + 5), rtol=1e-12)
    layers = layers_of(ex.standardized(ex.scale(ex.Input(4), [1, 2, 3, 4.0]), 1e-3), "float64")
    assert [type(layer) for layer in layers] == [Layer, LayerNorm]
    np.testing.assert_allclose(Mlp(layers).forward(X), normalized(X * [1, 2, 3, 4]), rtol=1e-12)


def test_columns_go_into_the_next_layers_weights():
    """A choice of columns costs no layer, wherever scales and activations stand between."""
    x = ex.activated(ex.scale(ex.columns(ex.Input(6), [5, 0, 2, 1]), 2.0), "tanh")
    layers = layers_of(ex.dense(x, W), "float64")
    mlp = Mlp(layers)
    rows = RNG.standard_normal((5, 6))
    np.testing.assert_allclose(mlp.forward(rows), np.tanh(2 * rows[:, [5, 0, 2, 1]]) @ W, rtol=1e-12)
    assert mlp.n_out == 3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda x: ex.dense(x, W[:2]), r"weights have shape \(2, 3\); expected \(4, outputs\)"),
        (lambda x: ex.scale(x, [1.0, 2.0]), "factor has 2 numbers; expected 4"),
        (lambda x: ex.columns(x, [4]), "takes columns"),
        (lambda x: ex.power(x, 1.5), "raises to the power 1.5"),
        (lambda x: ex.clip(x, 2.0, 1.0), "which leaves one number"),
        (lambda x: ex.clip(x, None, 1e9), "bounds beyond"),
        (lambda x: ex.standardized(x, -1.0), "has epsilon -1.0"),
        (lambda x: layers_of(ex.helper(x, "exp"), "float32"), "exp is no layer"),
        (lambda x: layers_of(ex.power(x, 2.0), "float32"), "to the power 2"),
        (lambda x: layers_of(ex.add(x, ex.activated(x, "relu")), "float32"), "adds two branches"),
        (lambda x: layers_of(ex.dense(ex.softmax(x), W), "float32"), "softmax is followed by more"),
        (
            lambda x: layers_of(ex.activated(ex.Input(5000), "relu"), "float32"),
            "needs a layer of 5000 x 5000",
        ),
    ],
)
def test_what_has_no_form_is_refused(build, message):
    """Sizes that do not fit, and operations that are no layers."""
    with pytest.raises(ConversionError, match=message):
        build(ex.Input(4))


# Flows


def flow(*shape, batch=None):
    n = math.prod(size for size in shape if size is not ROWS)
    return Flow(ex.Input(n), shape, batch)


@pytest.mark.parametrize(
    ("x", "target", "expected"),
    [
        (flow(ROWS, 2, 3), [-1, 6], (ROWS, 6)),
        (flow(ROWS, 2, 3), [0, -1], (ROWS, 6)),
        (flow(ROWS, 6), [ROWS, 3, 2], (ROWS, 3, 2)),
        (flow(ROWS, 6), [ROWS, -1], (ROWS, 6)),
        (flow(ROWS, 1), [-1], (ROWS,)),
        (flow(ROWS, 6, batch=1), [1, 6], (ROWS, 6)),
        (flow(ROWS, 6, batch=1), [6], (6,)),
        (flow(ROWS, 6, batch=8), [8, 2, 3], (ROWS, 2, 3)),
    ],
)
def test_reshapes_that_keep_rows(x, target, expected):
    """The batch is found again, be it unknown, 1 or another number."""
    assert fl.reshaped(x, target).shape == expected


@pytest.mark.parametrize(
    ("x", "target"),
    [
        (flow(ROWS, 6), [-1]),
        (flow(ROWS, 6), [3, -1]),
        (flow(ROWS, 6), [-1, 5]),
        (flow(ROWS, 6), [-1, -1]),
        (flow(ROWS, 6), [2, ROWS, 3]),
        (flow(ROWS, 6), [0, 0, 0]),
        (flow(ROWS, 6, batch=8), [4, 12]),
    ],
)
def test_reshapes_that_mix_rows_are_refused(x, target):
    """No reshape takes numbers from one row into another."""
    with pytest.raises(ConversionError, match="reshapes"):
        fl.reshaped(x, target)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (flow(ROWS, 3), flow(ROWS, 3), (ROWS, 3)),
        (flow(ROWS, 3), flow(ROWS, 1), (ROWS, 3)),
        (flow(ROWS, 1), flow(ROWS, 3), (ROWS, 3)),
        (flow(1, ROWS, 3), flow(ROWS, 3), (1, ROWS, 3)),
        (flow(3, batch=1), flow(ROWS, 3, batch=1), (ROWS, 3)),
    ],
)
def test_shapes_that_broadcast(a, b, expected):
    """Rows meet rows."""
    assert fl.joined(a, b).shape == expected


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (flow(ROWS, 3), flow(ROWS)),
        (flow(ROWS, 3), flow(ROWS, 1, 3)),
        (flow(ROWS, 3, 1), flow(ROWS, 1, 3)),
        (flow(ROWS, 2), flow(ROWS, 3)),
        (flow(ROWS, 2, 3), flow(ROWS, 3, 2)),
    ],
)
def test_shapes_that_would_mix_rows_or_numbers_are_refused(a, b):
    """What NumPy would broadcast row against row, or into more numbers than either has."""
    with pytest.raises(ConversionError, match="combines shapes"):
        fl.joined(a, b)


def test_transposes_and_axes():
    """A transpose puts a row's numbers in order; operations on a part of the row are refused."""
    turned = fl.transposed(flow(ROWS, 2, 3), [0, 2, 1])
    assert turned.shape == (ROWS, 3, 2)
    assert isinstance(turned.expression, ex.Selected)
    assert turned.expression.indices.tolist() == [0, 3, 1, 4, 2, 5]
    assert fl.transposed(flow(ROWS, 6), None).shape == (6, ROWS)
    assert fl.matrix_times(W.T, fl.transposed(flow(ROWS, 4), None)).shape == (3, ROWS)
    with pytest.raises(ConversionError, match="not the whole row"):
        fl.times_matrix(flow(ROWS, 2, 4), W)
    with pytest.raises(ConversionError, match="has axes"):
        fl.transposed(flow(ROWS, 6), [0, 7])
    with pytest.raises(ConversionError, match="has axis 5"):
        fl.whole_row_axis(flow(ROWS, 6), 5)
    with pytest.raises(ConversionError, match="whose size is not 1"):
        fl.squeezed(flow(ROWS, 6), [1])
    with pytest.raises(ConversionError, match="mixes rows"):
        fl.flattened(flow(2, ROWS, 3), 2)


def test_constants_are_broadcast_to_rows():
    """A constant for a channel is repeated along its pixels; one that differs from row to row is refused."""
    x, numbers = fl.with_constant(flow(ROWS, 2, 3), np.array([[1.0], [2.0]]))
    assert numbers.tolist() == [1, 1, 1, 2, 2, 2]
    assert x.shape == (ROWS, 2, 3)
    x, numbers = fl.with_constant(flow(ROWS, 1), np.arange(3.0))
    assert (x.n, x.shape, numbers.tolist()) == (3, (ROWS, 3), [0, 1, 2])
    with pytest.raises(ConversionError, match="differs from row to row"):
        fl.with_constant(flow(ROWS, 3), np.ones((4, 3)))
    with pytest.raises(ConversionError, match="combines"):
        fl.with_constant(flow(ROWS, 3), np.ones(4))
