"""
float32 arrays in, float32 arrays out: slow twins of the float32 kernels that are right to the last bit.

Plain NumPy, one operation and one rounding at a time, in the order that the kernels promise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

PANEL = 16
CHUNK = 256


def fma(x: Any, y: Any, z: Any) -> Array:
    """
    x * y + z with one rounding.

    In float64 the product is exact; the sum is rounded to odd (Boldo and Melquiond 2008): where it is inexact
    its last bit is set, which keeps the second rounding from seeing a tie, or missing one.
    """
    with np.errstate(all="ignore"):
        product = np.asarray(x, np.float64) * np.asarray(y, np.float64)
        z = np.asarray(z, np.float64)
        total = np.asarray(product + z)
        # What the sum lost (Knuth's TwoSum).
        z_share = total - product
        error = (product - (total - z_share)) + (z - z_share)
        is_even = total.view(np.int64) % 2 == 0
        inexact = np.isfinite(total) & (error != 0)
        odd = np.nextafter(total, np.copysign(np.inf, error))
        return np.asarray(np.where(inexact & is_even, odd, total).astype(np.float32))


def multiply_add(x: Any, y: Any, z: Any, has_fma: bool) -> Array:
    """x * y + z: with one rounding, or on machines without fused multiply-add with two."""
    if has_fma:
        return fma(x, y, z)
    with np.errstate(all="ignore"):
        product = np.asarray(x, np.float32) * np.asarray(y, np.float32)
        return np.asarray(product + np.asarray(z, np.float32))


def chunk_sums(x: Array, w: Array, start: Any, has_fma: bool = True) -> Array:
    """x (rows, k) @ w (k, n), added to *start* in the order of k: (rows, n)."""
    sums = np.broadcast_to(np.asarray(start, np.float32), (len(x), w.shape[1]))
    for k in range(len(w)):
        sums = multiply_add(x[:, k : k + 1], w[k], sums, has_fma)
    return sums


def pre_activations(x: Array, w: Array, b: Array, has_fma: bool = True) -> Array:
    """x @ w + b, in chunks of k: the first one's sum starts as b, the others' as 0."""
    sums = chunk_sums(x[:, :CHUNK], w[:CHUNK], b, has_fma)
    for k in range(CHUNK, len(w), CHUNK):
        with np.errstate(all="ignore"):
            sums = sums + chunk_sums(x[:, k : k + CHUNK], w[k : k + CHUNK], 0.0, has_fma)
    return np.asarray(sums)


def at_least(x: Array, floor: Any) -> Array:
    """The greater of x and *floor*; NaN where x is NaN, x itself where both are equal."""
    return np.asarray(np.where(x < floor, np.float32(floor), x))


def softmax(x: Array, exp: Callable[[Array], Array]) -> Array:
    """
    Softmax of the rows of x (rows, n), given the kernels' *exp*.

    Added up in float64 from the first class to the last; shares are products with the inverse of the sum.
    """
    y = np.empty_like(x)
    with np.errstate(all="ignore"):
        for row, numbers in enumerate(x):
            greatest = np.float32(-np.inf)
            for number in numbers:
                greatest = number if number > greatest else greatest
            is_greatest = numbers == greatest
            parts = exp(np.where(is_greatest, np.float32(0), numbers - greatest).astype(np.float32))
            total = np.float64(0)
            for part in parts:
                total += np.float64(part)
            y[row] = (parts.astype(np.float64) * (np.float64(1) / total)).astype(np.float32)
    return y


def packed(w: Array) -> Array:
    """Weights (n_in, n_out) as (panels, n_in, 16), zeros behind the last output, number by number."""
    n_in, n_out = w.shape
    panels = np.zeros(((n_out + PANEL - 1) // PANEL, n_in, PANEL), np.float32)
    for j in range(n_out):
        for k in range(n_in):
            panels[j // PANEL, k, j % PANEL] = w[k, j]
    return panels


def leaky(x: Array, alpha: Any) -> Array:
    """x for x > 0, else alpha x."""
    with np.errstate(all="ignore"):
        return np.asarray(np.where(x > 0, x, np.asarray(alpha, np.float32) * x))


# Activations of one rounding at most, and so the same in NumPy.
EXACT: dict[str, Callable[[Array, Any], Array]] = {
    "identity": lambda x, alpha: x,
    "relu": lambda x, alpha: at_least(x, 0.0),
    "relu6": lambda x, alpha: np.where(x > 6, np.float32(6), at_least(x, 0.0)),
    "hard_tanh": lambda x, alpha: np.where(x > 1, np.float32(1), at_least(x, -1.0)),
    "thresholded_relu": lambda x, alpha: np.where(
        (x > np.asarray(alpha, np.float32)) | np.isnan(x), x, np.float32(0)
    ),
    "leaky_relu": leaky,
    "prelu": leaky,
}


def forward(mlp: Any, x: Array, has_fma: bool = True) -> Array:
    """Every layer of *mlp*, whose activations are among EXACT, in turn."""
    for layer in mlp.layers:
        sums = pre_activations(x, layer.weights, layer.bias, has_fma)
        x = np.asarray(EXACT[layer.activation](sums, layer.alpha))
    return x
