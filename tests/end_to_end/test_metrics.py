"""Real sockets, a real process: what Prometheus finds, for each way that a request can end."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.models import save_scale
from support.oip import request_for as oip_request
from support.prometheus import Scrape, scrape, scrape_until
from support.server import ServerProcess, Stub, request, running

from nnproto.oip import inference_pb2 as oip
from nnserver.metrics.definitions import METRICS

INFER = "/inference.GRPCInferenceService/ModelInfer"
INFER_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
X = np.zeros((3, 64), np.float32)
DIGITS = {"model": "digits", "version": "1"}
HISTOGRAMS = ("decode", "queue", "compute", "encode")


def metrics_address(server: ServerProcess) -> str:
    found = re.search(r"metrics: http://(\S+)/metrics;", server.ready_line)
    assert found is not None, server.ready_line
    return found[1]


@pytest.fixture
def server(transport: str) -> Iterator[ServerProcess]:
    with running("--transport", transport, "--metrics-listen", "127.0.0.1:0") as process:
        yield process


def requests(
    found: Scrape, kind: str, status: str = "OK", model: str = "digits", version: str = "1"
) -> float:
    labels = {"model": model, "version": version, "kind": kind, "status": status}
    return found.get("nnserve_requests_total", 0.0, **labels)


def test_each_kind_and_each_status_is_counted(server: ServerProcess) -> None:
    """Unary and streamed, of both services; good ones, bad ones, late ones, and those for nobody."""
    address = metrics_address(server)
    with server.channel() as channel:
        stub = Stub(channel)
        for _ in range(5):
            stub.predict(request(X))
        bad = request(X[:, :5])
        assert len(list(stub.predict_stream(iter([request(X), bad, request(X)])))) == 3
        infer = channel.unary_unary(INFER, oip.ModelInferRequest.SerializeToString)
        for _ in range(4):
            infer(oip_request(X, "digits"))
        infer_stream = channel.stream_stream(INFER_STREAM, oip.ModelInferRequest.SerializeToString)
        assert len(list(infer_stream(iter([oip_request(X, "digits")] * 2)))) == 2
        with pytest.raises(grpc.RpcError):
            stub.predict(bad)
        for name in ("attack-1", "attack-2", 'x"} 1\nfaked_total 9'):
            with pytest.raises(grpc.RpcError):
                stub.predict(request(X, name))
            with pytest.raises(grpc.RpcError):
                infer(oip_request(X, name))
        with pytest.raises(grpc.RpcError):
            stub.predict(request(X, version="7"))
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/nnproto.v1.Inference/Nothing")(b"")
        found = scrape_until(address, lambda found: requests(found, "infer_stream") == 2)
        assert found.get("nnserve_connections") == 1
    assert requests(found, "predict") == 5
    assert requests(found, "predict_stream") == 2
    assert requests(found, "infer") == 4
    assert requests(found, "predict", "INVALID_ARGUMENT") == 1
    assert requests(found, "predict_stream", "INVALID_ARGUMENT") == 1
    assert requests(found, "predict", "NOT_FOUND", "", "") == 4
    assert requests(found, "infer", "NOT_FOUND", "", "") == 3
    assert found.get("nnserve_rows_total", **DIGITS) == 3 * 13
    assert found.get("nnserve_batch_rows_sum", **DIGITS) == 3 * 13
    for name in HISTOGRAMS:
        assert found.get(f"nnserve_{name}_seconds_sum", **DIGITS) > 0
    for name in ("decode", "queue"):
        assert found.get(f"nnserve_{name}_seconds_count", **DIGITS) == 13
    assert found.get("nnserve_requests_in_flight", **DIGITS) == 0
    assert found.get("nnserve_errors_total", status="NOT_FOUND") == 7
    assert found.get("nnserve_errors_total", status="UNIMPLEMENTED") == 1
    assert found.label_values("model") == {"", "digits", "mnist", "primer"}
    assert found.label_values("version") >= {"", "1"}
    found.check_histograms()


def test_all_metrics_are_there_from_the_beginning(server: ServerProcess, transport: str) -> None:
    """Every definition has a family; those of models have the bundled ones, at zero."""
    found = scrape(metrics_address(server))
    assert set(found.families) == {name.removesuffix("_total") for name in METRICS}
    for name, metric in METRICS.items():
        family = found.families[name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.type, metric.help)
    for model in ("digits", "mnist", "primer"):
        assert found.get("nnserve_model_served", model=model, version="1") == 1
        assert found.get("nnserve_model_loads_total", model=model, result="loaded") == 1
        assert found.get("nnserve_queue_limit_requests", model=model, version="1") == 4096
        assert found.get("nnserve_rows_total", model=model, version="1") == 0
    assert found.get("nnserve_ready") == 1
    assert found.get("process_resident_memory_bytes") > 1e6
    assert "transport" in dict(next(labels for name, labels in found.samples if name == "nnserve_build_info"))
    assert found.label_values("transport") == {transport}


def test_streams_are_counted_while_they_are_open(server: ServerProcess) -> None:
    address = metrics_address(server)
    is_over = threading.Event()

    def messages() -> Iterator[object]:
        yield request(X)
        is_over.wait(60)

    with server.channel() as one, server.channel() as other:
        answers = [Stub(channel).predict_stream(messages()) for channel in (one, other)]
        for stream in answers:
            next(stream)
        found = scrape(address)
        assert (found.get("nnserve_open_streams"), found.get("nnserve_connections")) == (2, 2)
        is_over.set()
        for stream in answers:
            assert list(stream) == []
        scrape_until(address, lambda found: found.get("nnserve_open_streams") == 0)


def test_scrapes_are_consistent_while_models_come_and_go(transport: str, tmp_path: Path) -> None:
    """
    A client asks without pause, another loads and unloads, a third scrapes.

    No counter ever goes down, histograms agree with their counts, and in the end each answer was counted.
    """
    file = save_scale(tmp_path / "iris.safetensors", 1.0)
    options = ("--transport", transport, "--model-control", "--metrics-listen", "127.0.0.1:0")
    with running(str(tmp_path), *options) as server, ThreadPoolExecutor(2) as pool:
        address = metrics_address(server)
        is_over = threading.Event()

        def ask() -> tuple[int, int]:
            answered = refused = 0
            with server.channel() as channel:
                stub = Stub(channel)
                while not is_over.is_set():
                    try:
                        stub.predict(request(np.ones((1, 1), np.float32), "iris"))
                        answered += 1
                    except grpc.RpcError as error:
                        assert error.code() is grpc.StatusCode.NOT_FOUND, error  # noqa: PT017
                        refused += 1
            return answered, refused

        def watch() -> int:
            scrapes, before = 0, scrape(address)
            while not is_over.is_set():
                found = scrape(address)
                found.check_histograms()
                after = found.cumulative()
                for key, value in before.cumulative().items():
                    assert after[key] >= value, key
                before = found
                scrapes += 1
            return scrapes

        client, watcher = pool.submit(ask), pool.submit(watch)
        service = "/inference.GRPCInferenceService/RepositoryModel"
        try:
            with server.channel() as channel:
                load, unload = (channel.unary_unary(service + name) for name in ("Load", "Unload"))
                asked = oip.RepositoryModelLoadRequest(model_name="iris").SerializeToString()
                for i in range(1, 16):
                    save_scale(file, float(i))
                    load(asked)
                    if i % 3 == 0:
                        unload(oip.RepositoryModelUnloadRequest(model_name="iris").SerializeToString())
                        load(asked)
                file.write_bytes(b"half a model")
                with pytest.raises(grpc.RpcError):
                    load(asked)
        finally:
            is_over.set()
        answered, refused = client.result(60)
        assert watcher.result(60) > 1
        iris = {"model": "iris"}
        found = scrape_until(address, lambda found: requests(found, "predict", model="iris") == answered)
        assert answered > 0
        assert requests(found, "predict", "NOT_FOUND", "", "") == refused
        assert found.get("nnserve_rows_total", version="1", **iris) == answered
        assert found.get("nnserve_queue_seconds_count", version="1", **iris) == answered
        assert found.get("nnserve_model_loads_total", result="loaded", **iris) == 1 + 15 + 5
        assert found.get("nnserve_model_loads_total", result="unloaded", **iris) == 5
        assert found.get("nnserve_model_loads_total", result="failed", **iris) == 1
