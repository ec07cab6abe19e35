"""Models in, an OipApi out, with an engine that a test drives by hand; requests and answers as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnproto.oip import inference_pb2 as pb
from nnserver.api.inference import InferenceLimits
from nnserver.api.oip import SERVICE, OipApi
from nnserver.batcher import QueueLimits
from nnserver.catalog import Catalog
from nnserver.engine import Engine
from nnserver.repository import Repository, ServedModel
from support.calls import FakeCall
from support.serving import ManualEngine

NUMPY = {
    **{"FP32": "<f4", "FP64": "<f8", "FP16": "<f2"},
    **{f"INT{bits}": f"<i{bits // 8}" for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": f"<u{bits // 8}" for bits in (8, 16, 32, 64)},
}
TYPED = {
    **{
        "FP32": "fp32_contents",
        "FP64": "fp64_contents",
        "INT64": "int64_contents",
        "UINT64": "uint64_contents",
    },
    **{f"INT{bits}": "int_contents" for bits in (8, 16, 32)},
    **{f"UINT{bits}": "uint_contents" for bits in (8, 16, 32)},
}


class OipServer:
    """An OipApi without a transport: starts calls and gives them messages."""

    def __init__(
        self,
        *models: ServedModel,
        limits: InferenceLimits | None = None,
        paths: Sequence[str] = (),
        may_change: bool = False,
    ) -> None:
        self.engine = ManualEngine()
        self.repository = Repository(models)
        self.catalog = Catalog(paths, QueueLimits(), self.repository)
        self.is_ready = True
        self.api = OipApi(
            self.repository,
            self.engine,
            limits or InferenceLimits(),
            self.catalog,
            is_ready=lambda: self.is_ready,
            may_change=may_change,
        )
        self.methods = self.api.methods()

    def start(self, name: str, message: bytes, call: FakeCall | None = None) -> FakeCall:
        """Make a unary call of the method *name*; nothing has run yet."""
        call = call or FakeCall()
        listener = self.methods[f"/{SERVICE}/{name}"].start(call)
        listener.on_message(message)
        listener.on_half_close()
        return call

    def ask(self, name: str, request: Any, kind: Any) -> Any:
        """The answer, of type *kind*, to *request*; raises what the call failed with."""
        call = self.start(name, request.SerializeToString())
        call.wait_for_end()
        if call.error is not None:
            raise call.error
        (reply,) = call.replies
        return kind.FromString(reply)

    def infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """The answer to *request*; raises what the call failed with."""
        call = self.start("ModelInfer", request.SerializeToString())
        if call.error is None:
            self.engine.run()
        if call.error is not None:
            raise call.error
        assert call.is_finished
        (reply,) = call.replies
        return pb.ModelInferResponse.FromString(reply)

    def let_jobs_wait(self) -> None:
        """From now on jobs wait in their lanes, as in a real server, until engine.run_waiting()."""
        self.engine.submit = Engine.submit.__get__(self.engine)

    def open(self, call: FakeCall | None = None) -> tuple[FakeCall, Any]:
        """Begin a ModelStreamInfer; the listener takes its messages."""
        call = call or FakeCall()
        return call, self.methods[f"/{SERVICE}/ModelStreamInfer"].start(call)


def request_for(
    x: Any,
    model: str = "iris",
    datatype: str = "FP32",
    raw: bool = True,
    outputs: Sequence[str] = (),
    **fields: Any,
) -> pb.ModelInferRequest:
    """A request with the rows *x* as *datatype*."""
    x = np.asarray(x)
    request = pb.ModelInferRequest(model_name=model, **fields)
    tensor = request.inputs.add(name="inputs", datatype=datatype, shape=x.shape)
    if raw:
        data = bfloat16(x) if datatype == "BF16" else x.astype(NUMPY[datatype])
        request.raw_input_contents.append(data.tobytes())
    else:
        getattr(tensor.contents, TYPED[datatype]).extend(x.ravel().tolist())
    for name in outputs:
        request.outputs.add(name=name)
    return request


def bfloat16(x: Any) -> NDArray[np.uint16]:
    """The upper halves of x as float32, which is cut off, not rounded."""
    return (np.asarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def tensor_of(response: pb.ModelInferResponse, name: str = "outputs") -> NDArray[Any]:
    """The tensor *name* of an answer, raw or typed, as an array; BYTES as an array of bytes."""
    (index,) = (i for i, output in enumerate(response.outputs) if output.name == name)
    output = response.outputs[index]
    shape = tuple(output.shape)
    values: Any
    if response.raw_output_contents:
        assert len(response.raw_output_contents) == len(response.outputs)
        raw = response.raw_output_contents[index]
        values = texts_in(raw) if output.datatype == "BYTES" else np.frombuffer(raw, NUMPY[output.datatype])
    elif output.datatype == "BYTES":
        values = list(output.contents.bytes_contents)
    else:
        values = np.array(getattr(output.contents, TYPED[output.datatype]), NUMPY[output.datatype])
    if output.datatype == "BYTES":
        array = np.empty(len(values), object)
        array[:] = values
        return array.reshape(shape)
    result: NDArray[Any] = values.reshape(shape)
    return result


def texts_in(raw: bytes) -> list[bytes]:
    """The elements of a raw BYTES tensor: each after its length as a little-endian uint32."""
    texts = []
    while raw:
        size = int.from_bytes(raw[:4], "little")
        assert len(raw) >= 4 + size
        texts.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return texts
