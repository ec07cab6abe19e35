"""Real sockets, a real process: what is in its log after each way that a request can end."""

from __future__ import annotations

import json

import grpc
import numpy as np
import pytest
from support.server import Stub, request, running

X = np.zeros((3, 64), np.float32)


def test_the_access_log_has_every_request_and_no_payload(transport: str) -> None:
    """In JSON: unary and streamed, good and bad, with ids of the requests and of the calls' metadata."""
    options = ("--transport", transport, "--log-format", "json", "--access-log-sample", "1")
    metadata = (("x-request-id", "call-1"), ("authorization", "Bearer t0ken"))
    with running(*options) as server:
        with server.channel() as channel:
            stub = Stub(channel)
            stub.predict(request(X, id="own-1"), metadata=metadata)
            stub.predict(request(X), metadata=metadata)
            with pytest.raises(grpc.RpcError):
                stub.predict(request(X, "unheard-of"), metadata=metadata)
            assert len(list(stub.predict_stream(iter([request(X, id="s-1"), request(X[:, :2])])))) == 2
        assert server.stop() == 0
    lines = [json.loads(line) for line in server.errors.splitlines()]
    found = [line for line in lines if line["logger"] == "nnserver.access"]
    assert [(line["kind"], line["model"], line["status"], line["rows"]) for line in found[:3]] == [
        ("predict", "digits", "OK", 3),
        ("predict", "digits", "OK", 3),
        ("predict", "", "NOT_FOUND", 0),
    ]
    # What is refused does not wait for what is computed.
    streamed = {(line["kind"], line["model"], line["status"], line["rows"]) for line in found[3:]}
    assert streamed == {
        ("predict_stream", "digits", "OK", 3),
        ("predict_stream", "digits", "INVALID_ARGUMENT", 0),
    }
    assert len(found) == 5
    assert [line["request_id"] for line in found[:3]] == ["own-1", "call-1", "call-1"]
    assert "t0ken" not in server.errors
    assert "unheard-of" not in server.errors


def test_by_default_nothing_is_logged_of_requests(transport: str) -> None:
    with running("--transport", transport) as server:
        with server.channel() as channel:
            Stub(channel).predict(request(X))
        assert server.stop() == 0
    assert server.errors == ""
