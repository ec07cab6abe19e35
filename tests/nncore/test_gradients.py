"""Derivatives of models: against complex steps and each other, with the same bits in every batch."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_models import normal, random_model, same_bits

import nncore

SMOOTH = ["identity", "sigmoid", "tanh", "swish", "softplus"]


def two_layers(activation: str, last: str = "identity", norm: bool = False, n_out: int = 3) -> nncore.Mlp:
    """A float64 model of 4 inputs."""
    rng = np.random.default_rng(3)
    layers: list[Any] = [nncore.Layer(rng.standard_normal((4, 6)), rng.standard_normal(6), activation)]
    if norm:
        layers.append(nncore.LayerNorm(rng.standard_normal(6), rng.standard_normal(6), 1e-3, activation))
    layers.append(nncore.Layer(rng.standard_normal((6, n_out)), rng.standard_normal(n_out), last))
    return nncore.Mlp(layers)


def analytic(mlp: nncore.Mlp, x: Any, of: str) -> Any:
    """The model, by formulas that hold for complex numbers."""
    apply: dict[str, Any] = {
        "identity": lambda z: z,
        "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
        "tanh": np.tanh,
        "swish": lambda z: z / (1 + np.exp(-z)),
        "softplus": lambda z: np.log(1 + np.exp(z)),
        "softmax": lambda z: np.exp(z) / np.exp(z).sum(),
        "log_softmax": lambda z: z - np.log(np.exp(z).sum()),
    }
    for layer in mlp.layers:
        if isinstance(layer, nncore.LayerNorm):
            distance = x - x.mean()
            x = distance / np.sqrt((distance**2).mean() + layer.epsilon) * layer.gain + layer.bias
        else:
            x = x @ layer.weights + layer.bias
        x = apply[layer.activation](x)
    if of == "probabilities" and mlp.layers[-1].activation not in ("softmax", "sigmoid"):
        x = apply["sigmoid" if mlp.n_out == 1 else "softmax"](x)
    return x


def complex_steps(mlp: nncore.Mlp, x: Any, of: str) -> Any:
    """The Jacobian, exact but for rounding: the imaginary part after a step of 1e-100 i."""
    columns = [analytic(mlp, x + 1e-100j * unit, of).imag / 1e-100 for unit in np.eye(mlp.n_in)]
    return np.stack(columns, axis=-1)


@pytest.mark.parametrize("of", ["outputs", "probabilities"])
@pytest.mark.parametrize("last", ["identity", "sigmoid", "softmax", "log_softmax"])
@pytest.mark.parametrize("activation", SMOOTH)
def test_jacobians_are_those_of_complex_steps(activation: str, last: str, of: str) -> None:
    """float64 within 1e-12 of the largest entry, float32 within 2e-5 (some roundings a layer)."""
    for norm, n_out in ((False, 3), (True, 3), (False, 9), (False, 1)):
        mlp = two_layers(activation, last, norm, n_out)
        x = np.random.default_rng(5).standard_normal((7, 4))
        expected = np.stack([complex_steps(mlp, row, of) for row in x])
        size = np.abs(expected).max() + 1e-3
        for model, tolerance in ((mlp, 1e-12), (mlp.astype("float32"), 2e-5)):
            jacobian = model.jacobian(x, of=of)
            assert jacobian.dtype == model.dtype
            assert np.abs(jacobian - expected).max() < tolerance * size
            v, t = np.full((7, n_out), 0.5), np.linspace(-1, 1, 28).reshape(7, 4)
            assert (
                np.abs(model.vjp(x, v, of=of) - np.einsum("rij,ri->rj", expected, v)).max()
                < 9 * tolerance * size
            )
            assert (
                np.abs(model.jvp(x, t, of=of) - np.einsum("rij,rj->ri", expected, t)).max()
                < 9 * tolerance * size
            )
            values, gradients = model.value_and_grad(x, n_out - 1, of=of)
            y = model.forward(x) if of == "outputs" else model.predict_proba(x)
            np.testing.assert_array_equal(values, y[:, -1])
            assert np.abs(gradients - expected[:, -1]).max() < tolerance * size


@pytest.mark.parametrize("name", list(nncore.ACTIVATIONS))
def test_every_activation_has_its_derivative_at_pre_activations(name: str) -> None:
    """One weight of 1: the gradient has the derivative's bits, at kinks and where outputs saturate, too."""
    activation = nncore.ACTIVATIONS[name]
    x = np.array([[-90.0], [-30.0], [-3.0], [-1.0], [0.0], [0.5], [1.0], [3.0], [6.0], [30.0], [90.0]])
    for dtype in ("float32", "float64"):
        mlp = nncore.Mlp([nncore.Layer(np.ones((1, 1), dtype), None, name)])
        np.testing.assert_array_equal(mlp.value_and_grad(x)[1], activation.derivative(x.astype(dtype)))


