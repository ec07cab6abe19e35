"""Real sockets, a real process, and a collector that keeps what it is sent: traces over OTLP."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from support.server import Stub, request, running

X = np.zeros((3, 64), np.float32)
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """An OTLP collector on a free port."""

    def __init__(self) -> None:
        self.requests: list[otlp.ExportTraceServiceRequest] = []
        handler = grpc.unary_unary_rpc_method_handler(
            self._export, otlp.ExportTraceServiceRequest.FromString, lambda answer: answer.SerializeToString()
        )
        service = "opentelemetry.proto.collector.trace.v1.TraceService"
        self.server = grpc.server(
            ThreadPoolExecutor(2), [grpc.method_handlers_generic_handler(service, {"Export": handler})]
        )
        self.url = f"http://127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def _export(
        self, message: otlp.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> otlp.ExportTraceServiceResponse:
        self.requests.append(message)
        return otlp.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.stop(0).wait()


def test_a_clients_trace_goes_on_in_the_server(transport: str, collector: Collector) -> None:
    """A unary request and two of a stream, sent with a traceparent; one more without is not sampled."""
    options = ("--transport", transport, "--trace-endpoint", collector.url, "--trace-sample", "0")
    with running(*options) as server:
        with server.channel() as channel:
            stub = Stub(channel)
            metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
            stub.predict(request(X), metadata=metadata)
            assert len(list(stub.predict_stream(iter([request(X)] * 2), metadata=metadata))) == 2
            stub.predict(request(X))
        assert server.stop() == 0
    found = [
        span
        for message in collector.requests
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert {span.trace_id.hex() for span in found} == {TRACE}
    roots = [span for span in found if span.parent_span_id.hex() == PARENT]
    assert sorted(span.name for span in roots) == [
        "nnproto.v1.Inference/Predict",
        *["nnproto.v1.Inference/PredictStream"] * 2,
    ]
    for root in roots:
        inside = [span for span in found if span.parent_span_id == root.span_id]
        assert sorted(span.name for span in inside) == ["compute", "queue"]
        for span in inside:
            assert root.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= root.end_time_unix_nano
    attributes = collector.requests[0].resource_spans[0].resource.attributes
    assert {pair.key: pair.value.string_value for pair in attributes}["service.name"] == "nnserve"
