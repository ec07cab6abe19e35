"""nnproto.v1.Inference: PredictRequest bytes -> rows -> PredictResponse bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from nnproto.v1 import inference_pb2 as pb
from nnserver.api.tensors import check_finite, data_type, decode_rows, encode_rows
from nnserver.batcher import Job
from nnserver.call import Call, Method, UnaryListener, unary
from nnserver.engine import Engine
from nnserver.errors import Draining, InvalidArgument, MessageTooLarge, status_and_text
from nnserver.repository import Repository, ServedModel

Array = NDArray[Any]

SERVICE = "nnproto.v1.Inference"

M = TypeVar("M", bound=Message)

_KINDS = frozenset(pb.OutputKind.values())

# Bytes of a response besides its rows and id, at most: names, version, the tensor's head.
_ENVELOPE_BYTES = 256


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

    def methods(self) -> dict[str, Method]:
        """Return the service's methods by path."""
        all_methods = (
            Method(f"/{SERVICE}/Predict", lambda call: UnaryListener(call, self._predict)),
            Method(f"/{SERVICE}/PredictStream", self._start_stream, client_streams=True, server_streams=True),
            unary(f"/{SERVICE}/ListModels", self._list_models),
            unary(f"/{SERVICE}/GetModel", self._get_model),
        )
        return {method.path: method for method in all_methods}

    def _predict(self, call: Call, message: bytes) -> None:
        def succeed(response: pb.PredictResponse) -> None:
            call.reply(response.SerializeToString())
            call.finish()

        self.check_size(message)
        self.submit(call, decode(pb.PredictRequest, message), succeed, call.fail)

    def _start_stream(self, call: Call) -> PredictStream:
        return PredictStream(self, call, self._limits.stream_window)

    def check_size(self, message: bytes) -> None:
        """Raise MessageTooLarge if *message* has more bytes than this server takes."""
        limit = self._limits.max_message_bytes
        if len(message) > limit:
            raise MessageTooLarge(
                f"the message has {len(message)} bytes; this server takes {limit} (max_message_bytes, "
                "--max-message-bytes); send fewer rows a message"
            )

    def submit(
        self,
        call: Call,
        request: pb.PredictRequest,
        succeed: Callable[[pb.PredictResponse], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        """Check *request* and queue its rows; raises what is wrong with it."""
        model = self._repository.get(request.model, request.version)
        mlp = model.mlp
        x = decode_rows(request.inputs, model.name, mlp.n_in, mlp.dtype)
        if self._limits.reject_nonfinite:
            check_finite(x)
        encode = self._encoder(model, request, len(x))

        def on_outputs(y: Array) -> None:
            succeed(encode(y))

        self._engine.submit(model.lane, Job(x, on_outputs, fail, call.is_cancelled, call.deadline))

    def _encoder(
        self, model: ServedModel, request: pb.PredictRequest, rows: int
    ) -> Callable[[Array], pb.PredictResponse]:
        """Return outputs (rows, n_out) -> response, for the kind of output that was asked for."""
        kind, top_k, request_id = request.output, request.top_k, request.id
        is_row = len(request.inputs.shape) == 1
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
            self._check_answer_size(rows, _labels_bytes(k, model.max_label_bytes, n_classes), request_id)
        else:
            if top_k:
                raise InvalidArgument(f"top_k is {top_k}; it must be 0 unless output is OUTPUT_KIND_LABELS")
            self._check_answer_size(rows, mlp.n_out * mlp.dtype.itemsize, request_id)

        def encode(y: Array) -> pb.PredictResponse:
            response = pb.PredictResponse(model=model.name, version=model.version, id=request_id)
            if kind == pb.OUTPUT_KIND_LABELS:
                _encode_labels(model, y, k, response)
            else:
                if kind == pb.OUTPUT_KIND_PROBABILITIES:
                    y = mlp.probabilities_from(y)
                encode_rows(y, is_row, response.outputs)
            return response

        return encode

    def _check_answer_size(self, rows: int, row_bytes: int, request_id: str) -> None:
        """Refuse before computing what could not be sent: a small request can ask for a large answer."""
        limit = self._limits.max_message_bytes
        size = rows * row_bytes + len(request_id.encode()) + _ENVELOPE_BYTES
        if size > limit:
            raise MessageTooLarge(
                f"the answer to {rows} rows would have about {size} bytes; this server sends "
                f"{limit} (max_message_bytes, --max-message-bytes); send fewer rows a message"
            )

    def _list_models(self, message: bytes) -> bytes:
        decode(pb.ListModelsRequest, message)
        return pb.ListModelsResponse(models=map(describe, self._repository)).SerializeToString()

    def _get_model(self, message: bytes) -> bytes:
        request = decode(pb.GetModelRequest, message)
        return describe(self._repository.get(request.name, request.version)).SerializeToString()


@dataclass(slots=True, eq=False)
class _Slot:
    """One request of a stream and, once known, its answer."""

    request_id: str = ""
    answer: bytes | None = None


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
        slot = _Slot()
        with self._lock:
            if self._draining:
                return  # The end of the stream is on its way and says so.
            self._slots.append(slot)
        try:
            # Decoded even if it is too large: the error goes with the request's id.
            request = decode(pb.PredictRequest, message)
            slot.request_id = request.id
            self._api.check_size(message)
            self._api.submit(
                self._call,
                request,
                lambda response: self._answer(slot, response),
                lambda error: self._answer(slot, _error_response(slot.request_id, error)),
            )
        except Exception as error:
            self._answer(slot, _error_response(slot.request_id, error))

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

    def _answer(self, slot: _Slot, response: pb.PredictResponse) -> None:
        """Fill *slot*; send every answer that has none before it missing."""
        message = response.SerializeToString()
        # Replying under the lock keeps the order of two threads that answer at once.
        with self._lock:
            slot.answer = message
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
    """Return the message; raises InvalidArgument if the bytes are not one."""
    try:
        return kind.FromString(message)
    except DecodeError:
        raise InvalidArgument(
            f"the message's {len(message)} bytes are not a {kind.DESCRIPTOR.full_name}"
        ) from None


def _labels_bytes(k: int, max_label_bytes: int, n_classes: int) -> int:
    """Return what the RowLabels of one row takes in a response, at most."""
    label = 1 + _varint_bytes(max_label_bytes) + max_label_bytes
    index, score = 1 + _varint_bytes(n_classes), 9
    entry = label + index + score
    row = k * (1 + _varint_bytes(entry) + entry)
    return 1 + _varint_bytes(row) + row


def _varint_bytes(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def _encode_labels(model: ServedModel, y: Array, k: int, response: pb.PredictResponse) -> None:
    indices, scores = model.mlp.top_labels_from(y, k)
    names = model.mlp.class_labels
    for row_indices, row_scores in zip(indices.tolist(), scores.tolist(), strict=True):
        top = response.labels.add().top
        for index, score in zip(row_indices, row_scores, strict=True):
            top.add(label=names[index], index=index, score=score)


def _error_response(request_id: str, error: BaseException) -> pb.PredictResponse:
    status, text = status_and_text(error)
    return pb.PredictResponse(id=request_id, error=pb.Error(code=int(status), message=text))
