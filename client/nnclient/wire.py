"""
Arrays -> request bytes; response messages -> arrays.

An array is copied once on its way into a request and once on its way out of a response. The
protobuf library would copy it three times into a request (bytes, message, message bytes), so the
last field, which is the tensor's data, is appended here; everything before it is protobuf's work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nnclient.errors import InvalidInput
from nnclient.options import MAX_ROWS_PER_MESSAGE
from nnproto.v1 import inference_pb2 as pb

OutputKind = Literal["outputs", "probabilities", "labels"]

KIND_NUMBERS: dict[str, pb.OutputKind.ValueType] = {
    "outputs": pb.OUTPUT_KIND_OUTPUTS,
    "probabilities": pb.OUTPUT_KIND_PROBABILITIES,
    "labels": pb.OUTPUT_KIND_LABELS,
}
DTYPE_OF: dict[int, np.dtype[Any]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
_NUMBER_OF_DTYPE = {dtype: cast(pb.DataType.ValueType, number) for number, dtype in DTYPE_OF.items()}

# The methods that take rows, unary or as a stream, and what they answer with.
ANSWERS: dict[str, type[pb.PredictResponse] | type[pb.DifferentiateResponse]] = {
    "Predict": pb.PredictResponse,
    "Differentiate": pb.DifferentiateResponse,
}

# As a tag of a length-delimited field.
_DATA_TAG = bytes([pb.Tensor.DATA_FIELD_NUMBER << 3 | 2])

# What a request holds besides its names and its data: tags, lengths, shape, id; with room to spare.
_OVERHEAD_BYTES = 128


@dataclass(frozen=True, slots=True)
class Question:
    """
    What is asked about every batch of a call. Raises InvalidInput if it cannot be asked.

    top_k: classes a row, for output="labels" only.
    """

    method: ClassVar[str] = "Predict"
    most_rows: ClassVar[int] = MAX_ROWS_PER_MESSAGE

    model: str
    version: str = ""
    output: OutputKind = "outputs"
    top_k: int = 1

    def __post_init__(self) -> None:
        check_model(self.model)
        if self.output not in KIND_NUMBERS:
            raise InvalidInput(
                f"output is {self.output!r}; expected one of {', '.join(map(repr, KIND_NUMBERS))}"
            )
        if self.top_k < 1:
            raise InvalidInput(f"top_k is {self.top_k}; expected at least 1")
        if self.top_k != 1 and self.output != "labels":
            raise InvalidInput(
                f"top_k is {self.top_k} with output={self.output!r}; it is for output='labels'"
            )

    def largest_data_bytes(self, message_bytes: int) -> int:
        """Return how many bytes of rows fit into a request of *message_bytes*."""
        names = len(self.model.encode()) + len(self.version.encode())
        return message_bytes - names - _OVERHEAD_BYTES

    def encode(self, rows: NDArray[Any], request_id: str = "") -> bytes:
        """
        Return the bytes of a PredictRequest, fields in the order of their numbers.

        rows: (rows, n_in), as as_rows returns them.
        """
        head = pb.PredictRequest(
            model=self.model,
            version=self.version,
            id=request_id,
            output=KIND_NUMBERS[self.output],
            top_k=self.top_k if self.output == "labels" else 0,
        )
        inputs = tensor_field(pb.PredictRequest.INPUTS_FIELD_NUMBER, rows)
        # join reads the array's memory itself: the one copy.
        return b"".join((head.SerializeToString(), *inputs))


def check_model(model: str) -> None:
    """Raise InvalidInput unless *model* can be a model's name."""
    if not isinstance(model, str) or not model:
        raise InvalidInput(f"model is {model!r}; expected the name of a model")


def tensor_field(number: int, rows: NDArray[Any]) -> tuple[Any, ...]:
    """Return the field *number*, below 16, with *rows* as a Tensor: bytes, and the array's own memory."""
    tensor = pb.Tensor(shape=rows.shape, dtype=_NUMBER_OF_DTYPE[rows.dtype]).SerializeToString()
    if rows.nbytes:
        tensor += _DATA_TAG + _varint(rows.nbytes)
    tag = bytes([number << 3 | 2])
    return tag, _varint(len(tensor) + rows.nbytes), tensor, rows.data if rows.nbytes else b""


def as_rows(x: ArrayLike, what: str = "x") -> tuple[NDArray[Any], bool]:
    """
    Return *x* as (rows, n_in), little-endian and C-contiguous, and whether it was a single row.

    float32 and float64 stay as they are. Other real types become the smaller of the two that
    holds all their values: float32 for bool, 8- and 16-bit integers and float16; float64 for the
    rest (where integers beyond 2**53 are rounded). Raises InvalidInput for anything else.
    """
    try:
        array = np.asarray(x)
    except Exception as error:  # rows of unequal length, or whatever the object's __array__ raises
        raise InvalidInput(f"{what} cannot be made an array: {error}") from error
    if array.dtype.kind not in "fiub":
        raise InvalidInput(f"{what} has dtype {array.dtype}; expected real numbers")
    if array.ndim not in (1, 2):
        raise InvalidInput(
            f"{what} has shape {array.shape}; expected (rows, n_in), or (n_in,) for a single row"
        )
    wire_dtype = np.dtype("<f4") if np.result_type(array.dtype, np.float32) == np.float32 else np.dtype("<f8")
    rows = np.ascontiguousarray(np.atleast_2d(array), dtype=wire_dtype)
    return rows, array.ndim == 1


def decode_tensor(tensor: pb.Tensor) -> NDArray[Any]:
    """
    Return *tensor* as a read-only array that shares its memory.

    Raises ValueError if dtype, shape and number of bytes do not agree.
    """
    dtype = DTYPE_OF.get(tensor.dtype)
    if dtype is None:
        raise ValueError(f"a tensor of unknown dtype {tensor.dtype}")
    return np.frombuffer(tensor.data, dtype).reshape(tuple(tensor.shape))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
