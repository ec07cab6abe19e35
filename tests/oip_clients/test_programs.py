"""Clients that are programs: grpc-js from the .proto, buf curl and grpcurl by reflection, and k6."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.server import ServerProcess

import nncore

HERE = Path(__file__).parent
PROTO = HERE.parent.parent / "proto"
SERVICE = "inference.GRPCInferenceService"
X = np.array([[1, 2, 3, 4], [0.5, 0, -1, 2]], np.float32)
# The request in the two spellings of JSON: protobuf's own, and that of the .proto file.
REQUEST = {
    "model_name": "iris",
    "inputs": [
        {
            "name": "inputs",
            "datatype": "FP32",
            "shape": [2, 4],
            "contents": {"fp32_contents": X.ravel().tolist()},
        }
    ],
    "outputs": [{"name": "outputs"}],
}


def program(name: str) -> str:
    """The path of a program that `make test-oip` installs; skips the test where it could not."""
    folders = (Path(sys.executable).parent, HERE / "node" / "node_modules" / ".bin")
    found = shutil.which(name, path=os.pathsep.join(map(str, folders)))
    if found is None:
        pytest.skip(f"{name} is not at hand")
    return found


def run(*command: str, **env: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def outputs_in(answer: Any, iris: nncore.Mlp) -> bool:
    """Whether a ModelInferResponse in JSON has iris's outputs for X, to the bit."""
    (output,) = answer["outputs"]
    contents = output["contents"]
    values = contents.get("fp32_contents") or contents["fp32Contents"]
    return np.array_equal(np.array(values, np.float32).reshape(2, 3), iris.forward(X))


def test_grpc_js(server: ServerProcess, iris: nncore.Mlp) -> None:
    """Typed, raw, an error and a stream, with messages made from the .proto file at run time."""
    program("proto-loader-gen-types")
    answers = json.loads(run("node", str(HERE / "node" / "client.js"), server.address))
    expected = iris.forward(X)
    assert answers["live"]
    for form in ("typed", "raw"):
        assert np.array_equal(np.array(answers[form], np.float32).reshape(2, 3), expected)
    assert answers["labels"] == [iris.class_labels[i] for i in expected.argmax(axis=1)]
    assert answers["error"] == [5, "unknown model 'rose'; this server has 'iris', 'iris64'"]
    assert answers["stream"] == [
        ["raw", ""],
        ["typed", "unknown model 'rose'; this server has 'iris', 'iris64'"],
        ["typed", ""],
    ]


def test_buf_curl(server: ServerProcess, iris: nncore.Mlp) -> None:
    """Methods and messages are learned by reflection."""
    curl = (program("buf"), "curl", "--http2-prior-knowledge", "--protocol", "grpc")
    methods = run(*curl, "--list-methods", f"http://{server.address}").split()
    assert f"{SERVICE}/ModelStreamInfer" in methods
    answer = run(*curl, "--data", json.dumps(REQUEST), f"http://{server.address}/{SERVICE}/ModelInfer")
    assert outputs_in(json.loads(answer), iris)


def test_grpcurl(server: ServerProcess, iris: nncore.Mlp) -> None:
    """Methods and messages are learned by reflection; an error has status and reason."""
    grpcurl = (program("grpcurl"), "-plaintext")
    assert SERVICE in run(*grpcurl, server.address, "list").split()
    answer = run(*grpcurl, "-d", json.dumps(REQUEST), server.address, f"{SERVICE}/ModelInfer")
    assert outputs_in(json.loads(answer), iris)
    refused = subprocess.run(
        [*grpcurl, "-d", '{"model_name": "rose"}', server.address, f"{SERVICE}/ModelInfer"],
        capture_output=True,
        text=True,
    )
    assert "Code: NotFound" in refused.stderr
    assert "unknown model 'rose'; this server has 'iris', 'iris64'" in refused.stderr


def test_k6(server: ServerProcess) -> None:
    k6 = (program("k6"), "run", "--quiet", "--no-usage-report")
    run(*k6, str(HERE / "k6.js"), TARGET=server.address, PROTO=str(PROTO))
