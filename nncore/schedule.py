"""
A plan and rows of x -> rows of y: in which order layers are evaluated, by one thread or several.

Few rows go through the layers together. Many go in groups of GROUP blocks of rows; a group goes through all
layers before the next, so that its activations stay in the second cache:

    for group: transpose in; for layer: for chunk of k: for panel: for block: tile, sweep; transpose out

A panel's chunk of weights (16 KB) is read from memory once a group and used from the first cache by each
block.

Threads share a job (see `JOB_ROWS`, …) in one of two ways. Enough rows are cut into parts, and a thread that
is done with one takes the next. Otherwise all work on the same rows: the panels of a layer are cut into
parts, and a layer begins when the one before is finished. Which thread computes what changes no bit.

Two buffers, which layers write to in turn, belong to a workspace; a workspace belongs to one call, or to one
thread of it.
"""

from __future__ import annotations

from numba.core import types

from nncore import kernel_table as kt
from nncore import packing
from nncore.compilation import kernel
from nncore.layers import BLOCK_VECTORS, FEW_ROWS, call_end, call_panels, few_stride, layer_of, panel_count
from nncore.pointers import (
    SLOTS,
    advance,
    claim,
    floats_at,
    floats_from,
    pause,
    read_shared,
    slots_at,
    slots_from,
)
from nncore.python_calls import (
    ARRAY_AXES,
    ARRAY_DATA,
    ARRAY_DTYPE,
    ARRAY_FLAGS,
    ARRAY_SHAPE,
    OBJECT_TYPE,
    call_with,
    counted,
    forget,
    is_null,
    low_half,
    release_lock,
    take_lock,
)

__all__ = [
    "FORWARD_OBJECTS",
    "GROUP",
    "forward_addresses",
    "forward_objects",
    "forward_parts",
    "is_finished",
]

# Blocks in a group.
GROUP = 4

# Slots of a workspace.
PLAN = 0
HERE = 1
THERE = 2

# Slots of a model's own callable: see `forward_objects`.
CALL_WORKSPACE = 0  # -> its slots
CALL_CALLERS = 1  # that have, or want, the workspace
CALL_LONG = 2  # from so many rows on other threads run Python meanwhile
CALL_ARRAY_TYPE = 3  # -> np.ndarray
CALL_FLOAT32 = 4  # -> its dtype
CALL_NONE = 5  # -> None
CALL_NEW = 6  # -> a function that makes a new array for the results of the rows it is given
CALL_SLOTS = 7

# NumPy's flags.
READABLE = 0x1 | 0x100  # C-contiguous, aligned
WRITEABLE = 0x400

# Slots of a job.
JOB_X = 0  # -> float32
JOB_Y = 1  # -> float32
JOB_ROWS = 2
JOB_THREADS = 3
JOB_PART_PANELS = 4  # panels of a part; 0 if the rows are cut
JOB_WORKSPACE = 5  # whose buffers are shared, if the panels are cut
JOB_STAGES = 8  # a claimed and a finished count for every stage, a cache line apart
STAGE_SLOTS = 16
STAGE_CLAIMED = 0
STAGE_FINISHED = 8


@kernel
def few_rows(plan, x, rows, y, here, there):
    """
    Evaluate up to MOST_FEW_ROWS rows.

    x: (rows, n_in).  y: (rows, n_out).  here, there: two buffers of (8, widest).
    """
    table = slots_at(plan, packing.TABLE)
    source, stride = x, plan[packing.N_IN]
    for index in range(plan[packing.LAYERS]):
        layer = layer_of(plan, index)
        panels = panel_count(layer[packing.LAYER_N_OUT])
        call_panels(table, kt.FEW_PANELS, layer, 0, panels, rows, source, stride, here, x, 0)
        source, stride = here, few_stride(layer[packing.LAYER_N_OUT])
        here, there = there, here
    last = layer_of(plan, plan[packing.LAYERS] - 1)
    call_end(table, kt.FEW_FINISH, last, rows, source, 0, y)


@kernel
def many_rows(plan, x, rows, y, here, there, rows_ahead):
    """
    Evaluate up to GROUP blocks of rows.

    x: (rows, n_in).  y: (rows, n_out).  here, there: two buffers of (GROUP, widest, rows of a block).
    rows_ahead: so many rows behind those of x are wanted next. The first layer's tiles ask for them: at batch
    8192 of 784-50-100-10 that made 90 GFLOP/s of 83.
    """
    table = slots_at(plan, packing.TABLE)
    block_stride = plan[packing.WIDEST] * BLOCK_VECTORS * table[kt.LANES]
    call_end(table, kt.MANY_BEGIN, layer_of(plan, 0), rows, x, block_stride, here)
    ahead = advance(x, rows * plan[packing.N_IN])
    ahead_count = rows_ahead * plan[packing.N_IN]
    for index in range(plan[packing.LAYERS]):
        layer = layer_of(plan, index)
        panels = panel_count(layer[packing.LAYER_N_OUT])
        call_panels(
            table, kt.MANY_PANELS, layer, 0, panels, rows, here, block_stride, there, ahead, ahead_count
        )
        ahead_count = 0
        here, there = there, here
    last = layer_of(plan, plan[packing.LAYERS] - 1)
    call_end(table, kt.MANY_FINISH, last, rows, here, block_stride, y)


