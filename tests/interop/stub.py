"""A grpcio channel in, the methods of TestService out; synchronous or asynchronous, as the channel is."""

from __future__ import annotations

from typing import Any

from interop.cases import RESPONSE_BYTES
from interop.proto import empty_pb2, messages_pb2
from interop.service import SERVICE


class Stub:
    """The test service's methods, and one of a service that is not there."""

    def __init__(self, channel: Any) -> None:
        def method(kind: str, path: str, answer: Any) -> Any:
            return getattr(channel, kind)(
                path,
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=answer.FromString,
            )

        empty, output = empty_pb2.Empty, messages_pb2.StreamingOutputCallResponse
        self.empty_call = method("unary_unary", f"/{SERVICE}/EmptyCall", empty)
        self.unary_call = method("unary_unary", f"/{SERVICE}/UnaryCall", messages_pb2.SimpleResponse)
        self.streaming_input_call = method(
            "stream_unary", f"/{SERVICE}/StreamingInputCall", messages_pb2.StreamingInputCallResponse
        )
        self.streaming_output_call = method("unary_stream", f"/{SERVICE}/StreamingOutputCall", output)
        self.full_duplex_call = method("stream_stream", f"/{SERVICE}/FullDuplexCall", output)
        self.half_duplex_call = method("stream_stream", f"/{SERVICE}/HalfDuplexCall", output)
        self.unimplemented_call = method("unary_unary", f"/{SERVICE}/UnimplementedCall", empty)
        self.call_of_no_service = method(
            "unary_unary", "/grpc.testing.UnimplementedService/UnimplementedCall", empty
        )


def unary_request(response_size: int, size: int, **fields: Any) -> messages_pb2.SimpleRequest:
    """A request of *size* zeros for an answer of *response_size*."""
    return messages_pb2.SimpleRequest(response_size=response_size, payload=payload(size), **fields)


def unary_response(size: int) -> messages_pb2.SimpleResponse:
    return messages_pb2.SimpleResponse(payload=payload(size))


def input_request(size: int) -> messages_pb2.StreamingInputCallRequest:
    return messages_pb2.StreamingInputCallRequest(payload=payload(size))


def output_request(*sizes: int, size: int = 0, **fields: Any) -> messages_pb2.StreamingOutputCallRequest:
    """A request of *size* zeros for answers of *sizes*."""
    parameters = [messages_pb2.ResponseParameters(size=wanted) for wanted in sizes]
    return messages_pb2.StreamingOutputCallRequest(
        response_parameters=parameters, payload=payload(size), **fields
    )


def sleepy_request(interval_us: int) -> messages_pb2.StreamingOutputCallRequest:
    """A request for an answer that takes its time."""
    parameters = messages_pb2.ResponseParameters(size=1, interval_us=interval_us)
    return messages_pb2.StreamingOutputCallRequest(response_parameters=[parameters])


def request_for_two() -> messages_pb2.StreamingOutputCallRequest:
    """A request for an answer of one byte at once, and one of two bytes half a second later."""
    found = output_request(1, 2)
    found.response_parameters[1].interval_us = 500_000
    return found


def output_response(size: int) -> messages_pb2.StreamingOutputCallResponse:
    return messages_pb2.StreamingOutputCallResponse(payload=payload(size))


def payload(size: int) -> messages_pb2.Payload:
    return messages_pb2.Payload(body=bytes(size))


OUTPUT_RESPONSES = [output_response(size) for size in RESPONSE_BYTES]
