"""
Rows of x -> rows of y: layer normalization, (x - mean) / sqrt(variance + epsilon) * gain + bias.

Computed in float64 for both dtypes, sums in a fixed order of eight partial sums; a float32 result is rounded
once. The variance is taken around the mean, in a second pass: from the squares alone it would lose its digits
where a row is far from zero. So a row's bits depend on the row alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import numpy as np
from numba.core import types

from nncore.arrays import FloatArray, FloatDtype
from nncore.compilation import compile_for, kernel

# Partial sums, so that additions need not wait for each other.
_LANES = 8


def normalize_rows(
    x: FloatArray, gain: FloatArray, bias: FloatArray, epsilon: float, out: FloatArray
) -> None:
    """
    Normalize the rows of *x* into *out*, which may be x.

    x, out: (rows, n), C-contiguous and aligned; gain, bias: (n,); all of one dtype. Nothing is checked.
    """
    _compiled(x.dtype)(x, gain, bias, epsilon, out)


@cache
def _compiled(dtype: FloatDtype) -> Callable[..., None]:
    number = types.float32 if dtype == np.float32 else types.float64
    rows, vector = types.Array(number, 2, "C", readonly=True), types.Array(number, 1, "C", readonly=True)
    out = types.Array(number, 2, "C")
    return cast(Callable[..., None], compile_for(_normalize_rows, (rows, vector, vector, types.float64, out)))


@kernel
def _normalize_rows(x: Any, gain: Any, bias: Any, epsilon: Any, out: Any) -> None:
    # x, out: (rows, n); gain, bias: (n,)
    rows, n = x.shape
    sums = np.empty(_LANES)
    for row in range(rows):
        mean = _sum_of_powers(x[row], 0.0, 1, sums) / n
        variance = _sum_of_powers(x[row], mean, 2, sums) / n
        factor = 1.0 / math.sqrt(variance + epsilon)
        for j in range(n):
            standard = (np.float64(x[row, j]) - mean) * factor
            out[row, j] = standard * np.float64(gain[j]) + np.float64(bias[j])


@kernel
def _sum_of_powers(x: Any, center: Any, power: Any, sums: Any) -> Any:
    """The sum of (x - center) ** power, power 1 or 2. x: (n,); sums: room for the partial sums."""
    sums[:] = 0.0
    whole = x.size - x.size % _LANES
    for k in range(0, whole, _LANES):
        for lane in range(_LANES):
            distance = np.float64(x[k + lane]) - center
            sums[lane] += distance if power == 1 else distance * distance
    for k in range(whole, x.size):
        distance = np.float64(x[k]) - center
        sums[k - whole] += distance if power == 1 else distance * distance
    total = 0.0
    for lane in range(_LANES):
        total += sums[lane]
    return total
