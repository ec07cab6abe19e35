"""Second derivatives: activations beside mpmath, Hessian-vector products beside differences of gradients."""

from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_models import normal, random_model, same_bits

import nncore


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


# As a person would type them; mpmath differentiates.
SMOOTH: dict[str, Any] = {
    "sigmoid": _sigmoid,
    "tanh": mpmath.tanh,
    "swish": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2,
    "gelu_tanh": lambda x: x * _sigmoid(2 * mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)),
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "mish": lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))),
    "softsign": lambda x: x / (1 + abs(x)),
    "elu": lambda x: x if x >= 0 else mpmath.expm1(x),
    "selu": lambda x: (
        mpmath.mpf("1.0507009873554804934193349852946")
        * (x if x >= 0 else mpmath.mpf("1.6732632423543772848170429916717") * mpmath.expm1(x))
    ),
    "celu": lambda x: x if x >= 0 else mpmath.expm1(x),
}
# Where two terms cancel; and the float64 constants of gelu_tanh are themselves off by half a digit.
CROSS_ZERO = {"swish", "gelu", "gelu_tanh", "mish"}
# (activation, x, second derivative) where there is none.
KINKS = [
    ("step", 0.0, 0.0),
    ("relu", 0.0, 0.0),
    ("leaky_relu", 0.0, 0.0),
    ("prelu", 0.0, 0.0),
    ("relu6", 0.0, 0.0),
    ("relu6", 6.0, 0.0),
    ("elu", 0.0, 0.0),
    ("selu", 0.0, 0.0),
    ("celu", 0.0, 0.0),
    ("softsign", 0.0, 0.0),
    ("hard_tanh", -1.0, 0.0),
    ("hard_tanh", 1.0, 0.0),
    ("hard_sigmoid", -3.0, 0.0),
    ("hard_sigmoid", 3.0, 0.0),
    ("hard_swish", -3.0, 0.0),
    ("hard_swish", 3.0, 0.0),
    ("thresholded_relu", 1.0, 0.0),
]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_second_derivatives_are_those_of_mpmath(name: str, dtype: str) -> None:
    """Within 2 ULP in float32 and 16 in float64; where they cross zero, within 2^-51."""
    rng = np.random.default_rng(6)
    x = np.concatenate([rng.uniform(-4, 4, 30), rng.uniform(-30, 30, 15), 10.0 ** rng.uniform(-8, 0, 5)])
    x = x.astype(dtype)
    got = nncore.ACTIVATIONS[name].second_derivative(x)
    assert got.dtype == np.dtype(dtype)
    roundings = 2 if dtype == "float32" else 16
    # 1e-18: what mpmath's differences are worth.
    floor = 2.0**-51 if name in CROSS_ZERO else 1e-18
    with mpmath.workdps(50):
        for value, actual in zip(x, got, strict=True):
            # One-sided at the kinks of elu and its like, of which no step may reach across.
            exact = mpmath.diff(SMOOTH[name], mpmath.mpf(float(value)), 2, h=mpmath.mpf(10) ** -15)
            bound = roundings * float(np.spacing(np.abs(np.asarray(exact, dtype)))) + floor
            assert abs(mpmath.mpf(float(actual)) - exact) <= bound, value


@pytest.mark.parametrize(("name", "x", "expected"), KINKS)
def test_kinks_have_the_second_derivative_that_is_documented(name: str, x: float, expected: float) -> None:
    """As docs/gradients.md has it; and in a Hessian, the same."""
    assert nncore.ACTIVATIONS[name].second_derivative(x) == expected
    assert nncore.ACTIVATIONS[name].second_kink
    mlp = nncore.Mlp([nncore.Layer([[1.0]], None, name)])
    assert mlp.hvp([[x]], [[2.0]]) == [[2 * expected]]


@pytest.mark.parametrize("name", sorted(set(nncore.ACTIVATIONS) - set(SMOOTH)))
def test_what_is_linear_piece_by_piece_has_none_between_kinks(name: str) -> None:
    """Zero, or hard_swish's 1/3."""
    x = np.linspace(-7, 7, 29) + 0.1
    expected = np.where(np.abs(x) < 3, 1 / 3, 0.0) if name == "hard_swish" else np.zeros_like(x)
    assert np.array_equal(nncore.ACTIVATIONS[name].second_derivative(x), expected)


