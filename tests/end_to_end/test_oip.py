"""Real sockets, a real process: the Open Inference Protocol, and models that are loaded and reloaded."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.models import save_scale
from support.oip import request_for, tensor_of
from support.server import ServerProcess, Stub, request, rows, running

import nncore
import nnserver
from nnproto.oip import inference_pb2 as pb

SERVICE = "inference.GRPCInferenceService"
MODELS = Path(nnserver.__file__).parent / "models"
DIGITS = nncore.load(MODELS / "digits.safetensors")
X = np.random.default_rng(0).uniform(0, 16, (40, 64)).astype(np.float32)


class OipStub:
    """The service's methods on one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self.stream = channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )

    def ask(self, name: str, message: Any, timeout: float = 60) -> Any:
        answer = getattr(pb, f"{name}Response")
        method = self._channel.unary_unary(
            f"/{SERVICE}/{name}",
            request_serializer=lambda m: m.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return method(message, timeout=timeout)

    def infer(self, message: pb.ModelInferRequest, timeout: float = 60) -> pb.ModelInferResponse:
        answer: pb.ModelInferResponse = self.ask("ModelInfer", message, timeout)
        return answer

    def failure(self, name: str, message: Any, timeout: float = 60) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.ask(name, message, timeout)
        return caught.value.code(), caught.value.details()

    def load(self, name: str) -> None:
        self.ask("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=name))

    def unload(self, name: str) -> None:
        self.ask("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=name))

    def weight(self, name: str = "iris", **fields: Any) -> float:
        """What a model of `save_scale` multiplies by."""
        return float(tensor_of(self.infer(request_for([[1.0]], name, **fields))).flat[0])


@pytest.fixture
def oip(server: ServerProcess) -> Iterator[OipStub]:
    with server.channel() as channel:
        yield OipStub(channel)


def wait_until(claim: Callable[[], bool], within_s: float = 30.0) -> None:
    """Poll what no event tells of: what another process serves."""
    end = time.monotonic() + within_s
    pause = threading.Event()
    while not claim():
        assert time.monotonic() < end, "it did not become true in time"
        pause.wait(0.02)


# Inference


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("n", [0, 1, 7, 40])
def test_outputs_are_nncores_own_bits(oip: OipStub, n: int, raw: bool) -> None:
    response = oip.infer(request_for(X[:n], "digits", raw=raw, id="a"))
    assert np.array_equal(tensor_of(response), DIGITS.forward(X[:n]))
    assert np.array_equal(tensor_of(response, "probabilities"), DIGITS.predict_proba(X[:n]))
    indices, _ = DIGITS.top_labels_from(DIGITS.forward(X[:n]))
    assert tensor_of(response, "labels").tolist() == [[str(i).encode()] for i in indices[:, 0]]
    assert (response.model_name, response.model_version, response.id) == ("digits", "1", "a")


def test_the_same_request_many_times_with_other_rows(oip: OipStub) -> None:
    for x in X:
        assert np.array_equal(tensor_of(oip.infer(request_for([x], "digits"))), DIGITS.forward(x[None]))


def test_classification(oip: OipStub) -> None:
    message = request_for(X, "digits", outputs=["probabilities"])
    message.outputs[0].parameters["classification"].int64_param = 3
    texts = tensor_of(oip.infer(message), "probabilities")
    indices, scores = DIGITS.top_labels_from(DIGITS.forward(X), 3)
    assert texts.shape == (40, 3)
    for text, index, score in zip(texts.ravel(), indices.ravel(), scores.ravel(), strict=True):
        assert text == f"{score!s}:{index}:{index}".encode()


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (request_for(X[:, :5], "digits"), "INVALID_ARGUMENT", "inputs has shape (40, 5); model 'digits'"),
        (request_for(X, "digits", outputs=["x"]), "INVALID_ARGUMENT", "model 'digits' has no output 'x'"),
        (
            pb.ModelInferRequest(model_name="digits"),
            "INVALID_ARGUMENT",
            "the request has no inputs; model 'digits' expects one, 'inputs'",
        ),
        (request_for(X, "rose"), "NOT_FOUND", "unknown model 'rose'"),
        (request_for(X, "digits", model_version="2"), "NOT_FOUND", "model 'digits' has no version '2'"),
    ],
    ids=["shape", "output", "empty", "model", "version"],
)
def test_a_wrong_request_is_told_why_and_the_next_one_works(
    oip: OipStub, message: pb.ModelInferRequest, code: str, text: str
) -> None:
    status, details = oip.failure("ModelInfer", message)
    assert (status.name, details[: len(text)]) == (code, text)
    assert np.array_equal(tensor_of(oip.infer(request_for(X[:1], "digits"))), DIGITS.forward(X[:1]))


def test_a_stream_answers_in_order_and_a_bad_message_fails_alone(oip: OipStub) -> None:
    messages = [
        request_for(X[i % 40 : i % 40 + i % 3], "digits", id=str(i), raw=i % 4 != 0) for i in range(100)
    ]
    messages[7].inputs[0].shape[1] = 3
    messages[50].model_name = "rose"
    answers = list(oip.stream(iter(messages), timeout=60))
    assert [answer.infer_response.id for answer in answers] == [str(i) for i in range(100)]
    for i, answer in enumerate(answers):
        if i in (7, 50):
            assert answer.error_message
        else:
            assert answer.error_message == ""
            expected = DIGITS.forward(X[i % 40 : i % 40 + i % 3])
            assert np.array_equal(tensor_of(answer.infer_response), expected)


def test_answers_come_while_requests_are_still_being_made(oip: OipStub) -> None:
    """Each request of this stream is made after the answer to the one before has been read."""
    requests: queue.SimpleQueue[pb.ModelInferRequest | None] = queue.SimpleQueue()
    call = oip.stream(iter(requests.get, None), timeout=60)
    for i in range(5):
        requests.put(request_for(X[:1], "digits", id=str(i)))
        assert next(call).infer_response.id == str(i)
    requests.put(None)
    assert list(call) == []


def test_a_timeout_in_microseconds_is_kept(server: ServerProcess, oip: OipStub) -> None:
    """One microsecond is over before the rows are run: DEADLINE_EXCEEDED."""
    message = request_for(X, "digits")
    message.parameters["timeout"].int64_param = 1
    status, _ = oip.failure("ModelInfer", message)
    assert status is grpc.StatusCode.DEADLINE_EXCEEDED


def test_clients_of_both_services_at_once_get_their_own_bits(server: ServerProcess) -> None:
    """32 clients of each, unary and streams: no answer has another's rows."""
    expected = DIGITS.forward(X)
    start = threading.Barrier(64)

    def client(k: int) -> int:
        with server.channel() as channel:
            oip, own = OipStub(channel), Stub(channel)
            start.wait(timeout=60)
            wrong = 0
            for i in range(10):
                a = (k + i) % 40
                b = a + 1 + (k * i) % 3
                if k % 2:
                    y = tensor_of(oip.infer(request_for(X[a:b], "digits", outputs=["outputs"])))
                else:
                    y = rows(own.predict(request(X[a:b])))
                wrong += not np.array_equal(y, expected[a:b])
            if k % 2:
                messages = (request_for(X[(k + i) % 40], "digits", id=str(i)) for i in range(10))
                for i, answer in enumerate(oip.stream(messages)):
                    wrong += answer.infer_response.id != str(i)
                    wrong += not np.array_equal(tensor_of(answer.infer_response), expected[(k + i) % 40])
            return wrong

    with ThreadPoolExecutor(64) as pool:
        assert sum(pool.map(client, range(64))) == 0


# What is told of models and of the server


def test_the_service_is_known_to_health_and_reflection(server: ServerProcess) -> None:
    with server.channel() as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        status = check(health_pb2.HealthCheckRequest(service=SERVICE)).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        database = ProtoReflectionDescriptorDatabase(channel)
        assert SERVICE in database.get_services()
        file = database.FindFileContainingSymbol(SERVICE)
        assert "ModelStreamInfer" in [method.name for method in file.service[0].method]


def test_metadata_configuration_and_readiness(oip: OipStub) -> None:
    assert oip.ask("ServerLive", pb.ServerLiveRequest()).live
    assert oip.ask("ServerReady", pb.ServerReadyRequest()).ready
    assert oip.ask("ModelReady", pb.ModelReadyRequest(name="digits")).ready
    assert not oip.ask("ModelReady", pb.ModelReadyRequest(name="rose")).ready
    assert oip.ask("ServerMetadata", pb.ServerMetadataRequest()).name == "nnserve"
    metadata = oip.ask("ModelMetadata", pb.ModelMetadataRequest(name="primer"))
    assert [tensor.datatype for tensor in (*metadata.inputs, *metadata.outputs)] == ["FP64", "FP64"]
    config = oip.ask("ModelConfig", pb.ModelConfigRequest(name="digits")).config
    assert (config.max_batch_size, list(config.input[0].dims)) == (4096, [64])


def test_statistics_advance_with_each_request(oip: OipStub) -> None:
    """By the time an answer is there, its request is counted, with its rows."""

    def now() -> pb.ModelStatistics:
        asked = pb.ModelStatisticsRequest(name="mnist")
        stats: pb.ModelStatistics = oip.ask("ModelStatistics", asked).model_stats[0]
        return stats

    x = np.zeros((3, 784), np.float32)
    before = now()
    for i in range(1, 4):
        oip.infer(request_for(x, "mnist", outputs=["outputs"]))
        after = now()
        assert after.inference_count == before.inference_count + 3 * i
        assert after.inference_stats.queue.count == before.inference_stats.queue.count + i
        assert after.inference_stats.success.count == before.inference_stats.success.count + i
        assert after.inference_stats.success.ns > before.inference_stats.success.ns


def test_what_is_not_there_is_unimplemented(server: ServerProcess) -> None:
    with server.channel() as channel:
        for name in ("SystemSharedMemoryStatus", "TraceSetting", "LogSettings", "Nothing"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/{SERVICE}/{name}")(b"")
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# The repository


def test_clients_load_and_unload_models_if_they_may(transport: str, tmp_path: Path) -> None:
    """From an empty folder; what fails leaves the old version serving."""
    with (
        running(str(tmp_path), "--transport", transport, "--model-control") as server,
        server.channel() as channel,
    ):
        assert "models: none" in server.ready_line
        oip = OipStub(channel)
        file = save_scale(tmp_path / "iris.safetensors", 2.0)
        status, _ = oip.failure("ModelInfer", request_for([[1.0]]))
        assert status is grpc.StatusCode.NOT_FOUND
        oip.load("iris")
        assert oip.weight() == 2
        file.write_bytes(b"half a model")
        status, text = oip.failure("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="iris"))
        assert status is grpc.StatusCode.FAILED_PRECONDITION
        assert text.startswith("model 'iris' cannot be loaded: iris.safetensors: ")
        assert str(tmp_path) not in text
        assert oip.weight() == 2
        save_scale(file, 3.0)
        oip.load("iris")
        assert oip.weight() == 3
        oip.unload("iris")
        status, _ = oip.failure("ModelInfer", request_for([[1.0]]))
        assert status is grpc.StatusCode.NOT_FOUND
        index = oip.ask("RepositoryIndex", pb.RepositoryIndexRequest()).models
        assert [(m.name, m.state, m.reason) for m in index] == [("iris", "UNAVAILABLE", "unloaded")]


def test_clients_change_nothing_by_default(oip: OipStub) -> None:
    for name in ("RepositoryModelLoad", "RepositoryModelUnload"):
        status, text = oip.failure(name, getattr(pb, f"{name}Request")(model_name="digits"))
        assert status is grpc.StatusCode.PERMISSION_DENIED
        assert "model_control" in text


def test_files_that_change_are_served_without_being_asked_for(transport: str, tmp_path: Path) -> None:
    """--reload: a new model, another version of it, a bad file, and a file that is taken away."""
    save_scale(tmp_path / "iris" / "1" / "model.safetensors", 1.0)
    options = ("--transport", transport, "--reload", "--reload-interval-s", "0.1", "--log-level", "error")
    with running(str(tmp_path), *options) as server, server.channel() as channel:
        oip = OipStub(channel)

        def is_ready(name: str, version: str = "") -> bool:
            ready: bool = oip.ask("ModelReady", pb.ModelReadyRequest(name=name, version=version)).ready
            return ready

        assert oip.weight() == 1
        save_scale(tmp_path / "iris" / "2" / "model.safetensors", 2.0)
        wait_until(lambda: oip.weight() == 2)
        save_scale(tmp_path / "rose.safetensors", 5.0)
        wait_until(lambda: is_ready("rose"))
        assert oip.weight("rose") == 5
        (tmp_path / "iris" / "3").mkdir()
        (tmp_path / "iris" / "3" / "model.safetensors").write_bytes(b"half")

        def reason() -> str:
            models = oip.ask("RepositoryIndex", pb.RepositoryIndexRequest()).models
            return next(str(m.reason) for m in models if m.name == "iris")

        wait_until(lambda: "model.safetensors" in reason())
        assert oip.weight() == 2
        (tmp_path / "rose.safetensors").unlink()
        wait_until(lambda: not is_ready("rose"))


def test_no_request_is_lost_or_swapped_while_its_model_is_replaced(transport: str, tmp_path: Path) -> None:
    """Two clients ask without pause while the model is reloaded 20 times: each answer is a whole model's."""
    file = save_scale(tmp_path / "iris.safetensors", 1.0, n=2)
    with running(str(tmp_path), "--transport", transport, "--model-control") as server:
        is_over = threading.Event()

        def client() -> tuple[int, set[float]]:
            count, weights = 0, set()
            with server.channel() as channel:
                oip = OipStub(channel)
                while not is_over.is_set():
                    y = tensor_of(oip.infer(request_for([[1.0, 2.0]])))[0]
                    assert y[1] == 2 * y[0]
                    weights.add(float(y[0]))
                    count += 1
            return count, weights

        with ThreadPoolExecutor(2) as pool, server.channel() as channel:
            clients = [pool.submit(client) for _ in range(2)]
            oip = OipStub(channel)
            try:
                for i in range(2, 22):
                    save_scale(file, float(i), n=2)
                    oip.load("iris")
                    assert float(tensor_of(oip.infer(request_for([[1.0, 2.0]])))[0, 0]) == i
            finally:
                is_over.set()
            for result in clients:
                count, weights = result.result(60)
                assert count > 0
                assert weights <= {float(i) for i in range(1, 22)}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_the_memory_of_an_unloaded_model_is_returned(transport: str, tmp_path: Path) -> None:
    """256 MiB of weights, loaded and unloaded three times: the process is as small as before."""
    n = 8192
    nncore.Mlp([nncore.Layer(np.full((n, n), 0.5, np.float32))]).save(tmp_path / "large.safetensors")
    save_scale(tmp_path / "small.safetensors")
    (tmp_path / "large.safetensors").rename(tmp_path / ".large")
    with (
        running(str(tmp_path), "--transport", transport, "--model-control") as server,
        server.channel() as channel,
    ):
        (tmp_path / ".large").rename(tmp_path / "large.safetensors")
        oip = OipStub(channel)
        assert oip.weight("small") == 2
        before_kib = server.status("VmRSS")
        for _ in range(3):
            oip.load("large")
            oip.infer(request_for(np.zeros((1, n), np.float32), "large", outputs=["labels"]))
            assert server.status("VmRSS") > before_kib + 200 * 1024
            oip.unload("large")
        # A tenth of the model: code and buffers that came into use meanwhile. Polled: the thread that ran the
        # last request may let go of the model a moment after its answer has arrived.
        wait_until(lambda: server.status("VmRSS") < before_kib + 26 * 1024)
