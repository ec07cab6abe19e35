"""An input in, nothing out if the decoders bore it: what is answered, and with what, is what must be."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from google.protobuf import descriptor_pool
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from numpy.typing import NDArray
from support.calls import FakeCall
from support.oip import request_for as oip_request_for
from support.oip import tensor_of
from support.serving import echo_mlp, request_for, rows_of, served

from fuzz.decoder_inputs import MOST_BYTES, first_messages
from fuzz.decoder_reference import (
    Models,
    Question,
    Refused,
    count_fields,
    has_group,
    parses,
    read_oip,
    read_own,
    top_fields,
)
from nncore.classification import top_classes
from nnproto.oip import inference_pb2 as oip
from nnproto.v1 import inference_pb2 as own
from nnserver.api import crumbs, wire
from nnserver.api.health import HealthApi
from nnserver.api.inference import InferenceApi, InferenceLimits
from nnserver.api.oip import POOL, OipApi
from nnserver.api.oip_infer import OipInference
from nnserver.api.reflection import ReflectionApi
from nnserver.batcher import Job, QueueLimits
from nnserver.call import Method
from nnserver.catalog import Catalog
from nnserver.engine import Engine, Lane
from nnserver.errors import InvalidArgument, ServerError, Status
from nnserver.repository import Repository

Array = NDArray[Any]

# Less than inputs may have, so that some run into it; answers of labels are larger than their requests.
LIMIT = 1500
# Of processor time; the longest that was seen is a hundredth of it.
INPUT_LIMIT_S = 1.0
# Of an error's text: it is to fit into a header.
TEXT_LIMIT = 2000
# What is large enough to be looked through, and how many fields it may have, so that small inputs meet both.
CRUMBS_UNCHECKED, CRUMBS_FIELDS, CRUMBS_SHAPE = 0, 12, 20

_OWN, _OIP = "/nnproto.v1.Inference/", "/inference.GRPCInferenceService/"
# Every method but those of inference itself, and what it takes.
METHODS: dict[str, type[Message]] = {
    _OWN + "ListModels": own.ListModelsRequest,
    _OWN + "GetModel": own.GetModelRequest,
    **{
        f"{_OIP}{name}": getattr(oip, f"{name}Request")
        for name in (
            *("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelConfig"),
            *("ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
        )
    },
    "/grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest,
    "/grpc.health.v1.Health/Watch": health_pb2.HealthCheckRequest,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": reflection_pb2.ServerReflectionRequest,
}
# Unary and stream of both services, twice as often as each of the others.
_INFERENCE_WAYS = 8
WAYS = _INFERENCE_WAYS + len(METHODS)

# UNKNOWN: see _Told.
_REFUSALS = frozenset((Status.INVALID_ARGUMENT, Status.NOT_FOUND, Status.RESOURCE_EXHAUSTED, Status.UNKNOWN))
_BYSTANDER_ROWS = np.array([[7, -8, 9]], np.float32)


class Failure(Exception):
    """Something did not hold."""


class _Caller:
    """Who waits for one request."""

    __slots__ = ("deadline", "found")
    origin = None
    is_patient = False
    metadata = ()

    def __init__(self) -> None:
        self.deadline: float | None = None
        self.found: list[bytes | BaseException] = []

    def is_cancelled(self) -> bool:
        return False

    def answer(self, message: bytes) -> None:
        self.found.append(message)

    def fail(self, error: BaseException) -> None:
        self.found.append(error)

    @property
    def end(self) -> bytes | BaseException:
        """What it was told; once."""
        if len(self.found) != 1:
            raise Failure(f"told {len(self.found)} times: {self.found}")
        return self.found[0]


class _PromptEngine(Engine):
    """Runs what is submitted at once, in one batch."""

    def submit_all(self, lane: Lane, jobs: Sequence[Job]) -> None:
        lane.row_cost_s = 0.0  # Else a slow moment would cut the next batch, and a thread finish it.
        super().submit_all(lane, jobs)
        self.run_waiting()


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(logging.Formatter().format(record))


def seeds() -> list[bytes]:
    """An input for every way and first message that go together."""
    first = first_messages()
    found = [
        bytes((way,)) + message
        for way in range(_INFERENCE_WAYS)
        for message in first["own" if way < _INFERENCE_WAYS // 2 else "oip"]
    ]
    return found + [
        bytes((way,)) + message for way in range(_INFERENCE_WAYS, WAYS) for message in first["named"]
    ]


class Trial:
    """Both services in this process, without a transport, tried with one input after the other."""

    def __init__(self) -> None:
        self._models: Models = {
            "iris": echo_mlp(3, labels=("a", "b", "ç")),
            "rose": echo_mlp(2, last="sigmoid", dtype="float64"),
        }
        self._batches: dict[str, list[Array]] = {name: [] for name in self._models}
        repository = Repository(self._served(name) for name in self._models)
        self._engine = _PromptEngine(1)
        limits = InferenceLimits(LIMIT)
        self._own = InferenceApi(repository, self._engine, limits)
        self._oip = OipInference(repository, self._engine, limits)
        self._folder = tempfile.TemporaryDirectory()
        # One that is asked to unload models unloads others than those that are asked for answers.
        catalog = Catalog((self._folder.name,), QueueLimits(), Repository())
        self._control = OipApi(repository, self._engine, limits, catalog, lambda: True, may_change=True)
        services = ("nnproto.v1.Inference", "inference.GRPCInferenceService")
        self._methods: dict[str, Method] = {
            **self._own.methods(),
            **self._control.methods(),
            **HealthApi(self._models.__contains__).methods(),
            **ReflectionApi(services, POOL, descriptor_pool.Default()).methods(),
        }
        self._bystanders = {
            "own": request_for(_BYSTANDER_ROWS, id="bystander").SerializeToString(),
            "oip": oip_request_for(_BYSTANDER_ROWS, id="bystander", outputs=["outputs"]).SerializeToString(),
        }
        self._log = _Log()
        logging.getLogger("nnserver").addHandler(self._log)

    def close(self) -> None:
        logging.getLogger("nnserver").removeHandler(self._log)
        self._control.close()
        self._engine.close()
        self._folder.cleanup()

    def run(self, tried: bytes) -> None:
        """Try *tried*; raises Failure, or whatever escaped."""
        started = time.process_time()
        way, message = (tried[0] if tried else 0) % WAYS, tried[1:]
        if way < _INFERENCE_WAYS:
            service, is_stream = ("own" if way < _INFERENCE_WAYS // 2 else "oip"), bool(way % 4 // 2)
            self._infer(service, is_stream, message)
        else:
            path, kind = list(METHODS.items())[way - _INFERENCE_WAYS]
            self._ask(path, kind, message)
        if self._log.found:
            said, self._log.found = self._log.found, []
            raise Failure(f"it was logged: {said}")
        took_s = time.process_time() - started
        if took_s > INPUT_LIMIT_S:
            raise Failure(f"it took {took_s:.1f} s of processor time")

    def _served(self, name: str) -> Any:
        def forward(x: Array) -> Array:
            self._batches[name].append(x)
            return x.copy()

        model = served(self._models[name], name, forward)
        # Time stands still: no timeout of a request is ever over.
        model.lane.batcher.clock = lambda: 0.0
        return model

    def _infer(self, service: str, is_stream: bool, message: bytes) -> None:
        kind: type[Message] = own.PredictRequest if service == "own" else oip.ModelInferRequest
        is_message = parses(kind, message)
        _check_crumbs(kind, message, is_message)
        if is_message:
            _check_fields(message)
        expected: Question | Refused
        try:
            expected = (read_own if service == "own" else read_oip)(message, self._models)
        except Refused as refusal:
            expected = refusal
        if is_stream:
            self._infer_streamed(service, message, expected)
            return
        for batch in self._batches.values():
            batch.clear()
        first, bystander, second = _Caller(), _Caller(), _Caller()
        infer_all: Callable[[Sequence[tuple[Any, bytes]]], None] = (
            self._own.predict_all if service == "own" else self._oip.infer_all
        )
        infer_all([(first, message), (bystander, self._bystanders[service])])
        self._check_bystander(service, bystander.end)
        if isinstance(first.end, bytes):
            self._check_rows(expected)
        self._check_end(service, first.end, expected, message)
        # Now it may be recognised, where it was parsed before.
        infer_all([(second, message)])
        if not _is_same_end(service, first.end, second.end):
            raise Failure(f"the same again was told {second.end!r} where it was {first.end!r}")

    def _infer_streamed(self, service: str, message: bytes, expected: Question | Refused) -> None:
        path = _OWN + "PredictStream" if service == "own" else _OIP + "ModelStreamInfer"
        call = FakeCall()
        listener: Any = self._methods[path].start(call)
        listener.on_messages((message, self._bystanders[service]))
        listener.on_half_close()
        if call.error is not None or not call.is_finished or len(call.replies) != 2:
            raise Failure(f"the stream ended with {call.error!r} after {len(call.replies)} answers")
        ends = [_unwrapped(service, reply) for reply in call.replies]
        self._check_bystander(service, ends[1])
        self._check_end(service, ends[0], expected, message)

    def _check_bystander(self, service: str, end: bytes | BaseException) -> None:
        if not isinstance(end, bytes):
            raise Failure(f"a bystander was told {end!r}")
        answer: Any
        if service == "own":
            answer = own.PredictResponse.FromString(end)
            rows = rows_of(answer)
        else:
            answer = oip.ModelInferResponse.FromString(end)
            rows = tensor_of(answer)
        if answer.id != "bystander" or rows.tobytes() != _BYSTANDER_ROWS.tobytes():
            raise Failure(f"a bystander was answered wrongly: {answer}")

    def _check_rows(self, expected: Question | Refused) -> None:
        """What went to the kernel first is what the reference has read."""
        if isinstance(expected, Refused):
            return
        x = self._batches[expected.model][0][: len(expected.x)]
        if not _is_same(x, expected.x, expected.is_exact):
            raise Failure(f"the rows were {x}; expected {expected.x}")

    def _check_end(
        self, service: str, end: bytes | BaseException, expected: Question | Refused, message: bytes
    ) -> None:
        if isinstance(end, BaseException):
            told = _check_refusal(end)
            status = Status.RESOURCE_EXHAUSTED
            if isinstance(expected, Refused) and len(message) <= LIMIT:
                status = expected.status
            # Else the message is too large; or the answer would be: what it takes at most is estimated.
            is_right = status != Status.RESOURCE_EXHAUSTED or "(max_message_bytes, " in str(end)
            # A stream of Triton's tells no status.
            if not is_right or told not in (status, Status.UNKNOWN):
                raise Failure(f"it was told {end!r}; expected {_described(expected)}")
            return
        if isinstance(expected, Refused) or len(message) > LIMIT:
            raise Failure(f"it was answered with {end!r}; expected {_described(expected)}")
        if len(end) > LIMIT:
            raise Failure(f"the answer has {len(end)} bytes; {LIMIT} are allowed")
        (_check_own if service == "own" else _check_oip)(end, expected, self._models)

    def _ask(self, path: str, kind: type[Message], message: bytes) -> None:
        """Any bytes are answered or refused; refused as no message if and only if protobuf says so."""
        call = FakeCall()
        listener: Any = self._methods[path].start(call)
        listener.on_message(message)
        listener.on_half_close()
        if path.endswith("/Watch"):
            listener.on_cancel()
        else:
            call.wait_for_end()
        if call.error is not None:
            _check_refusal(call.error)
        told_no_message = call.error is not None and "are not a" in str(call.error)
        if told_no_message == parses(kind, message):
            raise Failure(f"{path} said {call.error!r} to {message!r}")
        if call.error is None and not call.replies:
            raise Failure(f"{path} said nothing to {message!r}")


def _check_refusal(error: BaseException) -> Status:
    """Return the status of *error*, whose text is fit for a client."""
    if not isinstance(error, ServerError) or error.status not in _REFUSALS:
        raise Failure(f"it failed with {error!r}") from error
    text = str(error)
    if len(text) > TEXT_LIMIT or "Traceback" in text or "/" in text.replace("grpc.", "").split("'")[0]:
        raise Failure(f"it was told {text!r}")
    text.encode()
    return error.status


def _check_crumbs(kind: type[Message], message: bytes, is_message: bool) -> None:
    """With low limits, what has more fields than they allow is refused, and nothing else is."""
    limits = (crumbs.UNCHECKED_BYTES, crumbs.MOST_FIELDS, crumbs.MOST_SHAPE_BYTES)
    crumbs.UNCHECKED_BYTES, crumbs.MOST_FIELDS, crumbs.MOST_SHAPE_BYTES = (
        *(CRUMBS_UNCHECKED, CRUMBS_FIELDS),
        CRUMBS_SHAPE,
    )
    try:
        crumbs.refuse_crumbs(kind, message)
        is_refused = False
    except InvalidArgument:
        is_refused = True
    finally:
        crumbs.UNCHECKED_BYTES, crumbs.MOST_FIELDS, crumbs.MOST_SHAPE_BYTES = limits
    if not is_message:
        return
    count, longest, has_groups = count_fields(kind.DESCRIPTOR, message)
    is_too_much = count >= CRUMBS_FIELDS or longest > CRUMBS_SHAPE
    # What groups hold is counted, too, as if it stood outside of them.
    if is_refused != is_too_much and not (is_refused and has_groups):
        raise Failure(f"{count} fields, a shape of {longest} bytes: refused is {is_refused}")


def _check_fields(message: bytes) -> None:
    """The fields of a valid message lie where protobuf finds them."""
    try:
        found = list(wire.fields(message, 0, len(message)))
    except ValueError:
        if not has_group(message):
            raise Failure("fields were not found, and there is no group") from None
        return
    expected = top_fields(message)
    if [field.number for field in found] != [number for number, _, _ in expected]:
        raise Failure(f"fields {found} were found; expected {expected}")
    for field, (_, _, content) in zip(found, expected, strict=True):
        if isinstance(content, bytes) and message[field.content : field.end] != content:
            raise Failure(f"field {field} was found; expected {content!r}")


def _check_own(answer: bytes, asked: Question, models: Models) -> None:
    request, mlp = asked.request, models[asked.model]
    response = own.PredictResponse.FromString(answer)
    head = own.PredictResponse(id=request.id, model=asked.model, version="1")
    if request.output == own.OUTPUT_KIND_LABELS:
        # Scores of NaN have no order to speak of; which classes come first is test_inference's.
        k = request.top_k or 1
        if [len(row.top) for row in response.labels] != [k] * len(asked.x):
            raise Failure(f"{response.labels} are not {k} labels for {len(asked.x)} rows")
        del response.labels[:]
    else:
        y = mlp.probabilities_from(asked.x) if request.output == own.OUTPUT_KIND_PROBABILITIES else asked.x
        shape = (mlp.n_out,) if asked.is_row else y.shape
        if not _is_same(rows_of(response).reshape(y.shape), y, asked.is_exact):
            raise Failure(f"the answer is {rows_of(response)}; expected {y}")
        if tuple(response.outputs.shape) != shape:
            raise Failure(f"the answer's shape is {response.outputs.shape}; expected {shape}")
        response.ClearField("outputs")
    if response != head:
        raise Failure(f"the answer has {response}; expected {head}")


def _check_oip(answer: bytes, asked: Question, models: Models) -> None:
    request, mlp = asked.request, models[asked.model]
    response = oip.ModelInferResponse.FromString(answer)
    if (response.id, response.model_name, response.model_version) != (request.id, asked.model, "1"):
        raise Failure(f"the answer has {response}")
    if bool(response.raw_output_contents) != bool(request.raw_input_contents):
        raise Failure("a raw request has a typed answer, or the other way round")
    names = [output.name for output in request.outputs]
    names = names or (["outputs", "probabilities", "labels"] if mlp.labels else ["outputs"])
    if [output.name for output in response.outputs] != names:
        raise Failure(f"the answer has {[output.name for output in response.outputs]}; expected {names}")
    classes = {o.name: o.parameters["classification"].int64_param for o in request.outputs if o.parameters}
    for name in names:
        found = tensor_of(response, name)
        y = asked.x if name == "outputs" else mlp.probabilities_from(asked.x)
        k = min(classes.get(name, 0), len(mlp.class_labels)) or (1 if name == "labels" else 0)
        if k:
            texts = found.reshape(-1, k)
            if np.isnan(y).any():
                continue
            for row, indices in zip(texts, top_classes(y, k)[0].tolist(), strict=True):
                for text, index in zip(row, indices, strict=True):
                    label = mlp.class_labels[index].encode()
                    if name == "labels" and text != label:
                        raise Failure(f"the label is {text!r}; expected {label!r}")
                    if name != "labels" and text.split(b":")[1] != str(index).encode():
                        raise Failure(f"the class is {text!r}; expected {index}")
        elif not _is_same(found.reshape(y.shape), y, asked.is_exact and bool(request.raw_input_contents)):
            raise Failure(f"{name} is {found}; expected {y}")
        if (found.ndim == 1) != asked.is_row:
            raise Failure(f"{name} has shape {found.shape}")


def _unwrapped(service: str, reply: bytes) -> bytes | BaseException:
    """The answer, or the error, that a stream's message has in it."""
    if service == "own":
        response = own.PredictResponse.FromString(reply)
        if not response.HasField("error"):
            return reply
        error = ServerError(response.error.message)
        error.status = Status(response.error.code)
        return error
    wrapped = oip.ModelStreamInferResponse.FromString(reply)
    if not wrapped.error_message:
        if not wrapped.infer_response.parameters["triton_final_response"].bool_param:
            raise Failure("an answer of a stream is not the final one")
        return wrapped.infer_response.SerializeToString()
    return _Told(wrapped.error_message)


class _Told(ServerError):
    """An error of which only the text was told."""

    status = Status.UNKNOWN


def _is_same(found: Array, expected: Array, is_exact: bool) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if is_exact and not np.isnan(expected).any():
        return found.tobytes() == expected.tobytes()
    return np.array_equal(found, expected, equal_nan=True)


def _is_same_end(service: str, one: bytes | BaseException, other: bytes | BaseException) -> bool:
    """Whether two answers say the same, or two errors do."""
    if not isinstance(one, bytes) or not isinstance(other, bytes):
        return repr(one) == repr(other)
    kind = own.PredictResponse if service == "own" else oip.ModelInferResponse
    # As bytes: two NaN are never equal.
    return kind.FromString(one).SerializeToString() == kind.FromString(other).SerializeToString()


def _described(expected: Question | Refused) -> str:
    if isinstance(expected, Refused):
        return expected.status.name
    return f"an answer to {expected.x.shape} rows of {expected.model!r}"


assert MOST_BYTES > LIMIT
