"""Calls that expire, are cancelled or lose their client at every stage, and servers that are full."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.h2 import END_HEADERS, HEADERS, PREFACE, SETTINGS, RawClient, block, connect, frame, prefixed
from support.oip import request_for as oip_request_for
from support.server import NNSERVER, PREDICT, PREDICT_STREAM, ServerProcess, request, rows, running

import nncore
from faults.bystander import PATIENCE_S, Bystander, X
from faults.test_requests import INFER
from faults.tried import tried
from nnproto.v1 import inference_pb2 as own
from nnserver.model_folder import BUNDLED


def save_slow(folder: Path) -> None:
    """Put a model "slow", about 0.2 ms a row, beside the digits into *folder*."""
    w = np.full((2048, 2048), 1e-4, np.float32)
    layers = [
        nncore.Layer(np.ones((1, 2048), np.float32)),
        *[nncore.Layer(w, None, "tanh")] * 2,
        nncore.Layer(np.ones((2048, 1), np.float32)),
    ]
    nncore.Mlp(layers).save(folder / "slow.safetensors")
    (folder / "digits.safetensors").write_bytes((BUNDLED / "digits.safetensors").read_bytes())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_slow(folder)
    return folder


# One kernel thread, so that work piles up; and no bound by time, so that it may.
SLOW = ("--kernel-threads", "1", "--max-queue-ms", "0")


@pytest.fixture(scope="module")
def slow(transport: str, models: Path) -> Iterator[ServerProcess]:
    """A server with a slow model."""
    with running(str(models), *SLOW, "--transport", transport) as process:
        yield process
    assert process.errors == ""


def message_for(service: str, n: int, model: str = "slow") -> bytes:
    x = np.ones((n, 1), np.float32) if model == "slow" else X[:n]
    found: bytes = (request(x, model) if service == "own" else oip_request_for(x, model)).SerializeToString()
    return found


def wait_until(claim: Callable[[], bool]) -> None:
    """Poll what no event tells of."""
    end = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not claim():
        assert time.monotonic() < end, "it did not become true in time"
        pause.wait(0.02)


@contextlib.contextmanager
def busy(server: ServerProcess, n: int = 2000) -> Iterator[grpc.Channel]:
    """A channel on which the slow model has begun to compute *n* rows."""
    with server.channel() as channel:
        idle_s = server.cpu_s()
        call = channel.unary_unary(PREDICT).future(message_for("own", n), timeout=PATIENCE_S)
        wait_until(lambda: server.cpu_s() > idle_s + 0.1)
        yield channel
        call.cancel()


@tried(
    "Time",
    "deadlines before, on the way, in the queue, in the kernel",
    "DEADLINE_EXCEEDED; RESOURCE_EXHAUSTED if what waits takes longer",
)
@pytest.mark.parametrize("service", ["own", "oip"])
def test_a_deadline_at_every_stage_is_told(slow: ServerProcess, service: str) -> None:
    """While another call computes for a moment; the next call is answered."""
    path = PREDICT if service == "own" else INFER
    with Bystander(slow), busy(slow) as channel:
        method = channel.unary_unary(path)
        calls = [method.future(message_for(service, 2000), timeout=s) for s in (-1.0, 1e-5, 5e-4, 0.02, 0.2)]
        ends = [call.code().name for call in calls]
        assert ends[0] == "DEADLINE_EXCEEDED"
        assert set(ends) <= {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
        for call in calls:
            if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                assert "more than the deadline allows" in call.details()


@tried("Time", "cancelled at once, as it is read, in the queue, in the kernel", "CANCELLED, and not computed")
@pytest.mark.parametrize("service", ["own", "oip"])
def test_a_cancellation_at_every_stage_is_borne(slow: ServerProcess, service: str) -> None:
    """A minute of work is asked for and cancelled; what another client asks for need not wait for that."""
    path = PREDICT if service == "own" else INFER
    with Bystander(slow), busy(slow) as channel, slow.channel() as other:
        method = channel.unary_unary(path)
        begun_s = slow.cpu_s()
        calls = []
        for delay_s in (0.0, 0.0005, 0.02, 0.2) * 10:
            # Without a deadline: one that the work before it exceeds would be refused at once.
            call = method.future(message_for(service, 10_000))
            calls.append((time.monotonic() + delay_s, call))
        for due, call in calls:
            threading.Event().wait(max(due - time.monotonic(), 0))
            call.cancel()
        assert {call.code() for _, call in calls} == {grpc.StatusCode.CANCELLED}
        assert other.unary_unary(path)(message_for(service, 1), timeout=PATIENCE_S)
        # One of them may have been in the kernel, which takes two seconds for it.
        assert slow.cpu_s() - begun_s < 20


@tried(
    "Time",
    "deadlines of a hundred million hours, and of a nanosecond",
    "answered; DEADLINE_EXCEEDED if it is over",
)
def test_deadlines_of_any_length_are_taken(server: ServerProcess, bystander: Bystander) -> None:
    with RawClient(server.address) as client:
        # grpcio takes a nanosecond for a millisecond, in which it may answer.
        for timeout, statuses in ((b"99999999H", {0}), (b"99999999S", {0}), (b"1n", {0, 4})):
            body = prefixed(request(X[:1]).SerializeToString())
            answer = client.wait(client.request(PREDICT.encode(), body, (b"grpc-timeout", timeout)))
            assert answer.status in statuses


@tried(
    "Time",
    "a client that is killed with calls and streams in flight",
    "its connection is closed, nothing is left",
)
def test_a_killed_client_leaves_nothing(server: ServerProcess, bystander: Bystander) -> None:
    """SIGKILL, three times; open files are back at their level."""
    files = server.open_files()
    for mode in ("unary", "stream", "unary"):
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "nnclient", "load", "--target", server.address, "--model", "digits"),
                *("--concurrency", "4", "--duration-s", "60", "--mode", mode),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(lambda: server.open_files() > files)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        wait_until(lambda: server.open_files() <= files)
    bystander.is_answered()


@tried("Time", "connections reset amid a stream of requests", "let go, nothing is left")
def test_connections_that_are_reset_leave_nothing(server: ServerProcess, bystander: Bystander) -> None:
    files = server.open_files()
    body = prefixed(request(X).SerializeToString()) * 20
    for _ in range(100):
        with contextlib.suppress(OSError), connect(server.address) as sock:
            head = frame(HEADERS, END_HEADERS, 1, block(PREDICT_STREAM.encode()))
            sock.sendall(PREFACE + frame(SETTINGS, 0, 0) + head)
            for at in range(0, len(body), 16_000):
                sock.sendall(frame(0, 0, 1, body[at : at + 16_000]))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: server.open_files() <= files)


@tried("Load", "a full queue", "RESOURCE_EXHAUSTED at once; what was queued is answered")
def test_a_full_queue_is_told_at_once(transport: str, models: Path) -> None:
    """Twelve requests where four may wait: who is refused hears it before those that wait are run."""
    flags = (*SLOW, "--max-queue-requests", "4", "--transport", transport)
    with running(str(models), *flags) as server, Bystander(server):
        for path, service in ((PREDICT, "own"), (INFER, "oip")):
            with busy(server) as channel:
                method = channel.unary_unary(path)
                calls = [method.future(message_for(service, 64 + i), timeout=PATIENCE_S) for i in range(12)]
                ends = [call.code().name for call in calls]
                texts = {call.details() for call in calls if call.code().name == "RESOURCE_EXHAUSTED"}
            assert set(ends) == {"OK", "RESOURCE_EXHAUSTED"}
            assert all("full" in text and "max_queue_requests" in text for text in texts)


@tried(
    "Load", "more connections than files; then fewer", "those that are open are served, and new ones again"
)
def test_exhausted_descriptors_end_when_they_are_given_back(transport: str) -> None:
    """With 60 files, 100 connections: who was there is served throughout, and who comes afterwards."""
    command = ("/bin/sh", "-c", f'ulimit -n 60; exec "{NNSERVER}" "$@"', "nnserver")
    with running("--transport", transport, command=command) as server, Bystander(server) as bystander:
        files = server.open_files()
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                sock = stack.enter_context(connect(server.address))
                sock.sendall(PREFACE + frame(SETTINGS, 0, 0))
            wait_until(lambda: server.open_files() >= 58)
            for _ in range(5):
                bystander.is_answered()
        wait_until(lambda: server.open_files() <= files + 1)
        with Bystander(server):
            pass
    assert server.process.returncode == 0
    assert "Traceback" not in server.errors


@tried(
    "Load",
    "64 requests with 1 MB beside a row each, on 4 streams, while the model is busy",
    "INVALID_ARGUMENT each",
)
def test_ballast_does_not_pile_up(slow: ServerProcess) -> None:
    """They are refused as they come, and not held until the model has time."""
    message = b"\x9a\x06" + b"\x80\x80\x40" + bytes(1 << 20) + message_for("own", 1)
    with Bystander(slow), busy(slow) as channel:
        before = slow.status("VmRSS")
        calls = [channel.stream_stream(PREDICT_STREAM)(iter([message] * 16)) for _ in range(4)]
        codes = [own.PredictResponse.FromString(reply).error.code for call in calls for reply in call]
        assert codes == [3] * 64
        assert slow.status("VmRSS") < before + (64 << 10)


@tried(
    "Time", "a slow reader: windows of a few bytes, nothing read for a second, then all", "answered rightly"
)
def test_a_slow_reader_gets_its_answers(server: ServerProcess, bystander: Bystander) -> None:
    with RawClient(server.address, settings={4: 50}) as client:
        stream_id = client.request(PREDICT_STREAM.encode(), prefixed(request(X).SerializeToString()) * 3)
        for _ in range(5):
            bystander.is_answered()
        answers = [own.PredictResponse.FromString(m) for m in client.wait(stream_id).messages]
    assert [rows(answer).shape for answer in answers] == [(40, 10)] * 3
    assert len({answer.outputs.data for answer in answers}) == 1
