"""
Request bytes -> what a slow reader makes of them: the rows asked about, or the status of a refusal.

The slow twin of `nnserver.api`: protobuf's own decoder reads the bytes, and the contract's rules are written
down once more, one after the other, without templates, views or shortcuts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

import nncore
from nnproto.oip import inference_pb2 as oip
from nnproto.v1 import inference_pb2 as own
from nnserver.errors import Status

Array = NDArray[Any]
Models = Mapping[str, nncore.Mlp]

# wire type of a group's begin, as UnknownFieldSet tells it
_BYTES, _GROUP = 2, 3

_STRUCT = {
    **{"FP32": "f", "FP64": "d", "FP16": "e", "BF16": "H"},
    **{"INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q"},
    **{"UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q"},
}
_TYPED = {
    **{"FP32": "fp32", "FP64": "fp64", "INT64": "int64", "UINT64": "uint64"},
    **{"INT8": "int", "INT16": "int", "INT32": "int", "UINT8": "uint", "UINT16": "uint", "UINT32": "uint"},
}
_RANGES = {f"INT{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32)} | {
    f"UINT{bits}": (0, 2**bits - 1) for bits in (8, 16, 32)
}
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "timeout": ("int64_param",),
    "priority": ("int64_param", "uint64_param"),
    "sequence_id": ("int64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "triton_enable_empty_final_response": ("bool_param",),
}


@dataclass(slots=True)
class Question:
    """A request that is to be answered: the message, the model's name, and its rows (rows, n_in)."""

    request: Any
    model: str
    x: Array
    is_row: bool
    # Whether each bit of x is known: conversions may choose which NaN a NaN becomes.
    is_exact: bool


