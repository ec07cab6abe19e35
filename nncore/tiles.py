"""
Packed weights and activations -> sums of products: the innermost loops, as LLVM functions.

Both tiles compute y += x @ w for a block of outputs held in registers, over one chunk of k. They differ in
what lies along the lanes of a vector:

    many rows    x, y [feature][row of a block]    lanes are rows; a weight is broadcast
    few rows     x, y [row][feature]               lanes are outputs; an activation is broadcast

Weights lie as [panel of 16 outputs][k][16] for both.

One accumulation order. k is cut into chunks of CHUNK from 0. The sum of a chunk is a chain of fused
multiply-adds in the order of k, the first chunk's starting from the bias, the others' from 0; the chunks'
sums are added to each other in order:

    y = ((b + x0 w0 + ... + x511 w511) + (0 + x512 w512 + ...)) + ...

Each output of each row has its own chain, in whichever tile, block or thread it is computed, and so the same
bits. Chunks bound the rounding error as well: it grows with CHUNK + k / CHUNK instead of k.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from nncore.emitter import FLOAT, FLOAT_POINTER, I64, Emitter, define
from nncore.lanes import Lanes, Target, fma, maximum

__all__ = ["CHUNK", "PANEL", "FewRowsTile", "ManyRowsTile", "few_rows_tiles", "many_rows_tiles"]

# Outputs in a panel of packed weights: a cache line, and one vector of 512 bits.
PANEL = 16

# With it sums are as accurate as NumPy's, 512 to 4,096 wide. 512 makes the rms error 1.4 times as large and
# gains 3 % at batch 8 of 1024-4096-4096-1000, 1 % at 784-50-100-10 and nothing elsewhere (Zen 4).
CHUNK = 256

# Streaming tiles, and those of so many rows, ask for the weights so many floats (2 KB) ahead. With 8 rows
# what they compute keeps the processor from running ahead to the next weights by itself; with fewer it pays
# for weights in memory alone: one row of 1024-4096-4096-1000 went from 3.5 to 3.0 ms, but one of
# 512-1024-1024-256, in the third cache, from 82 to 94 us. 8 KB ahead are worse for either.
_PREFETCH_ROWS = 8
_PREFETCH_AHEAD = 512


def prefetched_floats(outputs: int) -> int:
    """
    Floats that a ManyRowsTile of *outputs* outputs asks for at every k.

    A panel's width, so that as many come as a panel has; half of it for 8 outputs, two of which make a panel.
    """
    return 8 if outputs == 8 else 16


class ManyRowsTile:
    """
    *outputs* outputs of *vectors* vectors of rows.

        x  (k, vectors * lanes)          one vector load for each of `vectors`
        w  (k, 16)                       from the first of the tile's outputs on; one broadcast an output
        y  (outputs, vectors * lanes)    outputs * vectors accumulators

    8 x 3 with 32 registers: 24 products for 11 loads, so that the multipliers are the limit, and 24 chains,
    more than the latency (4) times the rate (1 or 2) of any machine known.
    """

    ARGUMENTS = (FLOAT_POINTER, FLOAT_POINTER, I64, FLOAT_POINTER, FLOAT_POINTER, I64, FLOAT_POINTER, FLOAT)

    def __init__(self, outputs: int, vectors: int) -> None:
        self.outputs = outputs
        self.vectors = vectors

    def build(self, module: ir.Module, target: Target) -> ir.Function:
        """
        Define tile(x, w, count, bias, y, continues, prefetch, floor).

        count: k of this chunk.  continues: 0 if it is the first one, else 1.  prefetch: where lies what is
        wanted next; count * prefetched_floats(outputs) floats are asked for.  floor: results below it become
        it (0 for relu in the last chunk, else -inf).
        """
        name = f"nncore_many_{self.outputs}x{self.vectors}"
        return define(module, name, self.ARGUMENTS, target, self._emit)

    def _emit(
        self,
        e: Emitter,
        x: ir.Value,
        w: ir.Value,
        count: ir.Value,
        bias: ir.Value,
        y: ir.Value,
        continues: ir.Value,
        prefetch: ir.Value,
        floor: ir.Value,
    ) -> None:
        row_stride = self.vectors * e.lanes
        is_first = e.builder.icmp_signed("==", continues, e.integer(0))
        initial = []
        for j in range(self.outputs):
            start = e.builder.select(is_first, e.load_number(bias, j), ir.Constant(FLOAT, 0.0))
            initial += [e.splat(start)] * self.vectors

        ahead = prefetched_floats(self.outputs)
        with e.loop(count, initial) as loop:
            rows = e.at(x, e.builder.mul(loop.index, e.integer(row_stride)))
            weights = e.at(w, e.builder.mul(loop.index, e.integer(PANEL)))
            values = [e.load(rows, v * e.lanes) for v in range(self.vectors)]
            e.prefetch(e.at(prefetch, e.builder.mul(loop.index, e.integer(ahead))))
            sums = []
            for j in range(self.outputs):
                weight = e.broadcast(weights, j)
                sums += [
                    fma(values[v], weight, loop.values[j * self.vectors + v]) for v in range(self.vectors)
                ]
            loop.carry(*sums)

        lowest = e.splat(floor)
        with e.builder.if_else(is_first) as (first, later):
            with first:
                self._store(e, loop.values, y, lowest)
            with later:
                earlier = [e.load(y, i * e.lanes) for i in range(len(loop.values))]
                self._store(e, [a + s for a, s in zip(earlier, loop.values, strict=True)], y, lowest)

    def _store(self, e: Emitter, sums: list[Any], y: ir.Value, lowest: Lanes) -> None:
        for i, value in enumerate(sums):
            e.store(maximum(value, lowest), y, i * e.lanes)


class FewRowsTile:
    """
    *panels* panels of outputs of *rows* rows.

        x  (rows, k), x_stride apart          one broadcast a row
        w  (panels, k, 16), w_stride apart    16 / lanes vector loads a panel, each read once
        y  (rows, 16 * panels), y_stride apart
    """

    ARGUMENTS = (
        *(FLOAT_POINTER, I64, I64, FLOAT_POINTER, I64, I64, FLOAT_POINTER, FLOAT_POINTER, I64, I64, FLOAT),
    )

    def __init__(self, rows: int, panels: int, streams: bool = False) -> None:
        """streams: made for weights that come from memory and not from a cache."""
        self.rows = rows
        self.panels = panels
        self.streams = streams

    def build(self, module: ir.Module, target: Target) -> ir.Function:
        """
        Define tile(x, x_stride, last_row, w, w_stride, count, bias, y, y_stride, continues, floor).

        last_row: rows of x after this one are not read; its results are repeated in their place. The rest is
        as for ManyRowsTile.
        """
        name = f"nncore_few_{self.rows}x{self.panels}{'_streaming' if self.streams else ''}"
        return define(module, name, self.ARGUMENTS, target, self._emit)

    def _emit(
        self,
        e: Emitter,
        x: ir.Value,
        x_stride: ir.Value,
        last_row: ir.Value,
        w: ir.Value,
        w_stride: ir.Value,
        count: ir.Value,
        bias: ir.Value,
        y: ir.Value,
        y_stride: ir.Value,
        continues: ir.Value,
        floor: ir.Value,
    ) -> None:
        builder = e.builder
        vectors_per_panel = PANEL // e.lanes
        vectors = self.panels * vectors_per_panel
        later_rows = (e.least(e.integer(r), last_row) for r in range(1, self.rows))
        rows = [x, *(e.at(x, builder.mul(row, x_stride)) for row in later_rows)]
        panels = [w]
        for _ in range(1, self.panels):
            panels.append(e.at(panels[-1], w_stride))

        is_first = builder.icmp_signed("==", continues, e.integer(0))
        zero = e.constant(0.0)
        initial = []
        for v in range(vectors):
            start = builder.select(is_first, e.load(bias, v * e.lanes).value, zero.value)
            initial.append(Lanes(builder, start, e.target))

        with e.loop(count, initial * self.rows) as loop:
            weights_at = [e.at(panel, builder.mul(loop.index, e.integer(PANEL))) for panel in panels]
            if self.streams or self.rows >= _PREFETCH_ROWS:
                for place in weights_at:
                    e.prefetch(e.at(place, _PREFETCH_AHEAD))
            weights = [
                e.load(weights_at[v // vectors_per_panel], v % vectors_per_panel * e.lanes)
                for v in range(vectors)
            ]
            sums = []
            for r, row in enumerate(rows):
                value = e.broadcast(row, loop.index)
                sums += [fma(weights[v], value, loop.values[r * vectors + v]) for v in range(vectors)]
            loop.carry(*sums)

        lowest = e.splat(floor)
        with builder.if_else(is_first) as (first, later):
            for block, adds in ((first, False), (later, True)):
                with block:
                    row = y
                    for r in range(self.rows):
                        for v in range(vectors):
                            value = loop.values[r * vectors + v]
                            if adds:
                                value = e.load(row, v * e.lanes) + value
                            e.store(maximum(value, lowest), row, v * e.lanes)
                        row = e.at(row, y_stride)


def many_rows_tiles(target: Target, registers: int) -> list[ManyRowsTile]:
    """The tiles that fit into *registers* vector registers: powers of two of outputs, 1 to 3 vectors."""
    most = 8 if registers >= 32 else 4
    return [
        ManyRowsTile(outputs, vectors)
        for outputs in (1, 2, 4, 8, 16)
        for vectors in (1, 2, 3)
        if outputs <= most or (vectors == 1 and outputs <= 2 * most)
    ]


def few_rows_tiles(target: Target, registers: int) -> list[FewRowsTile]:
    """
    The tiles that fit into *registers* vector registers: powers of two of rows and of panels.

    The widest of each height comes once more, for weights that are streamed from memory.
    """
    vectors_per_panel = PANEL // target.lanes(FLOAT)
    tiles = []
    for rows in (1, 2, 4, 8):
        fitting = []
        for panels in (1, 2, 4):
            # A weight used by one row is an operand in memory; else it stays in a register for all rows.
            weights = panels * vectors_per_panel if rows > 1 else 0
            if rows * panels * vectors_per_panel + weights + 1 <= registers:
                fitting.append(FewRowsTile(rows, panels))
        tiles += fitting + [FewRowsTile(rows, tile.panels, streams=True) for tile in fitting[-1:]]
    return tiles
