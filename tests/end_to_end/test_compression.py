"""Answers are compressed if the server is told to and the client takes gzip, and only then."""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import pytest
from support.h2 import RawClient, prefixed
from support.server import ServerProcess, running

from nnproto.v1 import inference_pb2 as pb

LIST_MODELS = b"/nnproto.v1.Inference/ListModels"
TAKES_GZIP = (b"grpc-accept-encoding", b"identity,gzip")


def body(server: ServerProcess, *more: tuple[bytes, bytes]) -> bytes:
    """The answer to ListModels as it is on the wire."""
    with RawClient(server.address) as client:
        return client.wait(client.request(LIST_MODELS, prefixed(b""), *more)).body


@pytest.fixture(scope="module")
def told() -> Iterator[ServerProcess]:
    """A server that is told to compress."""
    with running("--transport", "h2", "--compress-answers") as process:
        yield process


def test_no_transport_compresses_unless_told_to(server: ServerProcess) -> None:
    plain = body(server, TAKES_GZIP)
    assert plain[0] == 0
    assert pb.ListModelsResponse.FromString(plain[5:]).models


def test_a_client_that_takes_gzip_gets_it(told: ServerProcess) -> None:
    plain, squeezed = body(told), body(told, TAKES_GZIP)
    assert (plain[0], squeezed[0]) == (0, 1)
    assert len(squeezed) < len(plain)
    assert gzip.decompress(squeezed[5:]) == plain[5:]


def test_grpcio_reads_compressed_answers(told: ServerProcess) -> None:
    with told.channel() as channel:
        call = channel.unary_unary(
            LIST_MODELS.decode(), response_deserializer=pb.ListModelsResponse.FromString
        )
        assert {model.name for model in call(b"").models} >= {"digits", "primer"}
