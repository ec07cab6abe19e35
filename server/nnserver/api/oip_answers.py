"""
Outputs of requests that ask for the same -> a ModelInferResponse for each, as bytes.

A model gives up to three tensors: `outputs`, the last layer's as they are; `probabilities`; and `labels`, the
most probable class of each row. Classification turns the first two into texts "value:index:label".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nncore.classification import top_classes
from nnproto.oip import inference_pb2 as pb
from nnserver.api import wire
from nnserver.api.answers import Encoder
from nnserver.api.oip_parameters import read_classification
from nnserver.api.oip_tensors import OIP_NAMES
from nnserver.errors import InvalidArgument
from nnserver.model_folder import quoted
from nnserver.model_settings import LABELS, OUTPUT_NAMES, OUTPUTS, PROBABILITIES
from nnserver.served_model import ServedModel

Array = NDArray[Any]

BYTES = "BYTES"

_RAW = pb.ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
# Around a label in an answer: its length, tags, and the lengths of what encloses it.
_LABEL_OVERHEAD = 8
# A float64 in decimal takes up to 24 characters, an index up to 10; two colons.
_CLASS_OVERHEAD = _LABEL_OVERHEAD + 36


@dataclass(frozen=True, slots=True)
class Requested:
    """One tensor of an answer: its values; or, if *classes* is not 0, so many classes a row as texts."""

    name: str
    classes: int = 0


def listed_outputs(model: ServedModel) -> tuple[str, ...]:
    """
    Return the outputs of the model's metadata, which answer a request that names none.

    config.toml's, or all three for a model with labels; else the outputs alone: without labels it may well
    be no classifier.
    """
    if model.settings.outputs is not None:
        return model.settings.outputs
    return OUTPUT_NAMES if model.mlp.labels else (OUTPUTS,)


def requested_outputs(request: pb.ModelInferRequest, model: ServedModel) -> tuple[Requested, ...]:
    """Return what *request* asks for; raises InvalidArgument, naming what there is."""
    outputs = request.outputs
    if not outputs:
        return tuple(map(Requested, listed_outputs(model)))
    requested: list[Requested] = []
    for output in outputs:
        name = output.name
        if name not in OUTPUT_NAMES:
            expected = ", ".join(f"'{known}'" for known in OUTPUT_NAMES)
            raise InvalidArgument(f"model '{model.name}' has no output {quoted(name)}; it has {expected}")
        if any(name == other.name for other in requested):
            raise InvalidArgument(f"output '{name}' is asked for twice")
        classes = read_classification(output.parameters, name)
        if classes:
            classes = min(classes, _class_count(model, name))
        requested.append(Requested(name, classes))
    return tuple(requested)


def largest_row_bytes(model: ServedModel, requested: Sequence[Requested]) -> int:
    """Return what one row takes in an answer, at most."""
    label = model.max_label_bytes
    size = 0
    for output in requested:
        if output.classes:
            size += output.classes * (label + _CLASS_OVERHEAD)
        elif output.name == LABELS:
            size += label + _LABEL_OVERHEAD
        else:
            size += model.mlp.n_out * model.mlp.dtype.itemsize
    return size


def head_bytes(model: ServedModel, requested: Sequence[Requested], request_id: str) -> int:
    """Return what an answer has besides its rows, at most; and a little that every message has."""
    return len(request_id.encode()) + len(model.name) + len(model.version) + 64 * len(requested)


def id_field(request_id: str) -> bytes:
    """Return the field of a request's id, or of its answer's: the number is the same."""
    return pb.ModelInferResponse(id=request_id).SerializeToString()


def raw_encoder(model: ServedModel, requested: Sequence[Requested], rows: int, is_row: bool) -> Encoder:
    """Return what answers requests of *rows* rows with raw contents."""
    head = _head(model, requested, rows, is_row).SerializeToString()
    tensors = [_Tensor(model, output) for output in requested]

    def encode(y: Array, id_fields: Sequence[bytes]) -> list[bytes]:
        probabilities = _probabilities(model, requested, y)
        answers = [[head, field] for field in id_fields]
        for tensor in tensors:
            values = probabilities if tensor.of_probabilities else y
            for answer, data in zip(answers, tensor.raw(values, len(id_fields)), strict=True):
                answer += (wire.bytes_field(_RAW, len(data)), data)
        return [b"".join(answer) for answer in answers]

    return encode


def typed_encoder(model: ServedModel, requested: Sequence[Requested], rows: int, is_row: bool) -> Encoder:
    """Return what answers requests of *rows* rows with typed contents."""
    head = _head(model, requested, rows, is_row)
    tensors = [_Tensor(model, output) for output in requested]

    def encode(y: Array, id_fields: Sequence[bytes]) -> list[bytes]:
        probabilities = _probabilities(model, requested, y)
        answers = []
        for i, field in enumerate(id_fields):
            part = slice(i * rows, (i + 1) * rows)
            answer = pb.ModelInferResponse()
            answer.CopyFrom(head)
            for tensor, output in zip(tensors, answer.outputs, strict=True):
                values = probabilities if tensor.of_probabilities else y
                tensor.fill(values[part], output.contents)
            answers.append(answer.SerializeToString() + field)
        return answers

    return encode


class _Tensor:
    """How one tensor of an answer is made from values (rows, n_out): outputs or probabilities."""

    def __init__(self, model: ServedModel, output: Requested) -> None:
        mlp = model.mlp
        self.of_probabilities = output.name != OUTPUTS
        self._is_text = output.name == LABELS or output.classes > 0
        self._classes = output.classes
        self._labels = [label.encode() for label in mlp.class_labels]
        self._has_labels = mlp.labels is not None
        self._wire_dtype = mlp.dtype.newbyteorder("<")
        self._contents = "fp32_contents" if mlp.dtype == np.float32 else "fp64_contents"

    def raw(self, values: Array, requests: int) -> list[bytes]:
        """Return the raw contents for each of *requests* requests that have equally many of the rows."""
        if not self._is_text:
            data = np.ascontiguousarray(values, self._wire_dtype).tobytes()
            size = len(data) // requests
            return [data[i * size : (i + 1) * size] for i in range(requests)] if requests > 1 else [data]
        texts = self._texts(values)
        count = len(texts) // requests
        return [
            b"".join(part for text in texts[i * count : (i + 1) * count] for part in (_length(text), text))
            for i in range(requests)
        ]

    def fill(self, values: Array, contents: pb.InferTensorContents) -> None:
        """Write the contents for one request."""
        if self._is_text:
            contents.bytes_contents.extend(self._texts(values))
        else:
            getattr(contents, self._contents).extend(values.ravel().tolist())

    def _texts(self, values: Array) -> list[bytes]:
        if not self._classes:
            return [self._labels[index] for index in _most_probable(values).tolist()]
        indices, scores = top_classes(values, self._classes)
        texts = []
        # str of a NumPy float: the shortest decimal that gives its bits back.
        for index, score in zip(indices.ravel().tolist(), scores.ravel(), strict=True):
            text = f"{score!s}:{index}".encode()
            texts.append(text + b":" + self._labels[index] if self._has_labels else text)
        return texts


def _most_probable(probabilities: Array) -> NDArray[np.int64]:
    """Return the first of top_classes for each row: by its short way, where there is one."""
    if probabilities.shape[1] > 1:
        first: NDArray[np.int64] = probabilities.argmax(axis=1)
        # A NaN counts as the largest here, and as the least probable there.
        if not np.isnan(probabilities).any():
            return first
    return top_classes(probabilities, 1)[0][:, 0].astype(np.int64)


def _class_count(model: ServedModel, name: str) -> int:
    if name == LABELS:
        raise InvalidArgument(
            f"output '{LABELS}' has no classification; expected that of '{OUTPUTS}' or '{PROBABILITIES}'"
        )
    if name == OUTPUTS and model.mlp.n_out == 1:
        raise InvalidArgument(
            f"'{OUTPUTS}' of model '{model.name}' is one number a row, not one a class; "
            f"expected classification of '{PROBABILITIES}'"
        )
    return len(model.mlp.class_labels)


def _head(
    model: ServedModel, requested: Sequence[Requested], rows: int, is_row: bool
) -> pb.ModelInferResponse:
    """Return an answer but for its id and contents."""
    head = pb.ModelInferResponse(model_name=model.name, model_version=model.version)
    for output in requested:
        is_text = output.name == LABELS or output.classes
        width = (output.classes or 1) if is_text else model.mlp.n_out
        head.outputs.add(
            name=output.name,
            datatype=BYTES if is_text else OIP_NAMES[model.mlp.dtype],
            shape=[width] if is_row else [rows, width],
        )
    return head


def _probabilities(model: ServedModel, requested: Sequence[Requested], y: Array) -> Array:
    """Return the probabilities if they are needed, else *y*."""
    return y if all(output.name == OUTPUTS for output in requested) else model.mlp.probabilities_from(y)


def _length(text: bytes) -> bytes:
    return len(text).to_bytes(4, "little")
