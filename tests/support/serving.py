"""Models in, the apis of nnproto.v1.Inference out, with an engine that a test drives by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nncore
from nnproto.v1 import inference_pb2 as pb
from nnserver.api.differentiate import DifferentiateApi
from nnserver.api.inference import SERVICE, InferenceApi, InferenceLimits
from nnserver.batcher import Batcher, Job, QueueLimits, gather
from nnserver.engine import Engine, Lane
from nnserver.errors import ServerError
from nnserver.repository import Repository, ServedModel
from support.calls import FakeCall

Array = NDArray[Any]


class ManualEngine(Engine):
    """An engine whose jobs wait until the test runs them, in the order that it likes."""

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.jobs: list[tuple[Lane, Job]] = []

    def submit(self, lane: Lane, job: Job) -> None:
        lane.batcher.put(job)  # for its refusals
        lane.batcher.take()
        self.jobs.append((lane, job))

    def submit_all(self, lane: Lane, jobs: Sequence[Job]) -> None:
        for job in jobs:
            try:
                self.submit(lane, job)
            except ServerError as error:
                job.caller.fail(error)

    def run(self, index: int = 0) -> None:
        """Run the job at *index* of those that wait."""
        lane, job = self.jobs.pop(index)
        job.form.deliver([job], lane.forward(gather([job], lane.n_in, lane.dtype)))

    def fail(self, error: BaseException, index: int = 0) -> None:
        """Fail the job at *index* of those that wait."""
        self.jobs.pop(index)[1].caller.fail(error)


def served(
    mlp: nncore.Mlp,
    name: str = "iris",
    forward: Callable[[Array], Array] | None = None,
    limits: QueueLimits | None = None,
) -> ServedModel:
    """*mlp* as a repository holds it; *forward* stands in for its kernel."""
    lane = Lane(Batcher(name, limits or QueueLimits()), forward or mlp.forward, mlp.n_in, mlp.dtype)
    return ServedModel(name, "1", mlp, lane)


def echo_mlp(n: int, last: str = "identity", dtype: str = "float32", **names: Any) -> nncore.Mlp:
    """A model of *n* inputs and outputs, to be served with a *forward* that gives back the rows."""
    return nncore.Mlp([nncore.Layer(np.eye(n, dtype=dtype), activation=last)], **names)


def echoed(n: int, name: str = "iris", **of_mlp: Any) -> ServedModel:
    """A served model whose outputs are its inputs, bit for bit."""
    return served(echo_mlp(n, **of_mlp), name, forward=lambda x: x.copy())


class Server:
    """The service without a transport: starts calls and gives them messages."""

    def __init__(self, *models: ServedModel, limits: InferenceLimits | None = None) -> None:
        self.engine = ManualEngine()
        self.repository = Repository(models)
        limits = limits or InferenceLimits()
        self.methods = {
            **InferenceApi(self.repository, self.engine, limits).methods(),
            **DifferentiateApi(self.repository, self.engine, limits).methods(),
        }

    def start(self, name: str, message: bytes, call: FakeCall | None = None) -> FakeCall:
        """Make a unary call of the method *name*; nothing has run yet."""
        call = call or FakeCall()
        listener = self.methods[f"/{SERVICE}/{name}"].start(call)
        listener.on_message(message)
        listener.on_half_close()
        return call

    def predict(self, request: pb.PredictRequest) -> pb.PredictResponse:
        """The answer to *request*; raises what the call failed with."""
        return pb.PredictResponse.FromString(self._answer("Predict", request.SerializeToString()))

    def differentiate(self, request: pb.DifferentiateRequest) -> pb.DifferentiateResponse:
        """The answer to *request*; raises what the call failed with."""
        answer = self._answer("Differentiate", request.SerializeToString())
        return pb.DifferentiateResponse.FromString(answer)

    def _answer(self, name: str, message: bytes) -> bytes:
        call = self.start(name, message)
        if call.error is None:
            self.engine.run()
        if call.error is not None:
            raise call.error
        assert call.is_finished
        (reply,) = call.replies
        return reply

    def open(self, name: str = "PredictStream") -> tuple[FakeCall, Any]:
        """Begin the stream *name*; the listener takes its messages."""
        call = FakeCall()
        return call, self.methods[f"/{SERVICE}/{name}"].start(call)


def request_for(x: Any, model: str = "iris", **fields: Any) -> pb.PredictRequest:
    """A request with the rows *x*, float32 or float64."""
    return pb.PredictRequest(model=model, inputs=tensor_of(x), **fields)


def derivative_of(x: Any, kind: str, model: str = "iris", **fields: Any) -> pb.DifferentiateRequest:
    """A request for a derivative at the rows *x*; kind: "VJP" and so on; tensors are given as arrays."""
    for name in {"cotangents", "tangents"} & fields.keys():
        fields[name] = tensor_of(fields[name])
    number = pb.DerivativeKind.Value(f"DERIVATIVE_KIND_{kind}")
    return pb.DifferentiateRequest(model=model, kind=number, inputs=tensor_of(x), **fields)


def tensor_of(x: Any) -> pb.Tensor:
    """The array *x* as a message, float32 or float64."""
    rows = np.asarray(x)
    if rows.dtype.kind != "f":
        rows = rows.astype(np.float32)
    dtype = {"float32": pb.DATA_TYPE_FLOAT32, "float64": pb.DATA_TYPE_FLOAT64}[rows.dtype.name]
    return pb.Tensor(shape=rows.shape, dtype=dtype, data=rows.astype(rows.dtype.newbyteorder("<")).tobytes())


def array_of(tensor: pb.Tensor) -> Array:
    """The array that a message holds."""
    dtype = {pb.DATA_TYPE_FLOAT32: "<f4", pb.DATA_TYPE_FLOAT64: "<f8"}[tensor.dtype]
    rows: Array = np.frombuffer(tensor.data, dtype)
    return rows.reshape(tuple(tensor.shape))


def rows_of(response: pb.PredictResponse) -> Array:
    """The outputs of an answer as an array."""
    return array_of(response.outputs)
