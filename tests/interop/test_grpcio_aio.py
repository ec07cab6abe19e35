"""grpcio for Python, its asyncio API, against both transports over every kind of connection."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from interop import cases
from interop.cases import CASES, PATIENCE_S, REQUEST_BYTES, RESPONSE_BYTES
from interop.endpoints import Endpoint, channel_to
from interop.proto.empty_pb2 import Empty
from interop.proto.messages_pb2 import EchoStatus
from interop.stub import (
    OUTPUT_RESPONSES,
    Stub,
    input_request,
    output_request,
    output_response,
    sleepy_request,
    unary_request,
    unary_response,
)

GZIP = grpc.Compression.Gzip
LARGE_REQUEST = unary_request(cases.LARGE_RESPONSE_BYTES, cases.LARGE_REQUEST_BYTES)
LARGE_RESPONSE = unary_response(cases.LARGE_RESPONSE_BYTES)


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, endpoint: Endpoint, runner: asyncio.Runner) -> None:
    async def run() -> None:
        async with channel_to(endpoint, grpc.aio) as channel:
            await getattr(Cases(Stub(channel)), case)()

    runner.run(run())


class Cases:
    """Each method is a case; it raises if the case fails."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub

    async def empty_unary(self) -> None:
        assert await self._stub.empty_call(Empty(), timeout=PATIENCE_S) == Empty()

    async def large_unary(self, **options: Any) -> None:
        response = await self._stub.unary_call(LARGE_REQUEST, timeout=PATIENCE_S, **options)
        assert response == LARGE_RESPONSE

    async def client_streaming(self, **options: Any) -> None:
        call = self._stub.streaming_input_call(timeout=PATIENCE_S, **options)
        for size in REQUEST_BYTES:
            await call.write(input_request(size))
        await call.done_writing()
        assert (await call).aggregated_payload_size == sum(REQUEST_BYTES) == 74922

    async def server_streaming(self) -> None:
        call = self._stub.streaming_output_call(output_request(*RESPONSE_BYTES), timeout=PATIENCE_S)
        assert [response async for response in call] == OUTPUT_RESPONSES
        assert await call.code() is grpc.StatusCode.OK

    async def ping_pong(self, **options: Any) -> None:
        call = self._stub.full_duplex_call(timeout=PATIENCE_S, **options)
        for wanted, size in zip(RESPONSE_BYTES, REQUEST_BYTES, strict=True):
            await call.write(output_request(wanted, size=size))
            assert await call.read() == output_response(wanted)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK

    async def empty_stream(self) -> None:
        call = self._stub.full_duplex_call(timeout=PATIENCE_S)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK

    async def half_duplex(self) -> None:
        call = self._stub.half_duplex_call(map(output_request, RESPONSE_BYTES), timeout=PATIENCE_S)
        assert [response async for response in call] == OUTPUT_RESPONSES

    async def cancel_after_begin(self) -> None:
        call = self._stub.streaming_input_call(timeout=PATIENCE_S)
        call.cancel()
        assert await call.code() is grpc.StatusCode.CANCELLED

    async def cancel_after_first_response(self) -> None:
        call = self._stub.full_duplex_call(timeout=PATIENCE_S)
        await call.write(output_request(RESPONSE_BYTES[0], size=REQUEST_BYTES[0]))
        assert await call.read() == OUTPUT_RESPONSES[0]
        call.cancel()
        assert await call.code() is grpc.StatusCode.CANCELLED

    async def timeout_on_sleeping_server(self) -> None:
        # Nothing is written: a write that meets the end of its call makes this client report INTERNAL.
        call = self._stub.full_duplex_call(timeout=0.001)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        call = self._stub.full_duplex_call(timeout=cases.ARRIVING_TIMEOUT_S)
        await call.write(sleepy_request(cases.SLEEP_US))
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    async def status_code_and_message(self) -> None:
        await self._expect_status(EchoStatus(code=cases.STATUS_CODE, message=cases.STATUS_MESSAGE))

    async def special_status_message(self) -> None:
        await self._expect_status(EchoStatus(code=cases.STATUS_CODE, message=cases.SPECIAL_STATUS_MESSAGE))

    async def _expect_status(self, asked: EchoStatus) -> None:
        request = output_request(response_status=asked)
        calls = (
            self._stub.unary_call(unary_request(0, 0, response_status=asked), timeout=PATIENCE_S),
            self._stub.full_duplex_call(iter((request,)), timeout=PATIENCE_S),
        )
        for call in calls:
            assert await call.code() is grpc.StatusCode.UNKNOWN
            assert await call.details() == asked.message

    async def custom_metadata(self) -> None:
        metadata = (cases.ECHO_INITIAL, cases.ECHO_TRAILING)
        request = output_request(RESPONSE_BYTES[0], size=REQUEST_BYTES[0])
        unary = self._stub.unary_call(LARGE_REQUEST, metadata=metadata, timeout=PATIENCE_S)
        duplex = self._stub.full_duplex_call(iter((request,)), metadata=metadata, timeout=PATIENCE_S)
        assert await unary == LARGE_RESPONSE
        assert [response async for response in duplex] == OUTPUT_RESPONSES[:1]
        for call in (unary, duplex):
            assert cases.ECHO_INITIAL in tuple(await call.initial_metadata())
            assert await call.code() is grpc.StatusCode.OK
            assert cases.ECHO_TRAILING in tuple(await call.trailing_metadata())

    async def unimplemented_method(self) -> None:
        call = self._stub.unimplemented_call(Empty(), timeout=PATIENCE_S)
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED

    async def unimplemented_service(self) -> None:
        call = self._stub.call_of_no_service(Empty(), timeout=PATIENCE_S)
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED

    async def gzip_unary(self) -> None:
        await self.large_unary(compression=GZIP)

    async def gzip_streaming(self) -> None:
        await self.client_streaming(compression=GZIP)
        await self.ping_pong(compression=GZIP)

    async def concurrent_large_unary(self) -> None:
        await asyncio.gather(*(self.large_unary() for _ in range(cases.CONCURRENT_CALLS)))
