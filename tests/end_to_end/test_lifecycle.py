"""Real sockets, a real process: deadlines, cancellation, idle and stalled peers, drain, start and stop."""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.server import NNSERVER, PREDICT_STREAM, ServerProcess, Stub, request, rows, running

import nncore
from nnproto.v1 import inference_pb2 as pb

X = np.random.default_rng(0).uniform(0, 16, (4, 64)).astype(np.float32)


def health(channel: grpc.Channel, name: str = "") -> int:
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    status: int = check(health_pb2.HealthCheckRequest(service=name), timeout=30).status
    return status


def wait_until(claim: Callable[[], bool], within_s: float = 30.0) -> None:
    """Poll what no event tells of: another process's threads and files."""
    end = time.monotonic() + within_s
    pause = threading.Event()
    while not claim():
        assert time.monotonic() < end, "it did not become true in time"
        pause.wait(0.02)


def is_listening(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


class OpenStream:
    """A PredictStream that is written to by hand."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.call = channel.stream_stream(PREDICT_STREAM)(iter(self._requests.get, None))

    def send(self, message: pb.PredictRequest) -> None:
        self._requests.put(message.SerializeToString())

    def read(self) -> pb.PredictResponse:
        return pb.PredictResponse.FromString(next(self.call))

    def half_close(self) -> None:
        self._requests.put(None)


@pytest.fixture
def slow_server(transport: str, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server whose model "slow" takes about 0.2 ms a row, 512 rows a batch."""
    w = np.full((2048, 2048), 1e-4, np.float32)
    layers = [
        nncore.Layer(np.ones((1, 2048), np.float32)),
        *[nncore.Layer(w, None, "tanh")] * 2,
        nncore.Layer(np.ones((2048, 1), np.float32)),
    ]
    nncore.Mlp(layers).save(tmp_path / "slow.safetensors")
    nncore.Mlp([nncore.Layer(np.eye(2, dtype=np.float32))]).save(tmp_path / "quick.safetensors")
    with running(str(tmp_path), "--transport", transport, "--max-batch-rows", "512") as process:
        yield process


def test_health_knows_the_server_its_services_and_models(server: ServerProcess) -> None:
    with server.channel() as channel:
        for name in ("", "nnproto.v1.Inference", "grpc.health.v1.Health", "digits"):
            assert health(channel, name) == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health(channel, "rose")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_tells_the_service_to_a_client_without_its_proto(server: ServerProcess) -> None:
    with server.channel() as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "nnproto.v1.Inference" in database.get_services()
        file = database.FindFileContainingSymbol("nnproto.v1.Inference")
        assert [method.name for method in file.service[0].method] == [
            "Predict",
            "PredictStream",
            "Differentiate",
            "DifferentiateStream",
            "ListModels",
            "GetModel",
        ]


def test_64_idle_streams_keep_nobody_waiting(server: ServerProcess) -> None:
    with server.channel() as idle, server.channel() as channel:
        streams = [OpenStream(idle) for _ in range(64)]
        for stream in streams:
            stream.send(request(X[:1]))
            stream.read()
        assert rows(Stub(channel).predict(request(X), timeout=30)).shape == (4, 10)
        assert health(channel) == health_pb2.HealthCheckResponse.SERVING
        for stream in streams:
            stream.send(request(X[:1]))
            stream.half_close()
            stream.read()
            assert list(stream.call) == []


def test_a_deadline_that_has_passed_is_told(server: ServerProcess) -> None:
    with server.channel() as channel:
        stub = Stub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.predict(request(X), timeout=-1.0)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert rows(stub.predict(request(X))).shape == (4, 10)


def test_a_deadline_that_passes_in_the_queue_is_told(slow_server: ServerProcess) -> None:
    """The slow model is busy for seconds; a request with 50 ms to live fails, the next one works."""
    with slow_server.channel() as channel:
        stub = Stub(channel)
        x = np.ones((4096, 1), np.float32)
        busy = [stub.predict.future(request(x, "slow")) for _ in range(3)]
        with pytest.raises(grpc.RpcError) as caught:
            stub.predict(request(x, "slow"), timeout=0.05)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # A small model is not held up by the large one.
        assert rows(stub.predict(request(np.ones((1, 2), np.float32), "quick"), timeout=30)).shape == (1, 2)
        for call in busy:
            call.cancel()
        assert rows(stub.predict(request(x[:1], "slow"), timeout=60)).shape == (1, 1)


def test_a_stream_with_a_deadline_ends_when_it_passes(server: ServerProcess) -> None:
    with server.channel() as channel:
        forever = threading.Event()

        def requests() -> Iterator[bytes]:
            yield request(X[:1]).SerializeToString()
            forever.wait(30)

        call = channel.stream_stream(PREDICT_STREAM)(requests(), timeout=0.5)
        next(call)
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        forever.set()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert rows(Stub(channel).predict(request(X))).shape == (4, 10)


def test_cancelled_calls_leave_nothing_behind(server: ServerProcess) -> None:
    """Threads and open files are back where they were after 200 cancelled calls and streams."""
    with server.channel() as warm:
        Stub(warm).predict(request(X))
    threads, files = server.status("Threads"), server.open_files()
    with server.channel() as channel:
        stub = Stub(channel)
        for i in range(100):
            call = stub.predict.future(request(X))
            call.cancel()
            stream = OpenStream(channel)
            if i % 2:
                stream.send(request(X))
                stream.read()
            stream.call.cancel()
        assert rows(stub.predict(request(X))).shape == (4, 10)
    # grpcio keeps the threads of its pools: at most as many as were in use at once.
    wait_until(lambda: server.open_files() <= files + 1)
    wait_until(lambda: server.status("Threads") <= threads + 40)


def test_a_channel_closed_under_a_stream_leaves_nothing_open(server: ServerProcess) -> None:
    """The server lets go of the connection, and the next request works."""
    with server.channel() as channel:
        stream = OpenStream(channel)
        stream.send(request(X))
        stream.read()
        files = server.open_files()
    wait_until(lambda: server.open_files() < files)
    with server.channel() as channel:
        assert rows(Stub(channel).predict(request(X))).shape == (4, 10)


def test_a_client_that_does_not_read_is_not_read_from(server: ServerProcess) -> None:
    """It offers 400 MB of requests and reads no answer: flow control stops it, and memory stays bounded."""
    x = np.random.default_rng(0).random((250, 784), np.float32)  # 784,000 bytes
    message = request(x, "mnist").SerializeToString()
    sent = 0
    stop = threading.Event()

    def requests() -> Iterator[bytes]:
        nonlocal sent
        while not stop.is_set() and sent < 500:
            sent += 1
            yield message

    before = server.status("VmRSS")
    # Without lookahead the client takes one answer and then stops reading.
    with server.channel(**{"grpc.http2.lookahead_bytes": 1 << 16, "grpc.http2.bdp_probe": 0}) as channel:
        call = channel.stream_stream(PREDICT_STREAM)(requests())
        next(call)
        with server.channel() as other:
            for _ in range(50):
                assert rows(Stub(other).predict(request(X), timeout=30)).shape == (4, 10)
        grown_mib = (server.status("VmRSS") - before) / 1024
        stop.set()
        call.cancel()
    # 64 messages of a stream's window, each held once or twice, and what malloc keeps.
    assert grown_mib < 256


def test_watchers_hear_of_the_drain_and_idle_streams_do_not_hold_it_up(transport: str) -> None:
    with running("--transport", transport, "--grace-s", "20") as server, server.channel() as channel:
        watch = channel.unary_stream(
            "/grpc.health.v1.Health/Watch", response_deserializer=health_pb2.HealthCheckResponse.FromString
        )(b"")
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stream = OpenStream(channel)
        stream.send(request(X))
        stream.read()
        started = time.monotonic()
        server.signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stream.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "the server is draining" in caught.value.details()
        assert server.wait() == 0
        assert time.monotonic() - started < 10
        assert server.errors == ""


def test_drain_under_load_loses_nothing(transport: str) -> None:
    """Every request gets its right answer or a clean UNAVAILABLE; the server exits with status 0."""
    with running("--transport", transport) as server:
        with server.channel() as channel:
            expected = rows(Stub(channel).predict(request(X)))
        begun = threading.Barrier(17)

        def client(k: int) -> tuple[int, list[grpc.StatusCode]]:
            answered = 0
            failures: list[grpc.StatusCode] = []
            with server.channel() as channel:
                stub = Stub(channel)
                is_first = True
                while not failures:
                    try:
                        answer = rows(stub.predict(request(X), timeout=30))
                        assert np.array_equal(answer, expected)
                        answered += 1
                    except grpc.RpcError as error:
                        failures.append(error.code())
                    if is_first:
                        is_first = False
                        begun.wait(timeout=60)
            return answered, failures

        with ThreadPoolExecutor(16) as pool:
            clients = [pool.submit(client, k) for k in range(16)]
            begun.wait(timeout=60)
            server.signal(signal.SIGTERM)
            results = [future.result() for future in clients]
        assert server.wait() == 0
        assert server.errors == ""
    assert all(answered >= 1 for answered, _ in results)
    assert {code for _, failures in results for code in failures} == {grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(transport: str, number: int, slow_server: ServerProcess) -> None:
    """With a long job in flight, the first signal waits for it and the second does not."""
    with slow_server.channel() as channel:
        stub = Stub(channel)
        calls = [stub.predict.future(request(np.ones((40_000, 1), np.float32), "slow")) for _ in range(2)]
        # They are in flight once the kernels run: a call that is still arriving would be refused.
        idle_s = slow_server.cpu_s()
        wait_until(lambda: slow_server.cpu_s() > idle_s + 0.3)
        slow_server.signal(number)
        # The drain has begun once the server takes no more connections.
        wait_until(lambda: not is_listening(slow_server.address))
        assert slow_server.process.poll() is None
        slow_server.signal(number)
        assert slow_server.wait() == 128 + number
        for call in calls:
            assert call.exception() is not None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tgkill is Linux's")
def test_a_signal_that_another_thread_receives_drains_all_the_same(transport: str) -> None:
    """The kernel may give a process's signal to any thread; the main one sleeps in a lock meanwhile."""
    with running("--transport", transport) as server:
        pid = server.process.pid
        for thread in (int(name) for name in os.listdir(f"/proc/{pid}/task")):
            if thread != pid:
                assert ctypes.CDLL(None).tgkill(pid, thread, signal.SIGTERM) == 0
                break
        assert server.wait() == 0


def test_sigint_drains_and_exits_with_0(transport: str) -> None:
    with running("--transport", transport) as server:
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        assert server.errors == ""


def test_unix_socket(transport: str, tmp_path: Path) -> None:
    """A socket left behind by a killed server is taken over."""
    path = tmp_path / "socket"
    for _ in range(2):
        server = ServerProcess("--transport", transport, listen=f"unix:{path}")
        with server.channel() as channel:
            assert rows(Stub(channel).predict(request(X), timeout=30)).shape == (4, 10)
        server.process.kill()
        server.wait()


def test_the_ready_line_says_where_what_and_how(server: ServerProcess) -> None:
    host, _, port = server.address.rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) > 0
    assert server.ready_line == (
        f"nnserver 0.1.0 ready on {server.address}; models: digits, mnist, primer; "
        f"try: nnclient models --target {server.address}\n"
    )


def start_in_vain(*arguments: str, **env: str) -> tuple[int, str]:
    done = subprocess.run([NNSERVER, *arguments], capture_output=True, text=True, env=env or None, timeout=60)
    assert done.stdout == ""
    return done.returncode, done.stderr


def test_a_port_in_use_is_an_error_that_says_so(server: ServerProcess, transport: str) -> None:
    status, text = start_in_vain("--listen", server.address, "--transport", transport)
    assert status == 1
    assert text.startswith(f"nnserver: error: cannot listen on {server.address}: ")
    assert text.count("\n") == 1


def test_busy_polling_ends_when_nothing_comes() -> None:
    """It answers as ever, and an idle server uses no processor time."""
    with running("--transport", "h2", "--busy-poll-us", "20000") as server, server.channel() as channel:
        for _ in range(10):
            assert rows(Stub(channel).predict(request(np.zeros((1, 64))))).shape == (1, 10)
        wait_until(lambda: _is_idle_for(server, 0.3), 10)


def _is_idle_for(server: ServerProcess, seconds: float) -> bool:
    before = server.cpu_s()
    time.sleep(seconds)
    return server.cpu_s() - before <= 0.05 * seconds


def test_two_servers_share_a_port_if_both_say_so(transport: str) -> None:
    """Connections are shared out between them, and when one drains, the other goes on answering."""
    shared = ("--transport", transport, "--reuse-port")
    with running(*shared) as first, running(*shared, "--listen", first.address) as second:
        for _ in range(20):
            with first.channel() as channel:
                assert rows(Stub(channel).predict(request(np.zeros((1, 64))))).shape == (1, 10)
        assert first.stop() == 0
        with second.channel() as channel:
            assert rows(Stub(channel).predict(request(np.zeros((1, 64))))).shape == (1, 10)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nowhere.safetensors",), "there is no model file or folder nowhere.safetensors"),
        (("--listen", "nonsense"), "listen is 'nonsense'; expected HOST:PORT or unix:PATH"),
        (("--max-message-bytes", "1"), "max_message_bytes is 1; expected at least 1024"),
        (("--config", "nowhere.toml"), "cannot read the configuration file nowhere.toml"),
    ],
)
def test_what_cannot_be_started_with_is_named(arguments: tuple[str, ...], text: str) -> None:
    status, printed = start_in_vain(*arguments)
    assert status == 1
    assert printed.startswith(f"nnserver: error: {text}")
    assert "Traceback" not in printed


def test_a_corrupt_model_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense" * 10)
    status, printed = start_in_vain(str(tmp_path))
    assert status == 1
    assert "bad.safetensors" in printed
    assert "Traceback" not in printed


def test_a_wrong_flag_is_a_usage_error() -> None:
    status, printed = start_in_vain("--lisen", "x")
    assert status == 2
    assert "unrecognized arguments" in printed


def test_help_shows_every_setting() -> None:
    done = subprocess.run([NNSERVER, "--help"], capture_output=True, text=True, check=True)
    for flag in ("--listen", "--max-message-bytes", "--grace-s", "--config", "--transport"):
        assert flag in done.stdout
