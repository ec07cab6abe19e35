"""
A plan of derivatives, rows of x and directions -> products with the Jacobian: the passes, by one thread.

A forward pass leaves the slopes of its activations on a tape. A backward pass (pull) takes cotangents of the
outputs through the layers in reverse, weights transposed; a tangent pass (push) takes tangents of the inputs
through the layers without their biases. Both multiply by the slopes in between, and use the tiles of the
forward pass: `nncore.layers`, in the same two ways, for few rows and for many.

Each row of x has `count` directions; all pairs are rows of these passes, in groups as large as the forward
pass's. With one direction the rows of both passes are the same, and the tape has the layout of the pass:

    few rows     tape of a layer [row][feature], few_stride apart
    many rows    tape of a layer [block][feature][row of the block]

With several, a row of the tape serves several rows of the pass: it is always [row][feature], and many rows
are scaled through a transposition.

Softmax at the end is taken row by row, in float64, before a pull or after a push.
"""

from __future__ import annotations

import numpy as np
from numba.core import types

from nncore import kernel_table as kt
from nncore import packing, schedule
from nncore import slopes as st
from nncore.compilation import kernel
from nncore.layers import (
    BLOCK_VECTORS,
    FEW_ROWS,
    blocks_of,
    call_end,
    call_panels,
    few_stride,
    layer_of,
    panel_count,
)
from nncore.pointers import SLOTS, advance, claim, floats_at, floats_from, slots_at, slots_from
from nncore.python_calls import (
    ARRAY_DATA,
    ARRAY_SHAPE,
    call_with,
    counted,
    is_null,
    release_lock,
    take_lock,
)
from nncore.schedule import (
    CALL_CALLERS,
    CALL_LONG,
    CALL_NEW,
    CALL_NONE,
    CALL_WORKSPACE,
    GROUP,
    READABLE,
    is_matrix,
)
from nncore.tiles import PANEL

__all__ = ["DERIVE_OBJECTS", "derive_addresses", "derive_objects"]

# Slots of a plan of derivatives.
FORWARD = 0  # -> descriptor of the layers without what follows their sums, as `nncore.packing` lays it out
PULL = 1  # -> the same of the transposed layers, in the layers' order
PUSH = 2  # -> the same of the layers without biases
SLOPES = 3  # -> slope_table()
HAS_SOFTMAX = 4  # 1 if softmax is at the end, else 0; not a pointer
PLAN_SLOTS = 5

# Slots of a workspace.
PLAN = 0
HERE = 1  # -> a buffer of a group of rows of the widest layer
THERE = 2  # -> another
SPARE = 3  # -> another
TAPE = 4  # -> slopes of a group, layer after layer
SEEDS = 5  # -> directions of a group
VALUES = 6  # -> values of a group, if nobody else wants them
SOURCES = 7  # -> for each row of a group the row of x that it belongs to
WORKSPACE_SLOTS = 8

# Slots of a model's own callables, behind those of `nncore.schedule`: see `derive_objects`.
CALL_WIDTH = schedule.CALL_SLOTS  # of the directions
CALL_UNITS = (
    CALL_WIDTH + 1
)  # -> the indices of unit vectors that are the directions, or null if they are given
CALL_COUNT = CALL_WIDTH + 2  # directions a row
CALL_IS_PULL = CALL_WIDTH + 3
CALL_SLOTS = CALL_WIDTH + 4

_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)


# The forward pass


@kernel
def has_slopes(layer):
    """Whether the layer's activation is not the identity."""
    return layer[packing.LAYER_CODE] != 0


@kernel
def tape_after(tape, layer, group_rows):
    """Where the tape of the layer behind *layer* begins."""
    return advance(tape, group_rows * few_stride(layer[packing.LAYER_N_OUT]))


