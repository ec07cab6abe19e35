"""
Batches in, request bytes out; responses in, results out: the bookkeeping of a stream.

Free of threads, sockets and clocks, so that both clients share it. A batch larger than one message
becomes several pieces, each the rows [start, stop) of it; the answers are joined again. What is
unanswered is kept, so that it can be sent again when a connection is lost.

    add_batch ──> next_request ──> (the network) ──> receive ──> pop_result
                       ^                                │
                       └────────── rewind <── lost connection
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nnclient.derivatives import DerivativeQuestion, Differential, DifferentialJoiner
from nnclient.errors import InternalError, InvalidInput, MessageTooLarge, NnclientError, error_from_answer
from nnclient.labels import Labels, decode_labels, join_labels
from nnclient.options import MAX_ROWS_PER_MESSAGE
from nnclient.wire import Question, as_rows, decode_tensor
from nnproto.v1 import inference_pb2 as pb

Prediction = NDArray[Any] | Labels
Result = Prediction | Differential
AnyQuestion = Question | DerivativeQuestion
# Fields 1 to 4 are the same: names, id and error.
AnyResponse = pb.PredictResponse | pb.DifferentiateResponse


class Joiner:
    """Answers of the pieces of one batch -> its result."""

    def __init__(self, question: Question, rows: int, single: bool) -> None:
        self._question = question
        self._rows = rows
        self._single = single
        self._outputs: NDArray[Any] | None = None
        self._labels: list[Labels] = []

    def add(self, response: pb.PredictResponse, start: int, stop: int) -> None:
        """Take the answer for rows [start, stop). Raises ValueError if it is not one."""
        if self._question.output == "labels":
            labels = decode_labels(response.labels, self._question.top_k)
            if len(labels) != stop - start:
                raise ValueError(f"{len(labels)} rows of labels for {stop - start} rows")
            self._labels.append(labels)
            return
        part = decode_tensor(response.outputs)
        if part.ndim != 2 or len(part) != stop - start:
            raise ValueError(f"outputs of shape {part.shape} for {stop - start} rows")
        if self._outputs is None:
            # An array of the caller's own, which may be written to: the one copy.
            self._outputs = np.empty((self._rows, part.shape[1]), part.dtype.newbyteorder("="))
        elif part.shape[1] != self._outputs.shape[1] or part.dtype != self._outputs.dtype:
            raise ValueError("pieces of one batch that differ in width or dtype; was the model replaced?")
        self._outputs[start:stop] = part

    def result(self) -> Prediction:
        """Return the joined answer; all pieces must have been added."""
        joined: Any = join_labels(self._labels) if self._question.output == "labels" else self._outputs
        return joined[0] if self._single else joined  # type: ignore[no-any-return]


def joiner_of(question: AnyQuestion, rows: int, single: bool) -> Any:
    """Return what joins the answers to *question* about a batch of *rows* rows, or of a *single* one."""
    if isinstance(question, DerivativeQuestion):
        return DifferentialJoiner(rows, single)
    return Joiner(question, rows, single)


@dataclass(slots=True)
class _Batch:
    """One item of the input and what is known of its answer."""

    index: int
    rows: NDArray[Any] | None
    ranges: Iterator[tuple[int, int]]
    pieces_left: int
    # A Joiner or a DifferentialJoiner.
    joiner: Any = None
    error: NnclientError | None = None

    @property
    def is_complete(self) -> bool:
        return self.error is not None or self.pieces_left == 0


@dataclass(slots=True)
class _Piece:
    """Rows [start, stop) of a batch, encoded: the input may reuse its array once it has been sent."""

    batch: _Batch
    start: int
    stop: int
    request_id: str
    request: bytes


@dataclass
class Conversation:
    """
    One stream's state. Not thread-safe.

    max_in_flight: requests sent and not answered at most; also batches taken in and not popped.
    """

    question: AnyQuestion
    message_bytes: int
    target: str
    max_in_flight: int
    _batches: deque[_Batch] = field(default_factory=deque)
    _in_flight: deque[_Piece] = field(default_factory=deque)
    _to_resend: deque[_Piece] = field(default_factory=deque)
    _splitting: _Batch | None = None
    _input_ended: bool = False
    _input_error: BaseException | None = None
    _refusal: NnclientError | None = None
    _batch_indices: Iterator[int] = field(default_factory=count)
    _request_ids: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        if self.max_in_flight < 1:
            raise InvalidInput(f"max_in_flight is {self.max_in_flight}; expected at least 1")

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered."""
        return len(self._in_flight)

    @property
    def wants_batch(self) -> bool:
        """Whether the next item of the input should be fetched."""
        return (
            not self._input_ended
            and self._splitting is None
            and not self._to_resend
            and len(self._in_flight) < self.max_in_flight
            and len(self._batches) < self.max_in_flight
        )

    @property
    def has_request(self) -> bool:
        """Whether next_request would return one."""
        return len(self._in_flight) < self.max_in_flight and (
            self._splitting is not None or bool(self._to_resend)
        )

    @property
    def has_result(self) -> bool:
        """Whether pop_result would return one."""
        return bool(self._batches) and self._batches[0].is_complete

    @property
    def is_sent(self) -> bool:
        """Whether nothing is left to send, now and later."""
        return self._input_ended and self._splitting is None and not self._to_resend

    @property
    def is_finished(self) -> bool:
        """Whether every result has been popped and none will follow."""
        return self._input_ended and not self._batches

    def add_batch(self, x: ArrayLike) -> None:
        """Take the next item of the input; what is wrong with it becomes its result, in its turn."""
        assert self._splitting is None, "the batch before is not sent"
        batch = _Batch(next(self._batch_indices), None, iter(()), 0)
        self._batches.append(batch)
        try:
            batch.rows, single = as_rows(x)
            ranges = pieces_of(self.question, batch.rows, self.message_bytes)
        except InvalidInput as error:
            self._fail(batch, error)
            return
        batch.ranges, batch.pieces_left = iter(ranges), len(ranges)
        batch.joiner = joiner_of(self.question, len(batch.rows), single)
        self._splitting = batch

    def end_input(self, error: BaseException | None = None) -> None:
        """Take note that the input has ended, by itself or with *error*."""
        self._input_ended = True
        self._input_error = error

    def next_request(self) -> bytes | None:
        """Return the next request to send, or None if there is none or too many are in flight."""
        if not self.has_request:
            return None
        if self._to_resend:
            piece = self._to_resend.popleft()
        else:
            assert self._splitting is not None
            piece = self._next_piece(self._splitting)
        self._in_flight.append(piece)
        return piece.request

    def _next_piece(self, batch: _Batch) -> _Piece:
        assert batch.rows is not None
        start, stop = next(batch.ranges)
        if stop == len(batch.rows):
            self._splitting = None
        request_id = str(next(self._request_ids))
        return _Piece(
            batch, start, stop, request_id, self.question.encode(batch.rows[start:stop], request_id)
        )

    def receive(self, response: AnyResponse) -> None:
        """
        Take the answer to the oldest request in flight.

        Raises Unavailable if the server answers that it is draining, and Overloaded if it says when it will
        be less busy: the request counts as unanswered; see give_up.
        Raises InternalError if the answer belongs to another request.
        """
        if not self._in_flight or response.id != self._in_flight[0].request_id:
            raise InternalError(f"the server at {self.target} answered request {response.id!r} out of turn")
        piece = self._in_flight[0]
        batch = piece.batch
        if response.HasField("error"):
            error = error_from_answer(
                response.error.code,
                response.error.message,
                target=self.target,
                retry_after_ms=response.error.retry_after_ms,
            )
            if error.status == "UNAVAILABLE" and batch.error is None:
                raise error
            if error.retry_after_s is not None and batch.error is None:
                self._refusal = error
                raise error
            self._in_flight.popleft()
            if batch.error is None:
                self._fail(batch, error, piece)
            return
        self._in_flight.popleft()
        if batch.error is not None:
            return
        try:
            batch.joiner.add(response, piece.start, piece.stop)
        except ValueError as error:
            self._fail(batch, InternalError(f"the server at {self.target} sent {error}"), piece)
        else:
            batch.pieces_left -= 1

    def give_up(self, error: NnclientError) -> bool:
        """
        Take *error* as the answer to the oldest request, if receive raised it so that it could be sent again.

        Return whether it was so; any other error is the call's.
        """
        if error is not self._refusal:
            return False
        self._refusal = None
        piece = self._in_flight.popleft()
        self._fail(piece.batch, error, piece)
        return True

    def rewind(self) -> None:
        """Take note that the connection is lost: what is unanswered must be sent again."""
        self._to_resend = deque(
            piece for piece in (*self._in_flight, *self._to_resend) if piece.batch.error is None
        )
        self._in_flight.clear()

    def pop_result(self) -> Result | NnclientError:
        """Return the result of the oldest batch, or the error that took its place."""
        batch = self._batches.popleft()
        if batch.error is not None:
            return batch.error
        result: Result = batch.joiner.result()
        return result

    def raise_input_error(self) -> None:
        """Raise what the input raised, if it did."""
        if self._input_error is not None:
            raise self._input_error

    def _fail(self, batch: _Batch, error: NnclientError, piece: _Piece | None = None) -> None:
        if piece is not None and batch.rows is not None and piece.stop - piece.start < len(batch.rows):
            # A row that the server names is counted from the piece's first.
            error.message = (
                f"in rows {piece.start} to {piece.stop - 1} of x, counted from 0 there: {error.message}"
            )
        error.batch_index = batch.index
        batch.error = error
        if self._splitting is batch:
            # The rest of it need not be asked.
            self._splitting = None


