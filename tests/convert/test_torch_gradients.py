"""Derivatives of models, beside those of torch.autograd in float64."""

from typing import Any

import numpy as np
import pytest

import nncore

torch = pytest.importorskip("torch")

FUNCTIONS: dict[str, Any] = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "swish": torch.nn.functional.silu,
    "elu": torch.nn.functional.elu,
    "selu": torch.selu,
    "celu": torch.celu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "softplus": torch.nn.functional.softplus,
    "softsign": torch.nn.functional.softsign,
    "mish": torch.nn.functional.mish,
    "relu6": torch.nn.functional.relu6,
    "hard_tanh": torch.nn.functional.hardtanh,
    # hardsigmoid itself has no second derivative there.
    "hard_sigmoid": lambda x: torch.nn.functional.relu6(x + 3) / 6,
    "hard_swish": torch.nn.functional.hardswish,
}


@pytest.mark.parametrize("last", ["identity", "softmax", "log_softmax"])
@pytest.mark.parametrize("activation", list(FUNCTIONS))
def test_derivatives_are_those_of_autograd(activation: str, last: str) -> None:
    """Jacobians and Hessian-vector products, through a layer normalization; float64, rounding apart."""
    rng = np.random.default_rng(2)
    first = nncore.Layer(rng.standard_normal((5, 8)), rng.standard_normal(8), activation)
    norm = nncore.LayerNorm(rng.standard_normal(8), rng.standard_normal(8), 1e-5)
    mlp = nncore.Mlp([first, norm, nncore.Layer(rng.standard_normal((8, 4)), rng.standard_normal(4), last)])
    ends = {**FUNCTIONS, "softmax": lambda z: z.softmax(-1), "log_softmax": lambda z: z.log_softmax(-1)}

    def network(row: Any) -> Any:
        for layer in mlp.layers:
            parameters = [torch.tensor(np.asarray(layer.bias))]
            if isinstance(layer, nncore.LayerNorm):
                gain = torch.tensor(np.asarray(layer.gain))
                row = torch.nn.functional.layer_norm(row, (layer.n_in,), gain, *parameters, layer.epsilon)
            else:
                row = row @ torch.tensor(np.asarray(layer.weights)) + parameters[0]
            row = ends[layer.activation](row)
        return row

    for x in rng.standard_normal((6, 5)):
        expected = torch.autograd.functional.jacobian(network, torch.tensor(x)).numpy()
        np.testing.assert_allclose(mlp.jacobian(x), expected, rtol=1e-9, atol=1e-11)
        v = rng.standard_normal(5)
        second = torch.autograd.functional.hvp(lambda row: network(row)[1], torch.tensor(x), torch.tensor(v))[
            1
        ]
        np.testing.assert_allclose(mlp.hvp(x, v, 1), second.numpy(), rtol=1e-9, atol=1e-9)
