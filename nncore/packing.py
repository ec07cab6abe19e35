"""
Layers -> a plan: weights packed for the tiles, and a descriptor of pointers to them.

    weights (n_in, n_out)    ->    [panel of 16 outputs][k][16], 64-byte aligned, zeros behind the last output
    bias, alpha (n_out,)     ->    the same 16 at a time, zeros (alpha: ones) behind the last output

A tile reads its weights from one end to the other, a cache line at a time. Packing is done once a model.

The descriptor is a row of int64: a header, then LAYER_SLOTS for every layer; the constants below name the
slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nncore.activations import ACTIVATIONS
from nncore.tiles import PANEL

if TYPE_CHECKING:
    from nncore.model import Layer

__all__ = ["Plan", "aligned_floats", "packed_panels", "padded"]

# Header
LAYERS = 0  # their number
WIDEST = 1  # the greatest n_in or n_out, rounded up to whole panels
TABLE = 2  # -> kernel_table()
N_IN = 3  # of the model
N_OUT = 4
HEADER_SLOTS = 8

# Every layer
LAYER_N_IN = 0
LAYER_N_OUT = 1
LAYER_KIND = 2  # what is done with the sums: one of the kinds below
LAYER_CODE = 3  # of the activation, if the kind is SWEPT
LAYER_WEIGHTS = 4  # -> float32
LAYER_BIAS = 5  # -> float32
LAYER_ALPHA = 6  # -> float32
LAYER_STREAMS = 7  # 1 if the weights have to come from memory each time, else 0
LAYER_SLOTS = 8

LINEAR, RELU, SWEPT, SOFTMAX = range(4)


# Models of more bytes do not stay in the cache that cores share: 16 to 64 MB on the machines known.
_CACHED_BYTES = 24 << 20


class Plan:
    """A model's layers, packed. Holds the arrays that its descriptor points to."""

    def __init__(self, layers: Sequence[Layer], table: npt.NDArray[np.int64]) -> None:
        """layers: float32, as `nncore.Mlp` has checked them.  table: `layers.complete_table()`."""
        self.n_in = layers[0].n_in
        self.n_out = layers[-1].n_out
        self.layer_count = len(layers)
        self.widest = max(padded(n) for layer in layers for n in (layer.n_in, layer.n_out))
        self._arrays: list[npt.NDArray[Any]] = [table]
        header = [0] * HEADER_SLOTS
        header[LAYERS] = len(layers)
        header[WIDEST] = self.widest
        header[TABLE] = table.ctypes.data
        header[N_IN] = self.n_in
        header[N_OUT] = self.n_out
        streams = 4 * sum(layer.weights.size for layer in layers) > _CACHED_BYTES
        slots = header + [slot for layer in layers for slot in self._layer_slots(layer, streams)]
        self.descriptor = np.array(slots, np.int64)
        self.descriptor.flags.writeable = False

    def _layer_slots(self, layer: Layer, streams: bool) -> list[int]:
        kind, code = _kind_and_code(layer.activation)
        alpha = 1.0 if layer.alpha is None else layer.alpha
        slots = [0] * LAYER_SLOTS
        slots[LAYER_N_IN] = layer.n_in
        slots[LAYER_N_OUT] = layer.n_out
        slots[LAYER_KIND] = kind
        slots[LAYER_CODE] = code
        slots[LAYER_WEIGHTS] = self._kept(packed_panels(layer.weights))
        slots[LAYER_BIAS] = self._kept(_padded_row(layer.bias, layer.n_out, 0.0))
        slots[LAYER_ALPHA] = self._kept(_padded_row(alpha, layer.n_out, 1.0))
        slots[LAYER_STREAMS] = int(streams)
        return slots

    def _kept(self, array: npt.NDArray[np.float32]) -> int:
        """The address of *array*, which then lives as long as the plan."""
        self._arrays.append(array)
        return array.ctypes.data


def _kind_and_code(activation: str) -> tuple[int, int]:
    if activation == "softmax":
        return SOFTMAX, 0
    if activation in ("identity", "relu"):
        return (LINEAR if activation == "identity" else RELU), 0
    return SWEPT, ACTIVATIONS[activation].code


def padded(count: int) -> int:
    """*count*, rounded up to whole panels."""
    return -(-count // PANEL) * PANEL


def aligned_floats(count: int) -> npt.NDArray[np.float32]:
    """*count* float32 that begin at a cache line; not set to anything."""
    memory = np.empty(count * 4 + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + count * 4].view(np.float32)


def packed_panels(weights: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """*weights* (n_in, n_out) as (panels, n_in, 16)."""
    n_in, n_out = weights.shape
    panels = aligned_floats(n_in * padded(n_out)).reshape(-1, n_in, PANEL)
    for index, panel in enumerate(panels):
        part = weights[:, index * PANEL : (index + 1) * PANEL]
        panel[:, : part.shape[1]] = part
        panel[:, part.shape[1] :] = 0.0
    return panels


def _padded_row(values: Any, count: int, behind: float) -> npt.NDArray[np.float32]:
    """*values*, a number or (count,), as whole panels with *behind* after them."""
    row = aligned_floats(padded(count))
    row[:count] = values
    row[count:] = behind
    return row
