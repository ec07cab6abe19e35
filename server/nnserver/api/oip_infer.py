"""ModelInferRequest bytes -> rows -> ModelInferResponse bytes: one by one, or as a stream."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from nnproto.oip import inference_pb2 as pb
from nnserver.api import wire
from nnserver.api.forms import Form
from nnserver.api.inference import InferenceLimits, decode
from nnserver.api.message_size import check_answer_size, check_message_size
from nnserver.api.oip_answers import (
    id_field,
    largest_row_bytes,
    raw_encoder,
    requested_outputs,
    typed_encoder,
)
from nnserver.api.oip_parameters import read_timeout
from nnserver.api.oip_tensors import decode_rows
from nnserver.api.tensors import check_finite
from nnserver.batcher import Caller, Job
from nnserver.call import Call, Listener
from nnserver.engine import Engine
from nnserver.errors import Draining, status_and_text
from nnserver.repository import Repository

# What Triton puts into every answer of a stream: a request has one answer here, so it is the final one.
_FINAL = pb.ModelInferResponse(
    parameters={"triton_final_response": pb.InferParameter(bool_param=True)}
).SerializeToString()
_ANSWER = pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER


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

    def infer(self, call: Call, message: bytes) -> None:
        """Answer one ModelInferRequest."""
        check_message_size(len(message), self._limits.max_message_bytes)
        self.submit(decode(pb.ModelInferRequest, message), len(message), call)

    def start_stream(self, call: Call) -> Listener:
        """Begin a ModelStreamInfer."""
        return InferStream(self, call, self._limits.stream_window)

    def submit(self, request: pb.ModelInferRequest, size: int, caller: Caller) -> None:
        """Check *request*, of *size* bytes, and queue its rows; raises what is wrong with it."""
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
        form = Form(model, count, rows.x.nbytes, encoder(model, requested, count, rows.is_row))
        if timeout_s is not None:
            caller = _Hurried(caller, self._clock() + timeout_s)
        self._engine.submit(model.lane, Job(form, rows.x, caller, id_field(request.id)))


class _Hurried:
    """A caller that waits no longer than *end*, whatever its call's deadline is."""

    __slots__ = ("answer", "deadline", "fail", "is_cancelled")

    def __init__(self, caller: Caller, end: float) -> None:
        self.deadline: float | None = end if caller.deadline is None else min(caller.deadline, end)
        self.answer = caller.answer
        self.fail = caller.fail
        self.is_cancelled = caller.is_cancelled


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
        slot = _Slot(self, self._call)
        with self._lock:
            if self._draining:
                return  # The end of the stream is on its way and says so.
            self._slots.append(slot)
        try:
            # Decoded even if it is too large: the error goes with the request's id.
            slot.request = decode(pb.ModelInferRequest, message)
            self._inference.submit(slot.request, len(message), slot)
        except Exception as error:
            slot.fail(error)

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

    def fill(self, slot: _Slot, answer: bytes) -> None:
        """Take the answer of *slot*; send every answer that has none before it missing."""
        # Replying under the lock keeps the order of two threads that answer at once.
        with self._lock:
            slot.answer_bytes = answer
            while self._slots and (ready := self._slots[0].answer_bytes) is not None:
                self._call.reply(ready)
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
    """One request of a stream and, once known, its answer: who waits for the request's job."""

    __slots__ = ("_stream", "answer_bytes", "deadline", "is_cancelled", "request")

    def __init__(self, stream: InferStream, call: Call) -> None:
        self._stream = stream
        self.answer_bytes: bytes | None = None
        self.deadline = call.deadline
        self.is_cancelled = call.is_cancelled
        # Empty until it is decoded.
        self.request = pb.ModelInferRequest()

    def answer(self, message: bytes) -> None:
        """Take a ModelInferResponse's bytes; as the field of another message, with one more parameter."""
        size = len(message) + len(_FINAL)
        self._stream.fill(self, b"".join((wire.bytes_field(_ANSWER, size), message, _FINAL)))

    def fail(self, error: BaseException) -> None:
        """Say that there is no answer to this request; the stream lives on."""
        _, text = status_and_text(error)
        response = pb.ModelStreamInferResponse(error_message=text)
        response.infer_response.id = self.request.id
        response.infer_response.model_name = self.request.model_name
        response.infer_response.model_version = self.request.model_version
        self._stream.fill(self, response.SerializeToString())
