"""
A model and rows of x -> products with its Jacobian and Hessians, and the Jacobian, each beside the values.

Derivatives are taken at the pre-activations, never from rounded activations; at kinks they are those of
`nncore.activations`. Rows go through all steps in groups, so that memory is bounded by the result and a few
MB. docs/gradients.md says what is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from nncore.arrays import FloatArray
from nncore.derivative_steps import steps_of
from nncore.model import AnyLayer, Layer

if TYPE_CHECKING:
    from nncore.segments import Evaluating

__all__ = ["Differentiating", "Differentiator", "differentiator_of"]

# Numbers of the widest layer that a group of rows has, over all directions.
_GROUP_NUMBERS = 1 << 17
_LEAST_GROUP_ROWS = 64

Indices = npt.NDArray[np.intp]
# Values and derivatives.
Pair = tuple[FloatArray, FloatArray]
# Derivatives without values, of arrays that need no conversion; or None, without having done anything.
AtOnce = Callable[..., FloatArray | None]


class Differentiating(Protocol):
    """What a model asks of its differentiator; see `Differentiator`."""

    vjp_at_once: AtOnce
    jvp_at_once: AtOnce
    jacobian_at_once: AtOnce

    def vjp(self, x: FloatArray, cotangents: FloatArray) -> Pair:
        """Values, and the Jacobian's transpose times cotangents."""

    def jvp(self, x: FloatArray, tangents: FloatArray) -> Pair:
        """Values, and the Jacobian times tangents."""

    def jacobian(
        self, x: FloatArray, outputs: Indices, inputs: Indices | None, is_reverse: bool = False
    ) -> Pair:
        """Values, and the Jacobian."""

    def hvp(self, x: FloatArray, v: FloatArray, output: int) -> Pair:
        """Values, and the Hessian times v."""


def differentiator_of(
    layers: Sequence[AnyLayer], evaluator: Evaluating, through_probabilities: bool
) -> Differentiating:
    """The differentiator for *layers*, which chain and have this *evaluator*."""
    from nncore import dense_gradients, evaluation

    if isinstance(evaluator, evaluation.Evaluator) and dense_gradients.is_dense(
        layers, through_probabilities
    ):
        dense = cast(Sequence[Layer], layers)
        return dense_gradients.DenseDifferentiator(dense, evaluator, through_probabilities)
    return Differentiator(layers, through_probabilities)


def never_at_once(*arguments: Any) -> None:
    """None: there is no shorter way."""


class Differentiator:
    """
    The derivatives of any model's outputs or probabilities, layer by layer. Safe to be used by many threads.

    Arrays are C-contiguous and in the model's dtype: `nncore.differentiable` has seen to that.
    """

    vjp_at_once: AtOnce = staticmethod(never_at_once)
    jvp_at_once: AtOnce = staticmethod(never_at_once)
    jacobian_at_once: AtOnce = staticmethod(never_at_once)

    def __init__(self, layers: Sequence[AnyLayer], through_probabilities: bool) -> None:
        self._steps = steps_of(layers, through_probabilities)
        self._n_in, self._n_out = layers[0].n_in, layers[-1].n_out
        self._dtype = layers[0].dtype
        self._widest = max(max(layer.n_in, layer.n_out) for layer in layers)

    def vjp(self, x: FloatArray, cotangents: FloatArray) -> Pair:
        """x: (rows, n_in), cotangents: (rows, n_out) -> (rows, n_out), (rows, n_in)."""
        values, products = self._room(len(x), self._n_out), self._room(len(x), self._n_in)
        for rows in self._groups(len(x), 1):
            values[rows], kept = self._forward(x[rows])
            products[rows] = self._pulled(kept, cotangents[rows].copy())
        return values, products

    def jvp(self, x: FloatArray, tangents: FloatArray) -> Pair:
        """x, tangents: (rows, n_in) -> (rows, n_out), (rows, n_out)."""
        values, products = self._room(len(x), self._n_out), self._room(len(x), self._n_out)
        for rows in self._groups(len(x), 1):
            values[rows], kept = self._forward(x[rows])
            products[rows] = self._pushed(kept, tangents[rows].copy())
        return values, products

    def jacobian(
        self, x: FloatArray, outputs: Indices, inputs: Indices | None, is_reverse: bool = False
    ) -> Pair:
        """
        x: (rows, n_in) -> (rows, n_out), (rows, outputs, inputs).

        inputs: None for all. A pass for each output, or for each input if those are fewer and it is not to be
        reverse.
        """
        every_input = np.arange(self._n_in) if inputs is None else inputs
        values: FloatArray = self._room(len(x), self._n_out)
        matrices: FloatArray = np.empty((len(x), len(outputs), len(every_input)), self._dtype)
        is_reverse = is_reverse or len(outputs) <= len(every_input)
        chosen, width = (outputs, self._n_out) if is_reverse else (every_input, self._n_in)
        unit: FloatArray = np.zeros((len(chosen), width), self._dtype)
        unit[np.arange(len(chosen)), chosen] = 1.0
        for rows in self._groups(len(x), len(chosen)):
            values[rows], kept = self._forward(x[rows])
            count = rows.stop - rows.start
            seeds: Any = np.tile(unit, (count, 1))
            if is_reverse:
                part = self._pulled(kept, seeds).reshape(count, len(chosen), self._n_in)
                matrices[rows] = part if inputs is None else part[:, :, inputs]
            else:
                part = self._pushed(kept, seeds).reshape(count, len(chosen), self._n_out)
                matrices[rows] = part[:, :, outputs].transpose(0, 2, 1)
        return values, matrices

    def hvp(self, x: FloatArray, v: FloatArray, output: int) -> Pair:
        """x, v: (rows, n_in) -> (rows, n_out), the output's Hessian times v (rows, n_in)."""
        values, products = self._room(len(x), self._n_out), self._room(len(x), self._n_in)
        for rows in self._groups(len(x), 2):
            y, t, kept = x[rows], v[rows], []
            for step in self._steps:
                y, t, needed = step.forward_along(y, t)
                kept.append(needed)
            g: FloatArray = np.zeros(y.shape, self._dtype)
            g[:, output] = 1.0
            h: FloatArray = np.zeros(y.shape, self._dtype)
            for step, needed in zip(reversed(self._steps), reversed(kept), strict=True):
                g, h = step.pull_along(needed, g, h)
            values[rows], products[rows] = y, h
        return values, products

    def _room(self, rows: int, width: int) -> FloatArray:
        room: FloatArray = np.empty((rows, width), self._dtype)
        return room

    def _groups(self, rows: int, directions: int) -> Iterator[slice]:
        size = max(_GROUP_NUMBERS // self._widest, _LEAST_GROUP_ROWS) // directions or 1
        for start in range(0, rows, size):
            yield slice(start, min(start + size, rows))

    def _forward(self, x: FloatArray) -> tuple[FloatArray, list[Any]]:
        kept = []
        for step in self._steps:
            x, needed = step.forward(x)
            kept.append(needed)
        return x, kept

    def _pulled(self, kept: list[Any], g: FloatArray) -> FloatArray:
        for step, needed in zip(reversed(self._steps), reversed(kept), strict=True):
            g = step.pull(needed, g)
        return g

    def _pushed(self, kept: list[Any], t: FloatArray) -> FloatArray:
        for step, needed in zip(self._steps, kept, strict=True):
            t = step.push(needed, t)
        return t
