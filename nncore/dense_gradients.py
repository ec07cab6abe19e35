"""
Dense layers in float32 -> their DenseDifferentiator: whole passes by the kernels of `derivative_schedule`.

Here Python meets the kernels, as in `nncore.evaluation`: memory for them to work in, and the short way for
what needs no conversion. Packed weights are the evaluator's; the transposed ones are packed on first use.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import types

from nncore import derivative_schedule as ds
from nncore import packing, python_calls
from nncore.activations import ACTIVATIONS
from nncore.arrays import FloatArray
from nncore.compilation import c_callback, compile_for
from nncore.evaluation import Evaluator, address_of, call_slots
from nncore.gradients import AtOnce, Differentiator, Indices, Pair, never_at_once
from nncore.layers import complete_table
from nncore.model import LOG_SOFTMAX, SOFTMAX, AnyLayer, Layer
from nncore.packing import Plan, aligned_floats, padded
from nncore.slopes import slope_table
from nncore.tiles import PANEL

__all__ = ["DenseDifferentiator", "is_dense"]

# Numbers of products that are computed at a time if a part of them is wanted, or another order.
_PART_NUMBERS = 1 << 19

_FLOAT32 = np.dtype(np.float32)


def is_dense(layers: Sequence[AnyLayer], through_probabilities: bool) -> bool:
    """Whether a DenseDifferentiator can be made for *layers*."""
    last = layers[-1]
    if last.dtype != _FLOAT32 or last.activation == LOG_SOFTMAX:
        return False
    # Probabilities of a single output are its sigmoid, which can take the place of the identity only.
    if through_probabilities and last.n_out == 1 and last.activation not in ("identity", "sigmoid"):
        return False
    return all(isinstance(layer, Layer) for layer in layers)


class PassPlan:
    """Descriptors of a model's layers for each kind of pass. Holds the arrays that they point to."""

    def __init__(self, layers: Sequence[Layer], evaluator: Evaluator, through_probabilities: bool) -> None:
        """layers: for which `is_dense`; evaluator: theirs."""
        names = [layer.activation for layer in layers]
        has_softmax = names[-1] == SOFTMAX
        if has_softmax:
            names[-1] = "identity"
        elif through_probabilities and layers[-1].n_out > 1 and names[-1] != "sigmoid":
            has_softmax = True
        elif through_probabilities and names[-1] == "identity":
            names[-1] = "sigmoid"
        forward: npt.NDArray[np.int64] = evaluator.plan.descriptor.copy()
        each_layer = forward[packing.HEADER_SLOTS :].reshape(-1, packing.LAYER_SLOTS)
        each_layer[:, packing.LAYER_KIND] = packing.LINEAR
        each_layer[:, packing.LAYER_CODE] = [ACTIVATIONS[name].code for name in names]
        push = forward.copy()
        no_bias = aligned_floats(evaluator.plan.widest)
        no_bias[:] = 0.0
        push[packing.HEADER_SLOTS :].reshape(-1, packing.LAYER_SLOTS)[:, packing.LAYER_BIAS] = address_of(
            no_bias
        )
        if has_softmax:
            each_layer[-1, packing.LAYER_KIND] = packing.SOFTMAX
        pull = Plan([Layer(layer.weights.T) for layer in layers], complete_table())
        descriptors = [forward, pull.descriptor, push, slope_table()]
        self.slots = np.array([*map(address_of, descriptors), has_softmax], np.int64)
        self.n_in, self.n_out, self.widest = layers[0].n_in, layers[-1].n_out, evaluator.plan.widest
        # As much as `layers.few_stride` of each, or a panel more.
        self.tape_width = sum(padded(layer.n_out) + PANEL for layer in layers)
        self._kept = (evaluator.plan, no_bias, pull, descriptors)


class Workspace:
    """Memory for one call: buffers for a group of rows, and a descriptor that points to them."""

    __slots__ = ("_kept", "address")

    def __init__(self, plan: PassPlan, group_rows: int) -> None:
        buffers = [aligned_floats(group_rows * plan.widest) for _ in range(3)]
        tape = aligned_floats(group_rows * plan.tape_width)
        seeds = aligned_floats(group_rows * max(plan.n_in, plan.n_out))
        values, sources = aligned_floats(group_rows * plan.n_out), np.zeros(group_rows, np.int64)
        parts: list[npt.NDArray[Any]] = [plan.slots, *buffers, tape, seeds, values, sources]
        slots = np.array([address_of(part) for part in parts], np.int64)
        self._kept = (plan, parts, slots)
        self.address = address_of(slots)


