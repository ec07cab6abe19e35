"""
A layer and the rows that enter it -> the rows that leave it: tiles and sweeps in the order that suits the
caches.

Few rows (up to FEW_ROWS) lie row after row, lanes being outputs; many rows lie in blocks of three vectors of
rows (48 with 512 bits), feature after feature, lanes being rows. For each there is a function that evaluates
some
panels of a layer, and what is needed at either end: a transposition, softmax, the results' way out.

`complete_table()` is the kernel table with the addresses of these functions. `nncore.schedule` calls them
through it, so that each is compiled once and optimised with nothing else: without a cache that halves the
time to the first answer.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt
from numba.core import types
from numba.core.typing import signature
from numba.extending import intrinsic

from nncore import kernel_table as kt
from nncore import packing
from nncore.compilation import c_callback, kernel
from nncore.pointers import FLOATS, SLOTS, advance, floats_at
from nncore.tiles import CHUNK, PANEL, prefetched_floats

__all__ = [
    "BLOCK_VECTORS",
    "FEW_ROWS",
    "call_end",
    "call_panels",
    "complete_table",
    "few_stride",
    "layer_of",
    "panel_count",
]

# Up to so many rows weights are the vectors. With 9 rows a vector of 16 lanes is worth its 7 idle ones.
FEW_ROWS = 8
# Vectors of rows in a block: as many as the largest tile has.
BLOCK_VECTORS = 3

_prefetched_floats = kernel(prefetched_floats)

_MINUS_INFINITY = np.float32(-np.inf)
_ZERO = np.float32(0.0)


@kernel
def panel_count(n_out):
    """Panels of a layer of *n_out* outputs."""
    return (n_out + PANEL - 1) // PANEL


@kernel
def few_stride(n_out):
    """
    Floats from one row to the next of a layer's results for few rows.

    A panel more than needed where rows are long: at a multiple of 4 KB eight rows would share one set of the
    first cache with each other. Together with the prefetching of tiles of 8 rows, at batch 8 on Zen 4,
    1024-4096-4096-1000 went from about 75 to 80-84 GFLOP/s.
    """
    panels = panel_count(n_out)
    return (panels + (1 if panels >= 16 else 0)) * PANEL


@kernel
def layer_of(plan, index):
    """The slots of layer *index*."""
    return advance(plan, packing.HEADER_SLOTS + index * packing.LAYER_SLOTS)


# Few rows: x and the buffers are (rows, features)


def few_panels(table, layer, first_panel, end_panel, rows, x, x_stride, y, ahead, ahead_count):
    """
    Evaluate panels [first_panel, end_panel) of a layer but for softmax.

    x: (rows, n_in), x_stride apart.  y: (8, n_out), few_stride apart.  rows: up to MOST_FEW_ROWS.
    ahead, ahead_count: not used; see many_panels.
    """
    lanes = table[kt.LANES]
    n_in = layer[packing.LAYER_N_IN]
    kind = layer[packing.LAYER_KIND]
    weights = floats_at(layer, packing.LAYER_WEIGHTS)
    bias = floats_at(layer, packing.LAYER_BIAS)
    stride = few_stride(layer[packing.LAYER_N_OUT])
    panel_stride = n_in * PANEL
    floor = _ZERO if kind == packing.RELU else _MINUS_INFINITY
    height, log2_height = 1, 0
    while height < rows:
        height, log2_height = 2 * height, log2_height + 1
    most = table[kt.MOST_PANELS + log2_height]

    panel = first_panel
    while panel < end_panel:
        taken, log2_taken = 1, 0
        while 2 * taken <= min(most, end_panel - panel):
            taken, log2_taken = 2 * taken, log2_taken + 1
        # Weights that come from memory, not from a cache, are asked for early.
        variant = kt.STREAMING if taken == most and layer[packing.LAYER_STREAMS] != 0 else log2_taken
        slot = kt.FEW_TILES + 4 * log2_height + variant
        w = advance(weights, panel * panel_stride)
        for k in range(0, n_in, CHUNK):
            count = min(CHUNK, n_in - k)
            kt.call_few_tile(
                table,
                slot,
                advance(x, k),
                x_stride,
                rows - 1,
                advance(w, k * PANEL),
                panel_stride,
                count,
                advance(bias, panel * PANEL),
                advance(y, panel * PANEL),
                stride,
                k,
                floor if k + count == n_in else _MINUS_INFINITY,
            )
        panel += taken

    if kind == packing.SWEPT:
        sweep = kt.SWEEPS_FEW + layer[packing.LAYER_CODE]
        first, vectors = first_panel * PANEL, (end_panel - first_panel) * PANEL // lanes
        alpha = advance(floats_at(layer, packing.LAYER_ALPHA), first)
        if vectors * lanes == stride:
            kt.call_sweep(table, sweep, y, rows, vectors, alpha)
        else:
            for row in range(rows):
                kt.call_sweep(table, sweep, advance(y, row * stride + first), 1, vectors, alpha)


def few_finish(table, layer, rows, here, unused, y):
    """The last layer's results (8, n_out), few_stride apart -> y (rows, n_out), by way of softmax."""
    n_out = layer[packing.LAYER_N_OUT]
    width, stride = panel_count(n_out) * PANEL, few_stride(n_out)
    for row in range(rows):
        source = advance(here, row * stride)
        target = advance(y, row * n_out)
        if layer[packing.LAYER_KIND] == packing.SOFTMAX:
            kt.call_softmax(table, kt.SOFTMAX_ROW, source, n_out, width // table[kt.LANES])
        for j in range(n_out):
            target[j] = source[j]


# Many rows: the buffers are (blocks, features, rows of a block). The last block of a group may have fewer
# vectors of rows than the others.


def many_panels(table, layer, first_panel, end_panel, rows, x, block_stride, y, ahead, ahead_count):
    """
    Evaluate panels [first_panel, end_panel) of a layer but for softmax.

    x: (blocks, n_in, rows of a block).  y: (blocks, n_out, rows of a block).  Blocks are block_stride apart.
    ahead: ahead_count floats that are wanted after this layer. The first tiles ask for them, bit by bit,
    instead of for the next weights.
    """
    lanes = table[kt.LANES]
    n_in = layer[packing.LAYER_N_IN]
    n_out = layer[packing.LAYER_N_OUT]
    kind = layer[packing.LAYER_KIND]
    weights = floats_at(layer, packing.LAYER_WEIGHTS)
    bias = floats_at(layer, packing.LAYER_BIAS)
    alpha = floats_at(layer, packing.LAYER_ALPHA)
    sweep = kt.SWEEPS_MANY + layer[packing.LAYER_CODE]
    panel_stride = n_in * PANEL
    blocks, last_vectors = blocks_of(table, rows)
    asked = 0

    for k in range(0, n_in, CHUNK):
        count = min(CHUNK, n_in - k)
        is_last = k + count == n_in
        floor = _ZERO if is_last and kind == packing.RELU else _MINUS_INFINITY
        for panel in range(first_panel, end_panel):
            first = panel * PANEL
            end = min(first + PANEL, n_out)
            w = advance(weights, panel * panel_stride + k * PANEL)
            # What is read after this: the next panel's chunk, or the first panel's next one.
            following = w
            if panel + 1 < end_panel:
                following = advance(w, panel_stride)
            elif not is_last:
                following = advance(weights, first_panel * panel_stride + (k + count) * PANEL)
            for block in range(blocks):
                vectors = last_vectors if block == blocks - 1 else BLOCK_VECTORS
                stride = vectors * lanes
                source = advance(x, block * block_stride + k * stride)
                target = advance(y, block * block_stride)
                most = table[kt.MOST_OUTPUTS + (1 if vectors == 1 else 0)]
                output = first
                while output < end:
                    taken, log2_taken = 1, 0
                    while 2 * taken <= min(most, end - output):
                        taken, log2_taken = 2 * taken, log2_taken + 1
                    if asked < ahead_count:
                        prefetch = advance(ahead, asked)
                        asked += count * _prefetched_floats(taken)
                    else:
                        prefetch = advance(following, (output - first) * count)
                    kt.call_many_tile(
                        table,
                        kt.MANY_TILES + 4 * log2_taken + vectors - 1,
                        source,
                        advance(w, output - first),
                        count,
                        advance(bias, output),
                        advance(target, output * stride),
                        k,
                        prefetch,
                        floor,
                    )
                    output += taken
                if is_last and kind == packing.SWEPT:
                    at_panel = advance(target, first * stride)
                    kt.call_sweep(table, sweep, at_panel, end - first, vectors, advance(alpha, first))


@kernel
def blocks_of(table, rows):
    """The number of blocks that *rows* fill, and the vectors of the last one."""
    lanes = table[kt.LANES]
    block_rows = BLOCK_VECTORS * lanes
    blocks = (rows + block_rows - 1) // block_rows
    return blocks, (rows - (blocks - 1) * block_rows + lanes - 1) // lanes


def many_begin(table, layer, rows, x, block_stride, here):
    """x (rows, n_in of the first *layer*) -> here (blocks, n_in, rows of a block)."""
    lanes = table[kt.LANES]
    n_in = layer[packing.LAYER_N_IN]
    blocks, last_vectors = blocks_of(table, rows)
    for block in range(blocks):
        vectors = last_vectors if block == blocks - 1 else BLOCK_VECTORS
        stride = vectors * lanes
        for vector in range(vectors):
            first = (block * BLOCK_VECTORS + vector) * lanes
            count = min(lanes, rows - first)
            source = advance(x, first * n_in)
            target = advance(here, block * block_stride + vector * lanes)
            # A transpose turns whole squares; for a sliver of one, number by number is less work.
            if n_in <= 4:
                for row in range(count):
                    for k in range(n_in):
                        target[k * stride + row] = source[row * n_in + k]
            else:
                kt.call_transpose(table, kt.TRANSPOSE_IN, source, n_in, count, n_in, target, stride)


def many_finish(table, layer, rows, here, block_stride, y):
    """The last layer's results (blocks, n_out, rows of a block) -> y (rows, n_out), by way of softmax."""
    lanes = table[kt.LANES]
    n_out = layer[packing.LAYER_N_OUT]
    blocks, last_vectors = blocks_of(table, rows)
    for block in range(blocks):
        vectors = last_vectors if block == blocks - 1 else BLOCK_VECTORS
        stride = vectors * lanes
        at_block = advance(here, block * block_stride)
        if layer[packing.LAYER_KIND] == packing.SOFTMAX:
            kt.call_softmax(table, kt.SOFTMAX_MANY, at_block, n_out, vectors)
        for vector in range(vectors):
            first = (block * BLOCK_VECTORS + vector) * lanes
            count = min(lanes, rows - first)
            source = advance(at_block, vector * lanes)
            target = advance(y, first * n_out)
            if n_out <= 4:
                for row in range(count):
                    for j in range(n_out):
                        target[row * n_out + j] = source[j * stride + row]
            else:
                kt.call_transpose(table, kt.TRANSPOSE_OUT, source, stride, count, n_out, target, n_out)


# The functions above as slots of the table

_PANELS = (
    SLOTS,
    SLOTS,
    types.int64,
    types.int64,
    types.int64,
    FLOATS,
    types.int64,
    FLOATS,
    FLOATS,
    types.int64,
)
_END = (SLOTS, SLOTS, types.int64, FLOATS, types.int64, FLOATS)
_IN_TABLE = {
    kt.FEW_PANELS: (few_panels, _PANELS),
    kt.FEW_FINISH: (few_finish, _END),
    kt.MANY_PANELS: (many_panels, _PANELS),
    kt.MANY_BEGIN: (many_begin, _END),
    kt.MANY_FINISH: (many_finish, _END),
}


@functools.cache
def complete_table() -> npt.NDArray[np.int64]:
    """The kernel table with this module's functions; compiled, or loaded, by the first call."""
    table = kt.kernel_table()
    for slot, (function, arguments) in _IN_TABLE.items():
        callback = c_callback(function, signature(types.void, *arguments), f"layers.{function.__name__}")
        _callbacks.append(callback)
        table[slot] = callback.address
    table.flags.writeable = False
    return table


# They own the code that the table points to.
_callbacks: list[Any] = []


@intrinsic
def call_panels(typing, table, slot, layer, first_panel, end_panel, rows, x, stride, y, ahead, ahead_count):
    """Run few_panels or many_panels, whichever is in *slot*."""
    return kt.call_through(_PANELS)


@intrinsic
def call_end(typing, table, slot, layer, rows, source, block_stride, target):
    """Run few_finish, many_begin or many_finish, whichever is in *slot*."""
    return kt.call_through(_END)
