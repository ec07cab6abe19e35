"""A full queue, over real sockets: refused at once, with the time to come back, whichever way one asks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from support.server import PREDICT, PREDICT_STREAM, ServerProcess, request, running

from nnclient import Client
from nnproto.oip import inference_pb2 as oip
from nnproto.v1 import inference_pb2 as pb

INFER = "/inference.GRPCInferenceService/ModelInfer"
INFER_STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
# Some ten milliseconds of work: many more requests come meanwhile than the queue holds.
X = np.random.default_rng(0).random((2000, 784), dtype=np.float32)
AT_ONCE = 24


@pytest.fixture(scope="module")
def narrow(transport: str) -> Iterator[ServerProcess]:
    """A server in which one request may wait."""
    with running("--transport", transport, "--max-queue-requests", "1", "--max-queue-ms", "0") as process:
        yield process


def infer_request(rows: int = len(X)) -> bytes:
    return oip.ModelInferRequest(
        model_name="mnist",
        id="a",
        inputs=[oip.ModelInferRequest.InferInputTensor(name="inputs", datatype="FP32", shape=(rows, 784))],
        raw_input_contents=[X[:rows].tobytes()],
    ).SerializeToString()


def refusals(ask: Callable[[], Any]) -> list[Any]:
    """What *ask* returns for requests that were refused, until there is one."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in range(20):
            found = [found for found in pool.map(lambda _: ask(), range(AT_ONCE)) if found is not None]
            if found:
                return found
    raise AssertionError("nothing was refused")


@pytest.mark.parametrize(
    ("path", "message"),
    [(PREDICT, request(X, model="mnist").SerializeToString()), (INFER, infer_request())],
    ids=["nnproto", "oip"],
)
def test_a_refused_call_is_told_when_to_come_back(narrow: ServerProcess, path: str, message: bytes) -> None:
    """RESOURCE_EXHAUSTED names the setting; grpc-retry-pushback-ms is a whole number of milliseconds."""
    with narrow.channel() as channel:
        method = channel.unary_unary(path)

        def ask() -> grpc.RpcError | None:
            try:
                method(message, timeout=60)
            except grpc.RpcError as error:
                return error
            return None

        for error in refusals(ask):
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "max_queue_requests" in error.details()
            pushback = dict(error.trailing_metadata())["grpc-retry-pushback-ms"]
            assert 1 <= int(pushback) <= 10_000


def test_a_refused_request_of_a_stream_is_told_when_to_come_back(narrow: ServerProcess) -> None:
    """Its error has retry_after_ms, its place in the order is kept, and the stream goes on."""
    with narrow.channel() as channel:
        method = channel.stream_stream(PREDICT_STREAM, response_deserializer=pb.PredictResponse.FromString)

        def ask() -> list[pb.Error] | None:
            sent = (request(X[:500], model="mnist", id=str(n)).SerializeToString() for n in range(8))
            answers = list(method(sent, timeout=60))
            assert [answer.id for answer in answers] == [str(n) for n in range(8)]
            return [answer.error for answer in answers if answer.HasField("error")] or None

        for error in itertools.chain(*refusals(ask)):
            assert error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert 1 <= error.retry_after_ms <= 10_000


def test_a_refused_request_of_the_other_services_stream_is_told_when_to_come_back(
    narrow: ServerProcess,
) -> None:
    """The answer's parameter retry_after_ms says so beside the error."""
    with narrow.channel() as channel:
        method = channel.stream_stream(
            INFER_STREAM, response_deserializer=oip.ModelStreamInferResponse.FromString
        )

        def ask() -> list[oip.ModelStreamInferResponse] | None:
            answers = list(method((infer_request(500) for _ in range(8)), timeout=60))
            assert len(answers) == 8
            return [answer for answer in answers if answer.error_message] or None

        for answer in itertools.chain(*refusals(ask)):
            assert "max_queue_requests" in answer.error_message
            assert answer.infer_response.id == "a"
            assert 1 <= answer.infer_response.parameters["retry_after_ms"].int64_param <= 10_000


def test_what_cannot_be_run_in_time_is_refused_and_streams_wait(transport: str) -> None:
    """With --max-queue-ms 1, calls behind milliseconds of work are refused; a stream's requests are not."""
    message = request(X, model="mnist").SerializeToString()
    with running("--transport", transport, "--max-queue-ms", "1") as server, server.channel() as channel:
        method = channel.unary_unary(PREDICT)

        def ask() -> str | None:
            try:
                method(message, timeout=60)
            except grpc.RpcError as error:
                return f"{error.code().name}: {error.details()}"
            return None

        for text in refusals(ask):
            # Of the model's queue or, with grpcio, of the line for a thread.
            assert re.match(r"RESOURCE_EXHAUSTED: .*\b[0-9]+ ms of .*\bmax_queue_ms\b", text)
        with Client(server.address) as client:
            batches = list(client.stream("mnist", [X] * 16))
            assert all(np.array_equal(y, batches[0]) for y in batches)
