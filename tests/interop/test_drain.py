"""SIGTERM during a call: whatever the client, the call is finished before the server ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from interop.cases import FINISH_WHILE_DRAINING, PATIENCE_S
from interop.endpoints import OVER_TCP, TEST_SERVICE_COMMAND, Certificates, Endpoint, channel_to, serving
from interop.programs import Program
from interop.proto.empty_pb2 import Empty
from interop.stub import Stub, output_response, request_for_two


@pytest.fixture(params=OVER_TCP, ids="-".join)
def mortal(request: pytest.FixtureRequest, certificates: Certificates, tmp_path: Path) -> Iterator[Endpoint]:
    """A server of the test's own."""
    with serving(TEST_SERVICE_COMMAND, *request.param, certificates, tmp_path) as found:
        yield found


def end(endpoint: Endpoint) -> None:
    endpoint.process.signal(signal.SIGTERM)


def test_grpcio(mortal: Endpoint) -> None:
    with channel_to(mortal, grpc) as channel:
        stub = Stub(channel)
        call = stub.streaming_output_call(request_for_two(), timeout=PATIENCE_S)
        assert next(call) == output_response(1)
        end(mortal)
        assert list(call) == [output_response(2)]
        assert mortal.process.wait() == 0
        assert stub.empty_call.future(Empty(), timeout=PATIENCE_S).code() is grpc.StatusCode.UNAVAILABLE


def test_grpcio_aio(mortal: Endpoint, runner: asyncio.Runner) -> None:
    async def run() -> None:
        async with channel_to(mortal, grpc.aio) as channel:
            stub = Stub(channel)
            call = stub.streaming_output_call(request_for_two(), timeout=PATIENCE_S)
            assert await call.read() == output_response(1)
            end(mortal)
            assert await call.read() == output_response(2)
            assert await call.code() is grpc.StatusCode.OK
            assert await asyncio.to_thread(mortal.process.wait) == 0
            code = await stub.empty_call(Empty(), timeout=PATIENCE_S).code()
            assert code is grpc.StatusCode.UNAVAILABLE

    runner.run(run())


def test_grpc_js(mortal: Endpoint, grpc_js: Program) -> None:
    outcome = grpc_js.outcome_after(FINISH_WHILE_DRAINING, mortal.arguments, lambda: end(mortal))
    assert outcome == f"{FINISH_WHILE_DRAINING} ok"
    assert mortal.process.wait() == 0


def test_cpp(mortal: Endpoint, cpp: Program) -> None:
    outcome = cpp.outcome_after(FINISH_WHILE_DRAINING, mortal.arguments, lambda: end(mortal))
    assert outcome == f"{FINISH_WHILE_DRAINING} ok"
    assert mortal.process.wait() == 0
