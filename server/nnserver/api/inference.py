"""nnproto.v1.Inference: PredictRequest bytes -> rows -> PredictResponse bytes."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from nnproto.v1 import inference_pb2 as pb
from nnserver.api.answers import (
    Encoder,
    error_answer,
    id_field,
    labels_encoder,
    largest_labels_bytes,
    tensor_encoder,
)
from nnserver.api.crumbs import refuse_crumbs
from nnserver.api.forms import Form, Known, Templates
from nnserver.api.message_size import check_answer_size, check_message_size
from nnserver.api.tensors import check_finite, data_type, decode_rows
from nnserver.batcher import Caller, Job
from nnserver.call import Call, Method, Requests, UnaryListener, unary
from nnserver.engine import Engine, Lane
from nnserver.errors import Draining, InvalidArgument
from nnserver.repository import Repository, ServedModel

SERVICE = "nnproto.v1.Inference"

M = TypeVar("M", bound=Message)

_KINDS = frozenset(pb.OutputKind.values())


@dataclass(frozen=True, slots=True)
class InferenceLimits:
    """What the api takes: see the settings of the same names."""

    max_message_bytes: int = 16 << 20
    stream_window: int = 64
    reject_nonfinite: bool = False


class InferenceApi:
    """The service nnproto.v1.Inference over the models of *repository*, run by *engine*."""

    def __init__(self, repository: Repository, engine: Engine, limits: InferenceLimits) -> None:
        self._repository = repository
        self._engine = engine
        self._limits = limits
        self._templates = Templates(repository)
        # message -> what it asks for, if one like it has been seen
        self.recall: Callable[[bytes], Known | None] = self._templates.find
        if limits.reject_nonfinite:
            self.recall = self._recall_finite

    def methods(self) -> dict[str, Method]:
        """Return the service's methods by path."""
        all_methods = (
            Method(
                f"/{SERVICE}/Predict",
                lambda call: UnaryListener(call, self._predict),
                handle_all=self._predict_all,
            ),
            Method(f"/{SERVICE}/PredictStream", self._start_stream, client_streams=True, server_streams=True),
            unary(f"/{SERVICE}/ListModels", self._list_models),
            unary(f"/{SERVICE}/GetModel", self._get_model),
        )
        return {method.path: method for method in all_methods}

    def _predict(self, call: Call, message: bytes) -> None:
        self._predict_all([(call, message)])

    def _predict_all(self, requests: Requests) -> None:
        """Queue the rows of all *requests*, those for one model at once."""
        jobs: dict[Lane, list[Job]] = {}
        recall = self.recall
        for call, message in requests:
            try:
                known = recall(message)
                if known is None:
                    check_message_size(len(message), self._limits.max_message_bytes)
                    known = self.examine(decode(pb.PredictRequest, message), message)
            except Exception as error:
                call.fail(error)
                continue
            add(jobs, known, call)
        self.submit_all(jobs)

    def submit_all(self, jobs: dict[Lane, list[Job]]) -> None:
        """Queue *jobs*, by the way they go; the callers of those that cannot be are told."""
        for lane, together in jobs.items():
            self._engine.submit_all(lane, together)

    def _start_stream(self, call: Call) -> PredictStream:
        return PredictStream(self, call, self._limits.stream_window)

    def _recall_finite(self, message: bytes) -> Known | None:
        known = self._templates.find(message)
        if known is not None:
            mlp = known[0].model.mlp
            check_finite(np.frombuffer(known[1], mlp.dtype).reshape(-1, mlp.n_in))
        return known

    def examine(self, request: pb.PredictRequest, message: bytes) -> Known:
        """Return what *request*, parsed from *message*, asks for; raises what is wrong with it."""
        check_message_size(len(message), self._limits.max_message_bytes)
        generation = self._repository.generation
        model = self._repository.get(request.model, request.version)
        mlp = model.mlp
        x = decode_rows(request.inputs, model.name, mlp.n_in, mlp.dtype)
        if self._limits.reject_nonfinite:
            check_finite(x)
        form = Form(model, len(x), x.nbytes, self._encoder(model, request, len(x)))
        if request.inputs.dtype == data_type(mlp.dtype) and sys.byteorder == "little":
            self._templates.learn(message, form, generation)
        return form, x, id_field(request.id)

    def _encoder(self, model: ServedModel, request: pb.PredictRequest, rows: int) -> Encoder:
        """Return what answers *request* with the kind of output that it asks for."""
        kind, top_k, request_id = request.output, request.top_k, request.id
        mlp = model.mlp
        if kind not in _KINDS:
            raise InvalidArgument(
                f"output is {kind}; expected OUTPUT_KIND_OUTPUTS, OUTPUT_KIND_PROBABILITIES "
                "or OUTPUT_KIND_LABELS"
            )
        if kind == pb.OUTPUT_KIND_LABELS:
            n_classes = len(mlp.class_labels)
            if top_k > n_classes:
                raise InvalidArgument(f"top_k is {top_k}; model '{model.name}' has {n_classes} classes")
            k = top_k or 1
            self._check_answer_size(rows, largest_labels_bytes(model, k), request_id)
            return labels_encoder(model, rows, k)
        if top_k:
            raise InvalidArgument(f"top_k is {top_k}; it must be 0 unless output is OUTPUT_KIND_LABELS")
        self._check_answer_size(rows, mlp.n_out * mlp.dtype.itemsize, request_id)
        is_row = len(request.inputs.shape) == 1
        as_probabilities = kind == pb.OUTPUT_KIND_PROBABILITIES
        return tensor_encoder(model, rows, is_row=is_row, as_probabilities=as_probabilities)

    def _check_answer_size(self, rows: int, row_bytes: int, request_id: str) -> None:
        check_answer_size(rows, row_bytes, len(request_id.encode()), self._limits.max_message_bytes)

    def _list_models(self, message: bytes) -> bytes:
        decode(pb.ListModelsRequest, message)
        return pb.ListModelsResponse(models=map(describe, self._repository)).SerializeToString()

    def _get_model(self, message: bytes) -> bytes:
        request = decode(pb.GetModelRequest, message)
        return describe(self._repository.get(request.name, request.version)).SerializeToString()