def test_derivatives_agree_with_finite_differences() -> None:
    """For each activation with an alpha an output, in float64, away from kinks; a central step of 1e-6."""
    x = np.array([[0.3, -0.7, 1.1, 0.2]])
    for name, activation in nncore.ACTIVATIONS.items():
        alpha = np.linspace(0.3, 0.9, 6) if activation.takes_alpha else None
        rng = np.random.default_rng(8)
        mlp = nncore.Mlp([nncore.Layer(rng.standard_normal((4, 6)), rng.standard_normal(6), name, alpha)])
        for j, step in enumerate(1e-6 * np.eye(4)):
            slope = (mlp.forward(x + step) - mlp.forward(x - step)) / 2e-6
            np.testing.assert_allclose(mlp.jacobian(x)[:, :, j], slope, atol=1e-8, err_msg=name)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 300), st.sampled_from(["outputs", "probabilities"]))
def test_a_row_has_the_same_derivatives_in_every_batch(seed: int, rows: int, of: str) -> None:
    """Products from both sides, Jacobians, gradients: bit for bit."""
    rng = np.random.default_rng(seed)
    mlp = random_model(rng, most_width=60)
    x, v, t = normal(rng, (rows, mlp.n_in)), normal(rng, (rows, mlp.n_out)), normal(rng, (rows, mlp.n_in))

    def derivatives(part: slice) -> list[Any]:
        at = x[part]
        products = *mlp.value_and_vjp(at, v[part], of=of), *mlp.value_and_jvp(at, t[part], of=of)
        return [*products, *mlp.value_and_jacobian(at, of=of), *mlp.value_and_grad(at, of=of)]

    whole = derivatives(slice(0, rows))
    middle = rows // 2
    for part in (slice(0, middle), slice(middle, rows), slice(middle, middle + 1)):
        for got, all_rows in zip(derivatives(part), whole, strict=True):
            assert same_bits(got, all_rows[part])
    y = mlp.forward(x) if of == "outputs" else mlp.predict_proba(x)
    assert all(same_bits(values, y) for values in whole[:-2:2])


def test_threads_do_not_disturb_each_other() -> None:
    """Four threads, 200 calls of one model: always the same bits."""
    rng = np.random.default_rng(1)
    mlp = two_layers("swish", "softmax", True).astype("float32")
    x = normal(rng, (50, 4))
    expected = mlp.jacobian(x)
    with ThreadPoolExecutor(4) as pool:
        assert all(same_bits(got, expected) for got in pool.map(lambda _: mlp.jacobian(x), range(200)))


def test_softmax_keeps_its_digits_where_it_saturates() -> None:
    """p = 1 - 2e-22: the derivative is 2e-22, not 0."""
    for dtype in ("float32", "float64"):
        mlp = nncore.Mlp([nncore.Layer(np.eye(2, dtype=dtype), None, "softmax")])
        expected = np.exp(-50.0) * np.array([[1, -1], [-1, 1]])
        np.testing.assert_allclose(mlp.jacobian([50.0, 0.0]), expected, rtol=1e-5)