class DenseDifferentiator:
    """The derivatives of a model of dense layers in float32; see `nncore.gradients.Differentiator`."""

    def __init__(self, layers: Sequence[Layer], evaluator: Evaluator, through_probabilities: bool) -> None:
        self._plan = PassPlan(layers, evaluator, through_probabilities)
        self._evaluator = evaluator
        self._n_in, self._n_out = self._plan.n_in, self._plan.n_out
        self._idle: list[Workspace] = []
        self._derive: Any = _derive_addresses()
        self._by_steps = functools.cache(lambda: Differentiator(layers, through_probabilities))
        n_in, n_out = self._n_in, self._n_out
        self.vjp_at_once = self._own_callable(True, 1, (n_in,))
        self.jvp_at_once = self._own_callable(False, 1, (n_out,))
        self.jacobian_at_once: AtOnce = never_at_once
        if n_out <= n_in:
            self.jacobian_at_once = self._own_callable(True, n_out, (n_out, n_in), has_units=True)

    def vjp(self, x: FloatArray, cotangents: FloatArray) -> Pair:
        """x: (rows, n_in), cotangents: (rows, n_out) -> (rows, n_out), (rows, n_in)."""
        values, products = self._room(len(x), self._n_out), self._room(len(x), self._n_in)
        self._run(x, cotangents, None, True, values, products)
        return values, products

    def jvp(self, x: FloatArray, tangents: FloatArray) -> Pair:
        """x, tangents: (rows, n_in) -> (rows, n_out), (rows, n_out)."""
        values, products = self._room(len(x), self._n_out), self._room(len(x), self._n_out)
        self._run(x, tangents, None, False, values, products)
        return values, products

    def jacobian(
        self, x: FloatArray, outputs: Indices, inputs: Indices | None, is_reverse: bool = False
    ) -> Pair:
        """x: (rows, n_in) -> (rows, n_out), (rows, outputs, inputs)."""
        inputs_count = self._n_in if inputs is None else len(inputs)
        is_reverse = is_reverse or len(outputs) <= inputs_count
        values = self._room(len(x), self._n_out)
        matrices = self._room(len(x), len(outputs), inputs_count)
        if is_reverse and inputs is None:
            self._run(x, x, outputs, True, values, matrices)
            return values, matrices
        units = outputs if is_reverse else np.arange(self._n_in) if inputs is None else inputs
        width = self._n_in if is_reverse else self._n_out
        rows_at_once = max(1, _PART_NUMBERS // (len(units) * width))
        for start in range(0, len(x), rows_at_once):
            rows = slice(start, start + rows_at_once)
            products = self._room(len(x[rows]), len(units), width)
            self._run(x[rows], x, units, is_reverse, values[rows], products)
            if is_reverse:
                matrices[rows] = products[:, :, inputs]
            else:
                matrices[rows] = products[:, :, outputs].transpose(0, 2, 1)
        return values, matrices

    def hvp(self, x: FloatArray, v: FloatArray, output: int) -> Pair:
        """x, v: (rows, n_in) -> (rows, n_out), the output's Hessian times v (rows, n_in)."""
        return self._by_steps().hvp(x, v, output)

    def _room(self, *shape: int) -> Any:
        return np.empty(shape, _FLOAT32)

    def _run(
        self, x: Any, directions: Any, units: Indices | None, is_pull: bool, values: Any, products: Any
    ) -> None:
        """directions: one for each of x, if there are no units."""
        try:
            workspace = self._idle.pop()
        except IndexError:
            workspace = self._new_workspace()
        self._derive(
            workspace.address,
            address_of(x),
            len(x),
            address_of(directions),
            0 if units is None else address_of(units),
            1 if units is None else len(units),
            is_pull,
            address_of(values),
            address_of(products),
        )
        self._idle.append(workspace)

    def _new_workspace(self) -> Workspace:
        return Workspace(self._plan, self._evaluator.group_rows)

    def _own_callable(
        self, is_pull: bool, count: int, shape: tuple[int, ...], has_units: bool = False
    ) -> AtOnce:
        """`derivative_schedule.derive_objects` with a workspace of its own; *shape* of a row's products."""
        if not python_calls.layout_is_known():
            return never_at_once
        empty = np.empty

        def new(x: FloatArray) -> FloatArray:
            return empty((len(x), *shape), _FLOAT32)

        units = np.arange(count)
        long_rows = self._evaluator.long_rows // (1 + 2 * count)
        slots = call_slots(ds.CALL_SLOTS, self._new_workspace(), long_rows, new)
        slots.kept += (units,)
        slots[ds.CALL_WIDTH] = self._n_out if is_pull else self._n_in
        slots[ds.CALL_UNITS] = address_of(units) if has_units else 0
        slots[ds.CALL_COUNT] = count
        slots[ds.CALL_IS_PULL] = is_pull
        return python_calls.callable_over(_derive_objects().address, slots)


@functools.cache
def _derive_addresses() -> Any:
    return compile_for(ds.derive_addresses, (types.int64,) * 9)


@functools.cache
def _derive_objects() -> Any:
    """The C function, compiled, or loaded, by the first call; it owns its code."""
    return c_callback(ds.derive_objects, ds.DERIVE_OBJECTS, "derivative_schedule.derive_objects")
