"""Observer: which requests are observed, and what is told of them; traces with the SDK's own exporter."""

import gc
import logging
import random
import weakref

import numpy as np
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from support.calls import FakeCall
from support.serving import echoed, request_for

from nnserver.api.inference import InferenceApi, InferenceLimits
from nnserver.engine import Engine
from nnserver.observation import Observer, Sampler
from nnserver.repository import Repository
from nnserver.request_watch import RequestWatch
from nnserver.tracing import OtelTracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
UNSAMPLED = (("traceparent", f"00-{TRACE}-{PARENT}-00"),)


class Traced:
    """An InferenceApi with a real engine, whose requests are observed."""

    def __init__(self, share=0.0, trace_share=None):
        self.exporter = InMemorySpanExporter()
        self.tracer = None
        if trace_share is not None:
            self.tracer = OtelTracer(SimpleSpanProcessor(self.exporter), trace_share)
        self.engine = Engine(threads=1)
        self.repository = Repository([echoed(2)])
        watch = RequestWatch(counts=False, observer=Observer(share, self.tracer))
        self.api = InferenceApi(self.repository, self.engine, InferenceLimits(), watch)

    def ask(self, x=((1.0, 2.0),), metadata=(), **fields):
        call = FakeCall()
        call.metadata = metadata
        self.api.predict_all([(call, request_for(np.array(x), **fields).SerializeToString())])
        self.engine.run_waiting()
        assert call.has_ended
        return call

    def spans(self):
        return {span.name: span for span in self.exporter.get_finished_spans()}


@pytest.fixture
def traced():
    made = []

    def make(**options):
        made.append(Traced(**options))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()
        if each.tracer is not None:
            each.tracer.close()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
def test_a_sampler_picks_its_share(share):
    """However the requests come; 3 standard deviations of a binomial, and exactly none or all at the ends."""
    rng = random.Random(0)
    sampler = Sampler(share, rng.random)
    total = picked = 0
    while total < 20_000:
        n = rng.randrange(1, 50)
        positions = list(sampler.pick(n))
        assert positions == sorted(set(positions))
        assert all(0 <= position < n for position in positions)
        total, picked = total + n, picked + len(positions)
    assert abs(picked - share * total) <= 3 * (total * share * (1 - share)) ** 0.5


def test_each_request_is_logged_if_all_are(traced, caplog):
    """Good ones with id and rows, bad ones with their status; the second of a form like the first."""
    served = traced(share=1.0)
    with caplog.at_level(logging.INFO, "nnserver.access"):
        for i in range(2):
            served.ask(id=f"r{i}")
        served.ask(metadata=(("x-request-id", "from-proxy"),))
        served.ask([[1.0]], id="bad")
        served.ask(model="nothing\n")
    facts = [record.facts for record in caplog.records if record.name == "nnserver.access"]
    assert [(f["request_id"], f["status"], f["rows"]) for f in facts[:3]] == [
        ("r0", "OK", 1),
        ("r1", "OK", 1),
        ("from-proxy", "OK", 1),
    ]
    assert [(f["model"], f["version"], f["status"]) for f in facts] == [
        *[("iris", "1", "OK")] * 3,
        ("iris", "1", "INVALID_ARGUMENT"),
        ("", "", "NOT_FOUND"),
    ]
    assert all(f["kind"] == "predict" and f["time_ms"] > 0 for f in facts)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_fault_is_logged_once_whatever_the_share(share, traced, caplog):
    served = traced(share=share)
    lane = served.repository.get("iris").lane

    def broken(x):
        raise ArithmeticError

    lane.forward = broken
    served.ask(id="unlucky")
    records = [record for record in caplog.records if record.name == "nnserver.access"]
    assert [(r.levelname, r.facts["request_id"], r.facts["status"]) for r in records] == [
        ("ERROR", "unlucky", "INTERNAL")
    ]


def test_a_sampled_parent_gets_a_span_with_queue_and_compute_inside(traced):
    served = traced(trace_share=0.0)
    served.ask(metadata=SAMPLED, id="r7")
    spans = served.spans()
    assert set(spans) == {"nnproto.v1.Inference/Predict", "queue", "compute"}
    server = spans["nnproto.v1.Inference/Predict"]
    assert server.kind is SpanKind.SERVER
    assert (f"{server.context.trace_id:032x}", f"{server.parent.span_id:016x}") == (TRACE, PARENT)
    assert server.parent.is_remote
    assert dict(server.attributes) == {
        "rpc.system": "grpc",
        "rpc.service": "nnproto.v1.Inference",
        "rpc.method": "Predict",
        "rpc.grpc.status_code": 0,
        "nnserve.request_id": "r7",
        "nnserve.model": "iris",
        "nnserve.version": "1",
        "nnserve.rows": 1,
    }
    queue, compute = spans["queue"], spans["compute"]
    for child in (queue, compute):
        assert child.parent.span_id == server.context.span_id
        assert child.context.trace_id == server.context.trace_id
    moments = (server.start_time, queue.start_time, queue.end_time, compute.start_time, compute.end_time)
    assert list(moments) == sorted(moments)
    assert compute.end_time <= server.end_time


def test_the_parent_decides_and_without_one_the_share_does(traced):
    served = traced(trace_share=1.0)
    served.ask(metadata=UNSAMPLED)
    assert served.spans() == {}
    served.ask(metadata=(("traceparent", "nonsense"),))
    assert served.spans()["nnproto.v1.Inference/Predict"].parent is None
    served = traced(trace_share=0.0)
    served.ask()
    assert served.spans() == {}


def test_a_refused_request_and_a_fault_are_traced(traced):
    served = traced(trace_share=0.0)
    served.ask([[1.0]], metadata=SAMPLED)
    (refused,) = served.exporter.get_finished_spans()
    assert refused.attributes["rpc.grpc.status_code"] == 3
    assert refused.status.status_code is StatusCode.UNSET
    served.exporter.clear()

    def broken(x):
        raise ArithmeticError

    served.repository.get("iris").lane.forward = broken
    served.ask(metadata=SAMPLED)
    assert served.spans()["nnproto.v1.Inference/Predict"].status.status_code is StatusCode.ERROR


def test_an_observed_request_leaves_nothing_behind(traced):
    """Its wrapper and its job hold each other only until it has ended."""
    served = traced(share=1.0, trace_share=1.0)
    gc.collect()
    gc.disable()
    try:
        served.ask()
        gone = weakref.ref(served.repository.get("iris").lane.batcher)
        served.repository.remove("iris")
        assert gone() is None
    finally:
        gc.enable()
