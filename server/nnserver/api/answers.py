"""Outputs of several requests of one form -> a PredictResponse for each, as bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnproto.v1 import inference_pb2 as pb
from nnserver.api import wire
from nnserver.api.tensors import data_type
from nnserver.errors import retry_after_ms, status_and_text
from nnserver.repository import ServedModel

Array = NDArray[Any]
# What the kernel gave for requests * rows, outputs (requests * rows, n_out) of a forward pass, and the field
# of the id of each request -> an answer to each.
Encoder = Callable[[Any, Sequence[bytes]], list[bytes]]

# Fields 1 to 4 of a response (names, id and error) are the same, whatever was asked.
_OUTPUTS = pb.PredictResponse.OUTPUTS_FIELD_NUMBER
_DATA = pb.Tensor.DATA_FIELD_NUMBER


def id_field(request_id: str) -> bytes:
    """Return the field of a request's id, or of its answer's: the number is the same."""
    return pb.PredictResponse(id=request_id).SerializeToString()


def error_answer(id_field: bytes, error: BaseException) -> bytes:
    """Return the answer to a request of a stream that failed."""
    status, text = status_and_text(error)
    error_field = pb.Error(code=int(status), message=text, retry_after_ms=retry_after_ms(error) or 0)
    return id_field + pb.PredictResponse(error=error_field).SerializeToString()


def tensor_encoder(model: ServedModel, rows: int, *, is_row: bool, as_probabilities: bool) -> Encoder:
    """Return what answers requests of *rows* rows with outputs, or probabilities, as a tensor."""
    mlp = model.mlp
    names = pb.PredictResponse(model=model.name, version=model.version).SerializeToString()
    shape = (mlp.n_out,) if is_row else (rows, mlp.n_out)
    size = rows * mlp.n_out * mlp.dtype.itemsize
    head = tensor_head(_OUTPUTS, shape, mlp.dtype)
    without_id = names + head
    little_endian = mlp.dtype.newbyteorder("<")

    def encode(y: Array, id_fields: Sequence[bytes]) -> list[bytes]:
        if as_probabilities:
            y = mlp.probabilities_from(y)
        y = np.ascontiguousarray(y, little_endian)
        if len(id_fields) == 1:
            return [b"".join((names, id_fields[0], head, y.data if size else b""))]
        data = y.tobytes()
        return [
            (names + field + head if field else without_id) + data[i * size : i * size + size]
            for i, field in enumerate(id_fields)
        ]

    return encode


def tensor_head(number: int, shape: Sequence[int], dtype: np.dtype[Any]) -> bytes:
    """Return all of the field *number*, a tensor, that comes before the tensor's numbers."""
    tensor = pb.Tensor(shape=shape, dtype=data_type(dtype)).SerializeToString()
    size = prod(shape) * dtype.itemsize
    if size:
        tensor += wire.bytes_field(_DATA, size)
    return wire.bytes_field(number, len(tensor) + size) + tensor


def labels_encoder(model: ServedModel, rows: int, k: int) -> Encoder:
    """Return what answers requests of *rows* rows with the k most probable classes of each."""
    names = pb.PredictResponse(model=model.name, version=model.version).SerializeToString()
    class_labels = model.mlp.class_labels

    def encode(y: Array, id_fields: Sequence[bytes]) -> list[bytes]:
        indices, scores = (found.tolist() for found in model.mlp.top_labels_from(y, k))
        answers = []
        for i, field in enumerate(id_fields):
            response = pb.PredictResponse()
            part = slice(i * rows, (i + 1) * rows)
            for row_indices, row_scores in zip(indices[part], scores[part], strict=True):
                top = response.labels.add().top
                for index, score in zip(row_indices, row_scores, strict=True):
                    top.add(label=class_labels[index], index=index, score=score)
            answers.append(names + field + response.SerializeToString())
        return answers

    return encode


def largest_labels_bytes(model: ServedModel, k: int) -> int:
    """Return what k classes of one row take in a response, at most."""
    n_classes = len(model.mlp.class_labels)
    label = len(wire.bytes_field(1, model.max_label_bytes)) + model.max_label_bytes
    index, score = 1 + len(wire.varint(n_classes)), 9
    entry = label + index + score
    row = k * (len(wire.bytes_field(1, entry)) + entry)
    return len(wire.bytes_field(1, row)) + row