# Entry points


@kernel
def forward_rows(workspace, x, y, rows):
    """x (rows, n_in) -> y (rows, n_out), both contiguous, by way of the buffers of *workspace*."""
    plan = slots_at(workspace, PLAN)
    here, there = floats_at(workspace, HERE), floats_at(workspace, THERE)
    table = slots_at(plan, packing.TABLE)
    group_rows = GROUP * BLOCK_VECTORS * table[kt.LANES]
    first = 0
    while first < rows:
        count = rows - first
        at_x, at_y = advance(x, first * plan[packing.N_IN]), advance(y, first * plan[packing.N_OUT])
        if count > FEW_ROWS:
            count = min(count, group_rows)
            rows_ahead = min(group_rows, rows - first - count)
            many_rows(plan, at_x, count, at_y, here, there, rows_ahead)
        else:
            count = min(count, table[kt.MOST_FEW_ROWS])
            few_rows(plan, at_x, count, at_y, here, there)
        first += count


def forward_objects(me, arguments, count):
    """
    Evaluate arguments[0], an array (rows, n_in), into arguments[1], an array (rows, n_out) or None.

    A C function for `python_calls.callable_over`.  me: an array of the slots CALL_….  Returns arguments[1],
    or a new array in place of None, if it was done; else None without a word why: the caller looks for the
    reason. Done are float32 arrays of two axes that lie in memory as kernels want it, of the right shapes and
    apart from each other, if no other thread has the workspace just now.
    """
    slots = slots_at(me, ARRAY_DATA)
    none = slots_at(slots, CALL_NONE)
    x, y = slots_at(arguments, 0), slots_at(arguments, 1)
    workspace = slots_at(slots, CALL_WORKSPACE)
    plan = slots_at(workspace, PLAN)
    if count != 2 or not is_matrix(slots, x, plan[packing.N_IN], READABLE):
        return counted(none)
    if arguments[1] == slots[CALL_NONE]:
        y = call_with(slots_at(slots, CALL_NEW), x)
        if is_null(y):
            return y
    elif is_matrix(slots, y, plan[packing.N_OUT], READABLE | WRITEABLE) and are_apart(x, y):
        y = counted(y)
    else:
        return counted(none)
    is_ours = claim(slots, CALL_CALLERS, 1) == 0
    if is_ours:
        rows = slots_at(x, ARRAY_SHAPE)[0]
        at_x, at_y = floats_at(x, ARRAY_DATA), floats_at(y, ARRAY_DATA)
        if rows < slots[CALL_LONG]:
            forward_rows(workspace, at_x, at_y, rows)
        else:
            state = release_lock()
            forward_rows(workspace, at_x, at_y, rows)
            take_lock(state)
    claim(slots, CALL_CALLERS, -1)
    if is_ours:
        return y
    forget(y)
    return counted(none)


# PyObject *forward_objects(PyObject *, PyObject **, Py_ssize_t)
FORWARD_OBJECTS = SLOTS(SLOTS, SLOTS, types.int64)


@kernel
def is_matrix(slots, item, width, flags):
    """Whether the object *item* is a float32 array of *width* columns with all of *flags*."""
    if item[OBJECT_TYPE] != slots[CALL_ARRAY_TYPE] or item[ARRAY_DTYPE] != slots[CALL_FLOAT32]:
        return False
    if low_half(item, ARRAY_AXES) != 2 or low_half(item, ARRAY_FLAGS) & flags != flags:
        return False
    return slots_at(item, ARRAY_SHAPE)[1] == width


@kernel
def are_apart(x, y):
    """Whether two float32 matrices have as many rows as each other and no memory in common."""
    x_shape, y_shape = slots_at(x, ARRAY_SHAPE), slots_at(y, ARRAY_SHAPE)
    x_begin, y_begin = x[ARRAY_DATA], y[ARRAY_DATA]
    x_end, y_end = x_begin + 4 * x_shape[0] * x_shape[1], y_begin + 4 * y_shape[0] * y_shape[1]
    return x_shape[0] == y_shape[0] and (x_end <= y_begin or y_end <= x_begin)


@kernel
def forward_parts(job_address, workspace_address):
    """
    Take part in a job until there is nothing left to take.

    Every thread calls this with a workspace of its own. When the caller's returns, parts may still be in the
    works elsewhere: see `is_finished`. A thread that comes late finds nothing and touches nothing but the
    job.
    """
    job, workspace = slots_from(job_address), slots_from(workspace_address)
    if job[JOB_PART_PANELS] == 0:
        row_parts(job, workspace)
    else:
        panel_parts(job)