class Refused(Exception):
    """The request is to be refused with *status*."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


def read_own(message: bytes, models: Models) -> Question:
    """Return what a PredictRequest asks for; raises Refused."""
    request = _parsed(own.PredictRequest, message)
    mlp = _model(models, request.model, request.version)
    tensor = request.inputs
    code = {own.DATA_TYPE_FLOAT32: "f", own.DATA_TYPE_FLOAT64: "d"}.get(tensor.dtype)
    _require(code is not None)
    shape = _shape(tensor.shape, mlp.n_in)
    x, is_exact = _unpacked(tensor.data, str(code), prod(shape), mlp.dtype)
    kind = request.output
    _require(kind in (0, 1, 2, 3))
    if kind == own.OUTPUT_KIND_LABELS:
        _require(request.top_k <= len(mlp.class_labels))
    else:
        _require(request.top_k == 0)
    return Question(request, request.model, x.reshape(-1, mlp.n_in), len(shape) == 1, is_exact)


def read_oip(message: bytes, models: Models) -> Question:
    """Return what a ModelInferRequest asks for; raises Refused."""
    request = _parsed(oip.ModelInferRequest, message)
    mlp = _model(models, request.model_name, request.model_version)
    for name, parameter in request.parameters.items():
        _require(name in _PARAMETERS or not name.startswith("triton_"))
        if name in _PARAMETERS:
            choice = parameter.WhichOneof("parameter_choice")
            _require(choice in _PARAMETERS[name])
            if name in ("timeout", "priority"):
                _require(getattr(parameter, choice) >= 0)
    names = [output.name for output in request.outputs]
    _require(len(names) == len(set(names)) and set(names) <= {"outputs", "probabilities", "labels"})
    for output in request.outputs:
        _require(not any(key.startswith("shared_memory_") for key in output.parameters))
        if "classification" in output.parameters:
            parameter = output.parameters["classification"]
            _require(parameter.WhichOneof("parameter_choice") == "int64_param" and parameter.int64_param > 0)
            _require(output.name != "labels" and not (output.name == "outputs" and mlp.n_out == 1))
    _require([tensor.name for tensor in request.inputs] == ["inputs"])
    (tensor,) = request.inputs
    _require(not any(key.startswith("shared_memory_") for key in tensor.parameters))
    _require(tensor.datatype in _STRUCT)
    shape = _shape(tensor.shape, mlp.n_in)
    if request.raw_input_contents:
        _require(not any(len(values) for _, values in tensor.contents.ListFields()))
        _require(len(request.raw_input_contents) == 1)
        x, is_exact = _raw(request.raw_input_contents[0], tensor.datatype, prod(shape), mlp.dtype)
    else:
        x, is_exact = _typed(tensor.contents, tensor.datatype, prod(shape), mlp.dtype)
    return Question(request, request.model_name, x.reshape(-1, mlp.n_in), len(shape) == 1, is_exact)


def parses(kind: type[Message], message: bytes) -> bool:
    """Whether protobuf takes *message* for a *kind*."""
    try:
        kind.FromString(message)
    except DecodeError:
        return False
    return True


def top_fields(message: bytes) -> list[tuple[int, int, Any]]:
    """Number, wire type and content of each field of a valid *message*, found without its type."""
    fields: Any = UnknownFieldSet(Empty.FromString(message))
    return [(field.field_number, field.wire_type, field.data) for field in fields]


def has_group(message: bytes) -> bool:
    return any(wire_type == _GROUP for _, wire_type, _ in top_fields(message))


def count_fields(descriptor: Any, message: bytes) -> tuple[int, int, bool]:
    """Fields of a valid *message* and its submessages, bytes of its longest shape, whether it has groups."""
    submessages = {
        f.number: f.message_type for f in descriptor.fields if f.type == FieldDescriptor.TYPE_MESSAGE
    }
    shapes = {f.number for f in descriptor.fields if f.name == "shape"}
    count, longest, has_groups = 0, 0, False
    for number, wire_type, content in top_fields(message):
        count += 1
        if wire_type == _GROUP:
            has_groups = True
        elif wire_type == _BYTES and number in submessages:
            below = count_fields(submessages[number], content)
            count, longest, has_groups = count + below[0], max(longest, below[1]), has_groups or below[2]
        elif wire_type == _BYTES and number in shapes:
            longest = max(longest, len(content))
    return count, longest, has_groups


def _parsed(kind: type[Message], message: bytes) -> Any:
    try:
        return kind.FromString(message)
    except DecodeError:
        raise Refused(Status.INVALID_ARGUMENT) from None


def _model(models: Models, name: str, version: str) -> nncore.Mlp:
    if name not in models or version not in ("", "1"):
        raise Refused(Status.NOT_FOUND)
    return models[name]


def _require(claim: bool) -> None:
    if not claim:
        raise Refused(Status.INVALID_ARGUMENT)


def _shape(shape: Any, n_in: int) -> tuple[int, ...]:
    found = tuple(shape)
    _require(found == (n_in,) or (len(found) == 2 and found[0] >= 0 and found[1] == n_in))
    return found


def _raw(data: bytes, datatype: str, size: int, dtype: np.dtype[Any]) -> tuple[Array, bool]:
    x, is_exact = _unpacked(data, _STRUCT[datatype], size, dtype, is_bfloat=datatype == "BF16")
    if datatype in ("INT32", "INT64", "UINT32", "UINT64"):
        _require_held(struct.unpack(f"<{size}{_STRUCT[datatype]}", data), x)
    return x, is_exact


def _typed(contents: Any, datatype: str, size: int, dtype: np.dtype[Any]) -> tuple[Array, bool]:
    _require(datatype in _TYPED)
    field = f"{_TYPED[datatype]}_contents"
    _require({found.name for found, values in contents.ListFields() if len(values)} <= {field})
    values = list(getattr(contents, field))
    _require(len(values) == size)
    if datatype in _RANGES:
        low, high = _RANGES[datatype]
        _require(all(low <= value <= high for value in values))
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.array([_rounded(value, dtype) for value in values], dtype)
    if datatype in ("INT32", "INT64", "UINT32", "UINT64"):
        _require_held(tuple(values), x)
    return x, False


def _rounded(value: float, dtype: np.dtype[Any]) -> Any:
    return dtype.type(value)


def _require_held(integers: tuple[int, ...], x: Array) -> None:
    """Each of *integers* is that number in *x*: Python compares integers and floats exactly."""
    _require(all(integer == float(value) for integer, value in zip(integers, x, strict=True)))


def _unpacked(
    data: bytes, code: str, size: int, dtype: np.dtype[Any], is_bfloat: bool = False
) -> tuple[Array, bool]:
    _require(len(data) == size * struct.calcsize(f"<{code}"))
    if code == dtype.char:
        return np.frombuffer(data, dtype), True
    values: Iterator[Any] = iter(struct.unpack(f"<{size}{code}", data))
    if is_bfloat:
        values = (struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in values)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array([_rounded(value, dtype) for value in values], dtype), False
