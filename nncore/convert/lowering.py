"""
Expression -> layers: affine parts are folded into the nearest layer, the rest must be a chain of layers.

Folding is computed in float64 and rounded once. Nothing else is moved: two dense layers in a row stay two, so
that a model costs what its source costs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.arrays import FloatDtype, model_dtype
from nncore.convert import expressions as ex
from nncore.convert.expressions import Expression
from nncore.errors import ConversionError
from nncore.model import LOG_SOFTMAX, SOFTMAX, AnyLayer, Layer, LayerNorm, naming_layer

Numbers = npt.NDArray[Any]

# A step that fits into no layer beside it needs a square one: up to so many numbers a row, 16 MB in float32.
_MAX_SQUARE = 2048


class _Draft:
    """
    A layer that still takes scales and an activation.

    weights: (n_in, n), or (n,) for the gain of a layer normalization, which has an epsilon.
    """

    def __init__(self, weights: Numbers, bias: Numbers, epsilon: float | None = None) -> None:
        self.weights = weights
        self.bias = bias
        self.epsilon = epsilon
        self.activation = "identity"
        self.alpha: float | Numbers | None = None

    def takes(self, step: Expression) -> bool:
        """Whether *step* can be a part of this layer."""
        if isinstance(step, ex.RowSoftmax) and self.epsilon is not None:
            return False
        return self.activation == "identity"

    def scale(self, factor: Numbers, shift: Numbers) -> None:
        """Multiply and shift the outputs."""
        if (factor != 1.0).any():
            self.weights = self.weights.astype(np.float64) * factor
        self.bias = self.bias.astype(np.float64) * factor + shift

    def finished(self, dtype: FloatDtype) -> AnyLayer:
        """The layer, in *dtype*."""
        alpha = self.alpha.astype(np.float64) if isinstance(self.alpha, np.ndarray) else self.alpha
        weights, bias = self.weights.astype(np.float64), self.bias.astype(np.float64)
        if self.epsilon is not None:
            return LayerNorm(weights, bias, self.epsilon, self.activation, alpha).astype(dtype)
        return Layer(weights, bias, self.activation, alpha).astype(dtype)


def layers_of(output: Expression, dtype: npt.DTypeLike) -> list[AnyLayer]:
    """
    The layers that compute *output*, in *dtype* ("float32" or "float64").

    Raises ConversionError, naming the part of the source that is no chain of layers, or ModelError for
    numbers that are not finite.
    """
    steps = _chain(output)
    wanted = model_dtype(dtype)
    drafts: list[_Draft] = []
    scale: ex.Polynomial | None = None
    for step in steps:
        last = drafts[-1] if drafts else None
        if isinstance(step, ex.Polynomial):
            factor, shift = step.coefficients[1], step.coefficients[0]
            if last is not None and last.takes(step):
                last.scale(factor, shift)
            else:
                scale = step
        elif isinstance(step, ex.Dense | ex.Selected):
            drafts.append(_dense(_as_dense(step), scale))
            scale = None
        elif isinstance(step, ex.Standardized):
            epsilon = _epsilon_of_unscaled(step, scale)
            if epsilon is None:
                drafts.append(_square(step, scale))
                epsilon = step.epsilon
            drafts.append(_Draft(np.ones(step.n), np.zeros(step.n), epsilon))
            scale = None
        else:
            if last is None or scale is not None or not last.takes(step):
                drafts.append(_square(step, scale))
                scale = None
            _activate(drafts[-1], step)
    if scale is not None or not drafts:
        drafts.append(_square(output, scale))
    layers: list[AnyLayer] = []
    for index, draft in enumerate(drafts):
        with naming_layer(index):
            layers.append(draft.finished(wanted))
    return layers


def _chain(output: Expression) -> list[Expression]:
    """The steps from the input to *output*, without the input."""
    steps: list[Expression] = []
    step, origin = output, output.origin
    while not isinstance(step, ex.Input):
        origin = step.origin or origin
        _require_layer_like(step, origin, is_last=not steps)
        steps.append(step)
        step = step.operands[0]
    return steps[::-1]


def _require_layer_like(step: Expression, origin: str, is_last: bool) -> None:
    prefix = f"{origin}: " if origin else ""
    if isinstance(step, ex.Sum):
        raise ConversionError(f"{prefix}adds two branches that depend on the input; {_CHAINS}")
    if isinstance(step, ex.Product):
        raise ConversionError(f"{prefix}multiplies two branches that depend on the input; {_CHAINS}")
    if isinstance(step, ex.Helper):
        raise ConversionError(
            f"{prefix}{_HELPERS.get(step.name, step.name)} is no layer of a perceptron here"
        )
    if isinstance(step, ex.Polynomial) and step.degree > 1:
        raise ConversionError(f"{prefix}raises numbers to the power {step.degree}, which is no activation")
    if isinstance(step, ex.RowSoftmax):
        name = LOG_SOFTMAX if step.log else SOFTMAX
        if not is_last:
            raise ConversionError(f"{prefix}{name} is followed by more; only the last layer may have it")


_CHAINS = "a model is a chain of layers"
_HELPERS = {
    "mean": "the mean of a row",
    "variance": "the variance of a row",
    "centered": "a row less its mean",
}


def _as_dense(step: ex.Dense | ex.Selected) -> ex.Dense:
    if isinstance(step, ex.Dense):
        return step
    if step.x.n * step.n > _MAX_SQUARE**2:
        raise ConversionError(
            f"{_where(step)}picks {step.n} of {step.x.n} numbers, which is too large a layer"
        )
    weights = np.zeros((step.x.n, step.n))
    weights[step.indices, np.arange(step.n)] = 1.0
    return ex.Dense(step.n, step.x, weights, np.zeros(step.n), origin=step.origin)


def _where(step: Expression) -> str:
    return f"{step.origin}: " if step.origin else ""


def _dense(step: ex.Dense, scale: ex.Polynomial | None) -> _Draft:
    weights, bias = step.weights, step.bias
    if scale is not None:  # (x * factor + shift) @ w + b = x @ (factor * w) + (shift @ w + b)
        shift, factor = scale.coefficients
        bias = shift @ weights.astype(np.float64) + bias
        weights = factor[:, np.newaxis] * weights
    return _Draft(weights, bias)


def _epsilon_of_unscaled(step: ex.Standardized, scale: ex.Polynomial | None) -> float | None:
    """
    The epsilon with which *step* does to x what it does to the scaled x; None if there is none.

    A row that is scaled and shifted as a whole is the same when standardized, but for epsilon.
    """
    if scale is None:
        return step.epsilon
    shift, factor = scale.coefficients
    if (shift != shift[0]).any() or (factor != factor[0]).any() or factor[0] <= 0.0:
        return None
    return float(step.epsilon / factor[0] ** 2)


def _square(step: Expression, scale: ex.Polynomial | None) -> _Draft:
    """A layer that does nothing but *scale*, to have a place for *step*."""
    n = step.operands[0].n if step.operands else step.n
    if n > _MAX_SQUARE:
        raise ConversionError(
            f"{_where(step)}needs a layer of {n} x {n} weights of its own; supported is up to {_MAX_SQUARE}"
        )
    shift, factor = (np.zeros(n), np.ones(n)) if scale is None else scale.coefficients
    return _Draft(np.diag(factor), shift)


def _activate(draft: _Draft, step: Expression) -> None:
    if isinstance(step, ex.Activated):
        draft.activation, draft.alpha = step.name, step.alpha
    else:
        assert isinstance(step, ex.RowSoftmax)
        draft.activation = LOG_SOFTMAX if step.log else SOFTMAX
