"""
What is asked of a model's derivatives -> request bytes; response messages -> values and derivatives.

Rows here are rows of x with those of the cotangents or tangents behind them, side by side: so they are cut
into messages, sent and joined again as the rows of a prediction are.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nnclient.errors import InvalidInput
from nnclient.options import MAX_ROWS_PER_MESSAGE
from nnclient.wire import KIND_NUMBERS, as_rows, check_model, decode_tensor, tensor_field
from nnproto.v1 import inference_pb2 as pb

Of = Literal["outputs", "probabilities"]
Kind = Literal["vjp", "jvp", "jacobian", "value_and_grad", "hvp"]

_KINDS: dict[str, pb.DerivativeKind.ValueType] = {
    "vjp": pb.DERIVATIVE_KIND_VJP,
    "jvp": pb.DERIVATIVE_KIND_JVP,
    "jacobian": pb.DERIVATIVE_KIND_JACOBIAN,
    "value_and_grad": pb.DERIVATIVE_KIND_VALUE_AND_GRAD,
    "hvp": pb.DERIVATIVE_KIND_HVP,
}
_DIRECTIONS = {
    "vjp": ("cotangents", pb.DifferentiateRequest.COTANGENTS_FIELD_NUMBER),
    "jvp": ("tangents", pb.DifferentiateRequest.TANGENTS_FIELD_NUMBER),
    "hvp": ("tangents", pb.DifferentiateRequest.TANGENTS_FIELD_NUMBER),
}
_INPUTS = pb.DifferentiateRequest.INPUTS_FIELD_NUMBER
# What a request holds besides names, indices and data, with room to spare; an index takes 5 bytes at most.
_OVERHEAD_BYTES = 192
_INDEX_BYTES = 5
# Of the Jacobians in one answer, whatever the model's dtype: half of what nnserver sends by default.
_ANSWER_BYTES = 8 << 20


class Differential(NamedTuple):
    """
    What a model answers at some rows, and its derivatives there, of the same rows.

    Arrays in the model's dtype; their first axis is that of the rows, unless a single row was asked about.
    """

    values: NDArray[Any]
    derivatives: NDArray[Any]


class OfOneOutput(TypedDict, total=False):
    """
    What every derivative takes beside a model and rows.

    of: "outputs", the default, or "probabilities".
    inputs: indices of the inputs to differentiate by, each once; None for all.
    version: of the model; empty for the server's choice.
    timeout_s: time for the whole call; None for the client's own.
    """

    of: Of
    inputs: Sequence[int] | None
    version: str
    timeout_s: float | None


class OfOutputs(OfOneOutput, total=False):
    """The same, and outputs: indices of the outputs to differentiate, each once; None for all."""

    outputs: Sequence[int] | None


@dataclass(frozen=True, slots=True)
class DerivativeQuestion:
    """
    What is asked about every row of a call. Raises InvalidInput if it cannot be asked.

    direction_width: numbers of a row of cotangents or tangents, which are the last of each row.
    most_rows: in a message.
    """

    method: ClassVar[str] = "Differentiate"

    kind: Kind
    model: str
    version: str = ""
    of: Of = "outputs"
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    direction_width: int = 0
    most_rows: int = MAX_ROWS_PER_MESSAGE

    def __post_init__(self) -> None:
        check_model(self.model)
        if self.of not in ("outputs", "probabilities"):
            raise InvalidInput(f"of is {self.of!r}; expected 'outputs' or 'probabilities'")

    def largest_data_bytes(self, message_bytes: int) -> int:
        """Return how many bytes of rows fit into a request of *message_bytes*."""
        names = len(self.model.encode()) + len(self.version.encode())
        indices = _INDEX_BYTES * (len(self.inputs) + len(self.outputs))
        return message_bytes - names - indices - _OVERHEAD_BYTES

    def with_answers_of(self, n_in: int, n_out: int) -> DerivativeQuestion:
        """Return the question with so few rows a message that the Jacobians of a model that wide fit."""
        row_bytes = 8 * (len(self.inputs) or n_in) * (len(self.outputs) or n_out)
        most_rows = max(1, min(MAX_ROWS_PER_MESSAGE, _ANSWER_BYTES // max(row_bytes, 1)))
        return replace(self, most_rows=most_rows)

    def encode(self, rows: NDArray[Any], request_id: str = "") -> bytes:
        """Return the bytes of a DifferentiateRequest; rows: as `rows_of` returns them."""
        head = pb.DifferentiateRequest(
            model=self.model,
            version=self.version,
            id=request_id,
            output=KIND_NUMBERS[self.of],
            kind=_KINDS[self.kind],
            input_indices=self.inputs,
            output_indices=self.outputs,
        )
        parts: list[Any] = [head.SerializeToString()]
        if self.kind in _DIRECTIONS:
            n_in = rows.shape[1] - self.direction_width
            parts += tensor_field(_DIRECTIONS[self.kind][1], np.ascontiguousarray(rows[:, n_in:]))
            rows = np.ascontiguousarray(rows[:, :n_in])
        return b"".join((*parts, *tensor_field(_INPUTS, rows)))


def question_of(
    kind: Kind,
    model: str,
    choice: OfOutputs | OfOneOutput,
    outputs: Sequence[int] | None = None,
) -> DerivativeQuestion:
    """Return what *choice* asks of *model*; *outputs*: if it does not say."""
    chosen = cast(OfOutputs, choice)
    return DerivativeQuestion(
        kind,
        model,
        chosen.get("version", ""),
        chosen.get("of", "outputs"),
        _indices(chosen.get("inputs"), "inputs"),
        _indices(chosen.get("outputs", outputs), "outputs"),
    )


def one(output: int | None) -> Sequence[int] | None:
    """Return one output as a choice of outputs; None, for a model that has but one, as none."""
    return None if output is None else (output,)


def rows_of(
    question: DerivativeQuestion, x: ArrayLike, directions: ArrayLike | None
) -> tuple[DerivativeQuestion, NDArray[Any], bool]:
    """
    Return the question with the width of *directions*, rows of both side by side, and if x is a single row.

    Raises InvalidInput if there is not one row of directions for each of x.
    """
    rows, single = as_rows(x)
    if directions is None:
        return question, rows, single
    name = _DIRECTIONS[question.kind][0]
    others, _ = as_rows(directions, name)
    if len(others) != len(rows):
        raise InvalidInput(f"{name} has {len(others)} rows; expected {len(rows)}, one for each of x")
    both = np.concatenate((rows, others), axis=1)
    return replace(question, direction_width=others.shape[1]), both, single


class DifferentialJoiner:
    """Answers of the pieces of one batch -> its Differential."""

    def __init__(self, rows: int, single: bool) -> None:
        self._rows = rows
        self._single = single
        self._joined: Differential | None = None

    def add(self, response: pb.DifferentiateResponse, start: int, stop: int) -> None:
        """Take the answer for rows [start, stop). Raises ValueError if it is not one."""
        parts = Differential(decode_tensor(response.values), decode_tensor(response.derivatives))
        for part in parts:
            if not part.ndim or len(part) != stop - start:
                raise ValueError(f"values or derivatives of shape {part.shape} for {stop - start} rows")
        if self._joined is None:
            # Arrays of the caller's own, which may be written to: the one copy.
            self._joined = Differential(
                *(np.empty((self._rows, *part.shape[1:]), part.dtype.newbyteorder("=")) for part in parts)
            )
        for whole, part in zip(self._joined, parts, strict=True):
            if part.shape[1:] != whole.shape[1:] or part.dtype != whole.dtype:
                raise ValueError("pieces of one batch that differ in shape or dtype; was the model replaced?")
            whole[start:stop] = part

    def result(self) -> Differential:
        """Return the joined answer; all pieces must have been added."""
        assert self._joined is not None
        if self._single:
            return Differential(self._joined.values[0], self._joined.derivatives[0])
        return self._joined


def _indices(given: Sequence[int] | None, what: str) -> tuple[int, ...]:
    if given is None:
        return ()
    try:
        indices = tuple(operator.index(index) for index in given)
    except TypeError:
        raise InvalidInput(f"{what} is {given!r}; expected a sequence of indices") from None
    if not indices:
        raise InvalidInput(f"{what} is empty; expected one or more indices, or None for all")
    for at, index in enumerate(indices):
        if not 0 <= index < 1 << 32:
            raise InvalidInput(f"{what}[{at}] is {index}; expected an index, from 0")
    return indices
