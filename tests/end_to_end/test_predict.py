"""Real sockets, a real process: what Predict, PredictStream, ListModels and GetModel answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.server import ServerProcess, Stub, request, rows, running

import nncore
import nnserver
from nnproto.v1 import inference_pb2 as pb

MODELS = Path(nnserver.__file__).parent / "models"
DIGITS = nncore.load(MODELS / "digits.safetensors")
PRIMER = nncore.load(MODELS / "primer.safetensors")
MNIST = nncore.load(MODELS / "mnist.safetensors")
X = np.random.default_rng(0).uniform(0, 16, (40, 64)).astype(np.float32)


def assert_still_works(stub: Stub) -> None:
    """The next request is answered as if nothing had been."""
    assert np.array_equal(rows(stub.predict(request(X[:1]))), DIGITS.forward(X[:1]))


def failure(stub: Stub, message: pb.PredictRequest, **options: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        stub.predict(message, **options)
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize("n", [0, 1, 7, 40])
def test_outputs_are_nncores_own_bits(stub: Stub, n: int) -> None:
    response = stub.predict(request(X[:n], id="a"))
    assert np.array_equal(rows(response), DIGITS.forward(X[:n]))
    assert (response.model, response.version, response.id) == ("digits", "1", "a")


def test_a_single_row_is_answered_as_a_row(stub: Stub) -> None:
    assert np.array_equal(rows(stub.predict(request(X[0]))), DIGITS.forward(X[0]))


def test_probabilities_are_softmax_of_the_outputs(stub: Stub) -> None:
    response = stub.predict(request(X, output=pb.OUTPUT_KIND_PROBABILITIES))
    assert np.array_equal(rows(response), DIGITS.predict_proba(X))


def test_labels_come_with_index_and_score(stub: Stub) -> None:
    response = stub.predict(request(X, output=pb.OUTPUT_KIND_LABELS, top_k=3))
    indices, scores = DIGITS.top_labels_from(DIGITS.forward(X), 3)
    assert [[entry.index for entry in row.top] for row in response.labels] == indices.tolist()
    assert [[entry.score for entry in row.top] for row in response.labels] == scores.tolist()
    assert [row.top[0].label for row in response.labels] == [str(i) for i in indices[:, 0]]


def test_a_float64_request_is_rounded_for_a_float32_model(stub: Stub) -> None:
    x = X.astype(np.float64) + 1e-12
    answer = rows(stub.predict(request(x)))
    assert answer.dtype == np.float32
    assert np.array_equal(answer, DIGITS.forward(x.astype(np.float32)))


def test_a_float64_model_answers_float64_whatever_it_is_asked(stub: Stub) -> None:
    """primer's printed digits: 0.31682708 and 0.69627909."""
    for dtype in (np.float32, np.float64):
        answer = rows(stub.predict(request(np.array([1.0, 0.5], dtype), "primer")))
        assert answer.dtype == np.float64
        assert [f"{value:.8f}" for value in answer] == ["0.31682708", "0.69627909"]


def test_a_stream_answers_in_order_with_ids(stub: Stub) -> None:
    """Requests of different models and sizes alternate."""
    xs = [X[i % 7 : i % 7 + i % 5] for i in range(200)]
    messages = [
        request(x, id=str(i)) if i % 3 else request(x[:, :2], "primer", id=str(i)) for i, x in enumerate(xs)
    ]
    answers = list(stub.predict_stream(iter(messages)))
    assert [answer.id for answer in answers] == [str(i) for i in range(200)]
    for i, (x, answer) in enumerate(zip(xs, answers, strict=True)):
        expected = DIGITS.forward(x) if i % 3 else PRIMER.forward(x[:, :2])
        assert np.array_equal(rows(answer), expected)


def test_an_empty_stream_ends_well(stub: Stub) -> None:
    assert list(stub.predict_stream(iter(()))) == []


def test_answers_come_while_requests_are_still_being_made(stub: Stub) -> None:
    """Each request of this stream is made after the answer to the one before has been read."""
    answered = threading.Semaphore(1)

    def requests() -> Iterator[pb.PredictRequest]:
        for i in range(5):
            assert answered.acquire(timeout=30)
            yield request(X[:1], id=str(i))

    for i, answer in enumerate(stub.predict_stream(requests(), timeout=60)):
        assert answer.id == str(i)
        answered.release()


