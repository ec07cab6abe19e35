"""
One ONNX node whose inputs are all constants -> the constant that it computes, with NumPy, of a bounded size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from nncore.convert.onnx_node import FLOAT_TYPES, INTEGER_TYPES, Node, Numbers
from nncore.errors import ConversionError

# No constant of a model has so many numbers: a small file must not ask for all memory.
_MAX_CONSTANT = 1 << 27

_Operator: TypeAlias = Callable[[Node], Any]


def _require_size(shape: Sequence[int]) -> None:
    if math.prod(int(size) for size in shape) > _MAX_CONSTANT or any(size < 0 for size in shape):
        raise ConversionError(f"makes a constant of shape {tuple(int(size) for size in shape)}")


def _binary_fold(function: Callable[[Any, Any], Any]) -> _Operator:
    def fold(node: Node) -> Any:
        a, b = node.constant(0), node.constant(1)
        _require_size(np.broadcast_shapes(a.shape, b.shape))
        return np.asarray(function(a, b), np.result_type(a, b))

    return fold


def _divided(a: Numbers, b: Numbers) -> Numbers:
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":
        if not b.all():
            raise ConversionError("divides whole numbers by zero")
        return np.trunc(a / b)
    return np.asarray(a / b)


def _matmul_fold(node: Node) -> Any:
    a, b = node.constant(0), node.constant(1)
    _require_size((*a.shape[:-1], b.shape[-1]))
    return a @ b


def _expand_fold(node: Node) -> Any:
    x, shape = node.constant(0), [int(size) for size in node.constant(1).reshape(-1)]
    _require_size(shape)
    joint = np.broadcast_shapes(x.shape, tuple(shape))
    _require_size(joint)
    return np.array(np.broadcast_to(x, joint))


def _constant_of_shape_fold(node: Node) -> Any:
    shape = [int(size) for size in node.constant(0).reshape(-1)]
    _require_size(shape)
    value = node.attributes.get("value", np.zeros(1, np.float32))
    return np.full(shape, np.asarray(value).reshape(-1)[0], np.asarray(value).dtype)


def _cast_fold(node: Node) -> Any:
    kind = node.integer("to", 1)
    wanted: Any = np.float64 if kind == 11 else np.float32 if kind in FLOAT_TYPES else INTEGER_TYPES.get(kind)
    if wanted is None:
        raise ConversionError(f"casts to element type number {kind}")
    return node.constant(0).astype(wanted)


def slices(node: Node, rank: int) -> list[tuple[int, int, int, int]]:
    """(axis, start, end, step) of a Slice node."""
    starts, ends = node.attributes.get("starts"), node.attributes.get("ends")
    if starts is None or ends is None:
        starts, ends = node.constant(1).reshape(-1).tolist(), node.constant(2).reshape(-1).tolist()
    axes = node.axes(3) or list(range(len(starts)))
    steps = node.constant(4).reshape(-1).tolist() if node.has(4) else [1] * len(starts)
    return [
        (int(axis) % max(rank, 1), int(start), int(end), int(step))
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    ]


def _slice_fold(node: Node) -> Any:
    x = node.constant(0)
    index = [slice(None)] * x.ndim
    for axis, start, end, step in slices(node, x.ndim):
        index[axis] = slice(start, end if end > -(1 << 60) else None, step)
    return x[tuple(index)]


def _reshape_fold(node: Node) -> Any:
    x = node.constant(0)
    target = [int(size) for size in node.constant(1).reshape(-1)] if node.has(1) else node.attributes["shape"]
    if not node.integer("allowzero", 0):
        target = [x.shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    return x.reshape(target)


def _squeeze_fold(node: Node) -> Any:
    axes = node.axes(1)
    return np.squeeze(node.constant(0), None if axes is None else tuple(axes))


def _unsqueeze_fold(node: Node) -> Any:
    return np.expand_dims(node.constant(0), tuple(node.axes(1) or ()))


def _concat_fold(node: Node) -> Any:
    parts = [node.constant(index) for index in range(len(node.inputs))]
    _require_size([sum(part.size for part in parts)])
    return np.concatenate(parts, node.integer("axis", 0))


def _gather_fold(node: Node) -> Any:
    x, indices, axis = node.constant(0), node.constant(1), node.integer("axis", 0)
    _require_size([x.size // max(x.shape[axis], 1) * indices.size])
    return np.take(x, indices, axis)


FOLDED: dict[str, _Operator] = {
    "Add": _binary_fold(np.add),
    "Sub": _binary_fold(np.subtract),
    "Mul": _binary_fold(np.multiply),
    "Div": _binary_fold(_divided),
    "Pow": _binary_fold(np.power),
    "Max": _binary_fold(np.maximum),
    "Min": _binary_fold(np.minimum),
    "Neg": lambda node: -node.constant(0),
    "Abs": lambda node: np.abs(node.constant(0)),
    "Sqrt": lambda node: np.sqrt(node.constant(0)),
    "Exp": lambda node: np.exp(node.constant(0)),
    "Log": lambda node: np.log(node.constant(0)),
    "Reciprocal": lambda node: 1 / node.constant(0),
    "Identity": lambda node: node.value(0),
    "MatMul": _matmul_fold,
    "Transpose": lambda node: np.transpose(node.constant(0), node.attributes.get("perm")),
    "Reshape": _reshape_fold,
    "Squeeze": _squeeze_fold,
    "Unsqueeze": _unsqueeze_fold,
    "Concat": _concat_fold,
    "Gather": _gather_fold,
    "Slice": _slice_fold,
    "Expand": _expand_fold,
    "ConstantOfShape": _constant_of_shape_fold,
    "Cast": _cast_fold,
    "Shape": lambda node: np.array(node.constant(0).shape, np.int64),
    "ReduceProd": lambda node: np.prod(node.constant(0), keepdims=bool(node.integer("keepdims", 1))),
}
