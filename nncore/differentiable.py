"""
x and directions, of any real type -> derivatives of a model's outputs or probabilities: methods of `Mlp`.

Arguments are checked and converted here, inputs and outputs chosen; `nncore.gradients` computes. Every method
has a second form, value_and_…, that returns what the model answers at x as well: both come from one pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nncore.arrays import FloatArray, FloatDtype
from nncore.errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    from nncore.gradients import Differentiating
    from nncore.model import AnyLayer
    from nncore.segments import Evaluating

__all__ = ["Differentiable"]

Indices = npt.NDArray[np.intp]


class Differentiable:
    """
    The derivatives of a model. What all methods have in common:

    x: (rows, n_in) real numbers, or (n_in,) for a single row, whose results then have no axis of rows.
    of: "outputs" for derivatives of forward(), "probabilities" for those of predict_proba().
    inputs, outputs: indices, each at most once; None for all. The model is then seen as a function of these
    inputs alone (the others stay as they are in x) with these outputs alone, in the order given: n_in and
    n_out below are their numbers, but for x, which always has all inputs.

    Results are in the model's dtype, to which arguments are converted. Values have the bits of forward() or
    predict_proba(). A row's bits depend on that row and the model alone. Safe to be called by many threads at
    once.

    Raises ShapeError, DtypeError or ArgumentError, saying what was expected.
    """

    layers: tuple[AnyLayer, ...]
    n_in: int
    n_out: int
    dtype: FloatDtype

    def vjp(
        self,
        x: npt.ArrayLike,
        cotangents: npt.ArrayLike,
        *,
        of: str = "outputs",
        inputs: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
    ) -> FloatArray:
        """
        Vector-Jacobian products: at each row of *x*, the Jacobian's transpose times a row of *cotangents*.

        cotangents: (rows, n_out), as many rows as x.  Returns (rows, n_in).
        """
        if inputs is None and outputs is None:
            # In place of self._differentiator: 50 ns of the 900 that the smallest model takes.
            differentiator = self._of_outputs if of == "outputs" else self._differentiator(of)
            answer = differentiator.vjp_at_once(x, cotangents)
            if answer is not None:
                return answer
        return self.value_and_vjp(x, cotangents, of=of, inputs=inputs, outputs=outputs)[1]

    def value_and_vjp(
        self,
        x: npt.ArrayLike,
        cotangents: npt.ArrayLike,
        *,
        of: str = "outputs",
        inputs: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """Values (rows, n_out), and what `vjp` returns."""
        rows = self._checked_rows(x, self.n_in, "inputs")
        wanted, given = _chosen(inputs, self.n_in, "inputs"), _chosen(outputs, self.n_out, "outputs")
        directions = self._directions(rows, cotangents, given, self.n_out, "cotangents")
        values, products = self._differentiator(of).vjp(rows.reshape(-1, self.n_in), directions)
        return _shaped(rows, _taken(values, given)), _shaped(rows, _taken(products, wanted))

    def jvp(
        self,
        x: npt.ArrayLike,
        tangents: npt.ArrayLike,
        *,
        of: str = "outputs",
        inputs: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
    ) -> FloatArray:
        """
        Jacobian-vector products: at each row of *x*, the Jacobian times a row of *tangents*.

        tangents: (rows, n_in), as many rows as x.  Returns (rows, n_out).
        """
        if inputs is None and outputs is None:
            answer = self._differentiator(of).jvp_at_once(x, tangents)
            if answer is not None:
                return answer
        return self.value_and_jvp(x, tangents, of=of, inputs=inputs, outputs=outputs)[1]

    def value_and_jvp(
        self,
        x: npt.ArrayLike,
        tangents: npt.ArrayLike,
        *,
        of: str = "outputs",
        inputs: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """Values (rows, n_out), and what `jvp` returns."""
        rows = self._checked_rows(x, self.n_in, "inputs")
        given, wanted = _chosen(inputs, self.n_in, "inputs"), _chosen(outputs, self.n_out, "outputs")
        directions = self._directions(rows, tangents, given, self.n_in, "tangents")
        values, products = self._differentiator(of).jvp(rows.reshape(-1, self.n_in), directions)
        return _shaped(rows, _taken(values, wanted)), _shaped(rows, _taken(products, wanted))

    def jacobian(
        self,
        x: npt.ArrayLike,
        *,
        of: str = "outputs",
        inputs: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
    ) -> FloatArray:
        """
        The Jacobian at each row of *x*: [row, i, j] is the derivative of output i by input j.

        Returns (rows, n_out, n_in). Takes a pass for each output, or for each input if those are fewer.
        """
        if inputs is None and outputs is None:
            answer = self._differentiator(of).jacobian_at_once(x)
            if answer is not None:
                return answer
        return self.value_and_jacobian(x, of=of, inputs=inputs, outputs=outputs)[1]

    def value_and_jacobian(
        self,
        x: npt.ArrayLike,
        *,
        of: str = "outputs",
        inputs: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """Values (rows, n_out), and what `jacobian` returns."""
        rows = self._checked_rows(x, self.n_in, "inputs")
        by, wanted = _chosen(inputs, self.n_in, "inputs"), _chosen(outputs, self.n_out, "outputs")
        every_output = np.arange(self.n_out) if wanted is None else wanted
        values, matrices = self._differentiator(of).jacobian(rows.reshape(-1, self.n_in), every_output, by)
        return _shaped(rows, _taken(values, wanted)), _shaped(rows, matrices)

    def value_and_grad(
        self,
        x: npt.ArrayLike,
        output: int = 0,
        *,
        of: str = "outputs",
        inputs: Sequence[int] | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """
        The output (or probability) of index *output* at each row of *x*, and its gradient by the inputs.

        Returns (rows,) and (rows, n_in).
        """
        rows = self._checked_rows(x, self.n_in, "inputs")
        index, by = _checked_index(output, self.n_out, "output"), _chosen(inputs, self.n_in, "inputs")
        values, gradients = self._differentiator(of).jacobian(
            rows.reshape(-1, self.n_in), np.array([index]), by, is_reverse=True
        )
        return values[:, index].reshape(rows.shape[:-1]), _shaped(rows, gradients[:, 0])

    def hvp(
        self,
        x: npt.ArrayLike,
        v: npt.ArrayLike,
        output: int = 0,
        *,
        of: str = "outputs",
        inputs: Sequence[int] | None = None,
    ) -> FloatArray:
        """
        Hessian-vector products: at each row of *x*, the Hessian of one output times a row of *v*.

        v: (rows, n_in), as many rows as x.  Returns (rows, n_in).
        Where an activation has no second derivative, `nncore.activations` says what stands for it: at kinks,
        0. What is linear piece by piece, as relu, has the Hessian of the piece that x lies in.
        """
        return self.value_and_hvp(x, v, output, of=of, inputs=inputs)[1]

    def value_and_hvp(
        self,
        x: npt.ArrayLike,
        v: npt.ArrayLike,
        output: int = 0,
        *,
        of: str = "outputs",
        inputs: Sequence[int] | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """The output (rows,), and what `hvp` returns."""
        rows = self._checked_rows(x, self.n_in, "inputs")
        index, by = _checked_index(output, self.n_out, "output"), _chosen(inputs, self.n_in, "inputs")
        directions = self._directions(rows, v, by, self.n_in, "v")
        values, products = self._differentiator(of).hvp(rows.reshape(-1, self.n_in), directions, index)
        return values[:, index].reshape(rows.shape[:-1]), _shaped(rows, _taken(products, by))

    @functools.cached_property
    def _evaluator(self) -> Evaluating:
        raise NotImplementedError

    def _checked_rows(self, values: npt.ArrayLike, width: int, what: str) -> FloatArray:
        raise NotImplementedError

    def _directions(
        self, rows: FloatArray, values: npt.ArrayLike, given: Indices | None, width: int, what: str
    ) -> FloatArray:
        """*values*, one row for each of *rows*, as (rows, width): 0 where they are not *given*."""
        narrow = width if given is None else given.size
        array = self._checked_rows(values, narrow, what)
        shape = (*rows.shape[:-1], narrow)
        if array.shape != shape:
            raise ShapeError(f"{what} has shape {array.shape}; expected {shape}, a row for each of inputs")
        array = array.reshape(-1, narrow)
        if given is None:
            return array
        wide: Any = np.zeros((len(array), width), self.dtype)
        wide[:, given] = array
        return wide  # type: ignore[no-any-return]

    def _differentiator(self, of: str) -> Differentiating:
        if of == "outputs":
            return self._of_outputs
        if of == "probabilities":
            return self._of_probabilities
        raise ArgumentError(f"of is {of!r}; expected 'outputs' or 'probabilities'")

    @functools.cached_property
    def _of_outputs(self) -> Differentiating:
        # Imported when first needed: it brings in Numba, which describing a model does not need.
        from nncore.gradients import differentiator_of

        return differentiator_of(self.layers, self._evaluator, through_probabilities=False)

    @functools.cached_property
    def _of_probabilities(self) -> Differentiating:
        from nncore.gradients import differentiator_of

        return differentiator_of(self.layers, self._evaluator, through_probabilities=True)


def _checked_index(index: Any, count: int, what: str) -> int:
    """*index* as an int in [0, count)."""
    is_integer = isinstance(index, int | np.integer) and not isinstance(index, bool)
    if not is_integer or not 0 <= index < count:
        raise ArgumentError(f"{what} is {index!r}; expected an integer from 0 to {count - 1}")
    return int(index)


def _chosen(indices: Sequence[int] | None, count: int, what: str) -> Indices | None:
    """*indices* as an array, each in [0, count) and there once; None if they are all, in order."""
    if indices is None:
        return None
    if isinstance(indices, str) or not hasattr(indices, "__len__") or len(indices) == 0:
        raise ArgumentError(f"{what} is {indices!r}; expected a sequence of one or more indices")
    first_at: dict[int, int] = {}
    for at, index in enumerate(indices):
        earlier = first_at.setdefault(_checked_index(index, count, f"{what}[{at}]"), at)
        if earlier != at:
            raise ArgumentError(f"{what}[{at}] repeats {what}[{earlier}]: {index}")
    array = np.array(list(first_at), np.intp)
    return None if array.size == count and (array == np.arange(count)).all() else array


def _taken(columns: FloatArray, indices: Indices | None) -> FloatArray:
    """The columns of *indices*, C-contiguous; all for None."""
    taken: Any = columns if indices is None else np.ascontiguousarray(columns[:, indices])
    return taken  # type: ignore[no-any-return]


def _shaped(rows: FloatArray, results: FloatArray) -> FloatArray:
    """*results*, one for each of *rows*; without their axis if that is a single row."""
    return results.reshape(rows.shape[:-1] + results.shape[1:])
