"""
Rows of x -> rows of y: the forward pass of a multi-layer perceptron.

Glossary, the same letters everywhere:

    x (rows, n_in)    inputs of a layer        w (n_in, n_out)   weights
    b (n_out,)        bias                     y (rows, n_out)   activation(x @ w + b)

Accumulation order, the same for every row whatever batch it came in: k is cut into chunks of CHUNK. A chunk's
sum starts as b (the first one's) or 0, and k = 0, 1, … adds x[k] * w[k] with one rounding (a fused
multiply-add); the chunks' sums are added in their order. A row's bits therefore depend on the row and the
model alone.

float32 models are evaluated by `nncore.evaluation`, with tiles in SIMD; others by the plain kernel of this
file, which has the same bits for float32, too, and serves as the tiles' reference.

Either is compiled once, not once a model: a model is a table that kernels read. They hold no state; what they
need for the layers in between belongs to the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from numba.core import types

from nncore.activations import ACTIVATIONS
from nncore.arrays import FloatArray, FloatDtype
from nncore.compilation import compile_for, kernel
from nncore.model import SOFTMAX, Layer
from nncore.row_softmax import softmax_row
from nncore.switch import activate
from nncore.tiles import CHUNK
from nncore.tracing import fma

if TYPE_CHECKING:
    from nncore.evaluation import Evaluator

# Columns of a plan's table: sizes, code of the activation, and where in `numbers` w, b and alpha start.
_N_IN, _N_OUT, _CODE, _W, _B, _ALPHA = range(6)
_SOFTMAX_CODE = -1
# Rows of w that are added at a time: one load and store of y for four loads of w. 1.3 to 2.6 times as fast
# as one by one in float32, 1.05 to 1.5 times in float64 (Zen 4).
_UNROLL = 4


@dataclass(frozen=True, eq=False)
class Plan:
    """
    A model, laid out for the kernel.

    numbers: every layer's w (row-major), b and, where the activation takes one, alpha (n_out,).
    table: (layers, 6) int64, a row a layer, in the columns above.
    """

    numbers: FloatArray
    table: npt.NDArray[np.int64]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> Plan:
        """The plan of *layers*, which chain."""
        parts: list[Any] = []
        table = []
        start = 0
        for layer in layers:
            is_softmax = layer.activation == SOFTMAX
            code = _SOFTMAX_CODE if is_softmax else ACTIVATIONS[layer.activation].code
            w, b = start, start + layer.weights.size
            alpha = b + layer.n_out
            table.append((layer.n_in, layer.n_out, code, w, b, alpha))
            # An alpha that is not used costs n_out numbers and saves the kernel a question.
            used_alpha = 0.0 if layer.alpha is None else layer.alpha
            parts += [layer.weights.ravel(), layer.bias, np.full(layer.n_out, used_alpha, layer.dtype)]
            start = alpha + layer.n_out
        return cls(np.concatenate(parts), np.array(table, np.int64))


class PlainEvaluator:
    """Evaluates a model of either dtype by the plain kernel, with the interface of `evaluation.Evaluator`."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._plan = Plan.of(layers)

    def evaluate_at_once(self, x: Any, out: Any) -> FloatArray | None:
        """None: there is no shorter way than `evaluate`."""
        return None

    def evaluate(self, x: FloatArray, y: FloatArray, threads: int = 1) -> None:
        """Evaluate *x* into *y*, both checked by the caller; always by one thread."""
        forward(self._plan, x, y)

    def threads_for(self, rows: int) -> int:
        """1."""
        return 1


def evaluator_of(layers: Sequence[Layer]) -> Evaluator | PlainEvaluator:
    """The evaluator for the dtype of *layers*, which chain."""
    if layers[0].dtype == np.float32:
        from nncore.evaluation import Evaluator

        return Evaluator(layers)
    return PlainEvaluator(layers)


def forward(plan: Plan, x: FloatArray, out: FloatArray) -> None:
    """
    Evaluate *plan* on the rows of *x*, writing into *out*.

    x: (rows, n_in); out: (rows, n_out), must not alias x. Both C-contiguous and aligned, in the dtype of
    plan.numbers. Nothing is checked: that is Mlp's part.
    """
    _compiled(plan.numbers.dtype)(plan.numbers, plan.table, x, out)


@functools.cache
def _compiled(dtype: FloatDtype) -> Callable[..., None]:
    """The kernel for *dtype*, compiled or loaded from the cache on the first call."""
    number = types.float32 if dtype == np.float32 else types.float64

    def array(element: Any, dimensions: int, readonly: bool = True) -> Any:
        return types.Array(element, dimensions, "C", readonly)

    # One signature: a writeable array converts to a read-only one.
    arrays = array(number, 1), array(types.int64, 2), array(number, 2), array(number, 2, False)
    return compile_for(_forward, arrays)


@kernel
def _forward(numbers: Any, table: Any, x: Any, out: Any) -> None:
    # numbers: (n,); table: (layers, 6); x: (rows, n_in); out: (rows, n_out)
    last = table.shape[0] - 1
    widest = 0
    for layer in range(last + 1):
        # Not .max(): code that has it needs all of Numba's array functions, and SciPy, to be loaded.
        widest = max(widest, table[layer, _N_OUT])
    scratch = np.empty((3, widest), out.dtype)
    for row in range(x.shape[0]):
        source = x[row]
        for layer in range(last + 1):
            n_in, n_out, code = table[layer, _N_IN], table[layer, _N_OUT], table[layer, _CODE]
            w, b, alpha = table[layer, _W], table[layer, _B], table[layer, _ALPHA]
            y = out[row] if layer == last else scratch[layer % 2, :n_out]
            weights = numbers[w : w + n_in * n_out].reshape(n_in, n_out)
            y[:] = numbers[b : b + n_out]
            _add_products(source[:CHUNK], weights[:CHUNK], y)
            for k in range(CHUNK, n_in, CHUNK):
                chunk_sum = scratch[2, :n_out]
                chunk_sum[:] = 0.0
                _add_products(source[k : k + CHUNK], weights[k : k + CHUNK], chunk_sum)
                for j in range(n_out):
                    y[j] += chunk_sum[j]
            if code == _SOFTMAX_CODE:
                softmax_row(y, y)
            else:
                for j in range(n_out):
                    y[j] = activate(y[j], code, numbers[alpha + j])
            source = y


@kernel
def _add_products(x: Any, w: Any, y: Any) -> None:
    # x: (n_in,); w: (n_in, n_out); y: (n_out,) += x @ w, k in order
    n_in, n_out = w.shape
    whole = n_in - n_in % _UNROLL
    for k in range(0, whole, _UNROLL):
        x0, x1, x2, x3 = x[k], x[k + 1], x[k + 2], x[k + 3]
        w0, w1, w2, w3 = w[k], w[k + 1], w[k + 2], w[k + 3]
        for j in range(n_out):
            y[j] = fma(x3, w3[j], fma(x2, w2[j], fma(x1, w1[j], fma(x0, w0[j], y[j]))))
    for k in range(whole, n_in):
        for j in range(n_out):
            y[j] = fma(x[k], w[k, j], y[j])
