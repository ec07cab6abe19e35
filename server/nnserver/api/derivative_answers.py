"""Values and derivatives of several requests of one form -> a DifferentiateResponse for each, as bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import numpy as np

from nnproto.v1 import inference_pb2 as pb
from nnserver.api.answers import Array, Encoder, tensor_head
from nnserver.derivatives import Derivative, Differential
from nnserver.repository import ServedModel

_VALUES = pb.DifferentiateResponse.VALUES_FIELD_NUMBER
_DERIVATIVES = pb.DifferentiateResponse.DERIVATIVES_FIELD_NUMBER


def differential_encoder(model: ServedModel, wanted: Derivative, rows: int, *, is_row: bool) -> Encoder:
    """Return what answers requests of *rows* rows, or of a single one without that axis, with *wanted*."""
    dtype = model.mlp.dtype
    names = pb.DifferentiateResponse(model=model.name, version=model.version).SerializeToString()
    first = () if is_row else (rows,)
    of_values = tensor_head(_VALUES, first + wanted.value_shape, dtype)
    of_derivatives = tensor_head(_DERIVATIVES, first + wanted.shape, dtype)
    little_endian = dtype.newbyteorder("<")

    def encode(y: Differential, id_fields: Sequence[bytes]) -> list[bytes]:
        values = _parts(y.values, rows * prod(wanted.value_shape), little_endian)
        derivatives = _parts(y.derivatives, rows * prod(wanted.shape), little_endian)
        return [
            b"".join((names, field, of_values, of_one, of_derivatives, of_other))
            for field, of_one, of_other in zip(id_fields, values, derivatives, strict=False)
        ]

    return encode


def _parts(array: Array, size: int, dtype: np.dtype[Any]) -> Iterable[Any]:
    """Yield the memory of *array*, *size* numbers at a time; for ever nothing if that is none."""
    flat = np.ascontiguousarray(array, dtype).reshape(-1)
    at = 0
    while True:
        yield flat[at : at + size].data if size else b""
        at += size