def test_a_bad_message_in_a_stream_fails_alone(stub: Stub) -> None:
    messages = [request(X[:1], id=str(i)) for i in range(6)]
    messages[1] = request(X[:1, :3], id="1")
    messages[2] = request(X[:1], "rose", id="2")
    messages[4].inputs.data = b"short"
    answers = list(stub.predict_stream(iter(messages)))
    assert [answer.id for answer in answers] == [str(i) for i in range(6)]
    assert [answer.error.code for answer in answers] == [0, 3, 5, 0, 3, 0]
    assert answers[1].error.message == "inputs has shape (1, 3); model 'digits' expects (rows, 64)"
    assert answers[2].error.message == "unknown model 'rose'; this server has 'digits', 'mnist', 'primer'"
    assert answers[4].error.message == "inputs has 5 bytes of data; shape (1, 64) of float32 takes 256"
    assert np.array_equal(rows(answers[5]), DIGITS.forward(X[:1]))


def test_bytes_that_are_no_message_fail_alone_in_a_stream(server: ServerProcess, stub: Stub) -> None:
    with server.channel() as channel:
        call = channel.stream_stream("/nnproto.v1.Inference/PredictStream")
        good = request(X[:1]).SerializeToString()
        answers = [pb.PredictResponse.FromString(a) for a in call(iter([good, b"\xff" * 9, good]))]
    assert [answer.error.code for answer in answers] == [0, 3, 0]
    assert_still_works(stub)


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (
            request(X[:, :5]),
            "INVALID_ARGUMENT",
            "inputs has shape (40, 5); model 'digits' expects (rows, 64)",
        ),
        (request(X[:2].reshape(2, 8, 8)), "INVALID_ARGUMENT", "inputs has shape (2, 8, 8); model"),
        (
            pb.PredictRequest(model="digits", inputs=pb.Tensor(shape=(1, 64), data=bytes(256))),
            "INVALID_ARGUMENT",
            "inputs has dtype DATA_TYPE_UNSPECIFIED; expected",
        ),
        (
            pb.PredictRequest(
                model="digits",
                inputs=pb.Tensor(shape=(2, 64), dtype=pb.DATA_TYPE_FLOAT32, data=bytes(256)),
            ),
            "INVALID_ARGUMENT",
            "inputs has 256 bytes of data; shape (2, 64) of float32 takes 512",
        ),
        (
            pb.PredictRequest(
                model="digits", inputs=pb.Tensor(shape=(2**62, 64), dtype=pb.DATA_TYPE_FLOAT32)
            ),
            "INVALID_ARGUMENT",
            "inputs has 0 bytes of data",
        ),
        (pb.PredictRequest(model="digits"), "INVALID_ARGUMENT", "inputs has dtype"),
        (request(X[:1], output=pb.OUTPUT_KIND_LABELS, top_k=11), "INVALID_ARGUMENT", "top_k is 11;"),
        (request(X[:1], "rose"), "NOT_FOUND", "unknown model 'rose'; this server has"),
        (request(X[:1], version="7"), "NOT_FOUND", "model 'digits' has no version '7'"),
    ],
)
def test_a_wrong_request_is_told_what_was_expected(
    stub: Stub, message: pb.PredictRequest, code: str, text: str
) -> None:
    status, details = failure(stub, message)
    assert status.name == code
    assert details.startswith(text)
    assert_still_works(stub)


def test_bytes_that_are_no_message_are_an_invalid_argument(server: ServerProcess, stub: Stub) -> None:
    with server.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/nnproto.v1.Inference/Predict")(b"\xff" * 9)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "are not a nnproto.v1.PredictRequest" in caught.value.details()
    assert_still_works(stub)


def test_an_unknown_method_is_unimplemented(server: ServerProcess, stub: Stub) -> None:
    with server.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/nnproto.v1.Inference/Guess")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert_still_works(stub)


def test_nan_and_infinities_are_answered_and_touch_no_other_row(stub: Stub) -> None:
    x = X[:3].copy()
    x[1, 5], x[2, 6] = np.nan, np.inf
    answer = rows(stub.predict(request(x)))
    assert np.array_equal(answer[0], DIGITS.forward(X[0]))
    assert np.isnan(answer[1]).any()


