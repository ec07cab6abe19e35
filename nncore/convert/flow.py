"""
Tensors of a graph -> expressions with shapes: where the batch is, and which operations stay within a row.

A `Flow` is a tensor that depends on the input. Its shape has `ROWS` where the batch is. What its n numbers a
row mean is the expression's part; this file follows them through reshapes, transposes and broadcasts, and
refuses what would mix rows or work on some of a row's axes only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nncore.convert import expressions as ex
from nncore.convert.expressions import Expression
from nncore.errors import ConversionError

# The size of the batch axis: as many as there are rows.
ROWS = None
Shape: TypeAlias = tuple[int | None, ...]
Numbers = npt.NDArray[Any]

# No row of a model has so many numbers; a file that claims more is not believed.
MAX_WIDTH = 1 << 24


@dataclass(frozen=True, eq=False)
class Flow:
    """
    A tensor: for every row the numbers of *expression*, in the order of the axes of *shape* other than ROWS.

    batch: the number of rows, if the source fixed it; its axis may then be missing if that is 1.
    """

    expression: Expression
    shape: Shape
    batch: int | None = None

    @property
    def n(self) -> int:
        """Numbers a row."""
        return self.expression.n


@dataclass(frozen=True, eq=False)
class Dims:
    """Integers that a graph computes from shapes: a vector, or one number; ROWS among them."""

    values: tuple[int | None, ...]
    is_scalar: bool = False


def input_flow(shape: Sequence[int | None], what: str) -> Flow:
    """The flow of an input of *shape*, whose first axis is the batch, whatever its size."""
    if not shape:
        raise ConversionError(f"{what} is a single number; expected rows of numbers")
    if len(shape) == 1:
        batch, sizes, axes = 1, list(shape), ()
    else:
        batch, sizes, axes = shape[0], list(shape[1:]), (ROWS,)  # type: ignore[assignment]
    if any(size is None or size < 1 for size in sizes):
        raise ConversionError(f"{what} has shape {shown(shape)}; all sizes but the first must be known")
    n = math.prod(size for size in sizes if size is not None)
    if n > MAX_WIDTH:
        raise ConversionError(f"{what} has {n:,} numbers a row; at most {MAX_WIDTH:,} are supported")
    return Flow(ex.Input(n), (*axes, *sizes), batch)


def kept_shape(flow: Flow) -> tuple[int, ...] | None:
    """The shape of a row of *flow*, to be kept as a model's input_shape; None if it is flat already."""
    sizes = tuple(size for size in flow.shape if size is not ROWS)
    return sizes if len(sizes) > 1 else None


def shown(shape: Sequence[int | None]) -> str:
    """*shape* for messages."""
    return "(" + ", ".join("rows" if size is ROWS else str(size) for size in shape) + ")"


def elementwise(x: Flow, expression: Expression) -> Flow:
    """The flow of *expression*, computed from x element by element."""
    return Flow(expression, x.shape, x.batch)


def with_constant(x: Flow, constant: Numbers) -> tuple[Flow, Numbers]:
    """
    x and *constant*, broadcast against each other: the flow, and the constant as (n,).

    The flow is x, or x repeated along axes where it has one number only.
    """
    sizes = [1 if size is ROWS else size for size in x.shape]
    shape = list(constant.shape)
    width = max(len(sizes), len(shape))
    sizes = [1] * (width - len(sizes)) + sizes
    shape = [1] * (width - len(shape)) + shape
    rows_axis = x.shape.index(ROWS) + width - len(x.shape) if ROWS in x.shape else None
    if rows_axis is not None and shape[rows_axis] != 1:
        raise ConversionError(f"has a constant of shape {constant.shape}, which differs from row to row")
    joint = []
    for size, other in zip(sizes, shape, strict=True):
        if size != other and 1 not in (size, other):
            raise ConversionError(
                f"combines shape {shown(x.shape)} with a constant of shape {constant.shape}"
            )
        joint.append(max(size, other))
    if math.prod(joint) > MAX_WIDTH:
        raise ConversionError(f"makes {math.prod(joint):,} numbers a row")
    expression = x.expression
    if joint != sizes:
        position = np.broadcast_to(np.arange(x.n).reshape(sizes), joint).reshape(-1)
        expression = ex.columns(expression, position) if x.n > 1 else _repeated(expression, position.size)
    answer: list[int | None] = list(joint)
    if rows_axis is not None:
        answer[rows_axis] = ROWS
    return Flow(expression, tuple(answer), x.batch), np.broadcast_to(constant.reshape(shape), joint).reshape(
        -1
    )