def test_inputs_and_outputs_can_be_chosen() -> None:
    """The model as a function of some inputs with some outputs, in the order asked for, by either mode."""
    mlp = two_layers("tanh", "log_softmax")
    x = np.linspace(-1, 1, 8).reshape(2, 4)
    whole, y = mlp.jacobian(x), mlp.forward(x)
    choices: list[Any] = [([2], [3, 0]), ([2, 0, 1], [1]), (None, [2]), ([1], None), ([1, 0], [3, 2, 1, 0])]
    for outputs, inputs in choices:
        chosen = {"outputs": outputs, "inputs": inputs}
        rows, columns = outputs or [0, 1, 2], inputs or [0, 1, 2, 3]
        expected = whole[:, rows][:, :, columns]
        values, jacobian = mlp.value_and_jacobian(x, **chosen)
        np.testing.assert_array_equal(values, y[:, rows])
        np.testing.assert_allclose(jacobian, expected, rtol=1e-12, atol=1e-14)
        v, t = (np.linspace(1, 2, 2 * len(width)).reshape(2, -1) for width in (rows, columns))
        values, product = mlp.value_and_vjp(x, v, **chosen)
        np.testing.assert_array_equal(values, y[:, rows])
        np.testing.assert_allclose(product, np.einsum("rij,ri->rj", expected, v), rtol=1e-12, atol=1e-14)
        values, product = mlp.value_and_jvp(x, t, **chosen)
        np.testing.assert_array_equal(values, y[:, rows])
        np.testing.assert_allclose(product, np.einsum("rij,rj->ri", expected, t), rtol=1e-12, atol=1e-14)
        value, gradient = mlp.value_and_grad(x, rows[0], inputs=inputs)
        np.testing.assert_array_equal(value, y[:, rows[0]])
        np.testing.assert_allclose(gradient, expected[:, 0], rtol=1e-12, atol=1e-14)


def test_single_rows_and_no_rows() -> None:
    """Shapes follow those of forward()."""
    mlp = two_layers("tanh")
    assert mlp.jacobian(np.zeros(4)).shape == (3, 4)
    assert mlp.jacobian(np.zeros((0, 4))).shape == (0, 3, 4)
    assert mlp.vjp(np.zeros(4), np.ones(3)).shape == (4,)
    assert mlp.jvp(np.zeros((0, 4)), np.zeros((0, 4))).shape == (0, 3)
    value, gradient = mlp.value_and_grad(np.zeros(4), output=2)
    assert value.shape == ()
    assert gradient.shape == (4,)


def test_arguments_are_left_as_they_are() -> None:
    """Work in place is done on copies."""
    mlp = nncore.Mlp([nncore.Layer(np.eye(2), None, "softmax")])
    x, v = np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]])
    mlp.vjp(x, v), mlp.jvp(x, v)
    assert x.tolist() == [[1.0, 2.0]]
    assert v.tolist() == [[3.0, 4.0]]


def test_errors_say_what_was_expected() -> None:
    """Shapes, types, indices and words."""
    mlp = two_layers("tanh")
    x = np.zeros((2, 4))
    with pytest.raises(nncore.ShapeError, match=r"cotangents has shape \(1, 3\); expected \(2, 3\)"):
        mlp.vjp(x, np.zeros((1, 3)))
    with pytest.raises(nncore.ShapeError, match="tangents has shape"):
        mlp.jvp(x, np.zeros((2, 3)))
    with pytest.raises(nncore.DtypeError, match="cotangents has dtype complex128"):
        mlp.vjp(x, np.zeros((2, 3), complex))
    with pytest.raises(nncore.ArgumentError, match="output is 3; expected an integer from 0 to 2"):
        mlp.value_and_grad(x, output=3)
    with pytest.raises(nncore.ArgumentError, match=r"inputs\[1\] is -1; expected an integer from 0 to 3"):
        mlp.jacobian(x, inputs=[0, -1])
    with pytest.raises(nncore.ArgumentError, match=r"outputs\[2\] repeats outputs\[0\]: 1"):
        mlp.vjp(x, np.zeros((2, 3)), outputs=[1, 0, 1])
    with pytest.raises(nncore.ShapeError, match=r"tangents has shape \(2, 4\)"):
        mlp.jvp(x, np.zeros((2, 4)), inputs=[1])
    with pytest.raises(nncore.ArgumentError, match="outputs is"):
        mlp.jacobian(x, outputs=[])
    with pytest.raises(nncore.ArgumentError, match="of is 'logits'"):
        mlp.jacobian(x, of="logits")
