"""
A model's layers -> steps, each with its forward pass and its products with a Jacobian from either side.

    y, kept = step.forward(x)          what the derivative needs is kept: slopes or probabilities, say
    step.pull(kept, g)                 rows of g times the Jacobian: cotangents of y -> cotangents of x
    step.push(kept, t)                 the Jacobian times rows of t: tangents of x -> tangents of y

and for second derivatives along a direction t of x, where everything has a rate of change along it:

    y, t_y, kept = step.forward_along(x, t)
    g_x, h_x = step.pull_along(kept, g, h)     h, h_x: the rates of g, g_x

In pull and push, g and t have `repeats` rows in a run for each row of x: (rows * repeats, n). Products with
weights are done by the evaluators of `nncore.forward`, forwards, transposed or without bias; the rest by
kernels that treat every row alike, without the GIL. So a row's bits depend on the row and the model alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numba.core import types

from nncore import forward
from nncore.activations import ACTIVATIONS
from nncore.arrays import FloatArray, FloatDtype
from nncore.compilation import compile_for, kernel
from nncore.model import LOG_SOFTMAX, SOFTMAX, AnyLayer, Layer, LayerNorm
from nncore.row_normalization import normalize_rows
from nncore.row_softmax import log_softmax, softmax

__all__ = ["Step", "steps_of"]


class Step(Protocol):
    """One step of a model; see the module's docstring."""

    def forward(self, x: FloatArray) -> tuple[FloatArray, Any]:
        """y, and what the other two need."""

    def pull(self, kept: Any, g: FloatArray) -> FloatArray:
        """Cotangents of x; *g* may be overwritten."""

    def push(self, kept: Any, t: FloatArray) -> FloatArray:
        """Tangents of y; *t* may be overwritten."""

    def forward_along(self, x: FloatArray, t: FloatArray) -> tuple[FloatArray, FloatArray, Any]:
        """y, its tangents, and what `pull_along` needs; nothing is overwritten."""

    def pull_along(self, kept: Any, g: FloatArray, h: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Cotangents of x and their rates; *g* and *h* may be overwritten."""


def steps_of(layers: Sequence[AnyLayer], through_probabilities: bool) -> list[Step]:
    """The steps of *layers*, which chain; with `Mlp.probabilities_from` at the end if so wished."""
    steps = [step for layer in layers for step in _steps_of_layer(layer)]
    last = layers[-1]
    if through_probabilities and last.activation not in (SOFTMAX, "sigmoid"):
        steps.append(_Elementwise("sigmoid", None, last.dtype) if last.n_out == 1 else _Softmax())
    return steps


def _steps_of_layer(layer: AnyLayer) -> Iterator[Step]:
    yield _Normalization(layer) if isinstance(layer, LayerNorm) else _Dense(layer)
    if layer.activation == SOFTMAX:
        yield _Softmax()
    elif layer.activation == LOG_SOFTMAX:
        yield _LogSoftmax()
    elif layer.activation != "identity":
        yield _Elementwise(layer.activation, layer.alpha, layer.dtype)


class _Dense:
    """x @ w + b."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer

    @cached_property
    def _affine(self) -> Callable[[FloatArray], FloatArray]:
        return _product(Layer(self._layer.weights, self._layer.bias))

    @cached_property
    def _linear(self) -> Callable[[FloatArray], FloatArray]:
        return _product(Layer(self._layer.weights))

    @cached_property
    def _transposed(self) -> Callable[[FloatArray], FloatArray]:
        return _product(Layer(self._layer.weights.T))

    def forward(self, x: FloatArray) -> tuple[FloatArray, None]:
        """Pre-activations; nothing needs to be kept."""
        return self._affine(x), None

    def pull(self, kept: None, g: FloatArray) -> FloatArray:
        """g @ w.T."""
        return self._transposed(g)

    def push(self, kept: None, t: FloatArray) -> FloatArray:
        """t @ w."""
        return self._linear(t)

    def forward_along(self, x: FloatArray, t: FloatArray) -> tuple[FloatArray, FloatArray, None]:
        """Pre-activations and their tangents."""
        return self._affine(x), self._linear(t), None

    def pull_along(self, kept: None, g: FloatArray, h: FloatArray) -> tuple[FloatArray, FloatArray]:
        """g @ w.T, h @ w.T."""
        return self._transposed(g), self._transposed(h)


def _product(layer: Layer) -> Callable[[FloatArray], FloatArray]:
    evaluate, n_out, dtype = forward.evaluator_of([layer]).evaluate, layer.n_out, layer.dtype

    def product(x: FloatArray) -> FloatArray:
        y: FloatArray = np.empty((len(x), n_out), dtype)
        evaluate(x, y)
        return y

    return product


class _Elementwise:
    """An activation; its slopes, taken at the pre-activations, are kept."""

    def __init__(self, name: str, alpha: float | FloatArray | None, dtype: FloatDtype) -> None:
        self._activation = ACTIVATIONS[name]
        self._alpha = [] if alpha is None else [np.asarray(alpha, dtype)]

    def forward(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Activations and slopes. The ufunc has the bits of the kernels."""
        slopes = self._activation.derivative(x, *self._alpha)
        return self._activation.function(x, *self._alpha), slopes

    def pull(self, kept: FloatArray, g: FloatArray) -> FloatArray:
        """g times the slopes."""
        _compiled(_scale, g.dtype)(kept, g, g)
        return g

    push = pull

    def forward_along(
        self, x: FloatArray, t: FloatArray
    ) -> tuple[FloatArray, FloatArray, tuple[FloatArray, FloatArray]]:
        """Activations and tangents; slopes and their rates are kept."""
        y, slopes = self.forward(x)
        rates = self._activation.second_derivative(x, *self._alpha)
        _compiled(_scale, t.dtype)(t, rates, rates)
        tangents = t.copy()
        _compiled(_scale, t.dtype)(slopes, tangents, tangents)
        return y, tangents, (slopes, rates)

    def pull_along(
        self, kept: tuple[FloatArray, FloatArray], g: FloatArray, h: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """g slopes, h slopes + g rates."""
        slopes, rates = kept
        _compiled(_scale, g.dtype)(slopes, h, h)
        _compiled(_add_product, g.dtype)(rates, g, h)
        return self.pull(slopes, g), h


class _Softmax:
    """Softmax of a row; probabilities are kept. Its Jacobian, diag(p) - p p.T, is symmetric."""

    def forward(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Probabilities, twice."""
        p = softmax(x)
        return p, p

    def pull(self, kept: FloatArray, g: FloatArray) -> FloatArray:
        """p (g - p . g)."""
        _compiled(_through_softmax, g.dtype)(kept, g, g)
        return g

    push = pull

    def forward_along(
        self, x: FloatArray, t: FloatArray
    ) -> tuple[FloatArray, FloatArray, tuple[FloatArray, FloatArray]]:
        """Probabilities and their tangents, both of which are kept."""
        p = softmax(x)
        tangents = self.push(p, t.copy())
        return p, tangents, (p, tangents)

    def pull_along(
        self, kept: tuple[FloatArray, FloatArray], g: FloatArray, h: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Through the Jacobian both, and g through the Jacobian's rate."""
        p, rates = kept
        h = self.pull(p, h)
        _compiled(_add_through_softmax_rate, g.dtype, 3)(p, rates, g, h)
        return self.pull(p, g), h


class _LogSoftmax:
    """Logarithms of softmax; probabilities are kept."""

    def forward(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Logarithms, probabilities."""
        return log_softmax(x), softmax(x)

    def pull(self, kept: FloatArray, g: FloatArray) -> FloatArray:
        """g - p times the sum of g."""
        _compiled(_pull_log_softmax, g.dtype)(kept, g, g)
        return g

    def push(self, kept: FloatArray, t: FloatArray) -> FloatArray:
        """t - p . t."""
        _compiled(_push_log_softmax, t.dtype)(kept, t, t)
        return t

    def forward_along(
        self, x: FloatArray, t: FloatArray
    ) -> tuple[FloatArray, FloatArray, tuple[FloatArray, FloatArray]]:
        """Logarithms and their tangents; probabilities and their rates are kept."""
        y, p = self.forward(x)
        rates = t.copy()
        _compiled(_through_softmax, t.dtype)(p, rates, rates)
        return y, self.push(p, t.copy()), (p, rates)

    def pull_along(
        self, kept: tuple[FloatArray, FloatArray], g: FloatArray, h: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """As `pull` both, and h less the probabilities' rates times the sum of g."""
        p, rates = kept
        h = self.pull(p, h)
        _compiled(_subtract_times_sum, g.dtype)(rates, g, h)
        return self.pull(p, g), h


class _Normalization:
    """A layer normalization; x itself is kept."""

    def __init__(self, layer: LayerNorm) -> None:
        self._layer = layer

    def forward(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Normalized rows, and x."""
        y = np.empty_like(x)
        normalize_rows(x, self._layer.gain, self._layer.bias, self._layer.epsilon, y)
        return y, x

    def pull(self, kept: FloatArray, g: FloatArray) -> FloatArray:
        """The gain, then the symmetric Jacobian of the standard scores."""
        return self._through(kept, g, True)

    def push(self, kept: FloatArray, t: FloatArray) -> FloatArray:
        """The symmetric Jacobian of the standard scores, then the gain."""
        return self._through(kept, t, False)

    def _through(self, x: FloatArray, g: FloatArray, gain_first: bool) -> FloatArray:
        _compiled_normalization(g.dtype)(x, self._layer.gain, self._layer.epsilon, gain_first, g, g)
        return g

    def forward_along(
        self, x: FloatArray, t: FloatArray
    ) -> tuple[FloatArray, FloatArray, tuple[FloatArray, FloatArray]]:
        """Normalized rows and their tangents; x and t are kept."""
        y, _ = self.forward(x)
        return y, self.push(x, t.copy()), (x, t)

    def pull_along(
        self, kept: tuple[FloatArray, FloatArray], g: FloatArray, h: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Both at once, in float64."""
        x, t = kept
        _compiled_normalization_along(g.dtype)(x, t, self._layer.gain, self._layer.epsilon, g, h)
        return g, h


# Kernels: g and out, (rows * repeats, n), may be the same array.


class _Arrays(NamedTuple):
    """The types of arrays of one dtype, for signatures."""

    rows: Any
    vector: Any
    out: Any


def _arrays(dtype: FloatDtype) -> _Arrays:
    number = types.float32 if dtype == np.float32 else types.float64
    return _Arrays(
        types.Array(number, 2, "C", readonly=True),
        types.Array(number, 1, "C", readonly=True),
        types.Array(number, 2, "C"),
    )


@cache
def _compiled(function: Callable[..., None], dtype: FloatDtype, inputs: int = 2) -> Callable[..., None]:
    """*function* of so many arrays of rows and another to write to."""
    of = _arrays(dtype)
    return compile_for(function, (*[of.rows] * inputs, of.out))


@cache
def _compiled_normalization(dtype: FloatDtype) -> Callable[..., None]:
    of = _arrays(dtype)
    arguments = of.rows, of.vector, types.float64, types.boolean, of.rows, of.out
    return cast(Callable[..., None], compile_for(_through_normalization, arguments))


@cache
def _compiled_normalization_along(dtype: FloatDtype) -> Callable[..., None]:
    of = _arrays(dtype)
    arguments = of.rows, of.rows, of.vector, types.float64, of.out, of.out
    return cast(Callable[..., None], compile_for(_normalization_along, arguments))


@kernel
def _scale(slopes: Any, g: Any, out: Any) -> None:
    # slopes: (rows, n)
    rows, n = slopes.shape
    repeats = g.shape[0] // max(rows, 1)
    for row in range(rows):
        for at in range(row * repeats, (row + 1) * repeats):
            for j in range(n):
                out[at, j] = g[at, j] * slopes[row, j]


@kernel
def _most_probable(p: Any) -> Any:
    best = 0
    for j in range(p.size):
        if p[j] > p[best]:
            best = j
    return best


@kernel
def _through_softmax(p: Any, g: Any, out: Any) -> None:
    # Softmax does not see a constant that is added to g. With that of the most probable class taken off,
    # 1 - p never appears, which has no digits left where p is all but 1.
    rows, n = p.shape
    repeats = g.shape[0] // max(rows, 1)
    for row in range(rows):
        best = _most_probable(p[row])
        for at in range(row * repeats, (row + 1) * repeats):
            base = np.float64(g[at, best])
            total = 0.0
            for j in range(n):
                total += np.float64(p[row, j]) * (np.float64(g[at, j]) - base)
            for j in range(n):
                out[at, j] = np.float64(p[row, j]) * (np.float64(g[at, j]) - base - total)


@kernel
def _pull_log_softmax(p: Any, g: Any, out: Any) -> None:
    rows, n = p.shape
    repeats = g.shape[0] // max(rows, 1)
    for row in range(rows):
        best = _most_probable(p[row])
        rest = 0.0  # 1 - p of the most probable class, with all its digits
        for j in range(n):
            if j != best:
                rest += np.float64(p[row, j])
        for at in range(row * repeats, (row + 1) * repeats):
            at_best = np.float64(g[at, best])
            others = 0.0
            for j in range(n):
                if j != best:
                    others += np.float64(g[at, j])
            for j in range(n):
                if j != best:
                    out[at, j] = np.float64(g[at, j]) - np.float64(p[row, j]) * (others + at_best)
            out[at, best] = at_best * rest - np.float64(p[row, best]) * others


@kernel
def _push_log_softmax(p: Any, t: Any, out: Any) -> None:
    rows, n = p.shape
    repeats = t.shape[0] // max(rows, 1)
    for row in range(rows):
        best = _most_probable(p[row])
        for at in range(row * repeats, (row + 1) * repeats):
            base = np.float64(t[at, best])
            total = 0.0
            for j in range(n):
                total += np.float64(p[row, j]) * (np.float64(t[at, j]) - base)
            for j in range(n):
                out[at, j] = np.float64(t[at, j]) - base - total


@kernel
def _through_normalization(x: Any, gain: Any, epsilon: Any, gain_first: Any, g: Any, out: Any) -> None:
    # (v - mean(v) - s mean(v s)) / sqrt(variance + epsilon), s being the standard scores.
    rows, n = x.shape
    repeats = g.shape[0] // max(rows, 1)
    scores, v = np.empty(n), np.empty(n)
    for row in range(rows):
        mean = 0.0
        for j in range(n):
            mean += np.float64(x[row, j])
        mean /= n
        variance = 0.0
        for j in range(n):
            scores[j] = np.float64(x[row, j]) - mean
            variance += scores[j] * scores[j]
        factor = 1.0 / math.sqrt(variance / n + epsilon)
        for j in range(n):
            scores[j] *= factor
        for at in range(row * repeats, (row + 1) * repeats):
            total, along = 0.0, 0.0
            for j in range(n):
                v[j] = np.float64(g[at, j]) * (np.float64(gain[j]) if gain_first else 1.0)
                total += v[j]
                along += v[j] * scores[j]
            for j in range(n):
                product = factor * (v[j] - total / n - scores[j] * (along / n))
                out[at, j] = product if gain_first else product * np.float64(gain[j])


# For second derivatives: no repeats.


@kernel
def _add_product(rates: Any, g: Any, out: Any) -> None:
    # rates, g, out: (rows, n)
    for row in range(g.shape[0]):
        for j in range(g.shape[1]):
            out[row, j] += rates[row, j] * g[row, j]


@kernel
def _subtract_times_sum(rates: Any, g: Any, out: Any) -> None:
    # rates, g, out: (rows, n)
    rows, n = g.shape
    for row in range(rows):
        total = 0.0
        for j in range(n):
            total += np.float64(g[row, j])
        for j in range(n):
            out[row, j] -= np.float64(rates[row, j]) * total


@kernel
def _add_through_softmax_rate(p: Any, rates: Any, g: Any, out: Any) -> None:
    # rates: of p. g counts from the most probable class, as in _through_softmax.
    rows, n = p.shape
    for row in range(rows):
        base = np.float64(g[row, _most_probable(p[row])])
        total, rate = 0.0, 0.0
        for j in range(n):
            difference = np.float64(g[row, j]) - base
            total += np.float64(p[row, j]) * difference
            rate += np.float64(rates[row, j]) * difference
        for j in range(n):
            difference = np.float64(g[row, j]) - base
            out[row, j] += np.float64(rates[row, j]) * (difference - total) - np.float64(p[row, j]) * rate


@kernel
def _normalization_along(x: Any, t: Any, gain: Any, epsilon: Any, g: Any, h: Any) -> None:
    # s: the standard scores, r: their rates along t; u = gain g and v = gain h. In place of g
    #     q / deviation,  q = u - mean(u) - s mean(u s)
    # and in place of h its rate
    #     (v - mean(v) - r mean(u s) - s (mean(v s) + mean(u r)) - q mean(s t) / deviation) / deviation.
    rows, n = x.shape
    s, r, u, v = np.empty(n), np.empty(n), np.empty(n), np.empty(n)
    for row in range(rows):
        mean, mean_t = 0.0, 0.0
        for j in range(n):
            mean += np.float64(x[row, j])
            mean_t += np.float64(t[row, j])
        mean /= n
        mean_t /= n
        variance = 0.0
        for j in range(n):
            s[j] = np.float64(x[row, j]) - mean
            variance += s[j] * s[j]
        factor = 1.0 / math.sqrt(variance / n + epsilon)
        along = 0.0
        for j in range(n):
            s[j] *= factor
            along += s[j] * np.float64(t[row, j])
        along /= n
        mean_u, mean_v, u_s, v_s, u_r = 0.0, 0.0, 0.0, 0.0, 0.0
        for j in range(n):
            r[j] = factor * (np.float64(t[row, j]) - mean_t - s[j] * along)
            u[j] = np.float64(gain[j]) * np.float64(g[row, j])
            v[j] = np.float64(gain[j]) * np.float64(h[row, j])
            mean_u += u[j]
            mean_v += v[j]
            u_s += u[j] * s[j]
            v_s += v[j] * s[j]
            u_r += u[j] * r[j]
        for j in range(n):
            q = u[j] - mean_u / n - s[j] * (u_s / n)
            rate = v[j] - mean_v / n - r[j] * (u_s / n) - s[j] * ((v_s + u_r) / n) - q * along * factor
            g[row, j] = factor * q
            h[row, j] = factor * rate
