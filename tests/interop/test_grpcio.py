"""grpcio for Python, its synchronous API, against both transports over every kind of connection."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from interop import cases
from interop.cases import CASES, PATIENCE_S, REQUEST_BYTES, RESPONSE_BYTES
from interop.endpoints import OVER_TCP, Endpoint, channel_to
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
from interop.wire import bytes_sent_to

GZIP = grpc.Compression.Gzip
LARGE_REQUEST = unary_request(cases.LARGE_RESPONSE_BYTES, cases.LARGE_REQUEST_BYTES)
LARGE_RESPONSE = unary_response(cases.LARGE_RESPONSE_BYTES)


@pytest.fixture
def stub(endpoint: Endpoint) -> Iterator[Stub]:
    with channel_to(endpoint, grpc) as channel:
        yield Stub(channel)


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, stub: Stub) -> None:
    getattr(Cases(stub), case)()


@pytest.mark.parametrize("endpoint", OVER_TCP, ids="-".join, indirect=True)
def test_gzip_is_what_went_over_the_wire(endpoint: Endpoint) -> None:
    """271,828 zeros take less than a tenth of that."""

    def run(address: str) -> None:
        with channel_to(endpoint, grpc, address) as channel:
            Cases(Stub(channel)).gzip_unary()

    sent, _ = bytes_sent_to(endpoint.address, run)
    assert sent < cases.LARGE_REQUEST_BYTES / 10


class Cases:
    """Each method is a case; it raises if the case fails."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub

    def empty_unary(self) -> None:
        assert self._stub.empty_call(Empty(), timeout=PATIENCE_S) == Empty()

    def large_unary(self) -> None:
        assert self._stub.unary_call(LARGE_REQUEST, timeout=PATIENCE_S) == LARGE_RESPONSE

    def client_streaming(self, **options: Any) -> None:
        requests = map(input_request, REQUEST_BYTES)
        response = self._stub.streaming_input_call(requests, timeout=PATIENCE_S, **options)
        assert response.aggregated_payload_size == sum(REQUEST_BYTES) == 74922

    def server_streaming(self) -> None:
        call = self._stub.streaming_output_call(output_request(*RESPONSE_BYTES), timeout=PATIENCE_S)
        assert list(call) == OUTPUT_RESPONSES
        assert call.code() is grpc.StatusCode.OK

    def ping_pong(self, **options: Any) -> None:
        requests: SimpleQueue[Any] = SimpleQueue()
        call = self._stub.full_duplex_call(iter(requests.get, None), timeout=PATIENCE_S, **options)
        for wanted, size in zip(RESPONSE_BYTES, REQUEST_BYTES, strict=True):
            requests.put(output_request(wanted, size=size))
            assert next(call) == output_response(wanted)
        requests.put(None)
        assert list(call) == []
        assert call.code() is grpc.StatusCode.OK

    def empty_stream(self) -> None:
        call = self._stub.full_duplex_call(iter(()), timeout=PATIENCE_S)
        assert list(call) == []
        assert call.code() is grpc.StatusCode.OK

    def half_duplex(self) -> None:
        call = self._stub.half_duplex_call(map(output_request, RESPONSE_BYTES), timeout=PATIENCE_S)
        assert list(call) == OUTPUT_RESPONSES

    def cancel_after_begin(self) -> None:
        requests: SimpleQueue[Any] = SimpleQueue()
        call = self._stub.streaming_input_call.future(iter(requests.get, None), timeout=PATIENCE_S)
        call.cancel()
        requests.put(None)
        assert call.code() is grpc.StatusCode.CANCELLED

    def cancel_after_first_response(self) -> None:
        requests: SimpleQueue[Any] = SimpleQueue()
        call = self._stub.full_duplex_call(iter(requests.get, None), timeout=PATIENCE_S)
        requests.put(output_request(RESPONSE_BYTES[0], size=REQUEST_BYTES[0]))
        assert next(call) == OUTPUT_RESPONSES[0]
        call.cancel()
        requests.put(None)
        assert call.code() is grpc.StatusCode.CANCELLED

    def timeout_on_sleeping_server(self) -> None:
        for timeout in (0.001, cases.ARRIVING_TIMEOUT_S):
            requests: SimpleQueue[Any] = SimpleQueue()
            requests.put(sleepy_request(cases.SLEEP_US))
            call = self._stub.full_duplex_call(iter(requests.get, None), timeout=timeout)
            with pytest.raises(grpc.RpcError):
                next(call)
            requests.put(None)
            assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    def status_code_and_message(self) -> None:
        self._expect_status(EchoStatus(code=cases.STATUS_CODE, message=cases.STATUS_MESSAGE))

    def special_status_message(self) -> None:
        self._expect_status(EchoStatus(code=cases.STATUS_CODE, message=cases.SPECIAL_STATUS_MESSAGE))

    def _expect_status(self, asked: EchoStatus) -> None:
        request = output_request(response_status=asked)
        unary = self._stub.unary_call.future(unary_request(0, 0, response_status=asked), timeout=PATIENCE_S)
        duplex = self._stub.full_duplex_call(iter((request,)), timeout=PATIENCE_S)
        with pytest.raises(grpc.RpcError):
            next(duplex)
        for call in (unary, duplex):
            assert call.code() is grpc.StatusCode.UNKNOWN
            assert call.details() == asked.message

    def custom_metadata(self) -> None:
        metadata = (cases.ECHO_INITIAL, cases.ECHO_TRAILING)
        request = output_request(RESPONSE_BYTES[0], size=REQUEST_BYTES[0])
        unary = self._stub.unary_call.future(LARGE_REQUEST, metadata=metadata, timeout=PATIENCE_S)
        duplex = self._stub.full_duplex_call(iter((request,)), metadata=metadata, timeout=PATIENCE_S)
        assert unary.result() == LARGE_RESPONSE
        assert list(duplex) == OUTPUT_RESPONSES[:1]
        for call in (unary, duplex):
            assert cases.ECHO_INITIAL in call.initial_metadata()
            assert call.code() is grpc.StatusCode.OK
            assert cases.ECHO_TRAILING in call.trailing_metadata()

    def unimplemented_method(self) -> None:
        call = self._stub.unimplemented_call.future(Empty(), timeout=PATIENCE_S)
        assert call.code() is grpc.StatusCode.UNIMPLEMENTED

    def unimplemented_service(self) -> None:
        call = self._stub.call_of_no_service.future(Empty(), timeout=PATIENCE_S)
        assert call.code() is grpc.StatusCode.UNIMPLEMENTED

    def gzip_unary(self) -> None:
        response = self._stub.unary_call(LARGE_REQUEST, timeout=PATIENCE_S, compression=GZIP)
        assert response == LARGE_RESPONSE

    def gzip_streaming(self) -> None:
        self.client_streaming(compression=GZIP)
        self.ping_pong(compression=GZIP)

    def concurrent_large_unary(self) -> None:
        calls = [
            self._stub.unary_call.future(LARGE_REQUEST, timeout=PATIENCE_S)
            for _ in range(cases.CONCURRENT_CALLS)
        ]
        for call in calls:
            assert call.result() == LARGE_RESPONSE
