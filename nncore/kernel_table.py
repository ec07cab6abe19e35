"""
The machine at hand -> a table of function pointers: every tile, sweep and transpose, compiled together once.

`kernel_table()` gives the table, an array of int64. Drivers (`nncore.schedule`) call through it and so
contain no
tile: a driver compiles in tenths of a second and is never optimised together with the tiles. All tiles in one
compiled function: 3 s without a cache, 20 ms from it.

The first slots hold facts that drivers need: which tiles there are depends on the vectors' width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from nncore.activations import ACTIVATIONS
from nncore.compilation import kernel, target_of
from nncore.emitter import FLOAT, FLOAT_POINTER, I64
from nncore.lanes import Target
from nncore.pointers import FLOATS, SLOTS, data_of
from nncore.sweeps import (
    ACTIVATION_ARGUMENTS,
    SOFTMAX_ARGUMENTS,
    activation_sweep,
    softmax_many_rows,
    softmax_row,
)
from nncore.tiles import FewRowsTile, ManyRowsTile, few_rows_tiles, many_rows_tiles
from nncore.transposes import TRANSPOSE_ARGUMENTS, transpose_in, transpose_out

__all__ = [
    "FEW_FINISH",
    "FEW_PANELS",
    "FEW_TILES",
    "LANES",
    "MANY_BEGIN",
    "MANY_FINISH",
    "MANY_PANELS",
    "MANY_TILES",
    "MOST_FEW_ROWS",
    "MOST_OUTPUTS",
    "MOST_PANELS",
    "SOFTMAX_MANY",
    "STREAMING",
    "SOFTMAX_ROW",
    "SWEEPS_FEW",
    "SWEEPS_MANY",
    "TRANSPOSE_IN",
    "TRANSPOSE_OUT",
    "call_few_tile",
    "call_many_tile",
    "call_softmax",
    "call_sweep",
    "call_through",
    "call_transpose",
    "kernel_table",
]

# Facts.
LANES = 0  # floats in a vector
MOST_FEW_ROWS = 1  # rows of the tallest few-rows tile
MOST_OUTPUTS = 2  # outputs of the largest many-rows tile; [+ 1] with one vector
MOST_PANELS = 4  # [+ log2(rows)]: panels of the widest few-rows tile with so many rows

# Functions.
SOFTMAX_MANY = 8
SOFTMAX_ROW = 9
TRANSPOSE_IN = 10
TRANSPOSE_OUT = 11
FEW_PANELS = 12  # these five are `nncore.layers`'
FEW_FINISH = 13
MANY_PANELS = 14
MANY_BEGIN = 15
MANY_FINISH = 16
MANY_TILES = 20  # [+ 4 log2(outputs) + vectors - 1]
FEW_TILES = 40  # [+ 4 log2(rows) + log2(panels), or + STREAMING: the widest, for weights that are far away]
STREAMING = 3
SWEEPS_MANY = 64  # [+ code of the activation]
SWEEPS_FEW = 128
_SLOT_COUNT = 192


def _facts(target: Target, registers: int) -> dict[int, int]:
    few = few_rows_tiles(target, registers)
    many = many_rows_tiles(target, registers)
    facts = {
        LANES: target.lanes(FLOAT),
        MOST_FEW_ROWS: max(t.rows for t in few),
        MOST_OUTPUTS: max(t.outputs for t in many if t.vectors > 1),
        MOST_OUTPUTS + 1: max(t.outputs for t in many if t.vectors == 1),
    }
    for tile in few:
        slot = MOST_PANELS + _log2(tile.rows)
        facts[slot] = max(tile.panels, facts.get(slot, 0))
    return facts


def _functions(module: ir.Module, target: Target, registers: int) -> dict[int, ir.Function]:
    """Define every function of the table in *module*."""
    functions = {
        SOFTMAX_MANY: softmax_many_rows(module, target),
        SOFTMAX_ROW: softmax_row(module, target),
        TRANSPOSE_IN: transpose_in(module, target),
        TRANSPOSE_OUT: transpose_out(module, target),
    }
    for many in many_rows_tiles(target, registers):
        functions[MANY_TILES + 4 * _log2(many.outputs) + many.vectors - 1] = many.build(module, target)
    for few in few_rows_tiles(target, registers):
        variant = STREAMING if few.streams else _log2(few.panels)
        functions[FEW_TILES + 4 * _log2(few.rows) + variant] = few.build(module, target)

    # leaky_relu and prelu are one formula; without an alpha both orientations are one function.
    built: dict[Any, ir.Function] = {}
    for activation in ACTIVATIONS.values():
        for slot, lanes_are_rows in ((SWEEPS_MANY, True), (SWEEPS_FEW, False)):
            key = activation.trace, activation.takes_alpha and lanes_are_rows
            if key not in built:
                built[key] = activation_sweep(
                    module, target, activation.trace, activation.takes_alpha, lanes_are_rows
                )
            functions[slot + activation.code] = built[key]
    return functions


def _log2(power: int) -> int:
    return power.bit_length() - 1


def vector_registers(context: Any) -> int:
    """The number of vector registers of the machine that *context*, a Numba target context, compiles for."""
    triple = context.codegen().magic_tuple()[0]
    return 32 if target_of(context).vector_bits == 512 or triple.startswith(("aarch64", "arm64")) else 16


@intrinsic
def _fill(typing: Any, table: Any) -> Any:
    """Write facts and addresses into *table*."""

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
        target, registers = target_of(context), vector_registers(context)
        slots = arguments[0]
        for slot, fact in _facts(target, registers).items():
            builder.store(ir.Constant(I64, fact), builder.gep(slots, [ir.Constant(I64, slot)]))
        for slot, function in _functions(builder.module, target, registers).items():
            place = builder.gep(slots, [ir.Constant(I64, slot)])
            builder.store(function, builder.bitcast(place, function.type.as_pointer()))
        return context.get_dummy_value()

    return types.none(SLOTS), emit


@kernel
def fill_table(table):
    """Write facts and addresses into *table*, an array of int64; in it all tiles are compiled."""
    _fill(data_of(table))


def kernel_table() -> npt.NDArray[np.int64]:
    """A new table, but for the functions of `nncore.layers`; what it points to lives for ever."""
    table = np.zeros(_SLOT_COUNT, np.int64)
    fill_table(table)
    return table


def call_through(arguments: Sequence[Any]) -> Any:
    """
    What an intrinsic(typing, table, slot, ...) returns that calls the function in a slot of the table.

    arguments: the function's, as Numba types. If the first is SLOTS it is the table itself.
    """
    passes_table = arguments[0] == SLOTS
    given = arguments[1:] if passes_table else arguments

    def emit(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
        passed = [values[0], *values[2:]] if passes_table else values[2:]
        pointer = ir.FunctionType(ir.VoidType(), [value.type for value in passed]).as_pointer()
        place = builder.gep(values[0], [values[1]])
        builder.call(builder.load(builder.bitcast(place, pointer.as_pointer())), passed)
        return context.get_dummy_value()

    return types.none(SLOTS, types.int64, *given), emit


def _numba_types(arguments: Sequence[ir.Type]) -> list[Any]:
    kinds = {FLOAT_POINTER: FLOATS, I64: types.int64, FLOAT: types.float32}
    return [kinds[argument] for argument in arguments]


@intrinsic
def call_many_tile(typing, table, slot, x, w, count, bias, y, continues, prefetch, floor):
    """Run the ManyRowsTile in *slot*."""
    return call_through(_numba_types(ManyRowsTile.ARGUMENTS))


@intrinsic
def call_few_tile(
    typing, table, slot, x, x_stride, last_row, w, w_stride, count, bias, y, y_stride, continues, floor
):
    """Run the FewRowsTile in *slot*."""
    return call_through(_numba_types(FewRowsTile.ARGUMENTS))


@intrinsic
def call_sweep(typing, table, slot, y, count, vectors, alpha):
    """Run the activation's sweep in *slot*."""
    return call_through(_numba_types(ACTIVATION_ARGUMENTS))


@intrinsic
def call_softmax(typing, table, slot, y, features, vectors):
    """Run softmax_many_rows or softmax_row, whichever is in *slot*."""
    return call_through(_numba_types(SOFTMAX_ARGUMENTS))


@intrinsic
def call_transpose(typing, table, slot, x, x_stride, rows, features, y, y_stride):
    """Run transpose_in or transpose_out, whichever is in *slot*."""
    return call_through(_numba_types(TRANSPOSE_ARGUMENTS))
