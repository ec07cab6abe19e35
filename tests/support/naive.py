"""
Arrays in, float64 arrays out: obviously correct slow twins of nncore's kernels, in NumPy.

Textbook formulas, each rewritten only where float64 itself would overflow or cancel. Infinities and NaN are
the fast versions' business: these are meant for finite values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SELU_LAMBDA = 1.0507009873554805
SELU_ALPHA = 1.6732632423543772
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)

_erf = np.vectorize(math.erf, otypes=[np.float64])
_erfc = np.vectorize(math.erfc, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    e = np.exp(-np.abs(x))
    result: Array = np.where(x >= 0, 1, e) / (1 + e)
    return result


def _softplus(x: Array) -> Array:
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _softplus_tanh_grad(x: Array) -> Array:
    """The derivative of tanh(softplus(x))."""
    result: Array = _sigmoid(x) / np.cosh(np.minimum(_softplus(x), 300)) ** 2
    return result


def _left_over_alpha(x: Array, a: Array) -> Array:
    """min(x, 0) / a; for a = 0 its limit from above, and 0 where x is not negative."""
    left = np.minimum(x, 0)
    result: Array = np.where(left == 0, 0.0, left / np.where(a == 0, 1e-300, a))
    return result


def _gelu_tanh_inner(x: Array) -> Array:
    return SQRT_2_OVER_PI * (x + 0.044715 * x**3)


def _phi(x: Array) -> Array:
    """The normal density."""
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


# name -> f(x, alpha), f'(x, alpha). At kinks: the derivative from the left, but for elu, selu and celu at 0
# and where noted in ACTIVATIONS.
FUNCTIONS: dict[str, Any] = {
    "identity": lambda x, a: x,
    "step": lambda x, a: np.where(x > 0, 1.0, 0.0),
    "relu": lambda x, a: np.maximum(x, 0),
    "leaky_relu": lambda x, a: np.where(x > 0, x, a * x),
    "prelu": lambda x, a: np.where(x > 0, x, a * x),
    "relu6": lambda x, a: np.clip(x, 0, 6),
    "elu": lambda x, a: np.where(x > 0, x, a * np.expm1(np.minimum(x, 0))),
    "selu": lambda x, a: SELU_LAMBDA * np.where(x > 0, x, SELU_ALPHA * np.expm1(np.minimum(x, 0))),
    "celu": lambda x, a: np.where(x > 0, x, a * np.expm1(_left_over_alpha(x, a))),
    "sigmoid": lambda x, a: _sigmoid(x),
    "tanh": lambda x, a: np.tanh(x),
    "swish": lambda x, a: x * _sigmoid(x),
    "gelu": lambda x, a: x * _erfc(-x / math.sqrt(2)) / 2,
    "gelu_tanh": lambda x, a: x * _sigmoid(2 * _gelu_tanh_inner(x)),
    "softplus": lambda x, a: _softplus(x),
    "softsign": lambda x, a: x / (1 + np.abs(x)),
    "mish": lambda x, a: x * np.tanh(_softplus(x)),
    "hard_sigmoid": lambda x, a: np.clip(x / 6 + 0.5, 0, 1),
    "hard_swish": lambda x, a: x * np.clip(x / 6 + 0.5, 0, 1),
    "hard_tanh": lambda x, a: np.clip(x, -1, 1),
    "thresholded_relu": lambda x, a: np.where(x > a, x, 0.0),
}

DERIVATIVES: dict[str, Any] = {
    "identity": lambda x, a: np.ones_like(x),
    "step": lambda x, a: np.zeros_like(x),
    "relu": lambda x, a: np.where(x > 0, 1.0, 0.0),
    "leaky_relu": lambda x, a: np.where(x > 0, 1.0, a),
    "prelu": lambda x, a: np.where(x > 0, 1.0, a),
    "relu6": lambda x, a: np.where((x > 0) & (x < 6), 1.0, 0.0),
    "elu": lambda x, a: np.where(x >= 0, 1.0, a * np.exp(np.minimum(x, 0))),
    "selu": lambda x, a: SELU_LAMBDA * np.where(x >= 0, 1.0, SELU_ALPHA * np.exp(np.minimum(x, 0))),
    "celu": lambda x, a: np.where(x >= 0, 1.0, np.exp(_left_over_alpha(x, a))),
    "sigmoid": lambda x, a: _sigmoid(x) * _sigmoid(-x),
    "tanh": lambda x, a: 1 / np.cosh(np.clip(x, -300, 300)) ** 2,
    "swish": lambda x, a: _sigmoid(x) * (1 + x * _sigmoid(-x)),
    "gelu": lambda x, a: _erfc(-x / math.sqrt(2)) / 2 + x * _phi(x),
    "gelu_tanh": lambda x, a: (
        _sigmoid(2 * _gelu_tanh_inner(x))
        + 2
        * x
        * _sigmoid(2 * _gelu_tanh_inner(x))
        * _sigmoid(-2 * _gelu_tanh_inner(x))
        * SQRT_2_OVER_PI
        * (1 + 3 * 0.044715 * x * x)
    ),
    "softplus": lambda x, a: _sigmoid(x),
    "softsign": lambda x, a: 1 / (1 + np.abs(x)) ** 2,
    "mish": lambda x, a: np.tanh(_softplus(x)) + x * _softplus_tanh_grad(x),
    "hard_sigmoid": lambda x, a: np.where((x > -3) & (x < 3), 1 / 6, 0.0),
    "hard_swish": lambda x, a: np.where(x <= -3, 0.0, np.where(x >= 3, 1.0, x / 3 + 0.5)),
    "hard_tanh": lambda x, a: np.where((x > -1) & (x < 1), 1.0, 0.0),
    "thresholded_relu": lambda x, a: np.where(x > a, 1.0, 0.0),
}


def activation(name: str, x: Any, alpha: Any = 1.0) -> Array:
    """Activation *name* of *x*."""
    result: Array = FUNCTIONS[name](np.asarray(x, np.float64), np.asarray(alpha, np.float64))
    return result


def derivative(name: str, x: Any, alpha: Any = 1.0) -> Array:
    """The derivative of activation *name* at *x*."""
    result: Array = DERIVATIVES[name](np.asarray(x, np.float64), np.asarray(alpha, np.float64))
    return result


def softmax(x: Any) -> Array:
    """exp(x) / sum(exp(x)) over the last axis."""
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    result: Array = e / e.sum(axis=-1, keepdims=True)
    return result


def log_softmax(x: Any) -> Array:
    """log(softmax(x)) over the last axis."""
    x = np.asarray(x, np.float64)
    shifted = x - x.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def layer_forward(layer: Any, x: Any) -> Array:
    """activation(x @ w + b) of one nncore.Layer, in float64: x (rows, n_in) -> (rows, n_out)."""
    z = np.asarray(x, np.float64) @ np.asarray(layer.weights, np.float64) + np.asarray(layer.bias, np.float64)
    if layer.activation == "softmax":
        return softmax(z)
    alpha = 1.0 if layer.alpha is None else np.asarray(layer.alpha, np.float64)
    return activation(layer.activation, z, alpha)


def forward(mlp: Any, x: Any) -> Array:
    """Every layer of *mlp* in turn, in float64: x (rows, n_in) -> (rows, n_out)."""
    for layer in mlp.layers:
        x = layer_forward(layer, x)
    return np.asarray(x, np.float64)
