"""nnproto Tensor -> rows of an array: all checks of the wire format."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnproto.v1 import inference_pb2 as pb
from nnserver.api.shapes import shape_text
from nnserver.errors import InvalidArgument

Array = NDArray[Any]

_NUMPY: dict[int, np.dtype[Any]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
_PROTO: dict[np.dtype[Any], pb.DataType.ValueType] = {
    np.dtype(np.float32): pb.DATA_TYPE_FLOAT32,
    np.dtype(np.float64): pb.DATA_TYPE_FLOAT64,
}


def data_type(dtype: np.dtype[Any]) -> pb.DataType.ValueType:
    """Return the wire's name of float32 or float64."""
    return _PROTO[dtype]


def decode_rows(
    tensor: pb.Tensor, owner: str, width: int, dtype: np.dtype[Any], what: str = "inputs"
) -> Array:
    """
    Return the tensor's rows as (rows, width) of *dtype*, C-contiguous; not to be written to.

    A tensor of shape (width,) is one row. Values beyond float32's range become infinite in a
    float32 model. Raises InvalidArgument, naming *what* was wrong and what *owner* expects.
    """
    wire = _NUMPY.get(tensor.dtype)
    if wire is None:
        raise InvalidArgument(
            f"{what} has dtype {enum_name(pb.DataType, tensor.dtype)}; "
            "expected DATA_TYPE_FLOAT32 or DATA_TYPE_FLOAT64"
        )
    shape = tuple(tensor.shape)
    if len(shape) not in (1, 2) or shape[-1] != width or shape[0] < 0:
        raise InvalidArgument(f"{what} has shape {shape_text(shape)}; {owner} expects (rows, {width})")
    expected = prod(shape) * wire.itemsize
    data = tensor.data  # Once: each look at the field copies it.
    if len(data) != expected:
        raise InvalidArgument(
            f"{what} has {len(data)} bytes of data; shape {shape_text(shape)} of {wire.name} takes {expected}"
        )
    flat: Array = np.frombuffer(data, wire)
    if wire != dtype:
        # Invalid: a signalling NaN is as good as any.
        with np.errstate(over="ignore", invalid="ignore"):
            flat = flat.astype(dtype)
    return flat.reshape(-1, width)


def check_finite(x: Array, what: str = "inputs") -> None:
    """Raise InvalidArgument for the first NaN or infinite value, by row and column."""
    finite = np.isfinite(x)
    if not finite.all():
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise InvalidArgument(
            f"{what} has {x[row, column]} at row {row}, column {column}; "
            "this server takes finite values only (reject_nonfinite)"
        )


def enum_name(enum: Any, number: int) -> str:
    """Return what the protocol calls *number*; its digits, if that is nothing."""
    name: str = enum.Name(number) if number in enum.values() else str(number)
    return name
