"""
Rows of logits -> rows of probabilities, or of their logarithms: stable softmax over the last axis.

    softmax(x)[i] = e^(x[i] - m) / sum over j of e^(x[j] - m),   m = max(x)

x: (..., n) float32 or float64; the result has its shape and dtype. Rows are added up in float64, in the order
of the elements. A float32 row, added up in float64, is 1 within 2^-22; each probability is within
4 + |x[i] - m| ULP, of which |x[i] - m| is what rounding the difference costs.

NaN makes its own row NaN and no other. Infinities give the limit where there is one: classes at +inf share
the whole, classes at -inf have nothing; where all are -inf, they share equally.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from numba.core import types

from nncore import elementary
from nncore.arrays import FloatArray, real_array
from nncore.compilation import compile_for, kernel
from nncore.errors import DtypeError, ShapeError
from nncore.lanes import Lanes, select
from nncore.tracing import traced

__all__ = ["log_softmax", "log_softmax_row", "softmax", "softmax_row"]


def _below(x: Lanes, top: Lanes) -> Lanes:
    """x - top, which is 0 for two equal infinities."""
    return select(x.equals(top), 0.0, x - top)


def _part(x: Lanes, top: Lanes) -> Lanes:
    return elementary.decay(_below(x, top))


_difference = traced(_below)
_exp_difference = traced(_part)


@kernel
def softmax_row(x: Any, out: Any) -> None:
    """x, out: (n,) of one dtype; they may be the same array."""
    top = _greatest(x)
    total = 0.0
    for i in range(x.size):
        part = _exp_difference(x[i], top)
        out[i] = part
        total += part
    share = 1.0 / total
    for i in range(x.size):
        out[i] = out[i] * share


@kernel
def log_softmax_row(x: Any, out: Any) -> None:
    """x, out: (n,) of one dtype; they may be the same array."""
    top = _greatest(x)
    total = 0.0
    for i in range(x.size):
        total += _exp_difference(x[i], top)
    log_total = math.log(total)
    for i in range(x.size):
        # In float64, so that a float32 result is rounded once.
        out[i] = _difference(np.float64(x[i]), np.float64(top)) - log_total


@kernel
def _greatest(x: Any) -> Any:
    """The greatest number in *x*; -inf if there is none. NaN shows later, in the sum."""
    top = x.dtype.type(-np.inf)
    for value in x:
        if value > top:
            top = value
    return top


@kernel
def _softmax_rows(x: Any, out: Any) -> None:
    for row in range(x.shape[0]):
        softmax_row(x[row], out[row])


@kernel
def _log_softmax_rows(x: Any, out: Any) -> None:
    for row in range(x.shape[0]):
        log_softmax_row(x[row], out[row])


def softmax(x: npt.ArrayLike, out: FloatArray | None = None) -> FloatArray:
    """
    The probabilities of *x*, (..., n), over its last axis, written into *out* if given.

    out: shape and dtype of the result; may be x itself.
    float32 is answered in float32, everything else as float64.
    Raises ShapeError or DtypeError if x is no array of real numbers with an axis, or out does not fit.
    """
    return _over_rows(_softmax_rows, x, out)


def log_softmax(x: npt.ArrayLike, out: FloatArray | None = None) -> FloatArray:
    """The natural logarithms of `softmax(x)`, without its underflow. Arguments and errors are the same."""
    return _over_rows(_log_softmax_rows, x, out)


def _over_rows(rows: Callable[..., None], x: npt.ArrayLike, out: FloatArray | None) -> FloatArray:
    array = real_array(x, "x")
    if array.ndim == 0:
        raise ShapeError("x is a single number; expected an array with at least one axis")
    dtype = np.float32 if array.dtype in (np.float32, np.float16) else np.float64
    logits = np.ascontiguousarray(array, dtype=dtype)
    if out is not None:
        if out.shape != logits.shape:
            raise ShapeError(f"out has shape {out.shape}; expected {logits.shape}")
        if out.dtype != logits.dtype:
            raise DtypeError(f"out has dtype {out.dtype}; expected {logits.dtype}")
    direct = out is not None and out.flags.c_contiguous and out.flags.writeable
    result = out if out is not None and direct else np.empty_like(logits)
    if logits.size:
        n = logits.shape[-1]
        _compiled(rows, dtype)(logits.reshape(-1, n), result.reshape(-1, n))
    if out is not None and not direct:
        out[...] = result
    return result if out is None else out


@lru_cache(maxsize=4)
def _compiled(rows: Any, dtype: type) -> Callable[..., None]:
    """*rows* for *dtype*: one signature, since a writeable array is converted to a read-only one."""
    number = types.float32 if dtype is np.float32 else types.float64
    x, out = types.Array(number, 2, "C", readonly=True), types.Array(number, 2, "C")
    return cast(Callable[..., None], compile_for(rows, (x, out)))