@pytest.mark.parametrize("name", nncore.ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_infinities_give_the_limit_and_nan_passes(name: str, dtype: str) -> None:
    """Every second derivative vanishes far out; with alpha 0, too."""
    activation = nncore.ACTIVATIONS[name]
    far = np.array([-np.inf, -1e30, 1e30, np.inf], dtype)
    for alpha in ([], [0.0]) if activation.takes_alpha else ([],):
        arguments = [np.array(a, dtype) for a in alpha]
        assert float(np.abs(activation.second_derivative(far, *arguments)).max()) < 1e-80
        assert np.isnan(activation.second_derivative(np.array(np.nan, dtype), *arguments))


def models(activation: str, last: str, with_norm: bool) -> nncore.Mlp:
    """A float64 model of 4 inputs and 3 outputs."""
    rng = np.random.default_rng(3)
    layers: list[Any] = [nncore.Layer(rng.standard_normal((4, 6)), rng.standard_normal(6), activation)]
    if with_norm:
        layers.append(nncore.LayerNorm(rng.standard_normal(6), rng.standard_normal(6), 1e-3, activation))
    layers.append(nncore.Layer(rng.standard_normal((6, 3)), rng.standard_normal(3), last))
    return nncore.Mlp(layers)


@pytest.mark.parametrize("of", ["outputs", "probabilities"])
@pytest.mark.parametrize("last", ["identity", "tanh", "softmax", "log_softmax"])
@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "swish", "mish", "gelu_tanh", "elu", "relu"])
def test_hessian_vector_products_are_differences_of_gradients(activation: str, last: str, of: str) -> None:
    """
    A central step of 1e-5 in float64: within 1e-7 of the largest entry; float32 within 1e-4 of float64.

    With a layer normalization and without; and u H v = v H u.
    """
    for with_norm in (False, True):
        mlp = models(activation, last, with_norm)
        rng = np.random.default_rng(5)
        x, u, v = rng.standard_normal((3, 9, 4))
        for output in (0, 2):
            values, products = mlp.value_and_hvp(x, v, output, of=of)
            ahead, behind = (mlp.value_and_grad(x + step * v, output, of=of)[1] for step in (1e-5, -1e-5))
            size = np.abs(products).max() + 1e-3
            np.testing.assert_allclose(products, (ahead - behind) / 2e-5, atol=1e-7 * size)
            np.testing.assert_array_equal(values, mlp.value_and_grad(x, output, of=of)[0])
            mirrored = mlp.hvp(x, u, output, of=of)
            np.testing.assert_allclose((u * products).sum(1), (v * mirrored).sum(1), atol=1e-12 * size)
            single = mlp.astype("float32").hvp(x, v, output, of=of)
            assert single.dtype == np.float32
            np.testing.assert_allclose(single, products, atol=1e-4 * size)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 200), st.sampled_from(["outputs", "probabilities"]))
def test_a_row_has_the_same_products_in_every_batch(seed: int, rows: int, of: str) -> None:
    """Bit for bit."""
    rng = np.random.default_rng(seed)
    mlp = random_model(rng, most_width=60)
    x, v = normal(rng, (rows, mlp.n_in)), normal(rng, (rows, mlp.n_in))
    whole = mlp.hvp(x, v, of=of)
    middle = rows // 2
    for part in (slice(0, middle), slice(middle, rows), slice(middle, middle + 1)):
        assert same_bits(mlp.hvp(x[part], v[part], of=of), whole[part])


def test_inputs_can_be_chosen() -> None:
    """The Hessian by some inputs, in the order asked for."""
    mlp = models("tanh", "softmax", True)
    x = np.linspace(-1, 1, 8).reshape(2, 4)
    columns: list[Any] = [mlp.hvp(x, np.broadcast_to(unit, (2, 4)), 1) for unit in np.eye(4)]
    hessian: Any = np.stack(columns, axis=-1)
    v = np.array([[1.0, 2.0], [3.0, 4.0]])
    expected = np.einsum("rij,rj->ri", hessian[:, [3, 0]][:, :, [3, 0]], v)
    np.testing.assert_allclose(mlp.hvp(x, v, 1, inputs=[3, 0]), expected, rtol=1e-12)
    value, product = mlp.value_and_hvp(x[0], v[0], 1, inputs=[3, 0])
    assert value == mlp.forward(x[0])[1]
    np.testing.assert_allclose(product, expected[0], rtol=1e-12)


def test_errors_say_what_was_expected() -> None:
    """Shapes and indices."""
    mlp = models("tanh", "identity", False)
    x = np.zeros((2, 4))
    with pytest.raises(nncore.ShapeError, match=r"v has shape \(1, 4\); expected \(2, 4\)"):
        mlp.hvp(x, np.zeros((1, 4)))
    with pytest.raises(nncore.ShapeError, match=r"v has shape \(2, 4\)"):
        mlp.hvp(x, x, inputs=[0])
    with pytest.raises(nncore.ArgumentError, match="output is 3; expected an integer from 0 to 2"):
        mlp.hvp(x, x, 3)
