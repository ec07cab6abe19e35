"""ModelInferRequest bytes -> rows -> ModelInferResponse bytes: one by one, or as a stream."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nnproto.oip import inference_pb2 as pb
from nnserver.api.inference import InferenceLimits, decode
from nnserver.api.message_size import check_answer_size, check_message_size
from nnserver.api.oip_answers import (
    Encoder,
    id_field,
    largest_row_bytes,
    raw_encoder,
    requested_outputs,
    typed_encoder,
)
from nnserver.api.oip_parameters import read_timeout
from nnserver.api.oip_tensors import decode_rows
from nnserver.api.tensors import Array, check_finite
from nnserver.batcher import Job
from nnserver.call import Call, Listener, UnaryListener
from nnserver.engine import Engine, Lane
from nnserver.errors import Draining, status_and_text
from nnserver.repository import Repository

# What Triton puts into every answer of a stream: a request has one answer here, so it is the final one.
_FINAL = pb.ModelInferResponse(
    parameters={"triton_final_response": pb.InferParameter(bool_param=True)}
).SerializeToString()


@dataclass(frozen=True, slots=True)
class Question:
    """What a request asks for, checked: rows for a lane, and how its outputs become an answer."""

    lane: Lane
    x: Array
    id_field: bytes
    timeout_s: float | None
    encode: Encoder


class OipInference:
    """Answers ModelInferRequests with the models of *repository*, run by *engine*."""

    def __init__(
        self,
        repository: Repository,
        engine: Engine,
        limits: InferenceLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._repository = repository
        self._engine = engine
        self._limits = limits
        self._clock = clock

    def start_infer(self, call: Call) -> Listener:
        """Begin a ModelInfer."""
        return UnaryListener(call, self._infer)

    def start_stream(self, call: Call) -> Listener:
        """Begin a ModelStreamInfer."""
        return InferStream(self, call, self._limits.stream_window)

    def examine(self, request: pb.ModelInferRequest, size: int) -> Question:
        """Return what *request*, of *size* bytes, asks for; raises what is wrong with it."""
        limit = self._limits.max_message_bytes
        check_message_size(size, limit)
        model = self._repository.get(request.model_name, request.model_version)
        timeout_s = read_timeout(request.parameters)
        requested = requested_outputs(request, model)
        rows = decode_rows(request, model)
        count = len(rows.x)
        check_answer_size(count, largest_row_bytes(model, requested), len(request.id.encode()), limit)
        if self._limits.reject_nonfinite:
            check_finite(rows.x)
        encoder = raw_encoder if rows.is_raw else typed_encoder
        encode = encoder(model, requested, count, rows.is_row)
        return Question(model.lane, rows.x, id_field(request.id), timeout_s, encode)

    def submit(
        self,
        question: Question,
        call: Call,
        answer: Callable[[bytes], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """Queue the rows of *question*, or raise why they cannot be."""
        deadline = call.deadline
        if question.timeout_s is not None:
            end = self._clock() + question.timeout_s
            deadline = end if deadline is None else min(deadline, end)

        def succeed(y: Array) -> None:
            answer(question.encode(y, [question.id_field])[0])

        self._engine.submit(question.lane, Job(question.x, succeed, fail, call.is_cancelled, deadline))

    def _infer(self, call: Call, message: bytes) -> None:
        def answer(response: bytes) -> None:
            call.reply(response)
            call.finish()

        check_message_size(len(message), self._limits.max_message_bytes)
        request = decode(pb.ModelInferRequest, message)
        self.submit(self.examine(request, len(message)), call, answer, call.fail)


class InferStream:
    """
    Requests of one stream -> responses in the same order, each with its own error if it fails.

    At most *window* requests are taken and not yet answered.
    """

    def __init__(self, inference: OipInference, call: Call, window: int) -> None:
        self._inference = inference
        self._call = call
        self._lock = threading.Lock()
        self._slots: deque[_Slot] = deque()
        self._half_closed = False
        self._draining = False
        call.request(window)

    def on_message(self, message: bytes) -> None:
        slot = _Slot()
        with self._lock:
            if self._draining:
                return  # The end of the stream is on its way and says so.
            self._slots.append(slot)
        request = pb.ModelInferRequest()
        try:
            # Decoded even if it is too large: the error goes with the request's id.
            request = decode(pb.ModelInferRequest, message)
            question = self._inference.examine(request, len(message))
            self._inference.submit(
                question,
                self._call,
                lambda answer: self._fill(slot, _stream_answer(answer)),
                lambda error: self._fill(slot, _error_answer(request, error)),
            )
        except Exception as error:
            self._fill(slot, _error_answer(request, error))

    def on_half_close(self) -> None:
        with self._lock:
            self._half_closed = True
            self._end_if_done()

    def on_cancel(self) -> None:
        pass  # Waiting jobs ask call.is_cancelled() before they cost anything.

    def on_drain(self) -> None:
        with self._lock:
            self._draining = True
            self._end_if_done()

    def _fill(self, slot: _Slot, answer: bytes) -> None:
        """Take the answer of *slot*; send every answer that has none before it missing."""
        # Replying under the lock keeps the order of two threads that answer at once.
        with self._lock:
            slot.answer = answer
            while self._slots and self._slots[0].answer is not None:
                self._call.reply(self._slots[0].answer)
                self._slots.popleft()
                self._call.request(1)
            self._end_if_done()

    def _end_if_done(self) -> None:
        if self._slots:
            return
        if self._half_closed:
            self._call.finish()
        elif self._draining:
            self._call.fail(Draining("the server is draining; send the unanswered requests to another"))


class _Slot:
    """One request of a stream and, once known, its answer."""

    __slots__ = ("answer",)

    def __init__(self) -> None:
        self.answer: bytes | None = None


def _stream_answer(answer: bytes) -> bytes:
    """Return a ModelInferResponse's bytes as the answer to a request of a stream."""
    return pb.ModelStreamInferResponse(
        infer_response=pb.ModelInferResponse.FromString(answer + _FINAL)
    ).SerializeToString()


def _error_answer(request: pb.ModelInferRequest, error: BaseException) -> bytes:
    _, text = status_and_text(error)
    response = pb.ModelStreamInferResponse(error_message=text)
    response.infer_response.id = request.id
    response.infer_response.model_name = request.model_name
    response.infer_response.model_version = request.model_version
    return response.SerializeToString()
