"""
Requests that have ended in, OpenTelemetry spans out: one for each, with its wait and its kernel inside.

A request is traced if the traceparent (W3C) in its metadata says so; of those without one, a share is. Spans
are made when the request has ended, from the times that were noted on its way. Each request of a stream has a
span of its own. Imported when tracing was asked for: it needs the extra "otel".
"""

from __future__ import annotations

import time
from typing import Any

from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import SpanKind, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nnserver import __version__
from nnserver.access_log import RequestFacts, is_fault, request_id
from nnserver.call import Metadata
from nnserver.errors import Status
from nnserver.observation import Sampler, Times

_W3C = ("traceparent", "tracestate")
_METHODS = {
    "predict": ("nnproto.v1.Inference", "Predict"),
    "predict_stream": ("nnproto.v1.Inference", "PredictStream"),
    "differentiate": ("nnproto.v1.Inference", "Differentiate"),
    "differentiate_stream": ("nnproto.v1.Inference", "DifferentiateStream"),
    "infer": ("inference.GRPCInferenceService", "ModelInfer"),
    "infer_stream": ("inference.GRPCInferenceService", "ModelStreamInfer"),
}


class OtelTracer:
    """Traces requests to *processor*; of those without a traceparent, a *share*."""

    def __init__(self, processor: SpanProcessor, share: float) -> None:
        # What the environment says of the resource (OTEL_RESOURCE_ATTRIBUTES, OTEL_SERVICE_NAME) wins.
        resource = Resource.create({SERVICE_VERSION: __version__})
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "nnserve"}))
        self._provider = TracerProvider(
            sampler=ParentBased(ALWAYS_ON), resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("nnserver", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._sampler = Sampler(share)

    def wanted(self, metadata: Metadata) -> Context | None:
        """Return the context that a request with *metadata* is to be traced in, if it is to be."""
        carrier = {name: value for name, value in metadata if name in _W3C and isinstance(value, str)}
        if "traceparent" in carrier:
            context = self._propagator.extract(carrier, Context())
            parent = get_current_span(context).get_span_context()
            if parent.is_valid:
                return context if parent.trace_flags.sampled else None
        return Context() if any(True for _ in self._sampler.pick(1)) else None

    def record(
        self, parent: Any, facts: RequestFacts, metadata: Metadata, status: Status, times: Times
    ) -> None:
        """Make the spans of a request that has ended."""
        # From the monotonic clock of the times to the wall clock of spans.
        offset = time.time() - time.monotonic()

        def ns(moment: float) -> int:
            return round(1e9 * (moment + offset))

        service, method = _METHODS.get(facts.kind, ("nnserver", facts.kind))
        span = self._tracer.start_span(
            f"{service}/{method}",
            parent,
            kind=SpanKind.SERVER,
            start_time=ns(times.began),
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": method,
                "rpc.grpc.status_code": int(status),
                "nnserve.request_id": request_id(facts.id, metadata),
                "nnserve.model": facts.model,
                "nnserve.version": facts.version,
                "nnserve.rows": facts.rows,
            },
        )
        if is_fault(status):
            span.set_status(StatusCode.ERROR, status.name)
        stages = (("queue", times.queued, times.taken), ("compute", times.started, times.computed))
        inner = set_span_in_context(span, Context())
        for name, start, end in stages:
            if start and end:
                self._tracer.start_span(name, inner, start_time=ns(start)).end(ns(end))
        span.end(ns(times.ended))

    def close(self) -> None:
        """Send what has been recorded."""
        self._provider.shutdown()


def otlp_tracer(endpoint: str, share: float) -> OtelTracer:
    """Return a tracer that sends to the OTLP collector at *endpoint*, a URL, over gRPC."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OtelTracer(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)), share)