def answer_of(question: AnyQuestion, response: AnyResponse, rows: int, single: bool, target: str) -> Result:
    """Return the result of a batch of *rows* that fitted into one message. Raises InternalError."""
    joiner = joiner_of(question, rows, single)
    try:
        joiner.add(response, 0, rows)
    except ValueError as error:
        raise InternalError(f"the server at {target} sent {error}") from None
    result: Result = joiner.result()
    return result


def pieces_of(question: AnyQuestion, rows: NDArray[Any], message_bytes: int) -> list[tuple[int, int]]:
    """Return ranges of *rows*, each for one request of at most *message_bytes*; see split_rows."""
    return split_rows(rows, question.largest_data_bytes(message_bytes), question.most_rows)


def split_rows(
    rows: NDArray[Any], data_bytes: int, most_rows: int = MAX_ROWS_PER_MESSAGE
) -> list[tuple[int, int]]:
    """
    Return ranges [start, stop) of *rows*, each of at most *data_bytes* and *most_rows*.

    One empty range for no rows. Raises MessageTooLarge if a single row is larger.
    """
    row_bytes = rows.shape[1] * rows.itemsize
    if row_bytes > data_bytes and len(rows):
        raise MessageTooLarge(
            f"one row of x is {row_bytes:,} bytes and a message holds {data_bytes:,}; "
            "raise message_bytes, but not above the server's --max-message-bytes"
        )
    step = min(data_bytes // max(row_bytes, 1), most_rows) or 1
    return [(start, min(start + step, len(rows))) for start in range(0, max(len(rows), 1), step)]