class _Slot:
    """One request of a stream and, once known, its answer: who waits for the request's job."""

    __slots__ = ("_stream", "answer_bytes", "deadline", "id_field", "is_cancelled")

    def __init__(self, stream: PredictStream, call: Call) -> None:
        self._stream = stream
        self.id_field = b""
        self.answer_bytes: bytes | None = None
        self.deadline = call.deadline
        self.is_cancelled = call.is_cancelled

    def answer(self, message: bytes) -> PredictStream:
        self.answer_bytes = message
        return self._stream

    def fail(self, error: BaseException) -> None:
        self.answer_bytes = error_answer(self.id_field, error)
        self._stream.settle()


class PredictStream:
    """
    Requests of one stream -> responses in the same order, each with its own error if it fails.

    At most *window* requests are taken and not yet answered.
    """

    def __init__(self, api: InferenceApi, call: Call, window: int) -> None:
        self._api = api
        self._call = call
        self._lock = threading.Lock()
        self._slots: deque[_Slot] = deque()
        self._half_closed = False
        self._draining = False
        call.request(window)

    def on_message(self, message: bytes) -> None:
        self.on_messages((message,))

    def on_messages(self, messages: Sequence[bytes]) -> None:
        """Queue the rows of all *messages*, those for one model at once."""
        slots = [_Slot(self, self._call) for _ in messages]
        with self._lock:
            if self._draining:
                return  # The end of the stream is on its way and says so.
            self._slots += slots
        api = self._api
        recall = api.recall
        jobs: dict[Lane, list[Job]] = {}
        for slot, message in zip(slots, messages, strict=True):
            try:
                known = recall(message)
                if known is None:
                    # Parsed even if it is too large: the error goes with the request's id.
                    request = decode(pb.PredictRequest, message)
                    slot.id_field = id_field(request.id)
                    known = api.examine(request, message)
            except Exception as error:
                slot.fail(error)
                continue
            slot.id_field = known[2]
            add(jobs, known, slot)
        api.submit_all(jobs)

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

    def settle(self) -> None:
        """Send every answer that has none before it missing."""
        call, slots = self._call, self._slots
        # Replying under the lock keeps the order of two threads that answer at once.
        with self._lock:
            ready: list[bytes] = []
            while slots and (answer := slots[0].answer_bytes) is not None:
                ready.append(answer)
                slots.popleft()
            if ready:
                call.reply_all(ready)
                call.request(len(ready))
                self._end_if_done()

    def _end_if_done(self) -> None:
        if self._slots:
            return
        if self._half_closed:
            self._call.finish()
        elif self._draining:
            self._call.fail(Draining("the server is draining; send the unanswered requests to another"))


def add(jobs: dict[Lane, list[Job]], known: Known, caller: Caller) -> None:
    """Add the job of *known* to *jobs*, by the way it goes."""
    form, rows, note = known
    lane = form.model.lane
    if lane in jobs:
        jobs[lane].append(Job(form, rows, caller, note))
    else:
        jobs[lane] = [Job(form, rows, caller, note)]


def describe(model: ServedModel) -> pb.Model:
    """Return a served model's description."""
    mlp = model.mlp
    dtype = data_type(mlp.dtype)
    return pb.Model(
        name=model.name,
        version=model.version,
        dtype=dtype,
        inputs=pb.TensorSpec(shape=(-1, mlp.n_in), dtype=dtype),
        outputs=pb.TensorSpec(shape=(-1, mlp.n_out), dtype=dtype),
        layers=[
            pb.Layer(
                n_in=layer.n_in,
                n_out=layer.n_out,
                activation=layer.activation,
                alpha=() if layer.alpha is None else np.atleast_1d(layer.alpha).tolist(),
            )
            for layer in mlp.layers
        ],
        labels=mlp.labels or (),
        feature_names=mlp.feature_names or (),
        parameter_count=mlp.parameter_count,
    )


def decode(kind: type[M], message: bytes) -> M:
    """Return the message; raises InvalidArgument if the bytes are not one, or would be too many objects."""
    refuse_crumbs(kind, message)
    try:
        return kind.FromString(message)
    except DecodeError:
        raise InvalidArgument(
            f"the message's {len(message)} bytes are not a {kind.DESCRIPTOR.full_name}"
        ) from None
