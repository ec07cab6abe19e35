"""ModelInferRequest bytes -> rows -> ModelInferResponse bytes: one by one, or as a stream."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from nnproto.oip import inference_pb2 as pb
from nnserver.api import wire
from nnserver.api.forms import Form, Kind, Location, Templates
from nnserver.api.inference import InferenceLimits, check_rows_finite, decode
from nnserver.api.intake import queue_all
from nnserver.api.message_size import check_answer_size, check_ballast, check_message_size
from nnserver.api.oip_answers import (
    head_bytes,
    id_field,
    largest_row_bytes,
    raw_encoder,
    requested_outputs,
    typed_encoder,
)
from nnserver.api.oip_parameters import read_timeout
from nnserver.api.oip_tensors import OIP_NAMES, decode_rows
from nnserver.api.ordered_stream import OrderedStream, Slot
from nnserver.api.tensors import check_finite
from nnserver.batcher import Caller, Job
from nnserver.call import Call, Listener, Metadata
from nnserver.engine import Engine, Lane
from nnserver.errors import InvalidArgument, blame_model, retry_after_ms, status_and_text
from nnserver.repository import Repository
from nnserver.request_watch import RequestWatch

# What Triton puts into every answer of a stream: a request has one answer here, so it is the final one.
_FINAL = pb.ModelInferResponse(
    parameters={"triton_final_response": pb.InferParameter(bool_param=True)}
).SerializeToString()
_ANSWER = pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER

_ID = pb.ModelInferRequest.ID_FIELD_NUMBER
_RAW = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER


class OipInference:
    """Answers ModelInferRequests with the models of *repository*, run by *engine*."""

    def __init__(
        self,
        repository: Repository,
        engine: Engine,
        limits: InferenceLimits,
        clock: Callable[[], float] = time.monotonic,
        watch: RequestWatch | None = None,
    ) -> None:
        self._repository = repository
        self._engine = engine
        self._limits = limits
        self._clock = clock
        self._watch = watch
        self._templates = {kind: Templates(repository, locate) for kind in (Kind.INFER, Kind.INFER_STREAM)}

    def start_stream(self, call: Call) -> Listener:
        """Begin a ModelStreamInfer."""
        return InferStream(self, call, self._limits.stream_window)

    def infer(self, caller: Caller, message: bytes) -> None:
        """Queue the rows of a ModelInferRequest for *caller*."""
        self.infer_all([(caller, message)])

    def infer_all(self, requests: Sequence[tuple[Caller, bytes]], kind: str = Kind.INFER) -> None:
        """Queue the rows of all *requests*, those for one model at once; tell who waits what is wrong."""
        queue_all(self._engine, self._watch, kind, requests, self._job)

    def _job(self, message: bytes, caller: Caller, kind: str) -> tuple[Lane, Job]:
        """Return what is to be done for *message*, and where; raises what is wrong with it."""
        known = self._templates[kind].find(message)
        if known is None:
            return self._examined(message, caller, kind)
        form, rows, note = known
        if self._limits.reject_nonfinite:
            check_rows_finite(form, rows)
        return form.model.lane, Job(form, rows, caller, note)

    def _examined(self, message: bytes, caller: Caller, kind: str) -> tuple[Lane, Job]:
        """As _job, for a request unlike those that were seen before."""
        limit = self._limits.max_message_bytes
        check_message_size(len(message), limit)
        request = decode(pb.ModelInferRequest, message)
        generation = self._repository.generation
        model = self._repository.get(request.model_name, request.model_version)
        try:
            timeout_s = read_timeout(request.parameters)
            requested = requested_outputs(request, model)
            rows = decode_rows(request, model)
            check_ballast(len(message), rows.x.size)
            count = len(rows.x)
            check_answer_size(
                count, largest_row_bytes(model, requested), head_bytes(model, requested, request.id), limit
            )
            if self._limits.reject_nonfinite:
                check_finite(rows.x)
            encoder = raw_encoder if rows.is_raw else typed_encoder
            encode = encoder(model, requested, count, rows.is_row)
        except Exception as error:
            blame_model(error, model.name, model.version)
            raise
        form = Form(kind, model, count, rows.x.nbytes, encode)
        if timeout_s is not None:
            caller = _Hurried(caller, self._clock() + timeout_s)
        elif rows.is_raw and request.inputs[0].datatype == OIP_NAMES[model.mlp.dtype]:
            self._templates[kind].learn(message, form, generation)
        return model.lane, Job(form, rows.x, caller, id_field(request.id))


class _Hurried:
    """A caller that waits no longer than *end*, whatever its call's deadline is."""

    __slots__ = ("_caller", "answer", "deadline", "fail", "is_cancelled", "is_patient", "origin")

    def __init__(self, caller: Caller, end: float) -> None:
        self.deadline: float | None = end if caller.deadline is None else min(caller.deadline, end)
        self._caller = caller
        self.answer = caller.answer
        self.fail = caller.fail
        self.is_cancelled = caller.is_cancelled
        self.is_patient = caller.is_patient
        self.origin = caller.origin

    @property
    def metadata(self) -> Metadata:
        return self._caller.metadata


class InferStream(OrderedStream):
    """ModelInferRequests of one stream -> a ModelStreamInferResponse each, in the same order."""

    def __init__(self, inference: OipInference, call: Call, window: int) -> None:
        self._inference = inference
        super().__init__(call, window)

    def take(self, requests: Sequence[tuple[Slot, bytes]]) -> None:
        self._inference.infer_all(requests, Kind.INFER_STREAM)

    def wrap(self, answer: bytes) -> bytes:
        """Return a ModelInferResponse's bytes, with one more parameter, as the field of another message."""
        return b"".join((wire.bytes_field(_ANSWER, len(answer) + len(_FINAL)), answer, _FINAL))

    def error_answer(self, message: bytes, error: BaseException) -> bytes:
        _, text = status_and_text(error)
        response = pb.ModelStreamInferResponse(error_message=text)
        try:
            request = decode(pb.ModelInferRequest, message)
        except InvalidArgument:
            return response.SerializeToString()
        response.infer_response.id = request.id
        response.infer_response.model_name = request.model_name
        response.infer_response.model_version = request.model_version
        pause_ms = retry_after_ms(error)
        if pause_ms is not None:
            response.infer_response.parameters["retry_after_ms"].int64_param = pause_ms
        return response.SerializeToString()


def locate(message: bytes) -> Location | None:
    """Return where a ModelInferRequest's id and rows are, if its rows are raw and come last."""
    try:
        fields = list(wire.fields(message, 0, len(message)))
    except ValueError:
        return None
    ids = [field for field in fields if field.number == _ID]
    if len(ids) > 1 or not all(field.is_bytes for field in ids) or sys.byteorder != "little":
        return None
    if not fields or [field for field in fields if field.number == _RAW] != fields[-1:]:
        return None
    return (ids[0] if ids else None), fields[-1]