@kernel
def trace_few(plan, x, rows, y, here, there, tape, group_rows):
    """
    Evaluate up to MOST_FEW_ROWS rows, leaving slopes on the tape.

    x: (rows, n_in).  y: (rows, n_out).  tape: of the first of these rows.
    """
    layers, slopes = slots_at(plan, FORWARD), slots_at(plan, SLOPES)
    table = slots_at(layers, packing.TABLE)
    source, stride = x, layers[packing.N_IN]
    for index in range(layers[packing.LAYERS]):
        layer = layer_of(layers, index)
        panels = panel_count(layer[packing.LAYER_N_OUT])
        call_panels(table, kt.FEW_PANELS, layer, 0, panels, rows, source, stride, here, x, 0)
        source, stride = here, few_stride(layer[packing.LAYER_N_OUT])
        if has_slopes(layer):
            slot = st.WITH_SLOPES_FEW + layer[packing.LAYER_CODE]
            vectors, alpha = panels * PANEL // table[kt.LANES], floats_at(layer, packing.LAYER_ALPHA)
            for row in range(rows):
                at = row * stride
                st.call_with_slopes(slopes, slot, advance(here, at), 1, vectors, alpha, advance(tape, at))
        tape = tape_after(tape, layer, group_rows)
        here, there = there, here
    last = layer_of(layers, layers[packing.LAYERS] - 1)
    call_end(table, kt.FEW_FINISH, last, rows, source, 0, y)


@kernel
def trace_many(plan, x, rows, y, workspace, by_rows):
    """
    Evaluate up to GROUP blocks of rows, leaving slopes on the tape: [row][feature] if *by_rows*.

    x: (rows, n_in).  y: (rows, n_out).
    """
    layers, slopes = slots_at(plan, FORWARD), slots_at(plan, SLOPES)
    table = slots_at(layers, packing.TABLE)
    lanes = table[kt.LANES]
    here, there, spare = (
        floats_at(workspace, HERE),
        floats_at(workspace, THERE),
        floats_at(workspace, SPARE),
    )
    tape = floats_at(workspace, TAPE)
    block_rows = BLOCK_VECTORS * lanes
    block_stride = layers[packing.WIDEST] * block_rows
    blocks, last_vectors = blocks_of(table, rows)
    call_end(table, kt.MANY_BEGIN, layer_of(layers, 0), rows, x, block_stride, here)
    for index in range(layers[packing.LAYERS]):
        layer = layer_of(layers, index)
        n_out = layer[packing.LAYER_N_OUT]
        call_panels(
            table, kt.MANY_PANELS, layer, 0, panel_count(n_out), rows, here, block_stride, there, x, 0
        )
        if has_slopes(layer):
            slot = st.WITH_SLOPES_MANY + layer[packing.LAYER_CODE]
            alpha, tape_stride = floats_at(layer, packing.LAYER_ALPHA), few_stride(n_out)
            for block in range(blocks):
                vectors = last_vectors if block == blocks - 1 else BLOCK_VECTORS
                target = spare if by_rows else advance(tape, block * block_rows * tape_stride)
                st.call_with_slopes(
                    slopes, slot, advance(there, block * block_stride), n_out, vectors, alpha, target
                )
                for vector in range(vectors if by_rows else 0):
                    first = block * block_rows + vector * lanes
                    kt.call_transpose(
                        table,
                        kt.TRANSPOSE_OUT,
                        advance(spare, vector * lanes),
                        vectors * lanes,
                        min(lanes, rows - first),
                        n_out,
                        advance(tape, first * tape_stride),
                        tape_stride,
                    )
        tape = tape_after(tape, layer, GROUP * block_rows)
        here, there = there, here
    last = layer_of(layers, layers[packing.LAYERS] - 1)
    call_end(table, kt.MANY_FINISH, last, rows, here, block_stride, y)


# The backward pass and the tangent pass. first_row, count: row i of the pass has the slopes of row
# (first_row + i) // count of the tape.


@kernel
def layer_tape(plan, tape, index, group_rows):
    """Where the tape of layer *index* begins."""
    layers = slots_at(plan, FORWARD)
    for before in range(index):
        tape = tape_after(tape, layer_of(layers, before), group_rows)
    return tape


