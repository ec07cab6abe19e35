"""
Rows of x -> features of a block, and back: the transposes at either end of the many-rows path.

A square of lanes x lanes numbers is turned in registers: log2(lanes) rounds, each of which exchanges the
off-diagonal halves of ever larger squares by one shuffle a vector.
"""

from __future__ import annotations

from llvmlite import ir

from nncore.emitter import FLOAT_POINTER, I64, Emitter, define
from nncore.lanes import Lanes, Target

__all__ = ["TRANSPOSE_ARGUMENTS", "transpose_in", "transpose_out", "turned"]

# (x, x_stride, rows, features, y, y_stride)
TRANSPOSE_ARGUMENTS = (FLOAT_POINTER, I64, I64, I64, FLOAT_POINTER, I64)


def transpose_in(module: ir.Module, target: Target) -> ir.Function:
    """
    Define transpose(x, x_stride, rows, features, y, y_stride): x (rows, features) -> y (features, lanes).

    rows: 1 to lanes; the last one is repeated in the lanes left over. Nothing outside of x is read.
    """

    def emit(
        e: Emitter,
        x: ir.Value,
        x_stride: ir.Value,
        rows: ir.Value,
        features: ir.Value,
        y: ir.Value,
        y_stride: ir.Value,
    ) -> None:
        builder = e.builder
        last = builder.sub(rows, e.integer(1))
        at_row = [e.at(x, builder.mul(e.least(e.integer(r), last), x_stride)) for r in range(e.lanes)]
        whole = builder.and_(features, e.integer(-e.lanes))
        with e.loop(whole, step=e.lanes) as loop:
            place = e.at(y, builder.mul(loop.index, y_stride))
            for column in turned(e, [e.load(row, loop.index) for row in at_row]):
                e.store(column, place)
                place = e.at(place, y_stride)
        rest = builder.sub(features, whole)
        with e.when(builder.icmp_signed(">", rest, e.integer(0))):
            mask = e.first_lanes(rest)
            square = e.scratch(e.lanes)
            for i, column in enumerate(turned(e, [e.load_masked(e.at(row, whole), mask) for row in at_row])):
                e.store(column, square, i * e.lanes)
            place = e.at(y, builder.mul(whole, y_stride))
            with e.loop(rest) as loop:
                column = e.load(square, builder.mul(loop.index, e.integer(e.lanes)))
                e.store(column, place, builder.mul(loop.index, y_stride))

    return define(module, "nncore_transpose_in", TRANSPOSE_ARGUMENTS, target, emit)


def transpose_out(module: ir.Module, target: Target) -> ir.Function:
    """
    Define transpose(y, y_stride, rows, features, x, x_stride): y (features, lanes) -> x (rows, features).

    rows: 1 to lanes. Nothing outside of x is written.
    """

    def emit(
        e: Emitter,
        y: ir.Value,
        y_stride: ir.Value,
        rows: ir.Value,
        features: ir.Value,
        x: ir.Value,
        x_stride: ir.Value,
    ) -> None:
        builder = e.builder
        last = builder.sub(features, e.integer(1))
        square = e.scratch(e.lanes)
        with e.loop(features, step=e.lanes) as loop:
            columns = []
            for i in range(e.lanes):
                feature = e.least(builder.add(loop.index, e.integer(i)), last)
                columns.append(e.load(y, builder.mul(feature, y_stride)))
            for i, row in enumerate(turned(e, columns)):
                e.store(row, square, i * e.lanes)
            mask = e.first_lanes(builder.sub(features, loop.index))
            place = e.at(x, loop.index)
            with e.loop(rows) as row_loop:
                row = e.load(square, builder.mul(row_loop.index, e.integer(e.lanes)))
                e.store_masked(row, e.at(place, builder.mul(row_loop.index, x_stride)), mask)

    return define(module, "nncore_transpose_out", TRANSPOSE_ARGUMENTS, target, emit)


def turned(e: Emitter, rows: list[Lanes]) -> list[Lanes]:
    """The columns of a square of which *rows* are the rows."""
    kind = ir.VectorType(ir.IntType(32), e.lanes)
    values = [row.value for row in rows]
    distance = 1
    while distance < e.lanes:
        # Lanes of the second operand of a shuffle count from `lanes` on.
        low = ir.Constant(kind, [i if not i & distance else e.lanes + i - distance for i in range(e.lanes)])
        high = ir.Constant(kind, [i + distance if not i & distance else e.lanes + i for i in range(e.lanes)])
        for i in range(e.lanes):
            if not i & distance:
                pair = values[i], values[i + distance]
                values[i] = e.builder.shuffle_vector(*pair, low)
                values[i + distance] = e.builder.shuffle_vector(*pair, high)
        distance *= 2
    return [Lanes(e.builder, value, e.target) for value in values]
