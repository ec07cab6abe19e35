"""Every kind of client against nnserver: one row of digits, answered with the bits that nncore computes."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import numpy as np
import pytest
from interop.endpoints import KINDS, TRANSPORTS, Endpoint, channel_to
from support.server import PREDICT, request

import nncore
import nnserver as package
from nnproto.v1 import inference_pb2 as pb

DIGITS = nncore.load(Path(package.__file__).parent / "models" / "digits.safetensors")
ROW = np.random.default_rng(0).uniform(0, 16, 64).astype(np.float32)

# Bytes of a row -> bytes of the outputs.
Predict: TypeAlias = Callable[[Endpoint, bytes], bytes]


def predict_with_grpcio(endpoint: Endpoint, row: bytes) -> bytes:
    with channel_to(endpoint, grpc) as channel:
        return _outputs(channel.unary_unary(PREDICT)(_request(row), timeout=60))


async def predict_with_grpcio_aio(endpoint: Endpoint, row: bytes) -> bytes:
    async with channel_to(endpoint, grpc.aio) as channel:
        return _outputs(await channel.unary_unary(PREDICT)(_request(row), timeout=60))


def _request(row: bytes) -> bytes:
    message: bytes = request(np.frombuffer(row, np.float32)).SerializeToString()
    return message


def _outputs(message: bytes) -> bytes:
    return pb.PredictResponse.FromString(message).outputs.data


@pytest.fixture(params=["grpcio", "grpcio-aio", "grpc-js", "c++"])
def predict(request: pytest.FixtureRequest) -> Predict:
    """A kind of client."""
    if request.param == "grpcio":
        return predict_with_grpcio
    if request.param == "grpcio-aio":
        runner: asyncio.Runner = request.getfixturevalue("runner")
        return lambda endpoint, row: runner.run(predict_with_grpcio_aio(endpoint, row))
    program: Any = request.getfixturevalue("grpc_js" if request.param == "grpc-js" else "cpp")
    found: Predict = program.predict
    return found


def over(*kinds: str) -> pytest.MarkDecorator:
    """Run a test against nnserver on both transports, over connections of *kinds* only."""
    return pytest.mark.parametrize(
        "nnserver",
        [(transport, kind) for transport in TRANSPORTS for kind in kinds],
        ids="-".join,
        indirect=True,
    )


@over(*KINDS)
def test_a_prediction_has_nncores_own_bits(predict: Predict, nnserver: Endpoint) -> None:
    assert predict(nnserver, ROW.tobytes()) == DIGITS.forward(ROW).tobytes()


@over("mtls")
def test_a_client_that_shows_no_certificate_gets_nothing(predict: Predict, nnserver: Endpoint) -> None:
    stranger = dataclasses.replace(nnserver, client=None)
    with pytest.raises((grpc.RpcError, RuntimeError)):
        predict(stranger, ROW.tobytes())


@over("tls")
def test_a_client_that_trusts_another_authority_does_not_send(
    predict: Predict, nnserver: Endpoint, other_authority: Path
) -> None:
    with pytest.raises((grpc.RpcError, RuntimeError)):
        predict(dataclasses.replace(nnserver, ca=other_authority), ROW.tobytes())


@over("tls", "mtls")
@pytest.mark.parametrize(
    ("offered", "chosen"), [(["h2"], "h2"), (["http/1.1", "h2"], "h2"), (["grpc-exp", "h2"], "h2")]
)
def test_alpn_chooses_http_2(nnserver: Endpoint, offered: list[str], chosen: str) -> None:
    context = ssl.create_default_context(cafile=str(nnserver.ca))
    context.set_alpn_protocols(offered)
    if nnserver.client:
        context.load_cert_chain(*nnserver.client)
    host, _, port = nnserver.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 20) as sock,
        context.wrap_socket(sock, server_hostname=host) as secure,
    ):
        assert secure.selected_alpn_protocol() == chosen
        assert secure.recv(9)[3] == 4, "a server begins with SETTINGS"
