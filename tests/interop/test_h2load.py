"""h2load, which knows nothing of gRPC, against both transports: every request and byte is counted."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from interop.endpoints import ENDPOINTS, Endpoint
from interop.stub import output_request, output_response, unary_request, unary_response
from support.server import request

from nnproto.v1 import inference_pb2 as pb

REQUESTS = 1000
# h2load shows no certificate of its own.
REACHABLE = [(transport, kind) for transport, kind in ENDPOINTS if kind != "mtls"]
ROW = np.arange(64, dtype=np.float32).reshape(1, 64)


def prefixed(message: bytes) -> bytes:
    """A message as it is in the body: not compressed, its length, its bytes."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def load(h2load: str, endpoint: Endpoint, path: str, body: bytes, folder: Path) -> int:
    """Send *body* to *path* REQUESTS times, all answered 2xx; return the bytes of the answers' bodies."""
    file = folder / "body"
    file.write_bytes(body)
    scheme = "https" if endpoint.ca else "http"
    if endpoint.kind == "unix":
        where = [f"--base-uri={endpoint.address}", f"http://localhost{path}"]
    else:
        where = [f"{scheme}://{endpoint.address}{path}"]
    done = subprocess.run(
        [
            *(h2load, f"-n{REQUESTS}", "-c4", "-m8", "-d", str(file)),
            *("-H", "content-type: application/grpc", "-H", "te: trailers", *where),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    report = done.stdout
    n = REQUESTS
    assert (
        f"requests: {n} total, {n} started, {n} done, {n} succeeded, 0 failed, 0 errored, 0 timeout" in report
    )
    assert f"status codes: {n} 2xx, 0 3xx, 0 4xx, 0 5xx" in report
    if endpoint.ca:
        assert "Application protocol: h2" in report
    found = re.search(r"^traffic:.*\((\d+)\) data$", report, re.MULTILINE)
    assert found, report
    return int(found[1])


@pytest.mark.parametrize("endpoint", REACHABLE, ids="-".join, indirect=True)
def test_unary_calls(endpoint: Endpoint, h2load: str, tmp_path: Path) -> None:
    body = prefixed(unary_request(1000, 500).SerializeToString())
    received = load(h2load, endpoint, "/grpc.testing.TestService/UnaryCall", body, tmp_path)
    assert received == REQUESTS * len(prefixed(unary_response(1000).SerializeToString()))


@pytest.mark.parametrize("endpoint", REACHABLE, ids="-".join, indirect=True)
def test_duplex_streams(endpoint: Endpoint, h2load: str, tmp_path: Path) -> None:
    """20 messages and the end of the stream in one body: 20 answers."""
    body = 20 * prefixed(output_request(100).SerializeToString())
    received = load(h2load, endpoint, "/grpc.testing.TestService/FullDuplexCall", body, tmp_path)
    assert received == REQUESTS * 20 * len(prefixed(output_response(100).SerializeToString()))


@pytest.mark.parametrize("nnserver", REACHABLE, ids="-".join, indirect=True)
def test_predictions(nnserver: Endpoint, h2load: str, tmp_path: Path) -> None:
    """Each answer of nnserver is as long as the right one; test_nnserver.py looks at what is in it."""
    body = prefixed(request(ROW).SerializeToString())
    received = load(h2load, nnserver, "/nnproto.v1.Inference/Predict", body, tmp_path)
    outputs = pb.Tensor(shape=(1, 10), dtype=pb.DATA_TYPE_FLOAT32, data=bytes(40))
    answer = pb.PredictResponse(model="digits", version="1", outputs=outputs)
    assert received == REQUESTS * len(prefixed(answer.SerializeToString()))
