"""Credentials that are almost right, and nonsense for the listener of metrics -> refused."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

import grpc
import pytest
from support.h2 import RawClient, prefixed
from support.identities import TokenFile
from support.prometheus import scrape
from support.server import PREDICT, Stub, request, rows, running

from faults.bystander import PATIENCE_S, Bystander, X, Y
from faults.tried import tried
from nnserver.identities import hash_of


@tried(
    "Exposure",
    "credentials without a scheme, of another, twice, cut, its hash, 8 KB, no ASCII, a NUL",
    "UNAUTHENTICATED",
)
def test_what_is_almost_a_token_is_refused_and_told_to_nobody(transport: str, tmp_path: Path) -> None:
    """Neither client nor log hears of a token, right or wrong; the right one works before and after."""
    file = TokenFile(tmp_path / "tokens.toml")
    token = file.add("user", "infer")
    message = prefixed(request(X).SerializeToString())
    almost = [
        [token],
        [f"bearer{token}"],
        [f"Basic {token}"],
        [f"Bearer  {token}"],
        [f"Bearer {token} x"],
        [f"Bearer {token}", f"Bearer {token}"],
        [f"Bearer {token}, Bearer {token}"],
        [f"Bearer {token[:-1]}"],
        [f"Bearer {token[:-1]}☺"],
        [f"Bearer {hash_of(token).hex()}"],
        ["Bearer " + "x" * 7000],
        ["Bearer "],
        [""],
    ]
    flags = ("--transport", transport, "--tokens", str(file.path), "--log-level", "debug")
    with running(*flags, log=tmp_path / "log") as server, server.channel() as channel:

        def is_answered() -> None:
            metadata = (("authorization", f"Bearer {token}"),)
            answer = Stub(channel).predict(request(X), metadata=metadata, timeout=PATIENCE_S)
            assert rows(answer).tobytes() == Y.tobytes()

        is_answered()
        with RawClient(server.address) as client:
            for values in almost:
                headers = [(b"authorization", value.encode()) for value in values]
                answer = client.wait(client.request(PREDICT.encode(), message, *headers))
                # HTTP/2 allows no space at the end of a value: the stream is reset.
                assert answer.reset == 1 or answer.status == 16, values
                assert token.encode() not in b"".join((*answer.headers.values(), *answer.trailers.values()))
        is_answered()
    assert token not in server.errors
    assert token[:-1] not in server.errors
    assert "Traceback" not in server.errors


@tried(
    "Exposure",
    "garbage, huge and half requests, POST and paths for the listener of metrics",
    "refused; scrapes go on",
)
def test_nonsense_for_metrics_hurts_nobody(transport: str) -> None:
    rng = random.Random(0)
    nonsense = [
        rng.randbytes(300),
        b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"x-a: b\r\n" * 5000 + b"\r\n",
        b"POST /metrics HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n",
        b"GET /metrics HTTP/9.9\r\n\r\n",
        b"GET",
        b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
    flags = ("--transport", transport, "--metrics-listen", "127.0.0.1:0")
    with running(*flags) as server, Bystander(server) as bystander:
        address = server.ready_line.split("metrics: http://")[1].split("/metrics")[0]
        host, _, port = address.rpartition(":")
        before = scrape(address).get("nnserve_rows_total", model="digits", version="1")
        for data in nonsense * 5:
            with (
                contextlib.suppress(OSError),
                socket.create_connection((host, int(port)), PATIENCE_S) as sock,
            ):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                answer = sock.makefile("rb").read()
                assert b"Traceback" not in answer
                assert b".py" not in answer
                assert b"root:" not in answer
        bystander.is_answered()
        assert scrape(address).get("nnserve_rows_total", model="digits", version="1") > before
    assert "Traceback" not in server.errors
    assert server.process.returncode == 0


@tried(
    "Exposure",
    "administration without credentials, by whoever can connect",
    "PERMISSION_DENIED unless it was allowed",
)
def test_nobody_unloads_a_model_unless_it_is_allowed(transport: str) -> None:
    with running("--transport", transport) as server, Bystander(server), server.channel() as channel:
        for name in ("RepositoryModelLoad", "RepositoryModelUnload"):
            method = channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
            with pytest.raises(grpc.RpcError) as caught:
                method(b"\x12\x06digits", timeout=PATIENCE_S)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