@kernel
def row_parts(job, workspace):
    """
    `forward_parts` where rows are cut: one stage.

    A part is a share of what is left, so that all threads end together, but between a block and a group.
    """
    plan = slots_at(workspace, PLAN)
    x, y, rows = floats_at(job, JOB_X), floats_at(job, JOB_Y), job[JOB_ROWS]
    lanes = slots_at(plan, packing.TABLE)[kt.LANES]
    stage = advance(job, JOB_STAGES)
    first = read_shared(stage, STAGE_CLAIMED)
    while first < rows:
        vectors = (rows - first) // (2 * job[JOB_THREADS] * lanes)
        vectors = min(max(vectors, BLOCK_VECTORS), GROUP * BLOCK_VECTORS)
        first = claim(stage, STAGE_CLAIMED, vectors * lanes)
        count = min(vectors * lanes, rows - first)
        if count > 0:
            at_x, at_y = advance(x, first * plan[packing.N_IN]), advance(y, first * plan[packing.N_OUT])
            forward_rows(workspace, at_x, at_y, count)
            claim(stage, STAGE_FINISHED, count)
        first = read_shared(stage, STAGE_CLAIMED)


@kernel
def panel_parts(job):
    """
    `forward_parts` where panels are cut: a stage for each layer, and one for the results.

    With many rows there is a stage before all for the transposition of x.
    """
    workspace = slots_at(job, JOB_WORKSPACE)
    plan = slots_at(workspace, PLAN)
    table = slots_at(plan, packing.TABLE)
    x, y, rows = floats_at(job, JOB_X), floats_at(job, JOB_Y), job[JOB_ROWS]
    here, there = floats_at(workspace, HERE), floats_at(workspace, THERE)
    # Where the tiles for few rows take fewer than FEW_ROWS, the rest goes the other way: no bit depends on
    # it.
    is_many = rows > min(FEW_ROWS, table[kt.MOST_FEW_ROWS])
    panels_slot = kt.MANY_PANELS if is_many else kt.FEW_PANELS
    finish_slot = kt.MANY_FINISH if is_many else kt.FEW_FINISH
    block_stride = plan[packing.WIDEST] * BLOCK_VECTORS * table[kt.LANES]
    stage = advance(job, JOB_STAGES)
    source, stride = x, block_stride if is_many else plan[packing.N_IN]
    if is_many:
        if claim(stage, STAGE_CLAIMED, 1) == 0:
            call_end(table, kt.MANY_BEGIN, layer_of(plan, 0), rows, x, block_stride, there)
            claim(stage, STAGE_FINISHED, 1)
        await_count(stage, 1)
        source = there
    for index in range(plan[packing.LAYERS]):
        stage = advance(stage, STAGE_SLOTS)
        layer = layer_of(plan, index)
        panels = panel_count(layer[packing.LAYER_N_OUT])
        parts = (panels + job[JOB_PART_PANELS] - 1) // job[JOB_PART_PANELS]
        part = claim(stage, STAGE_CLAIMED, 1)
        while part < parts:
            first = part * job[JOB_PART_PANELS]
            end = min(first + job[JOB_PART_PANELS], panels)
            call_panels(table, panels_slot, layer, first, end, rows, source, stride, here, x, 0)
            claim(stage, STAGE_FINISHED, 1)
            part = claim(stage, STAGE_CLAIMED, 1)
        await_count(stage, parts)
        source = here
        if not is_many:
            stride = few_stride(layer[packing.LAYER_N_OUT])
        here, there = there, here
    stage = advance(stage, STAGE_SLOTS)
    if claim(stage, STAGE_CLAIMED, 1) == 0:
        last = layer_of(plan, plan[packing.LAYERS] - 1)
        call_end(table, finish_slot, last, rows, source, block_stride, y)
        claim(stage, STAGE_FINISHED, 1)


@kernel
def await_count(stage, parts):
    """Wait until *parts* parts of *stage* are finished. Busily: those who work on them are about to be."""
    while read_shared(stage, STAGE_FINISHED) < parts:
        pause()


@kernel
def is_finished(job_address, stage_index, parts, patience):
    """Whether *parts* of a stage are finished; waits busily for *patience* rounds of about 20 ns."""
    stage = advance(slots_from(job_address), JOB_STAGES + stage_index * STAGE_SLOTS)
    for _ in range(patience):
        if read_shared(stage, STAGE_FINISHED) >= parts:
            return True
        pause()
    return False


@kernel
def forward_addresses(x_address, y_address, rows, workspace_address):
    """Evaluate the rows at *x_address* into those at *y_address*; the caller has checked both."""
    forward_rows(slots_from(workspace_address), floats_from(x_address), floats_from(y_address), rows)
