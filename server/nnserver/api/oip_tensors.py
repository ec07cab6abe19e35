"""The input tensor of a ModelInferRequest -> rows: all checks of its name, type, shape and contents."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnproto.oip import inference_pb2 as pb
from nnserver.api.shapes import shape_text
from nnserver.errors import InvalidArgument
from nnserver.served_model import ServedModel

Array = NDArray[Any]

# A model takes one tensor, of this name.
INPUT = "inputs"

# Of float32 and float64, the types in which models compute.
OIP_NAMES = {np.dtype(np.float32): "FP32", np.dtype(np.float64): "FP64"}


@dataclass(frozen=True, slots=True)
class _Datatype:
    """How a datatype's elements are sent: their type in raw bytes, and the field of typed contents."""

    raw: np.dtype[Any]
    # None: has no typed contents.
    field: str | None
    # Whether a model's dtype may be unable to hold an element that must not be rounded.
    is_wide_integer: bool = False


_DATATYPES = {
    "FP32": _Datatype(np.dtype("<f4"), "fp32_contents"),
    "FP64": _Datatype(np.dtype("<f8"), "fp64_contents"),
    "FP16": _Datatype(np.dtype("<f2"), None),
    # The upper half of a float32; NumPy has no name for it.
    "BF16": _Datatype(np.dtype("<u2"), None),
    "INT8": _Datatype(np.dtype("i1"), "int_contents"),
    "INT16": _Datatype(np.dtype("<i2"), "int_contents"),
    "INT32": _Datatype(np.dtype("<i4"), "int_contents", True),
    "INT64": _Datatype(np.dtype("<i8"), "int64_contents", True),
    "UINT8": _Datatype(np.dtype("u1"), "uint_contents"),
    "UINT16": _Datatype(np.dtype("<u2"), "uint_contents"),
    "UINT32": _Datatype(np.dtype("<u4"), "uint_contents", True),
    "UINT64": _Datatype(np.dtype("<u8"), "uint64_contents", True),
}

_CONTENTS = tuple(field.name for field in pb.InferTensorContents.DESCRIPTOR.fields)


@dataclass(frozen=True, slots=True)
class Rows:
    """What a request asks about: x (rows, n_in), whether it was a single row, and whether it was raw."""

    x: Array
    is_row: bool
    is_raw: bool


def decode_rows(request: pb.ModelInferRequest, model: ServedModel) -> Rows:
    """
    Return the rows of *request*, converted to the model's dtype; not to be written to.

    FP64 is rounded for a float32 model, as nnproto's FLOAT64 is; integers must be held exactly.
    Raises InvalidArgument, naming what was wrong and what was expected.
    """
    tensor = _only_tensor(request, model.name)
    datatype = _DATATYPES.get(tensor.datatype)
    if datatype is None:
        raise InvalidArgument(
            f"{INPUT} has datatype {tensor.datatype[:40]!r}; expected one of {', '.join(_DATATYPES)}"
        )
    n_in = model.mlp.n_in
    shape = tuple(tensor.shape)
    if len(shape) not in (1, 2) or shape[-1] != n_in or shape[0] < 0:
        raise InvalidArgument(
            f"{INPUT} has shape {shape_text(shape)}; model '{model.name}' expects (rows, {n_in})"
        )
    raw = request.raw_input_contents
    if raw:
        flat = _decode_raw(tensor, raw, datatype, prod(shape))
    else:
        flat = _decode_typed(tensor, datatype, prod(shape))
    x = _convert(flat, tensor.datatype, datatype, model.mlp.dtype, n_in)
    return Rows(x.reshape(-1, n_in), is_row=len(shape) == 1, is_raw=bool(raw))


