"""Derivatives over real sockets, on both transports: unary, streams, errors, limits and statistics."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from support.models import random_mlp
from support.server import Stub, running
from support.serving import array_of, derivative_of

import nncore
import nnserver
from nnproto.v1 import inference_pb2 as pb

DIGITS = nncore.load(Path(nnserver.__file__).parent / "models" / "digits.safetensors")
X = np.random.default_rng(0).uniform(0, 16, (40, 64)).astype(np.float32)


def test_jacobians_are_nncores_bits(stub: Stub) -> None:
    """Of outputs and of probabilities, with the values."""
    for output, of in ((pb.OUTPUT_KIND_OUTPUTS, "outputs"), (pb.OUTPUT_KIND_PROBABILITIES, "probabilities")):
        answer = stub.differentiate(derivative_of(X, "JACOBIAN", "digits", output=output))
        values, jacobians = DIGITS.value_and_jacobian(X, of=of)
        assert np.array_equal(array_of(answer.values), values)
        assert np.array_equal(array_of(answer.derivatives), jacobians)


def test_a_row_has_the_same_derivatives_whatever_it_travels_with(stub: Stub) -> None:
    """Forty calls at once, batched as they come: each row's gradient is that of the row alone."""

    def ask(row: Any) -> Any:
        return array_of(
            stub.differentiate(derivative_of(row, "VALUE_AND_GRAD", "digits", output_indices=[3])).derivatives
        )

    with ThreadPoolExecutor(16) as pool:
        gradients = list(pool.map(ask, X))
    assert np.array_equal(gradients, DIGITS.value_and_grad(X, 3)[1])


def test_a_stream_mixes_kinds_and_survives_an_error(stub: Stub) -> None:
    """Answers come in the order of the requests; the one that is wrong says so."""
    requests = [
        derivative_of(X, "VJP", "digits", id="vjp", cotangents=np.ones((40, 10))),
        derivative_of(X, "JVP", "digits", id="short", tangents=np.ones((39, 64))),
        derivative_of(X, "HVP", "digits", id="hvp", tangents=X, output_indices=[0], output=2),
    ]
    answers = list(stub.differentiate_stream(iter(requests)))
    assert [answer.id for answer in answers] == ["vjp", "short", "hvp"]
    assert np.array_equal(array_of(answers[0].derivatives), DIGITS.vjp(X, np.ones((40, 10))))
    assert answers[1].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert answers[1].error.message == "tangents has 39 rows; expected 40, one for each of inputs"
    assert np.array_equal(array_of(answers[2].derivatives), DIGITS.hvp(X, X, 0, of="probabilities"))


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        (
            derivative_of(X, "HVP", "digits", tangents=X),
            grpc.StatusCode.INVALID_ARGUMENT,
            "output_indices has 0 entries; DERIVATIVE_KIND_HVP is of one output: expected its index, "
            "from 0 to 9",
        ),
        (
            derivative_of(np.zeros((4000, 784)), "JACOBIAN", "mnist"),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            None,
        ),
        (
            derivative_of(np.zeros((2000, 784), np.float32), "JACOBIAN", "mnist"),
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the answer to 2000 rows would have about 62800256 bytes; this server sends 16777216 "
            "(max_message_bytes, --max-message-bytes); send fewer rows a message",
        ),
        (
            derivative_of(X, "JACOBIAN", "nope"),
            grpc.StatusCode.NOT_FOUND,
            "unknown model 'nope'; this server has 'digits', 'mnist', 'primer'",
        ),
    ],
    ids=["no output", "large request", "large answer", "no model"],
)
def test_failures_have_the_same_status_and_text_on_either_transport(
    stub: Stub, request_: pb.DifferentiateRequest, status: grpc.StatusCode, text: str | None
) -> None:
    """And the connection works on."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.differentiate(request_)
    assert caught.value.code() is status
    assert text is None or caught.value.details() == text
    stub.differentiate(derivative_of(X, "JACOBIAN", "digits"))


def test_a_deadline_ends_a_call(stub: Stub) -> None:
    """As for Predict: DEADLINE_EXCEEDED; 12 MB each way take longer than this one."""
    x = np.zeros((4000, 784), np.float32)
    with pytest.raises(grpc.RpcError) as caught:
        stub.differentiate(derivative_of(x, "VALUE_AND_GRAD", "mnist", output_indices=[0]), timeout=1e-3)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.fixture
def slow_stub(transport: str, tmp_path: Path) -> Iterator[Stub]:
    """A server of a model whose Jacobian takes about a second: 512 rows, 128 passes each way."""
    random_mlp(0, (128, 1024, 1024, 128), "tanh").save(tmp_path / "wide.safetensors")
    with running("--transport", transport, str(tmp_path)) as server, server.channel() as channel:
        yield Stub(channel)


def test_long_derivatives_do_not_hold_others_up(slow_stub: Stub) -> None:
    """While Jacobians are computed that take seconds, calls of another kind are answered."""
    x = np.zeros((200, 128), np.float32)
    slow_stub.differentiate(derivative_of(x[:1], "JACOBIAN", "wide"))
    futures = [slow_stub.differentiate.future(derivative_of(x, "JACOBIAN", "wide")) for _ in range(3)]
    answered = 0
    while not all(future.done() for future in futures):
        slow_stub.get_model(pb.GetModelRequest(name="wide"))
        answered += 1
    for future in futures:
        assert tuple(future.result().derivatives.shape) == (200, 128, 128)
    assert answered > 10
