"""grpc.testing.TestService as an api: requests of the interoperability cases in, what they ask for out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from interop.proto.empty_pb2 import Empty
from interop.proto.messages_pb2 import (
    EchoStatus,
    Payload,
    ResponseParameters,
    SimpleRequest,
    SimpleResponse,
    StreamingInputCallRequest,
    StreamingInputCallResponse,
    StreamingOutputCallRequest,
    StreamingOutputCallResponse,
)

from nnserver.call import Call, Method, Methods, UnaryListener
from nnserver.errors import ServerError, Status

SERVICE = "grpc.testing.TestService"
ECHO_INITIAL = "x-grpc-test-echo-initial"
ECHO_TRAILING = "x-grpc-test-echo-trailing-bin"


class AskedFor(ServerError):
    """The status that a request asks for."""

    def __init__(self, asked: EchoStatus) -> None:
        super().__init__(asked.message)
        self.status = Status(asked.code)


def methods() -> Methods:
    """Return the service's methods by path; UnimplementedCall is not among them."""
    found = (
        Method(f"/{SERVICE}/EmptyCall", lambda call: UnaryListener(call, _answer_empty)),
        Method(f"/{SERVICE}/UnaryCall", lambda call: UnaryListener(call, _answer_unary)),
        Method(f"/{SERVICE}/StreamingInputCall", StreamingInput, client_streams=True),
        Method(
            f"/{SERVICE}/StreamingOutputCall",
            lambda call: UnaryListener(call, _answer_with_stream),
            server_streams=True,
        ),
        Method(f"/{SERVICE}/FullDuplexCall", FullDuplex, client_streams=True, server_streams=True),
        Method(f"/{SERVICE}/HalfDuplexCall", HalfDuplex, client_streams=True, server_streams=True),
    )
    return {method.path: method for method in found}


class StreamingInput:
    """Payloads -> how many bytes they have together, once the last has come."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._total = 0
        call.request(1)

    def on_message(self, message: bytes) -> None:
        self._total += len(StreamingInputCallRequest.FromString(message).payload.body)
        self._call.request(1)

    def on_half_close(self) -> None:
        response = StreamingInputCallResponse(aggregated_payload_size=self._total)
        self._call.reply(response.SerializeToString())
        self._call.finish()

    def on_cancel(self) -> None:
        pass

    def on_drain(self) -> None:
        pass


class FullDuplex:
    """Each request -> its answers, before the next request is read."""

    def __init__(self, call: Call) -> None:
        self._call = call
        _echo_metadata(call)
        call.request(1)

    def on_message(self, message: bytes) -> None:
        request = StreamingOutputCallRequest.FromString(message)
        _check_status(request.response_status)
        _send(self._call, request.response_parameters, then=lambda: self._call.request(1))

    def on_half_close(self) -> None:
        self._call.finish()

    def on_cancel(self) -> None:
        pass

    def on_drain(self) -> None:
        pass


class HalfDuplex(FullDuplex):
    """All requests -> all their answers, once the last request has come."""

    def __init__(self, call: Call) -> None:
        self._asked: list[ResponseParameters] = []
        super().__init__(call)

    def on_message(self, message: bytes) -> None:
        self._asked += StreamingOutputCallRequest.FromString(message).response_parameters
        self._call.request(1)

    def on_half_close(self) -> None:
        _send(self._call, self._asked, then=self._call.finish)


def _answer_empty(call: Call, message: bytes) -> None:
    Empty.FromString(message)
    call.reply(b"")
    call.finish()


def _answer_unary(call: Call, message: bytes) -> None:
    request = SimpleRequest.FromString(message)
    _echo_metadata(call)
    _check_status(request.response_status)
    response = SimpleResponse(payload=Payload(body=bytes(request.response_size)))
    call.reply(response.SerializeToString())
    call.finish()


def _answer_with_stream(call: Call, message: bytes) -> None:
    request = StreamingOutputCallRequest.FromString(message)
    _echo_metadata(call)
    _check_status(request.response_status)
    _send(call, request.response_parameters, then=call.finish)


def _echo_metadata(call: Call) -> None:
    for item in call.metadata:
        if item[0] == ECHO_INITIAL:
            call.add_metadata(initial=(item,))
        elif item[0] == ECHO_TRAILING:
            call.add_metadata(trailing=(item,))


def _check_status(asked: EchoStatus) -> None:
    if asked.code:
        raise AskedFor(asked)


def _send(call: Call, asked: Iterable[ResponseParameters], then: Callable[[], None]) -> None:
    """Reply with what was *asked* for, then do *then*; where there is time to wait, in a thread."""
    asked = list(asked)

    def run() -> None:
        for parameters in asked:
            time.sleep(parameters.interval_us * 1e-6)
            if call.is_cancelled():
                return
            response = StreamingOutputCallResponse(payload=Payload(body=bytes(parameters.size)))
            call.reply(response.SerializeToString())
        then()

    if any(parameters.interval_us for parameters in asked):
        threading.Thread(target=run, daemon=True).start()
    else:
        run()