def branch(value: Flow | Numbers | float, condition: Flow) -> Expression | float:
    """One of the two that *condition* chooses from: an expression of the same shape, or one number."""
    if isinstance(value, Flow):
        if value.shape != condition.shape:
            raise ConversionError(f"chooses from {shown(value.shape)} by {shown(condition.shape)}")
        return value.expression
    numbers = np.asarray(value, np.float64).reshape(-1)
    if numbers.size == 0 or (numbers != numbers[0]).any():
        raise ConversionError("chooses between the rows and several constants")
    return float(numbers[0])


def _repeated(x: Expression, n: int) -> Expression:
    return ex.dense(x, np.ones((1, n)))


def joined(a: Flow, b: Flow) -> Flow:
    """
    A flow of the shape that a and b have when broadcast; its expression is a's.

    Raises unless rows meet rows, and one of them has as many numbers a row as the result.
    """
    width = max(len(a.shape), len(b.shape))
    pairs = list(
        zip(
            (1,) * (width - len(a.shape)) + a.shape,
            (1,) * (width - len(b.shape)) + b.shape,
            strict=True,
        )
    )
    # A batch axis that is gone stands for one row.
    has_both = ROWS in a.shape and ROWS in b.shape
    is_apart = has_both and any(pair.count(ROWS) == 1 for pair in pairs)
    sizes = [size if other == 1 else other for size, other in pairs]
    numbers = math.prod(size for size in sizes if size is not ROWS)
    fits = all(size == other or 1 in (size, other) for size, other in pairs)
    if is_apart or not fits or numbers != max(a.n, b.n):
        raise ConversionError(f"combines shapes {shown(a.shape)} and {shown(b.shape)}")
    return Flow(a.expression, tuple(sizes), a.batch)


def times_matrix(x: Flow, weights: Numbers, bias: Numbers | None = None) -> Flow:
    """x @ weights + bias over the last axis, which must hold the whole row. weights: (x.n, n)."""
    require_whole_row(x, len(x.shape) - 1)
    expression = ex.dense(x.expression, weights, bias)
    return Flow(expression, (*x.shape[:-1], expression.n), x.batch)


def matrix_times(weights: Numbers, x: Flow) -> Flow:
    """weights @ x over the last axis but one, which must hold the whole row. weights: (n, x.n)."""
    if len(x.shape) < 2:
        return times_matrix(x, weights.T)
    require_whole_row(x, len(x.shape) - 2)
    expression = ex.dense(x.expression, weights.T)
    return Flow(expression, (*x.shape[:-2], expression.n, x.shape[-1]), x.batch)


def require_whole_row(x: Flow, axis: int) -> None:
    """Raise unless *axis* holds all numbers of a row."""
    size = x.shape[axis]
    if size != x.n or size is ROWS:
        raise ConversionError(
            f"works on axis {axis} of {shown(x.shape)}, which is not the whole row; flatten the input before"
        )


def whole_row_axis(x: Flow, axis: int) -> int:
    """*axis*, which may be negative, as one that holds all numbers of a row."""
    rank = len(x.shape)
    if not -rank <= axis < rank:
        raise ConversionError(f"has axis {axis}; its input has shape {shown(x.shape)}")
    require_whole_row(x, axis % rank)
    return axis % rank


def transposed(x: Flow, order: Sequence[int] | None) -> Flow:
    """x with its axes in another order."""
    rank = len(x.shape)
    order = list(range(rank))[::-1] if order is None else [axis + rank * (axis < 0) for axis in order]
    if sorted(order) != list(range(rank)):
        raise ConversionError(f"has axes {order}; its input has shape {shown(x.shape)}")
    sizes = [1 if size is ROWS else size for size in x.shape]
    positions = np.arange(x.n).reshape(sizes).transpose(order).reshape(-1)
    return Flow(ex.columns(x.expression, positions), tuple(x.shape[axis] for axis in order), x.batch)


