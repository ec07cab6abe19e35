"""
float64 -> float64: every activation and derivative by the C library, for kernels to call.

Textbook forms, each rewritten only where float64 would overflow or cancel, so that they are right to about
1e-13 of themselves: a float32's ULP is a million times that. They share no line with nncore's formulas.
An alpha is the float32 that nncore takes by default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

__all__ = ["DERIVATIVES", "FUNCTIONS"]

# error_model="numpy": 1 / 0 is an infinity here, too.
reference: Any = numba.njit(nogil=True, error_model="numpy")

SELU_LAMBDA = 1.0507009873554805
SELU_ALPHA = 1.6732632423543772
LEAK = float(np.float32(0.01))
SQRT_HALF = math.sqrt(0.5)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
SQRT_2_PI = math.sqrt(2 * math.pi)

# Left of this every tail is 0 in float32, and -inf * 0 would be NaN.
FAR_LEFT = -700.0


@reference
def sigmoid(x):
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    e = math.exp(x)
    return e / (1 + e)


@reference
def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


@reference
def identity(x):
    return x


@reference
def step(x):
    return 1.0 if x > 0 else 0.0


@reference
def relu(x):
    return max(x, 0.0)


@reference
def leaky_relu(x):
    return x if x > 0 else LEAK * x


@reference
def prelu(x):
    return x if x > 0 else 0.25 * x


@reference
def thresholded_relu(x):
    return x if x > 1 else 0.0


@reference
def thresholded_relu_grad(x):
    return 1.0 if x > 1 else 0.0


@reference
def relu6(x):
    return min(max(x, 0.0), 6.0)


@reference
def hard_tanh(x):
    return min(max(x, -1.0), 1.0)


@reference
def hard_sigmoid(x):
    return (min(max(x, -3.0), 3.0) + 3) / 6


@reference
def hard_swish(x):
    if x <= -3:
        return 0.0
    return x * hard_sigmoid(x)


@reference
def tanh(x):
    return math.tanh(x)


@reference
def swish(x):
    return x * sigmoid(x) if x > FAR_LEFT else 0.0


@reference
def elu(x):
    return x if x > 0 else math.expm1(x)


@reference
def selu(x):
    return SELU_LAMBDA * x if x > 0 else SELU_LAMBDA * SELU_ALPHA * math.expm1(x)


@reference
def gelu(x):
    return x * math.erfc(-x * SQRT_HALF) / 2 if x > FAR_LEFT else 0.0


@reference
def twice_gelu_inner(x):
    return 2 * SQRT_2_OVER_PI * (x + 0.044715 * x**3)


@reference
def gelu_tanh(x):
    return x * sigmoid(twice_gelu_inner(x)) if x > FAR_LEFT else 0.0


@reference
def softsign(x):
    # x / (1 + |x|), without inf / inf.
    return math.copysign(1 / (1 + 1 / abs(x)), x) if abs(x) > 1 else x / (1 + abs(x))


@reference
def mish(x):
    return x * math.tanh(softplus(x)) if x > FAR_LEFT else 0.0


@reference
def zero(x):
    return 0.0


@reference
def one(x):
    return 1.0


@reference
def leaky_relu_grad(x):
    return 1.0 if x > 0 else LEAK


@reference
def prelu_grad(x):
    return 1.0 if x > 0 else 0.25


@reference
def relu6_grad(x):
    return 1.0 if 0 < x < 6 else 0.0


@reference
def hard_tanh_grad(x):
    return 1.0 if -1 < x < 1 else 0.0


@reference
def hard_sigmoid_grad(x):
    return 1 / 6 if -3 < x < 3 else 0.0


@reference
def hard_swish_grad(x):
    if x <= -3:
        return 0.0
    return 1.0 if x >= 3 else (x + 1.5) / 3


@reference
def sigmoid_grad(x):
    return sigmoid(x) * sigmoid(-x)


@reference
def tanh_grad(x):
    return 1 / math.cosh(x) ** 2 if abs(x) < 300 else 0.0


@reference
def swish_grad(x):
    if abs(x) > -FAR_LEFT:
        return 1.0 if x > 0 else 0.0
    return sigmoid(x) * (1 + x * sigmoid(-x))


@reference
def elu_grad(x):
    return 1.0 if x >= 0 else math.exp(x)


@reference
def selu_grad(x):
    return SELU_LAMBDA if x >= 0 else SELU_LAMBDA * SELU_ALPHA * math.exp(x)


@reference
def gelu_grad(x):
    if abs(x) > 40:
        return 1.0 if x > 0 else 0.0
    return math.erfc(-x * SQRT_HALF) / 2 + x * math.exp(-x * x / 2) / SQRT_2_PI


@reference
def gelu_tanh_grad(x):
    if abs(x) > 40:
        return 1.0 if x > 0 else 0.0
    twice_u = twice_gelu_inner(x)
    slope = 2 * SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)
    return sigmoid(twice_u) * (1 + x * slope * sigmoid(-twice_u))


@reference
def softsign_grad(x):
    return 1 / (1 + abs(x)) ** 2


@reference
def mish_grad(x):
    if abs(x) > 300:
        return 1.0 if x > 0 else 0.0
    s = softplus(x)
    return math.tanh(s) + x * sigmoid(x) / math.cosh(s) ** 2


FUNCTIONS: dict[str, Callable[[float], float]] = {
    "identity": identity,
    "step": step,
    "relu": relu,
    "leaky_relu": leaky_relu,
    "prelu": prelu,
    "relu6": relu6,
    "hard_tanh": hard_tanh,
    "thresholded_relu": thresholded_relu,
    "hard_sigmoid": hard_sigmoid,
    "hard_swish": hard_swish,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "swish": swish,
    "elu": elu,
    "selu": selu,
    "celu": elu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "softplus": softplus,
    "softsign": softsign,
    "mish": mish,
}

DERIVATIVES: dict[str, Callable[[float], float]] = {
    "identity": one,
    "step": zero,
    "relu": step,
    "leaky_relu": leaky_relu_grad,
    "prelu": prelu_grad,
    "relu6": relu6_grad,
    "hard_tanh": hard_tanh_grad,
    "thresholded_relu": thresholded_relu_grad,
    "hard_sigmoid": hard_sigmoid_grad,
    "hard_swish": hard_swish_grad,
    "sigmoid": sigmoid_grad,
    "tanh": tanh_grad,
    "swish": swish_grad,
    "elu": elu_grad,
    "selu": selu_grad,
    "celu": elu_grad,
    "gelu": gelu_grad,
    "gelu_tanh": gelu_tanh_grad,
    "softplus": sigmoid,
    "softsign": softsign_grad,
    "mish": mish_grad,
}
