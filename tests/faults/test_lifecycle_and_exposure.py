"""Starts that meet a damaged cache, and what a server must not tell: payloads, paths, insides."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.models import save_scale
from support.oip import request_for as oip_request_for
from support.server import PREDICT, request, running

from faults.bystander import PATIENCE_S, Bystander, X
from faults.test_requests import INFER
from faults.tried import tried


def flipped(data: bytes) -> bytes:
    at = random.Random(len(data)).randrange(len(data))
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


DAMAGES: list[Callable[[bytes], bytes]] = [
    flipped,
    lambda data: data[: len(data) // 2],
    lambda data: b"",
    lambda data: b"cos\nsystem\n(S'false'\ntR." + data,
]


@tried(
    "Lifecycle",
    "a cache of kernels with bits flipped, cut, emptied, a pickle before it",
    "compiled anew; right bits",
)
def test_a_damaged_cache_is_compiled_anew(tmp_path: Path) -> None:
    """Of whatever transport: kernels are compiled before it begins."""
    cache = tmp_path / "cache"
    env = {"NNCORE_CACHE_DIR": str(cache)}
    with running(env=env) as server, Bystander(server):
        pass
    files = sorted(cache.rglob("*.code"))
    assert files
    for i, file in enumerate(files):
        file.write_bytes(DAMAGES[i % len(DAMAGES)](file.read_bytes()))
    with running(env=env) as server, Bystander(server):
        pass
    assert server.errors == ""


@tried("Lifecycle", "SIGKILL, and a new server on the same port", "it starts, and answers")
def test_a_killed_server_can_be_started_again(transport: str) -> None:
    """With a connection of the first one left open by its client."""
    with running("--transport", transport) as first, first.channel() as channel:
        channel.unary_unary(PREDICT)(request(X).SerializeToString(), timeout=PATIENCE_S)
        first.signal(signal.SIGKILL)
        first.wait()
        with running("--transport", transport, listen=first.address) as second, Bystander(second):
            assert second.address == first.address


@tried(
    "Exposure", "every refusal of these tables, with the log at its most talkative", "no payload in the log"
)
def test_a_log_tells_no_payload(transport: str, tmp_path: Path) -> None:
    """What is refused is logged with its reason; rows and ids are not, and forged lines stay one line."""
    secret = np.frombuffer(b"topsecret!!!" * 22, np.float32)[:64].reshape(1, 64)
    asked = (
        (PREDICT, request(secret, id="confidential")),
        (PREDICT, request(secret[:, :9], id="confidential")),
        (INFER, oip_request_for(secret, "digits", id="confidential")),
        (INFER, oip_request_for(secret, "digits", "FP64", id="confidential")),
        (PREDICT, request(X[:1], "a\r\n2026-01-01 00:00:00,000 ERROR forged")),
    )
    flags = ("--transport", transport, "--log-level", "debug")
    with running(*flags, log=tmp_path / "log") as server, Bystander(server), server.channel() as channel:
        for path, message in asked:
            call = channel.unary_unary(path).future(message.SerializeToString(), timeout=PATIENCE_S)
            call.code()  # Waits for its end.
    assert "inputs has shape (1, 9)" in server.errors
    for told in ("topsecret", "confidential", "Traceback", repr(secret[0, 0])):
        assert told not in server.errors
    assert not any(line.startswith("2026-01-01") for line in server.errors.splitlines())


@tried(
    "Exposure", "a model that cannot be read, for want of permission", "FAILED_PRECONDITION without a path"
)
def test_what_the_system_says_of_a_file_has_no_path(transport: str, tmp_path: Path) -> None:
    """An error of the system names the path; a client hears the file's name and the reason."""
    folder = tmp_path / "models"
    save_scale(folder / "victim.safetensors", 2.0)
    # A folder where a file is expected: what root may not read, either.
    with running(str(folder), "--transport", transport, "--model-control") as server:
        (folder / "victim.safetensors").unlink()
        (folder / "victim.safetensors").mkdir()
        with server.channel() as channel:
            load = channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelLoad")
            with pytest.raises(grpc.RpcError) as caught:
                load(b"\x12\x06victim", timeout=PATIENCE_S)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert str(tmp_path) not in caught.value.details()
    assert "victim.safetensors: Is a directory" in caught.value.details()
