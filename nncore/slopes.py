"""
What derivatives need beside the forward pass's kernels, as LLVM functions, and a table of pointers to them.

    activation with slopes    pre-activations -> activations in place, and the derivative there beside them
    scale                     y *= x, number by number
    scale by rows             y [feature][lanes] *= x [row][feature], each lane by a row of its own

`slope_table()` is to derivatives what `nncore.kernel_table` is to the forward pass: compiled, or loaded, when
a gradient is first asked for, so that no forward pass waits for it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nncore.activations import ACTIVATIONS
from nncore.compilation import kernel, target_of
from nncore.emitter import FLOAT_POINTER, I64, Emitter, define
from nncore.kernel_table import call_through
from nncore.lanes import Target
from nncore.pointers import FLOATS, SLOTS, data_of
from nncore.sweeps import Formula
from nncore.transposes import turned

__all__ = [
    "SCALE",
    "SCALE_BY_ROWS",
    "WITH_SLOPES_FEW",
    "WITH_SLOPES_MANY",
    "call_scale",
    "call_scale_by_rows",
    "call_with_slopes",
    "slope_functions",
    "slope_table",
]

# Slots.
WITH_SLOPES_MANY = 0  # [+ code of the activation]: lanes are rows
WITH_SLOPES_FEW = 64  # lanes are features
SCALE = 128
SCALE_BY_ROWS = 129
_SLOT_COUNT = 136

_I64_POINTER = I64.as_pointer()


def activation_with_slopes(
    module: ir.Module,
    target: Target,
    formulas: tuple[Formula, Formula],
    takes_alpha: bool,
    lanes_are_rows: bool,
) -> ir.Function:
    """
    Define sweep(y, count, vectors, alpha, slopes): slopes[i] = f'(y[i]), y[i] = f(y[i]).

    formulas: f and f'.  slopes: as y.  The rest is as for `nncore.sweeps.activation_sweep`.
    """
    function, derivative = formulas
    orientation = "" if not takes_alpha else "_many" if lanes_are_rows else "_few"

    def emit(
        e: Emitter, y: ir.Value, count: ir.Value, vectors: ir.Value, alpha: ir.Value, slopes: ir.Value
    ) -> None:
        builder = e.builder
        if not takes_alpha:
            with e.loop(builder.mul(count, vectors)) as loop:
                offset = builder.mul(loop.index, e.integer(e.lanes))
                x = e.load(y, offset)
                e.store(derivative(x), slopes, offset)
                e.store(function(x), y, offset)
            return
        stride = builder.mul(vectors, e.integer(e.lanes))
        with e.loop(count) as outer:
            start = builder.mul(outer.index, stride)
            constant = e.broadcast(alpha, outer.index) if lanes_are_rows else None
            with e.loop(vectors) as inner:
                along = builder.mul(inner.index, e.integer(e.lanes))
                offset = builder.add(start, along)
                x, parameter = e.load(y, offset), constant or e.load(alpha, along)
                e.store(derivative(x, parameter), slopes, offset)
                e.store(function(x, parameter), y, offset)

    name = f"nncore_{function.__name__}_with_slopes{orientation}"
    return define(module, name, [FLOAT_POINTER, I64, I64, FLOAT_POINTER, FLOAT_POINTER], target, emit)


def scale(module: ir.Module, target: Target) -> ir.Function:
    """Define scale(y, vectors, x): y[i] *= x[i]."""

    def emit(e: Emitter, y: ir.Value, vectors: ir.Value, x: ir.Value) -> None:
        with e.loop(vectors) as loop:
            offset = e.builder.mul(loop.index, e.integer(e.lanes))
            e.store(e.load(y, offset) * e.load(x, offset), y, offset)

    return define(module, "nncore_scale", [FLOAT_POINTER, I64, FLOAT_POINTER], target, emit)


def scale_by_rows(module: ir.Module, target: Target) -> ir.Function:
    """
    Define scale(y, y_stride, features, x, x_stride, rows): lane i of y[j] *= x[rows[i], j].

    y: (features, lanes), y_stride apart.  x: rows of whole vectors, x_stride apart.  rows: an int64 a lane.
    """
    arguments = [FLOAT_POINTER, I64, I64, FLOAT_POINTER, I64, _I64_POINTER]

    def emit(
        e: Emitter,
        y: ir.Value,
        y_stride: ir.Value,
        features: ir.Value,
        x: ir.Value,
        x_stride: ir.Value,
        rows: ir.Value,
    ) -> None:
        builder = e.builder
        at_row = []
        for lane in range(e.lanes):
            row = builder.load(builder.gep(rows, [e.integer(lane)]))
            at_row.append(e.at(x, builder.mul(row, x_stride)))
        whole = builder.and_(features, e.integer(-e.lanes))
        with e.loop(whole, step=e.lanes) as loop:
            place = e.at(y, builder.mul(loop.index, y_stride))
            for column in turned(e, [e.load(row, loop.index) for row in at_row]):
                e.store(e.load(place) * column, place)
                place = e.at(place, y_stride)
        rest = builder.sub(features, whole)
        with e.when(builder.icmp_signed(">", rest, e.integer(0))):
            square = e.scratch(e.lanes)
            for i, column in enumerate(turned(e, [e.load(row, whole) for row in at_row])):
                e.store(column, square, i * e.lanes)
            place = e.at(y, builder.mul(whole, y_stride))
            with e.loop(rest) as loop:
                column = e.load(square, builder.mul(loop.index, e.integer(e.lanes)))
                offset = builder.mul(loop.index, y_stride)
                e.store(e.load(place, offset) * column, place, offset)

    return define(module, "nncore_scale_by_rows", arguments, target, emit)


def slope_functions(module: ir.Module, target: Target) -> dict[int, ir.Function]:
    """Define every function of the table in *module*."""
    functions = {SCALE: scale(module, target), SCALE_BY_ROWS: scale_by_rows(module, target)}
    built: dict[Any, ir.Function] = {}
    for activation in ACTIVATIONS.values():
        formulas = activation.trace, activation.trace_derivative
        for slot, lanes_are_rows in ((WITH_SLOPES_MANY, True), (WITH_SLOPES_FEW, False)):
            key = formulas, activation.takes_alpha and lanes_are_rows
            if key not in built:
                built[key] = activation_with_slopes(
                    module, target, formulas, activation.takes_alpha, lanes_are_rows
                )
            functions[slot + activation.code] = built[key]
    return functions


@intrinsic
def _fill(typing: Any, table: Any) -> Any:
    """Write the functions' addresses into *table*."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        for slot, function in slope_functions(builder.module, target_of(context)).items():
            place = builder.gep(arguments[0], [ir.Constant(I64, slot)])
            builder.store(function, builder.bitcast(place, function.type.as_pointer()))
        return context.get_dummy_value()

    return types.none(SLOTS), emit


@kernel
def fill_slope_table(table):
    """Write the functions' addresses into *table*, an array of int64; in it all of them are compiled."""
    _fill(data_of(table))


@functools.cache
def slope_table() -> npt.NDArray[np.int64]:
    """The table; compiled, or loaded, by the first call. What it points to lives for ever."""
    table = np.zeros(_SLOT_COUNT, np.int64)
    fill_slope_table(table)
    table.flags.writeable = False
    return table


@intrinsic
def call_with_slopes(typing, table, slot, y, count, vectors, alpha, slopes):
    """Run the activation in *slot*."""
    return call_through([FLOATS, types.int64, types.int64, FLOATS, FLOATS])


@intrinsic
def call_scale(typing, table, slot, y, vectors, x):
    """Run `scale`."""
    return call_through([FLOATS, types.int64, FLOATS])


@intrinsic
def call_scale_by_rows(typing, table, slot, y, y_stride, features, x, x_stride, rows):
    """Run `scale_by_rows`."""
    return call_through([FLOATS, types.int64, types.int64, FLOATS, types.int64, SLOTS])
