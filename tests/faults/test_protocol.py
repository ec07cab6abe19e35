"""Messages at the limit, bombs, metadata without end and what is no gRPC -> a status, or nothing."""

from __future__ import annotations

import contextlib
import gzip
import random
import socket
import struct
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from support.h2 import END_HEADERS, HEADERS, PREFACE, SETTINGS, RawClient, connect, frame, prefixed
from support.oip import request_for as oip_request_for
from support.server import PREDICT, PREDICT_STREAM, ServerProcess, request, running

from faults.bystander import PATIENCE_S, Bystander, X
from faults.test_requests import INFER
from faults.tried import tried
from nnproto.v1 import inference_pb2 as own

LIMIT = 64 << 10


@pytest.fixture(scope="module")
def narrow(transport: str) -> Iterator[ServerProcess]:
    """A server that takes messages of 64 KiB."""
    with running("--transport", transport, "--max-message-bytes", str(LIMIT)) as process:
        yield process


def of_size(size: int, service: str) -> bytes:
    """A right request of *size* bytes: rows, and an id that fills the rest."""
    x = np.repeat(X[:1], (size - 2000) // 256, axis=0)
    message = request(x) if service == "own" else oip_request_for(x, "digits")
    # One more pass: the length of the id's length may change the size.
    for _ in range(3):
        message.id = "i" * (len(message.id) + size - message.ByteSize())
    data: bytes = message.SerializeToString()
    assert len(data) == size
    return data


@tried("Protocol", "a message of the limit, of one byte less and more", "answered; RESOURCE_EXHAUSTED")
@pytest.mark.parametrize("service", ["own", "oip"])
def test_the_limit_is_exact(narrow: ServerProcess, service: str) -> None:
    path = PREDICT if service == "own" else INFER
    with Bystander(narrow), narrow.channel() as channel:
        method = channel.unary_unary(path)
        for size in (LIMIT - 1, LIMIT):
            assert method(of_size(size, service), timeout=PATIENCE_S)
        with pytest.raises(grpc.RpcError) as caught:
            method(of_size(LIMIT + 1, service), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert f"{LIMIT + 1} bytes" in caught.value.details()
        with pytest.raises(grpc.RpcError) as caught:
            method(bytes(20 * LIMIT), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@tried(
    "Protocol",
    "16 KB of gzip that become 16 MiB, 20 times",
    "RESOURCE_EXHAUSTED, below 64 MiB more in memory",
)
def test_a_bomb_is_not_blown_up(narrow: ServerProcess) -> None:
    bomb = prefixed(gzip.compress(bytes(16 << 20), 9, mtime=0), 1)
    with Bystander(narrow), RawClient(narrow.address) as client:
        before = narrow.status("VmRSS")
        for path in (PREDICT, INFER, PREDICT_STREAM):
            for _ in range(20):
                answer = client.wait(client.request(path.encode(), bomb, (b"grpc-encoding", b"gzip")))
                assert answer.status == 8
        assert narrow.status("VmHWM") < before + (64 << 10)


@tried("Protocol", "metadata of 1 MB; of 10,000 fields", "the call is refused or the connection closed")
@pytest.mark.parametrize("fields", [1, 10_000])
def test_huge_metadata_costs_the_call(server: ServerProcess, bystander: Bystander, fields: int) -> None:
    size = (1 << 20) // fields
    metadata = tuple((f"x-{i}", "v" * (size - 6)) for i in range(fields))
    with server.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(PREDICT)(
            request(X[:1]).SerializeToString(), metadata=metadata, timeout=PATIENCE_S
        )
    assert caught.value.code().name in (
        "RESOURCE_EXHAUSTED",
        "UNAVAILABLE",
        "INTERNAL",
        "UNKNOWN",
        "CANCELLED",
    )


@tried(
    "Protocol", "random bytes, HTTP/1.1, a TLS hello, half a preface and random frames", "closed, or a status"
)
def test_garbage_hurts_nobody(transport: str) -> None:
    """A thousand connections, in a process of its own: gRPC's core logs some of them in its own words."""
    rng = random.Random(0)
    with running("--transport", transport) as server, Bystander(server) as bystander:
        for i in range(1000):
            nonsense = (
                rng.randbytes(rng.randint(1, 500)),
                b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(200),
                PREFACE[: rng.randint(1, 23)],
                PREFACE + frame(SETTINGS, 0, 0) + rng.randbytes(rng.randint(1, 200)),
                PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, rng.randbytes(60)),
                PREFACE
                + frame(SETTINGS, 0, 0)
                + frame(rng.randrange(10), rng.randrange(256), 1, rng.randbytes(9)),
            )[i % 7]
            with contextlib.suppress(OSError), connect(server.address) as sock:
                sock.sendall(nonsense)
                if i % 2:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if not i % 200:
                bystander.is_answered()
    assert "Traceback" not in server.errors
    assert server.process.returncode == 0


@tried("Protocol", "an id that comes after the rows, whatever its bytes", "answered")
def test_fields_may_come_in_any_order(server: ServerProcess, bystander: Bystander) -> None:
    with server.channel() as channel:
        for request_id in ("a", "b", "\x7f", "z" * 200, "\x08"):
            message = (
                request(X[:2]).SerializeToString() + own.PredictRequest(id=request_id).SerializeToString()
            )
            for _ in range(2):
                reply = channel.unary_unary(PREDICT)(message, timeout=PATIENCE_S)
                assert own.PredictResponse.FromString(reply).id == request_id