def _only_tensor(request: pb.ModelInferRequest, model_name: str) -> pb.ModelInferRequest.InferInputTensor:
    tensors = request.inputs
    if len(tensors) != 1 or tensors[0].name != INPUT:
        names = ", ".join(repr(tensor.name[:40]) for tensor in tensors[:8])
        if len(tensors) > 8:
            names += ", ..."
        raise InvalidArgument(
            f"the request has {f'the inputs {names}' if names else 'no inputs'}; model '{model_name}' "
            f"expects one, '{INPUT}'"
        )
    tensor = tensors[0]
    # Truth of a message's map is cheap, a look into it is not.
    if tensor.parameters and any(key.startswith("shared_memory_") for key in tensor.parameters):
        raise InvalidArgument(f"{INPUT} is in shared memory; this server takes contents in the message only")
    return tensor


def _decode_raw(
    tensor: pb.ModelInferRequest.InferInputTensor, raw: Any, datatype: _Datatype, size: int
) -> Array:
    if tensor.HasField("contents") and (given := _given_contents(tensor.contents)):
        raise InvalidArgument(
            f"{INPUT} has {given[0]} beside raw_input_contents; expected the one or the other"
        )
    if len(raw) != 1:
        raise InvalidArgument(f"raw_input_contents has {len(raw)} entries; expected 1, as there are inputs")
    data = raw[0]
    expected = size * datatype.raw.itemsize
    if len(data) != expected:
        raise InvalidArgument(
            f"{INPUT} has {len(data)} bytes of raw contents; shape {shape_text(tuple(tensor.shape))} of "
            f"{tensor.datatype} takes {expected}"
        )
    return np.frombuffer(data, datatype.raw)


def _decode_typed(tensor: pb.ModelInferRequest.InferInputTensor, datatype: _Datatype, size: int) -> Array:
    field = datatype.field
    if field is None:
        raise InvalidArgument(f"{tensor.datatype} has no typed contents; expected raw_input_contents")
    contents = tensor.contents
    values = getattr(contents, field)
    given = _given_contents(contents)
    if given not in ([], [field]):
        raise InvalidArgument(
            f"{INPUT} has {' and '.join(given)}; expected {field} alone, for datatype {tensor.datatype}"
        )
    if len(values) != size:
        raise InvalidArgument(
            f"{INPUT} has {len(values)} elements in {field}; shape {shape_text(tuple(tensor.shape))} "
            f"takes {size}"
        )
    if field not in ("int_contents", "uint_contents"):
        return np.array(values, datatype.raw)
    wide = np.array(values, np.int64)
    info = np.iinfo(datatype.raw)
    outside = (wide < info.min) | (wide > info.max)
    if outside.any():
        value = wide[outside][0]
        raise InvalidArgument(
            f"{INPUT} has {value} in {field}; {tensor.datatype} is {info.min} to {info.max}"
        )
    return wide.astype(datatype.raw)


def _given_contents(contents: pb.InferTensorContents) -> list[str]:
    return [name for name in _CONTENTS if len(getattr(contents, name))]


def _convert(flat: Array, name: str, datatype: _Datatype, dtype: np.dtype[Any], n_in: int) -> Array:
    if name == "BF16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    if flat.dtype == dtype:
        return flat
    # Invalid: a signalling NaN is as good as any. Over: beyond float32's range is infinite.
    with np.errstate(over="ignore", invalid="ignore"):
        converted: Array = flat.astype(dtype)
    if datatype.is_wide_integer:
        _require_exact(flat, converted, name, n_in)
    return converted


def _require_exact(integers: Array, converted: Array, name: str, n_in: int) -> None:
    # The largest integers round up to a power of two that their type does not hold.
    bound = float(2 ** (8 * integers.itemsize - (integers.dtype.kind == "i")))
    is_held = converted < bound
    is_exact = is_held & (np.where(is_held, converted, 0).astype(integers.dtype) == integers)
    if not is_exact.all():
        row, column = divmod(int(np.argmin(is_exact)), n_in)
        raise InvalidArgument(
            f"{INPUT} has {integers[row * n_in + column]} at row {row}, column {column}, which the model's "
            f"{converted.dtype} does not hold; expected {name} that it does, or FP64, which is rounded"
        )
