"""KServe's own Python client against nnserver: raw and typed contents, readiness, errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest
from kserve import InferInput, InferRequest
from kserve.inference_client import InferenceGRPCClient
from support.server import ServerProcess

import nncore

X = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)


def ask(server: ServerProcess, what: Callable[[Any], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with InferenceGRPCClient(server.address) as client:
            return await what(client)

    return asyncio.run(run())


def test_readiness(server: ServerProcess) -> None:
    assert ask(server, lambda client: client.is_server_live())
    assert ask(server, lambda client: client.is_server_ready())
    assert ask(server, lambda client: client.is_model_ready("iris"))
    assert not ask(server, lambda client: client.is_model_ready("rose"))


@pytest.mark.parametrize("raw", [True, False])
def test_a_request_is_answered_in_its_own_form(server: ServerProcess, iris: nncore.Mlp, raw: bool) -> None:
    """An array is sent raw, a list typed; both are answered with the same numbers."""
    data: Any = X if raw else X.ravel().tolist()
    tensor = InferInput("inputs", list(X.shape), "FP32", data)
    request = InferRequest("iris", [tensor], request_id="a")
    response = ask(server, lambda client: client.infer(request))
    assert (response.id, response.model_name) == ("a", "iris")
    outputs = {output.name: output for output in response.outputs}
    assert np.array_equal(outputs["outputs"].as_numpy(), iris.forward(X))
    assert np.array_equal(outputs["probabilities"].as_numpy(), iris.predict_proba(X))


def test_a_wrong_request_is_invalid_argument(server: ServerProcess) -> None:
    """Not INTERNAL, as a server may answer whose checks are its framework's."""
    request = InferRequest("iris", [InferInput("inputs", [5, 3], "FP32", X[:, :3])])
    with pytest.raises(grpc.RpcError) as caught:
        ask(server, lambda client: client.infer(request))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "model 'iris' expects (rows, 4)" in caught.value.details()