@kernel
def scale_few(plan, index, y, rows, tape, first_row, count, group_rows):
    """Multiply the rows of y, few_stride apart, by the slopes of layer *index*, if it has any."""
    layer = layer_of(slots_at(plan, FORWARD), index)
    if has_slopes(layer):
        table = slots_at(slots_at(plan, FORWARD), packing.TABLE)
        n_out = layer[packing.LAYER_N_OUT]
        stride, vectors = few_stride(n_out), panel_count(n_out) * PANEL // table[kt.LANES]
        at_layer = layer_tape(plan, tape, index, group_rows)
        for row in range(rows):
            slopes = advance(at_layer, (first_row + row) // count * stride)
            st.call_scale(slots_at(plan, SLOPES), st.SCALE, advance(y, row * stride), vectors, slopes)


@kernel
def pass_few(plan, is_pull, directions, rows, out, here, there, tape, first_row, count, group_rows):
    """
    Take up to MOST_FEW_ROWS directions through the layers.

    directions: (rows, n_out), out: (rows, n_in) if is_pull, else the other way round.
    """
    layers = slots_at(plan, FORWARD)
    table = slots_at(layers, packing.TABLE)
    steps = slots_at(plan, PULL if is_pull else PUSH)
    layer_count = layers[packing.LAYERS]
    layer = layer_of(steps, layer_count - 1 if is_pull else 0)
    width = layer[packing.LAYER_N_IN]
    source, stride = directions, width
    for step in range(layer_count):
        index = layer_count - 1 - step if is_pull else step
        layer = layer_of(steps, index)
        if is_pull:
            if step == 0 and has_slopes(layer_of(layers, index)):
                stride = few_stride(width)
                for row in range(rows):
                    for j in range(width):
                        here[row * stride + j] = directions[row * width + j]
                source = here
                here, there = there, here
            scale_few(plan, index, source, rows, tape, first_row, count, group_rows)
        panels = panel_count(layer[packing.LAYER_N_OUT])
        call_panels(table, kt.FEW_PANELS, layer, 0, panels, rows, source, stride, here, source, 0)
        source, stride = here, few_stride(layer[packing.LAYER_N_OUT])
        if not is_pull:
            scale_few(plan, index, source, rows, tape, first_row, count, group_rows)
        here, there = there, here
    call_end(table, kt.FEW_FINISH, layer, rows, source, 0, out)


@kernel
def scale_many(plan, index, y, rows, block_stride, tape, sources, group_rows):
    """
    Multiply the blocks of y by the slopes of layer *index*, if it has any.

    sources: for each row its row on the tape, or null if the tape has the layout of y.
    """
    layer = layer_of(slots_at(plan, FORWARD), index)
    if has_slopes(layer):
        table = slots_at(slots_at(plan, FORWARD), packing.TABLE)
        lanes, n_out = table[kt.LANES], layer[packing.LAYER_N_OUT]
        block_rows, stride = BLOCK_VECTORS * lanes, few_stride(n_out)
        at_layer, slopes = layer_tape(plan, tape, index, group_rows), slots_at(plan, SLOPES)
        blocks, last_vectors = blocks_of(table, rows)
        for block in range(blocks):
            vectors = last_vectors if block == blocks - 1 else BLOCK_VECTORS
            at_block = advance(y, block * block_stride)
            if is_null(sources):
                same = advance(at_layer, block * block_rows * stride)
                st.call_scale(slopes, st.SCALE, at_block, n_out * vectors, same)
            else:
                for vector in range(vectors):
                    st.call_scale_by_rows(
                        slopes,
                        st.SCALE_BY_ROWS,
                        advance(at_block, vector * lanes),
                        vectors * lanes,
                        n_out,
                        at_layer,
                        stride,
                        advance(sources, block * block_rows + vector * lanes),
                    )


@kernel
def pass_many(plan, is_pull, directions, rows, out, workspace, sources, group_rows):
    """Take up to GROUP blocks of directions through the layers; the rest is as for pass_few."""
    layers = slots_at(plan, FORWARD)
    table = slots_at(layers, packing.TABLE)
    steps = slots_at(plan, PULL if is_pull else PUSH)
    here, there, tape = (
        floats_at(workspace, HERE),
        floats_at(workspace, THERE),
        floats_at(workspace, TAPE),
    )
    block_stride = layers[packing.WIDEST] * BLOCK_VECTORS * table[kt.LANES]
    layer_count = layers[packing.LAYERS]
    layer = layer_of(steps, layer_count - 1 if is_pull else 0)
    call_end(table, kt.MANY_BEGIN, layer, rows, directions, block_stride, here)
    for step in range(layer_count):
        index = layer_count - 1 - step if is_pull else step
        layer = layer_of(steps, index)
        if is_pull:
            scale_many(plan, index, here, rows, block_stride, tape, sources, group_rows)
        panels = panel_count(layer[packing.LAYER_N_OUT])
        call_panels(table, kt.MANY_PANELS, layer, 0, panels, rows, here, block_stride, there, here, 0)
        if not is_pull:
            scale_many(plan, index, there, rows, block_stride, tape, sources, group_rows)
        here, there = there, here
    call_end(table, kt.MANY_FINISH, layer, rows, here, block_stride, out)


# Softmax at the end


@kernel
def through_softmax(p, rows, n, y, first_row, count):
    """
    Multiply each row of y, (rows, n), by the Jacobian of softmax, diag(p) - p p.T, in place.

    p: the probabilities, (…, n), of which row i of y has row (first_row + i) // count.
    Softmax does not see a constant that is added to y. With that of the most probable class taken off, 1 - p
    never appears, which has no digits left where p is all but 1.
    """
    for row in range(rows):
        share = advance(p, (first_row + row) // count * n)
        at_row = advance(y, row * n)
        best = 0
        for j in range(n):
            if share[j] > share[best]:
                best = j
        base = np.float64(at_row[best])
        total = 0.0
        for j in range(n):
            total += np.float64(share[j]) * (np.float64(at_row[j]) - base)
        for j in range(n):
            at_row[j] = np.float32(np.float64(share[j]) * (np.float64(at_row[j]) - base - total))


# All rows


@kernel
def directions_from(plan, workspace, given, units, first, rows, count, is_pull, values):
    """
    The directions of *rows* pairs, pair *first* of this group of x being the first one: (rows, width).

    given: a row for each pair of the group.  units: or, if not null, the indices of *count* units that every
    row of x has.  values: of the group.
    """
    layers, seeds = slots_at(plan, FORWARD), floats_at(workspace, SEEDS)
    width = layers[packing.N_OUT] if is_pull else layers[packing.N_IN]
    through = is_pull and plan[HAS_SOFTMAX] != 0
    at_first = advance(given, first * width)
    if is_null(units) and not through:
        return at_first
    for row in range(rows):
        at_row = advance(seeds, row * width)
        for j in range(width):
            at_row[j] = at_first[row * width + j] if is_null(units) else _ZERO
        if not is_null(units):
            at_row[units[(first + row) % count]] = _ONE
    if through:
        through_softmax(values, rows, width, seeds, first, count)
    return seeds


@kernel
def derive_rows(workspace, x, rows, given, units, count, is_pull, values, values_stride, out):
    """
    Values and products of *rows* rows of x, *count* directions each.

    x: (rows, n_in).  given: the directions (rows, count, n_out) of a pull, (rows, count, n_in) of a push;
    unused if *units*, the indices of count units, is not null.
    values: (rows, n_out), values_stride apart: n_out, or 0 to keep those of one group only.
    out: (rows, count, n_in) of a pull, (rows, count, n_out) of a push.
    """
    plan = slots_at(workspace, PLAN)
    layers = slots_at(plan, FORWARD)
    table = slots_at(layers, packing.TABLE)
    n_in, n_out = layers[packing.N_IN], layers[packing.N_OUT]
    width, out_width = (n_out, n_in) if is_pull else (n_in, n_out)
    here, there, tape = (
        floats_at(workspace, HERE),
        floats_at(workspace, THERE),
        floats_at(workspace, TAPE),
    )
    sources = slots_at(workspace, SOURCES)
    group_rows = GROUP * BLOCK_VECTORS * table[kt.LANES]
    few = min(FEW_ROWS, table[kt.MOST_FEW_ROWS])
    first = 0
    while first < rows:
        taken = min(group_rows, rows - first)
        at_x, at_values = advance(x, first * n_in), advance(values, first * values_stride)
        at_given, at_out = advance(given, first * count * width), advance(out, first * count * out_width)
        if taken <= few:
            trace_few(plan, at_x, taken, at_values, here, there, tape, group_rows)
        else:
            trace_many(plan, at_x, taken, at_values, workspace, count > 1)
        pairs = taken * count
        pair = 0
        while pair < pairs:
            is_by_rows = taken <= few or count > 1
            together = min(group_rows, pairs - pair)
            # A vector of rows that is not full: in 10 of 16 lanes, 18 us for a row of 784-50-100-10; in two
            # passes of few rows 13.
            if is_by_rows and together <= max(few, table[kt.LANES]):
                together = min(few, together)
            directions = directions_from(
                plan, workspace, at_given, units, pair, together, count, is_pull, at_values
            )
            target = advance(at_out, pair * out_width)
            if is_by_rows and together <= few:
                pass_few(
                    plan, is_pull, directions, together, target, here, there, tape, pair, count, group_rows
                )
            else:
                if is_by_rows:
                    for row in range(group_rows):
                        sources[row] = (pair + min(row, together - 1)) // count
                of_rows = sources if is_by_rows else slots_from(0)
                pass_many(plan, is_pull, directions, together, target, workspace, of_rows, group_rows)
            if plan[HAS_SOFTMAX] != 0 and not is_pull:
                through_softmax(at_values, together, n_out, target, pair, count)
            pair += together
        first += taken


# Entry points


@kernel
def derive_addresses(workspace_address, x_at, rows, given_at, units_at, count, is_pull, values_at, out_at):
    """`derive_rows` of what lies at these addresses; the caller has checked it."""
    workspace = slots_from(workspace_address)
    layers = slots_at(slots_at(workspace, PLAN), FORWARD)
    derive_rows(
        workspace,
        floats_from(x_at),
        rows,
        floats_from(given_at),
        slots_from(units_at),
        count,
        is_pull != 0,
        floats_from(values_at),
        layers[packing.N_OUT],
        floats_from(out_at),
    )


def derive_objects(me, arguments, count):
    """
    The products of arguments[0], an array (rows, n_in) of x, and arguments[1], an array of directions.

    A C function for `python_calls.callable_over`.  me: an array of the slots CALL_….  Without arguments[1],
    the directions are units.  Returns a new array, or None without a word why: see
    `nncore.schedule.forward_objects`, whose conditions these are.
    """
    slots = slots_at(me, ARRAY_DATA)
    none = slots_at(slots, CALL_NONE)
    workspace = slots_at(slots, CALL_WORKSPACE)
    layers = slots_at(slots_at(workspace, PLAN), FORWARD)
    has_units = slots[CALL_UNITS] != 0
    x = slots_at(arguments, 0)
    if count != (1 if has_units else 2) or not is_matrix(slots, x, layers[packing.N_IN], READABLE):
        return counted(none)
    rows = slots_at(x, ARRAY_SHAPE)[0]
    given = x
    if not has_units:
        given = slots_at(arguments, 1)
        if not is_matrix(slots, given, slots[CALL_WIDTH], READABLE):
            return counted(none)
        if slots_at(given, ARRAY_SHAPE)[0] != rows:
            return counted(none)
    if claim(slots, CALL_CALLERS, 1) != 0:
        claim(slots, CALL_CALLERS, -1)
        return counted(none)
    out = call_with(slots_at(slots, CALL_NEW), x)
    if not is_null(out):
        is_long = rows >= slots[CALL_LONG]
        state = release_lock() if is_long else none
        derive_rows(
            workspace,
            floats_at(x, ARRAY_DATA),
            rows,
            floats_at(given, ARRAY_DATA),
            slots_at(slots, CALL_UNITS),
            slots[CALL_COUNT],
            slots[CALL_IS_PULL] != 0,
            floats_at(workspace, VALUES),
            0,
            floats_at(out, ARRAY_DATA),
        )
        if is_long:
            take_lock(state)
    claim(slots, CALL_CALLERS, -1)
    return out


# PyObject *derive_objects(PyObject *, PyObject **, Py_ssize_t)
DERIVE_OBJECTS = SLOTS(SLOTS, SLOTS, types.int64)
