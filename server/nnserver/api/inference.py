"""nnproto.v1.Inference: PredictRequest bytes -> rows -> PredictResponse bytes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from nnserver.api.forms import Form, Kind, Known, Templates
from nnserver.api.message_size import check_answer_size, check_ballast, check_message_size
from nnserver.api.ordered_stream import OrderedStream, Slot
from nnserver.api.tensors import check_finite, data_type, decode_rows
from nnserver.batcher import Caller, Job, Rows
from nnserver.call import Call, Method, UnaryListener, unary
from nnserver.engine import Engine, Lane
from nnserver.errors import InvalidArgument, blame_model
from nnserver.repository import Repository, ServedModel
from nnserver.request_watch import RequestWatch

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
    """
    The service nnproto.v1.Inference over the models of *repository*, run by *engine*.

    watch: who wants to hear of requests, if anybody does.
    """

    def __init__(
        self,
        repository: Repository,
        engine: Engine,
        limits: InferenceLimits,
        watch: RequestWatch | None = None,
    ) -> None:
        self._repository = repository
        self._engine = engine
        self._limits = limits
        self._watch = watch
        # Each kind has its own, so that requests of one form are of one kind.
        self._templates = {kind: Templates(repository) for kind in (Kind.PREDICT, Kind.PREDICT_STREAM)}
        # message -> what it asks for, if one like it has been seen
        self._recall: dict[str, Callable[[bytes], Known | None]] = {
            kind: self._recall_finite(templates) if limits.reject_nonfinite else templates.find
            for kind, templates in self._templates.items()
        }

    def methods(self) -> dict[str, Method]:
        """Return the service's methods by path."""
        all_methods = (
            Method(
                f"/{SERVICE}/Predict",
                lambda call: UnaryListener(call, self._predict),
                handle_all=self.predict_all,
            ),
            Method(f"/{SERVICE}/PredictStream", self._start_stream, client_streams=True, server_streams=True),
            unary(f"/{SERVICE}/ListModels", self._list_models),
            unary(f"/{SERVICE}/GetModel", self._get_model),
        )
        return {method.path: method for method in all_methods}

    def _predict(self, call: Call, message: bytes) -> None:
        self.predict_all([(call, message)])

    def predict_all(self, requests: Sequence[tuple[Caller, bytes]], kind: str = Kind.PREDICT) -> None:
        """Queue the rows of all *requests*, those for one model at once; tell who waits what is wrong."""
        jobs: dict[Lane, list[Job]] = {}
        recall, watch = self._recall[kind], self._watch
        began = watch.clock() if watch else 0.0
        for caller, message in requests:
            try:
                form, rows, note = recall(message) or self._examine(message, kind)
            except Exception as error:
                if watch:
                    watch.refused(kind, caller, error, began)
                caller.fail(error)
                continue
            lane = form.model.lane
            if lane in jobs:
                jobs[lane].append(Job(form, rows, caller, note))
            else:
                jobs[lane] = [Job(form, rows, caller, note)]
        if watch:
            watch.decoded(jobs, began, len(requests))
        for lane, together in jobs.items():
            self._engine.submit_all(lane, together)

    def _start_stream(self, call: Call) -> AnswerStream:
        handle_all = partial(self.predict_all, kind=Kind.PREDICT_STREAM)
        return AnswerStream(handle_all, pb.PredictRequest, call, self._limits.stream_window)

    def _recall_finite(self, templates: Templates) -> Callable[[bytes], Known | None]:
        def recall(message: bytes) -> Known | None:
            known = templates.find(message)
            if known is not None:
                check_rows_finite(*known[:2])
            return known

        return recall

    def _examine(self, message: bytes, kind: str) -> Known:
        """Return what *message*, which is unlike earlier ones, asks for; raises what is wrong with it."""
        check_message_size(len(message), self._limits.max_message_bytes)
        request = decode(pb.PredictRequest, message)
        generation = self._repository.generation
        model = self._repository.get(request.model, request.version)
        mlp = model.mlp
        try:
            x = decode_rows(request.inputs, f"model '{model.name}'", mlp.n_in, mlp.dtype)
            check_ballast(len(message), x.size)
            if self._limits.reject_nonfinite:
                check_finite(x)
            form = Form(kind, model, len(x), x.nbytes, self._encoder(model, request, len(x)))
        except Exception as error:
            blame_model(error, model.name, model.version)
            raise
        if request.inputs.dtype == data_type(mlp.dtype) and sys.byteorder == "little":
            self._templates[kind].learn(message, form, generation)
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


class AnswerStream(OrderedStream):
    """
    Requests of one stream -> a response each, in order, with an error if it fails.

    handle_all: sees to the answers.  kind: of the requests, for their ids.
    """

    def __init__(
        self,
        handle_all: Callable[[Sequence[tuple[Caller, bytes]]], None],
        kind: type[pb.PredictRequest] | type[pb.DifferentiateRequest],
        call: Call,
        window: int,
    ) -> None:
        self._handle_all = handle_all
        self._kind = kind
        super().__init__(call, window)

    def take(self, requests: Sequence[tuple[Slot, bytes]]) -> None:
        self._handle_all(requests)

    def wrap(self, answer: bytes) -> bytes:
        return answer

    def error_answer(self, message: bytes, error: BaseException) -> bytes:
        try:
            request_id = decode(self._kind, message).id
        except InvalidArgument:
            request_id = ""
        return error_answer(id_field(request_id), error)


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


def check_rows_finite(form: Form, rows: Rows) -> None:
    """Raise InvalidArgument unless all *rows* of a recognised request are finite."""
    model = form.model
    try:
        check_finite(np.frombuffer(rows, model.mlp.dtype).reshape(-1, model.mlp.n_in))
    except InvalidArgument as error:
        blame_model(error, model.name, model.version)
        raise


def decode(kind: type[M], message: bytes) -> M:
    """Return the message; raises InvalidArgument if the bytes are not one, or would be too many objects."""
    refuse_crumbs(kind, message)
    try:
        return kind.FromString(message)
    except DecodeError:
        raise InvalidArgument(
            f"the message's {len(message)} bytes are not a {kind.DESCRIPTOR.full_name}"
        ) from None
