"""A server in, nothing out if another client is answered to the bit by both services, and all is well."""

from __future__ import annotations

from types import TracebackType

import grpc
import numpy as np
from grpc_health.v1 import health_pb2
from support.oip import request_for as oip_request_for
from support.oip import tensor_of
from support.server import PREDICT, ServerProcess, request, rows

import nncore
from nnproto.oip import inference_pb2 as oip
from nnproto.v1 import inference_pb2 as own
from nnserver.model_folder import BUNDLED

DIGITS = nncore.load(BUNDLED / "digits.safetensors")
X = np.random.default_rng(7).uniform(0, 16, (40, 64)).astype(np.float32)
Y = DIGITS.forward(X)
PATIENCE_S = 60.0


class Bystander:
    """A client of *server* over a connection of its own; as a context it asks at its beginning and end."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._channel = server.channel()
        self._asked = 0

    def __enter__(self) -> Bystander:
        self.is_answered()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.is_answered()
        finally:
            self._channel.close()

    def is_answered(self) -> None:
        """Ask both services for other rows than the last time, and health; raises unless all is right."""
        self._asked += 1
        part = slice(self._asked % 30, self._asked % 30 + 1 + self._asked % 9)
        request_id = f"bystander {self._asked}"
        answer = own.PredictResponse.FromString(
            self._call(PREDICT, request(X[part], id=request_id).SerializeToString())
        )
        assert (answer.id, answer.model) == (request_id, "digits")
        assert rows(answer).tobytes() == Y[part].tobytes()
        message = oip_request_for(X[part], "digits", id=request_id, outputs=["outputs"])
        reply = self._call("/inference.GRPCInferenceService/ModelInfer", message.SerializeToString())
        response = oip.ModelInferResponse.FromString(reply)
        assert response.id == request_id
        assert tensor_of(response).tobytes() == Y[part].tobytes()
        health = self._call("/grpc.health.v1.Health/Check", b"")
        assert health_pb2.HealthCheckResponse.FromString(health).status == 1

    def _call(self, path: str, message: bytes) -> bytes:
        method: grpc.UnaryUnaryMultiCallable = self._channel.unary_unary(path)
        answer: bytes = method(message, timeout=PATIENCE_S)
        return answer