def test_nan_is_refused_by_row_and_column_if_so_set(transport: str) -> None:
    with running("--transport", transport, "--reject-nonfinite") as server, server.channel() as channel:
        stub = Stub(channel)
        x = X[:3].copy()
        x[2, 5] = np.nan
        status, text = failure(stub, request(x))
        assert status is grpc.StatusCode.INVALID_ARGUMENT
        assert text.startswith("inputs has nan at row 2, column 5")
        assert_still_works(stub)


def test_an_oversized_message_names_the_setting(transport: str) -> None:
    """Between the limit and four times as much by our own text; beyond it, the call fails all the same."""
    with (
        running("--transport", transport, "--max-message-bytes", "4096") as server,
        server.channel() as channel,
    ):
        stub = Stub(channel)
        status, text = failure(stub, request(X[:20]))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "this server takes 4096 (max_message_bytes, --max-message-bytes)" in text
        assert_still_works(stub)
        status, text = failure(stub, request(np.zeros((200, 64), np.float32)))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert_still_works(stub)
        answers = list(stub.predict_stream(iter([request(X[:1]), request(X[:20], id="big"), request(X[:1])])))
        assert [answer.error.code for answer in answers] == [0, 8, 0]
        assert answers[1].id == "big"


def test_an_answer_that_would_be_oversized_is_refused_before_it_is_computed(
    transport: str, tmp_path: Path
) -> None:
    """One input a row, a thousand outputs: a small request can ask for a large answer."""
    wide = nncore.Mlp([nncore.Layer(np.ones((1, 1000), np.float32))])
    wide.save(tmp_path / "wide.safetensors")
    with (
        running(str(tmp_path), "--transport", transport, "--max-message-bytes", "8192") as server,
        server.channel() as channel,
    ):
        stub = Stub(channel)
        status, text = failure(stub, request(np.ones((100, 1), np.float32), "wide"))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the answer to 100 rows would have" in text
        assert rows(stub.predict(request(np.ones((1, 1), np.float32), "wide"))).shape == (1, 1000)


def test_large_messages_are_answered(stub: Stub) -> None:
    """3 MB of rows, which HTTP/2 cuts into many frames."""
    x = np.random.default_rng(1).random((1000, 784), np.float32)
    assert np.array_equal(rows(stub.predict(request(x, "mnist"))), MNIST.forward(x))


def test_models_are_listed_and_described(stub: Stub) -> None:
    models = stub.list_models(pb.ListModelsRequest()).models
    assert [model.name for model in models] == ["digits", "mnist", "primer"]
    model = stub.get_model(pb.GetModelRequest(name="digits"))
    assert model == models[0]
    assert [(layer.n_in, layer.n_out, layer.activation) for layer in model.layers] == [
        (64, 64, "relu"),
        (64, 32, "relu"),
        (32, 10, "identity"),
    ]
    assert (list(model.inputs.shape), list(model.outputs.shape)) == ([-1, 64], [-1, 10])
    assert list(model.labels) == [str(i) for i in range(10)]
    assert model.parameter_count == DIGITS.parameter_count
    with pytest.raises(grpc.RpcError) as caught:
        stub.get_model(pb.GetModelRequest(name="rose"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_row_has_the_same_bits_alone_and_among_64_concurrent_clients(server: ServerProcess) -> None:
    """Batching groups the clients' rows as it happens; no bit of any answer shows it."""
    expected = DIGITS.forward(X)
    start = threading.Barrier(64)

    def client(k: int) -> int:
        with server.channel() as channel:
            stub = Stub(channel)
            start.wait(timeout=60)
            wrong = 0
            for i in range(20):
                a = (k + i) % 40
                b = a + 1 + (k * i) % 3
                wrong += not np.array_equal(rows(stub.predict(request(X[a:b]))), expected[a:b])
            answers = stub.predict_stream(request(X[(k + i) % 40], id=str(i)) for i in range(20))
            for i, answer in enumerate(answers):
                wrong += answer.id != str(i) or not np.array_equal(rows(answer), expected[(k + i) % 40])
            return wrong

    with ThreadPoolExecutor(64) as pool:
        assert sum(pool.map(client, range(64))) == 0