def reshaped(x: Flow, target: Sequence[int | None], zero_copies: bool = True) -> Flow:
    """x in the shape *target*, which may hold ROWS, one -1, and 0 for the size at that place."""
    wanted = list(target)
    for axis, size in enumerate(wanted):
        if size == 0 and zero_copies:
            if axis >= len(x.shape):
                raise ConversionError(f"reshapes {shown(x.shape)} to {shown(target)}")
            wanted[axis] = x.shape[axis]
        elif size == x.batch and x.batch not in (None, 1) and axis == 0:
            wanted[axis] = ROWS
    unknown = [axis for axis, size in enumerate(wanted) if size == -1]
    known = math.prod(size for size in wanted if size not in (ROWS, -1))
    has_rows = ROWS in wanted
    if wanted.count(ROWS) > 1 or len(unknown) > 1 or known < 1:
        raise ConversionError(f"reshapes {shown(x.shape)} to {shown(target)}")
    if unknown and ROWS in x.shape and not has_rows and known == x.n:
        wanted[unknown[0]] = ROWS  # [-1, n]
    elif unknown and x.n % known == 0:
        wanted[unknown[0]] = x.n // known
    if ROWS in x.shape and ROWS not in wanted and x.batch == 1:
        # The batch is one of the ones, or has gone: either way it is a row.
        if 1 in wanted:
            wanted[wanted.index(1)] = ROWS
    elif ROWS in x.shape and ROWS not in wanted:
        raise ConversionError(f"reshapes {shown(x.shape)} to {shown(target)}, which mixes rows")
    if math.prod(size for size in wanted if size is not ROWS) != x.n:
        raise ConversionError(f"reshapes {shown(x.shape)} to {shown(target)}: the row has {x.n} numbers")
    if ROWS in wanted and ROWS in x.shape and not _keeps_rows(x.shape, wanted):
        raise ConversionError(f"reshapes {shown(x.shape)} to {shown(target)}, which mixes rows")
    return Flow(x.expression, tuple(wanted), x.batch)


def _keeps_rows(before: Shape, after: Sequence[int | None]) -> bool:
    """Whether rows stay rows: as many numbers lie before the batch axis as did."""

    def ahead(shape: Sequence[int | None]) -> int:
        return math.prod(size for size in shape[: list(shape).index(ROWS)] if size is not ROWS)

    return ahead(before) == ahead(after)


def squeezed(x: Flow, axes: Sequence[int] | None) -> Flow:
    """x without *axes*, or without all axes of size 1."""
    rank = len(x.shape)
    chosen = [a for a, size in enumerate(x.shape) if size == 1] if axes is None else [a % rank for a in axes]
    for axis in chosen:
        if x.shape[axis] != 1 and not (x.shape[axis] is ROWS and x.batch == 1):
            raise ConversionError(f"removes axis {axis} of {shown(x.shape)}, whose size is not 1")
    return Flow(x.expression, tuple(s for a, s in enumerate(x.shape) if a not in chosen), x.batch)


def unsqueezed(x: Flow, axes: Sequence[int]) -> Flow:
    """x with new axes of size 1 at *axes* of the result."""
    rank = len(x.shape) + len(axes)
    chosen = {axis % rank for axis in axes}
    rest = iter(x.shape)
    return Flow(x.expression, tuple(1 if a in chosen else next(rest) for a in range(rank)), x.batch)


def flattened(x: Flow, axis: int = 1) -> Flow:
    """x with two axes: those before *axis* in one, the others in the other."""
    rank = len(x.shape)
    axis = axis % rank if axis < 0 else axis
    sides = (x.shape[:axis], x.shape[axis:])
    shape = tuple(ROWS if ROWS in side else math.prod(s for s in side if s is not None) for side in sides)
    for side in sides:
        if ROWS in side and math.prod(size for size in side if size is not ROWS) != 1:
            raise ConversionError(f"flattens {shown(x.shape)} at axis {axis}, which mixes rows")
    return Flow(x.expression, shape, x.batch)
