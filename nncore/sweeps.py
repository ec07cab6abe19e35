"""
Sums -> activations, in place: passes over what a tile has just written, as LLVM functions.

Each applies one formula of `nncore.formulas`, or softmax, to a buffer that is still in the first cache.
Softmax has the bits of `nncore.softmax`: the numerators in float32, added up in float64 in the order of the
features, each multiplied by the sum's inverse in float64 and rounded.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from nncore import elementary
from nncore.emitter import FLOAT, FLOAT_POINTER, I64, Emitter, define
from nncore.lanes import Lanes, Target, select, to_double, to_single

__all__ = [
    "ACTIVATION_ARGUMENTS",
    "SOFTMAX_ARGUMENTS",
    "activation_sweep",
    "softmax_many_rows",
    "softmax_row",
]

Formula = Callable[..., Lanes]

# (y, count, vectors, alpha)
ACTIVATION_ARGUMENTS = (FLOAT_POINTER, I64, I64, FLOAT_POINTER)
# (y, features, vectors)
SOFTMAX_ARGUMENTS = (FLOAT_POINTER, I64, I64)


def activation_sweep(
    module: ir.Module, target: Target, formula: Formula, takes_alpha: bool, lanes_are_rows: bool
) -> ir.Function:
    """
    Define sweep(y, count, vectors, alpha): y[i] = formula(y[i]) for count * vectors vectors.

    lanes_are_rows: y is (count features, vectors of rows), and alpha has one number a feature; else y is
    (count rows, vectors of features), and alpha goes along with the features.
    """
    orientation = "" if not takes_alpha else "_many" if lanes_are_rows else "_few"

    def emit(e: Emitter, y: ir.Value, count: ir.Value, vectors: ir.Value, alpha: ir.Value) -> None:
        builder = e.builder
        if not takes_alpha:
            with e.loop(builder.mul(count, vectors)) as loop:
                place = e.at(y, builder.mul(loop.index, e.integer(e.lanes)))
                e.store(formula(e.load(place)), place)
            return
        stride = builder.mul(vectors, e.integer(e.lanes))
        with e.loop(count) as outer:
            line = e.at(y, builder.mul(outer.index, stride))
            constant = e.broadcast(alpha, outer.index) if lanes_are_rows else None
            with e.loop(vectors) as inner:
                offset = builder.mul(inner.index, e.integer(e.lanes))
                place = e.at(line, offset)
                e.store(formula(e.load(place), constant or e.load(alpha, offset)), place)

    return define(module, f"nncore_{formula.__name__}{orientation}", ACTIVATION_ARGUMENTS, target, emit)


def softmax_many_rows(module: ir.Module, target: Target) -> ir.Function:
    """Define sweep(y, features, vectors): softmax down the features of (features, vectors of rows)."""

    def emit(e: Emitter, y: ir.Value, features: ir.Value, vectors: ir.Value) -> None:
        builder = e.builder
        stride = builder.mul(vectors, e.integer(e.lanes))
        with e.loop(vectors) as column:
            top = e.at(y, builder.mul(column.index, e.integer(e.lanes)))
            with e.loop(features, [e.load(top)]) as loop:
                x = e.load(top, builder.mul(loop.index, stride))
                loop.carry(_greater(x, loop.values[0]))
            (greatest,) = loop.values
            with e.loop(features, [to_double(e.constant(0.0)).value]) as loop:
                place = e.at(top, builder.mul(loop.index, stride))
                power = _power(e.load(place), greatest)
                e.store(power, place)
                loop.carry((Lanes(builder, loop.values[0], target) + to_double(power)).value)
            share = 1.0 / Lanes(builder, loop.values[0], target)
            with e.loop(features) as loop:
                place = e.at(top, builder.mul(loop.index, stride))
                e.store(to_single(to_double(e.load(place)) * share), place)

    return define(module, "nncore_softmax_many", SOFTMAX_ARGUMENTS, target, emit)


def softmax_row(module: ir.Module, target: Target) -> ir.Function:
    """
    Define sweep(y, features, vectors): softmax of one row of *features* in *vectors* vectors.

    What stands behind the row in its last vectors is overwritten.
    """

    def emit(e: Emitter, y: ir.Value, features: ir.Value, vectors: ir.Value) -> None:
        builder = e.builder
        lowest = ir.Constant(FLOAT, float("-inf"))
        with e.loop(builder.mul(vectors, e.integer(e.lanes)), start=features) as loop:
            e.store_number(lowest, y, loop.index)
        with e.loop(vectors, [e.constant(float("-inf"))]) as loop:
            x = e.load(y, builder.mul(loop.index, e.integer(e.lanes)))
            loop.carry(_greater(x, loop.values[0]))
        greatest = e.across(loop.values[0], _greater)
        with e.loop(vectors) as loop:
            place = e.at(y, builder.mul(loop.index, e.integer(e.lanes)))
            e.store(_power(e.load(place), greatest), place)
        # One after the other, as the sum down the features is: the same bits.
        with e.loop(features, [ir.Constant(ir.DoubleType(), 0.0)]) as loop:
            power = builder.fpext(e.load_number(y, loop.index), ir.DoubleType())
            loop.carry(builder.fadd(loop.values[0], power))
        share = 1.0 / e.splat(loop.values[0])
        with e.loop(vectors) as loop:
            place = e.at(y, builder.mul(loop.index, e.integer(e.lanes)))
            e.store(to_single(to_double(e.load(place)) * share), place)

    return define(module, "nncore_softmax_row", SOFTMAX_ARGUMENTS, target, emit)


def _power(x: Lanes, greatest: Lanes) -> Lanes:
    """e^(x - greatest), the numerator of softmax; 1 for two equal infinities."""
    return elementary.decay(select(x.equals(greatest), 0.0, x - greatest))


def _greater(x: Lanes, bound: Lanes) -> Lanes:
    """The greater of *x* and *bound*, the latter if either is NaN (which the sum of the row then has)."""
    return select(x > bound, x, bound)
