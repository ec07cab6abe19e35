"""nnproto.v1.Inference's derivatives: DifferentiateRequest bytes -> rows -> DifferentiateResponse bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnproto.v1 import inference_pb2 as pb
from nnserver.api.answers import id_field
from nnserver.api.derivative_answers import differential_encoder
from nnserver.api.forms import Form
from nnserver.api.forms import Kind as RequestKind
from nnserver.api.inference import SERVICE, AnswerStream, InferenceLimits, decode
from nnserver.api.intake import queue_all
from nnserver.api.message_size import check_answer_size, check_ballast, check_message_size
from nnserver.api.tensors import check_finite, decode_rows, enum_name
from nnserver.batcher import Caller, Job
from nnserver.call import Call, Method, UnaryListener
from nnserver.derivatives import Derivative, Kind
from nnserver.engine import Engine, Lane
from nnserver.errors import InvalidArgument, blame_model
from nnserver.repository import Repository, ServedModel
from nnserver.request_watch import RequestWatch

Array = NDArray[Any]

_KINDS: dict[int, Kind] = {
    pb.DERIVATIVE_KIND_VJP: "vjp",
    pb.DERIVATIVE_KIND_JVP: "jvp",
    pb.DERIVATIVE_KIND_JACOBIAN: "jacobian",
    pb.DERIVATIVE_KIND_VALUE_AND_GRAD: "value_and_grad",
    pb.DERIVATIVE_KIND_HVP: "hvp",
}
_DIRECTIONS: dict[Kind, str] = {"vjp": "cotangents", "jvp": "tangents", "hvp": "tangents"}
_OF_ONE_OUTPUT = frozenset(("value_and_grad", "hvp"))


class DifferentiateApi:
    """The methods of nnproto.v1.Inference that differentiate the models of *repository*, run by *engine*."""

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

    def methods(self) -> dict[str, Method]:
        """Return the methods by path."""
        unary, stream = f"/{SERVICE}/Differentiate", f"/{SERVICE}/DifferentiateStream"
        return {
            unary: Method(
                unary,
                lambda call: UnaryListener(call, self._differentiate),
                handle_all=self.differentiate_all,
            ),
            stream: Method(stream, self._start_stream, client_streams=True, server_streams=True),
        }

    def _differentiate(self, call: Call, message: bytes) -> None:
        self.differentiate_all([(call, message)])

    def _start_stream(self, call: Call) -> AnswerStream:
        handle_all = partial(self.differentiate_all, kind=RequestKind.DIFFERENTIATE_STREAM)
        return AnswerStream(handle_all, pb.DifferentiateRequest, call, self._limits.stream_window)

    def differentiate_all(
        self, requests: Sequence[tuple[Caller, bytes]], kind: str = RequestKind.DIFFERENTIATE
    ) -> None:
        """Queue the rows of all *requests*, those for one lane at once; tell who waits what is wrong."""
        queue_all(self._engine, self._watch, kind, requests, self._job)

    def _job(self, message: bytes, caller: Caller, kind: str) -> tuple[Lane, Job]:
        """Return what is to be done for *message*, and where; raises what is wrong with it."""
        check_message_size(len(message), self._limits.max_message_bytes)
        request = decode(pb.DifferentiateRequest, message)
        model = self._repository.get(request.model, request.version)
        try:
            wanted = _derivative(request, model)
            rows = self._rows(request, wanted, model)
            indices = len(request.input_indices) + len(request.output_indices)
            check_ballast(len(message), rows.size + indices)
            lane = model.derivatives.lane_of(wanted)
        except Exception as error:
            blame_model(error, model.name, model.version)
            raise
        count, is_row = len(rows), len(request.inputs.shape) == 1
        encode = differential_encoder(model, wanted, count, is_row=is_row)
        return lane, Job(Form(kind, model, count, rows.nbytes, encode), rows, caller, id_field(request.id))

    def _rows(self, request: pb.DifferentiateRequest, wanted: Derivative, model: ServedModel) -> Array:
        """Return the inputs, with the directions behind them; raises what is wrong with them."""
        mlp, limits = model.mlp, self._limits
        x = decode_rows(request.inputs, f"model '{model.name}'", mlp.n_in, mlp.dtype)
        row_bytes = wanted.row_numbers * mlp.dtype.itemsize
        check_answer_size(len(x), row_bytes, len(request.id.encode()), limits.max_message_bytes)
        directions = _directions(request, wanted, model, len(x))
        if limits.reject_nonfinite:
            check_finite(x)
            if directions is not None:
                check_finite(directions, _DIRECTIONS[wanted.kind])
        return x if directions is None else np.concatenate((x, directions), axis=1)


def _derivative(request: pb.DifferentiateRequest, model: ServedModel) -> Derivative:
    """Return which derivative of *model* is asked for."""
    mlp = model.mlp
    kind = _KINDS.get(request.kind)
    if kind is None:
        *most, last = (pb.DerivativeKind.Name(number) for number in pb.DerivativeKind.values() if number)
        raise InvalidArgument(f"kind is {_kind_name(request)}; expected {', '.join(most)} or {last}")
    if request.output in (pb.OUTPUT_KIND_UNSPECIFIED, pb.OUTPUT_KIND_OUTPUTS):
        is_of_outputs = True
    elif request.output == pb.OUTPUT_KIND_PROBABILITIES:
        is_of_outputs = False
    else:
        raise InvalidArgument(
            f"output is {enum_name(pb.OutputKind, request.output)}; expected OUTPUT_KIND_OUTPUTS or "
            "OUTPUT_KIND_PROBABILITIES, which have derivatives"
        )
    inputs = _indices(request.input_indices, mlp.n_in, "input", model)
    outputs = _indices(request.output_indices, mlp.n_out, "output", model)
    n_in = mlp.n_in if inputs is None else len(inputs)
    n_out = mlp.n_out if outputs is None else len(outputs)
    if kind in _OF_ONE_OUTPUT and n_out != 1:
        raise InvalidArgument(
            f"output_indices has {len(request.output_indices)} entries; {_kind_name(request)} is of one "
            f"output: expected its index, from 0 to {mlp.n_out - 1}"
        )
    return Derivative(kind, "outputs" if is_of_outputs else "probabilities", inputs, outputs, n_in, n_out)


def _indices(given: Sequence[int], count: int, side: str, model: ServedModel) -> tuple[int, ...] | None:
    """Return the chosen inputs or outputs of *model*, which has *count*; None for all, in order."""
    if not given:
        return None
    if len(given) > count:
        raise InvalidArgument(
            f"{side}_indices has {len(given)} entries; model '{model.name}' has {count} {side}s"
        )
    first_at: dict[int, int] = {}
    for at, index in enumerate(given):
        if index >= count:
            raise InvalidArgument(
                f"{side}_indices[{at}] is {index}; model '{model.name}' has {side}s 0 to {count - 1}"
            )
        earlier = first_at.setdefault(index, at)
        if earlier != at:
            raise InvalidArgument(f"{side}_indices[{at}] repeats {side}_indices[{earlier}]: {index}")
    chosen = tuple(first_at)
    return None if chosen == tuple(range(count)) else chosen


def _directions(
    request: pb.DifferentiateRequest, wanted: Derivative, model: ServedModel, rows: int
) -> Array | None:
    """Return the cotangents or tangents: a row for each of the *rows* of inputs; None if there are none."""
    needed = _DIRECTIONS.get(wanted.kind)
    given = [field.name for field, _ in request.ListFields()]
    for name in ("cotangents", "tangents"):
        if name != needed and name in given:
            raise InvalidArgument(f"{name} are given; {_kind_name(request)} takes {needed or 'none'}")
    if needed is None:
        return None
    side, indices = ("output", wanted.outputs) if needed == "cotangents" else ("input", wanted.inputs)
    owner = f"model '{model.name}'"
    if indices is not None:
        owner += f" with {len(indices)} {side}_indices"
    width = wanted.direction_width
    if needed not in given:
        raise InvalidArgument(
            f"{needed} are missing; {owner} expects ({rows}, {width}), a row for each of inputs"
        )
    tensor = request.cotangents if needed == "cotangents" else request.tangents
    directions = decode_rows(tensor, owner, width, model.mlp.dtype, needed)
    if len(directions) != rows:
        raise InvalidArgument(f"{needed} has {len(directions)} rows; expected {rows}, one for each of inputs")
    return directions


def _kind_name(request: pb.DifferentiateRequest) -> str:
    return enum_name(pb.DerivativeKind, request.kind)
