"""Client against a scripted server over a real socket: answers, errors, retries, waiting."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from support.fake_server import NOT_SERVING, CuttableProxy, FakeModel, FakeServer, Fault

import nnclient
from nnclient import Client, Labels, ModelInfo, RetryPolicy
from nnproto.v1 import inference_pb2 as pb

X = np.arange(12, dtype=np.float32).reshape(4, 3)
QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)


def test_outputs_come_in_the_models_dtype(client: Client, server: FakeServer) -> None:
    """Whatever was sent, a float32 model answers in float32 and a float64 model in float64."""
    for name in ("lin", "double"):
        model = server.models[name]
        for dtype in (np.float32, np.float64, np.int64, np.uint8):
            y = client.predict(name, X.astype(dtype))
            assert y.dtype == model.dtype
            assert np.array_equal(y, model.outputs(X))


def test_a_row_is_answered_by_a_row(client: Client, server: FakeServer) -> None:
    """For every kind of output."""
    y = client.predict("lin", X[1])
    assert y.shape == (2,)
    assert np.array_equal(y, server.models["lin"].outputs(X)[1])
    assert client.predict("lin", [1, 2, 3], "probabilities").shape == (2,)
    labels = client.predict("shapes", [1, 0, 0, 0], "labels", top_k=2)
    assert labels.shape == (2,)
    assert [entry.label for entry in labels] == ["star", "circle"]


def test_no_rows_are_answered_by_none(client: Client) -> None:
    """With the right number of columns."""
    assert client.predict("lin", X[:0]).shape == (0, 2)
    assert client.predict("shapes", np.zeros((0, 4)), "labels", top_k=2).shape == (0, 2)


def test_probabilities_and_labels(client: Client, server: FakeServer) -> None:
    """The kind of output and top_k reach the server, and what it answers comes back."""
    x = np.eye(4, dtype=np.float32)
    p = client.predict("shapes", x, output="probabilities")
    assert np.array_equal(p, server.models["shapes"].probabilities(x))
    labels = client.predict("shapes", x, output="labels", top_k=3)
    assert isinstance(labels, Labels)
    assert np.array_equal(labels.scores, -np.sort(-p.astype(np.float64), axis=1))
    assert labels.labels[0].tolist() == ["star", "circle", "square"]


def test_large_arrays_travel_in_messages_of_bounded_size(server: FakeServer) -> None:
    """Each row once, in order, and joined into one answer."""
    x = np.random.default_rng(0).integers(-9, 9, (5000, 3)).astype(np.float32)
    with Client(server.target, message_bytes=4096) as client:
        y = client.predict("lin", x)
        labels = client.predict("lin", x, "labels")
    assert np.array_equal(y, server.models["lin"].outputs(x))
    assert labels.shape == (5000, 1)
    assert max(request.ByteSize() for request in server.requests) <= 4096
    assert set(server.calls) == {"PredictStream"}
    assert sum(request.inputs.shape[0] for request in server.requests) == 10_000


def test_an_error_in_a_large_array_names_its_rows(server: FakeServer) -> None:
    """The split is no business of the caller's, but rows that the server counts are."""
    server.answer_faults.extend([None, Fault(grpc.StatusCode.INVALID_ARGUMENT, "NaN in row 2")])
    with (
        Client(server.target, message_bytes=4096) as client,
        pytest.raises(
            nnclient.InvalidInput, match=r"^in rows \d+ to \d+ of x, counted from 0 there: NaN in row 2$"
        ),
    ):
        client.predict("lin", np.zeros((1000, 3)))


def test_models_are_described(client: Client) -> None:
    """Lists by name, one model, and its architecture."""
    assert [model.name for model in client.models()] == ["double", "lin", "shapes"]
    model = client.model("shapes")
    assert isinstance(model, ModelInfo)
    assert (model.version, model.n_in, model.n_out, model.labels) == ("7", 4, 3, ("square", "circle", "star"))
    assert model.architecture == "4-3"
    assert client.model("double").dtype == np.float64


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda c: c.predict("nope", X), nnclient.NotFound, "no model 'nope' is served here"),
        (lambda c: c.model("nope"), nnclient.NotFound, "no model 'nope' is served here"),
        (lambda c: c.predict("lin", X[:, :2]), nnclient.InvalidInput, r"model 'lin' expects \(rows, 3\)"),
    ],
)
def test_the_servers_words_reach_the_caller(
    client: Client, call: Callable[[Client], Any], error: type[Exception], text: str
) -> None:
    """And the next request works."""
    with pytest.raises(error, match=text):
        call(client)
    assert client.predict("lin", X).shape == (4, 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.predict("lin", X * 1j),
        lambda c: c.predict("lin", [["a"]]),
        lambda c: c.predict("", X),
        lambda c: c.predict("lin", X, "logits"),
        lambda c: c.predict("lin", X, "labels", top_k=0),
        lambda c: c.predict("lin", X, top_k=2),
        lambda c: c.predict("lin", X, timeout_s=0),
        lambda c: c.predict("lin", np.zeros((1, 1 << 20))),
        lambda c: c.stream("lin", [X], max_in_flight=0),
        lambda c: c.stream("lin", [X], errors="ignore"),
    ],
)
def test_what_cannot_work_is_refused_before_sending(
    client: Client, server: FakeServer, call: Callable[[Client], Any]
) -> None:
    """InvalidInput, and nothing reaches the server."""
    with pytest.raises(nnclient.InvalidInput):
        call(client)
    assert server.calls == []


def test_unavailable_is_retried(server: FakeServer) -> None:
    """The core repeats a call that met UNAVAILABLE; the caller sees the answer alone."""
    server.faults.extend([Fault(grpc.StatusCode.UNAVAILABLE, "draining")] * 2)
    with Client(server.target, retry=QUICK) as client:
        assert client.predict("lin", X).shape == (4, 2)
    assert server.calls == ["Predict"] * 3
    assert server.metadata[2]["grpc-previous-rpc-attempts"] == "2"


def test_requests_above_the_cores_default_buffer_are_retried(server: FakeServer) -> None:
    """A message of nearly 1 MiB, where the core by itself would keep only 256 KiB."""
    server.faults.extend([Fault(grpc.StatusCode.UNAVAILABLE, "draining")])
    with Client(server.target, retry=QUICK) as client:
        assert client.predict("double", np.zeros((4000, 3))).shape == (4000, 2)
        server.models["wide"] = FakeModel("wide", 200_000, 1)
        assert client.predict("wide", np.zeros((1, 200_000), np.float32)).shape == (1, 1)
        server.faults.append(Fault(grpc.StatusCode.UNAVAILABLE, "draining"))
        assert client.predict("wide", np.zeros((1, 200_000), np.float32)).shape == (1, 1)
    assert server.calls == ["Predict"] * 5


def test_attempts_run_out(server: FakeServer) -> None:
    """After the last, the server's words are raised."""
    server.faults.extend([Fault(grpc.StatusCode.UNAVAILABLE, "draining")] * 9)
    with (
        Client(server.target, retry=RetryPolicy(attempts=3, initial_backoff_s=0.01)) as client,
        pytest.raises(nnclient.Unavailable, match="draining"),
    ):
        client.predict("lin", X)
    assert server.calls == ["Predict"] * 3


@pytest.mark.parametrize(
    "code",
    [grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN],
)
def test_nothing_else_is_retried(server: FakeServer, code: grpc.StatusCode) -> None:
    """One call, one exception."""
    server.faults.extend([Fault(code, "no")])
    with Client(server.target, retry=QUICK) as client, pytest.raises(nnclient.NnclientError, match="no"):
        client.predict("lin", X)
    assert server.calls == ["Predict"]


def test_a_full_queue_is_retried_when_the_server_says_when(server: FakeServer) -> None:
    """gRPC's pushback is an invitation; without it, RESOURCE_EXHAUSTED is final."""
    hint = (("grpc-retry-pushback-ms", "5"),)
    server.faults.extend([Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", hint)] * 2)
    with Client(server.target, retry=QUICK) as client:
        assert client.predict("lin", X).shape == (4, 2)
        assert server.calls == ["Predict"] * 3
        server.faults.append(
            Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", (("retry-after-ms", "3600000"),))
        )
        with pytest.raises(nnclient.Overloaded) as caught:
            client.predict("lin", X, timeout_s=5)
        assert caught.value.retry_after_s == 3600
        assert len(server.calls) == 4


def test_deadline(client: Client, server: FakeServer) -> None:
    """The client's own timeout_s bounds a call that gives none; the next request works."""
    server.gate.clear()
    with pytest.raises(nnclient.DeadlineExceeded, match=r"within 0\.1 s"):
        client.predict("lin", X, timeout_s=0.1)
    with Client(server.target, timeout_s=0.1) as hasty, pytest.raises(TimeoutError):
        hasty.predict("lin", X)
    with Client(server.target, message_bytes=1024) as splitting, pytest.raises(nnclient.DeadlineExceeded):
        splitting.predict("lin", np.zeros((1000, 3)), timeout_s=0.1)
    server.gate.set()
    assert client.predict("lin", X).shape == (4, 2)


def test_closing_cancels_what_is_in_flight(server: FakeServer) -> None:
    """The waiting caller gets Cancelled; later calls say that the client is closed."""
    server.gate.clear()
    client = Client(server.target)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.predict, "lin", X)
        server.wait_for(lambda s: len(s.requests) == 1)
        client.close()
        with pytest.raises(nnclient.Cancelled):
            answer.result(20)
    client.close()
    for call in (lambda: client.predict("lin", X), lambda: client.stream("lin", [X]), client.models):
        with pytest.raises(RuntimeError, match="has been closed"):
            call()


def test_threads_share_a_client(client: Client, server: FakeServer) -> None:
    """Sixteen threads, each with its own rows, get their own answers."""

    def work(seed: int) -> bool:
        x = np.random.default_rng(seed).integers(-9, 9, (20, 3)).astype(np.float32)
        expected = server.models["lin"].outputs(x)
        streamed = list(client.stream("lin", [x] * 5))
        return np.array_equal(client.predict("lin", x), expected) and all(
            np.array_equal(y, expected) for y in streamed
        )

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(32)))


def test_metadata_is_sent_with_every_call(server: FakeServer) -> None:
    """Unary, stream and listing alike."""
    with Client(server.target, metadata={"Authorization": "Bearer x"}) as client:
        client.predict("lin", X)
        list(client.stream("lin", [X]))
        client.models()
        client.wait_ready()
    assert len(server.metadata) == 4
    assert all(metadata["authorization"] == "Bearer x" for metadata in server.metadata)
    assert server.metadata[0]["user-agent"].startswith(f"nnclient/{nnclient.__version__}")


def test_answers_that_make_no_sense_are_internal_errors(client: Client, server: FakeServer) -> None:
    """The message says what the server sent."""

    def cut(response: pb.PredictResponse) -> None:
        response.outputs.data = response.outputs.data[:-1]

    server.tamper = cut
    with pytest.raises(nnclient.InternalError, match="sent"):
        client.predict("lin", X)


def test_a_model_without_a_dtype_is_an_internal_error(client: Client, server: FakeServer) -> None:
    """A description that does not hold together is a fault of the server."""
    server.models["lin"].describe = lambda: pb.Model(name="lin")
    with pytest.raises(nnclient.InternalError, match="model 'lin'"):
        client.model("lin")


def test_oversized_messages_name_the_servers_setting() -> None:
    """What the core refuses is told in the server's terms."""
    server = FakeServer({}, max_message_bytes=2000).start()
    try:
        with Client(server.target) as client, pytest.raises(nnclient.MessageTooLarge) as caught:
            client.predict("lin", np.zeros((1000, 3)))
        assert "--max-message-bytes" in str(caught.value)
        assert "2,000" in str(caught.value)
    finally:
        server.stop()


def test_no_server_there() -> None:
    """The target, and what to look at."""
    nowhere = "127.0.0.1:1"
    with (
        Client(nowhere, retry=RetryPolicy(attempts=1)) as client,
        pytest.raises(nnclient.Unavailable) as caught,
    ):
        client.predict("lin", X)
    assert str(caught.value) == (
        f"no server answered at {nowhere} (connection refused); is nnserver running there?"
    )


def test_a_server_of_another_kind() -> None:
    """gRPC, but not ours: nothing about `unimplemented` alone."""
    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        with Client(f"127.0.0.1:{port}") as client:
            for call in (lambda: client.predict("lin", X), client.models, client.wait_ready):
                with pytest.raises(nnclient.NotFound, match="is that port an nnserver's"):
                    call()
    finally:
        other.stop(None)


def test_wait_ready_returns_once_the_server_serves() -> None:
    """Through a refused connection and a server that is still starting up."""
    server = FakeServer({}, health=NOT_SERVING).start()
    server.stop()
    with Client(server.target) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait_ready, timeout_s=30)
        server.start()
        server.wait_for(lambda s: s.calls.count("Check") >= 2)
        assert not waiting.done()
        server.health = b"\x08\x01"
        waiting.result(30)
    server.stop()


def test_wait_ready_says_what_it_waited_for(server: FakeServer) -> None:
    """Time, target and what was the matter."""
    server.health = NOT_SERVING
    with (
        Client(server.target) as client,
        pytest.raises(nnclient.DeadlineExceeded, match=r"waited 0\.2 s for the server at .*not serving yet"),
    ):
        client.wait_ready(timeout_s=0.2)
    with (
        Client("127.0.0.1:1") as nowhere,
        pytest.raises(TimeoutError, match=r"to be ready: no server answered at 127\.0\.0\.1:1 \(connection"),
    ):
        nowhere.wait_ready(timeout_s=0.2)


def test_wait_ready_for_a_model_fails_at_once_if_there_is_none(client: Client) -> None:
    """A name that is spelled wrong is not waited for."""
    client.wait_ready(model="lin")
    with pytest.raises(nnclient.NotFound, match="no model 'lni'"):
        client.wait_ready(model="lni", timeout_s=600)


def test_wait_ready_does_not_wait_for_credentials(client: Client, server: FakeServer) -> None:
    """What waiting cannot mend is raised at once."""
    server.faults.append(Fault(grpc.StatusCode.UNAUTHENTICATED, "who are you?"))
    with pytest.raises(nnclient.Unauthenticated, match="who are you"):
        client.wait_ready(timeout_s=600)


def test_a_lost_connection_is_made_again(server: FakeServer, proxy: CuttableProxy) -> None:
    """Between two calls, without the caller's doing."""
    with Client(proxy.target, retry=QUICK) as client:
        client.predict("lin", X)
        proxy.cut()
        assert client.predict("lin", X).shape == (4, 2)
    assert proxy.connections == 2


def test_a_connection_lost_during_a_call_is_survived(server: FakeServer, proxy: CuttableProxy) -> None:
    """The request is sent once more: predictions change nothing."""
    server.gate.clear()
    with Client(proxy.target, retry=QUICK) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.predict, "lin", X)
        server.wait_for(lambda s: len(s.requests) == 1)
        proxy.cut()
        server.wait_for(lambda s: len(s.requests) == 2)
        server.gate.set()
        assert answer.result(20).shape == (4, 2)


def make_certificate(folder: Path) -> tuple[bytes, bytes]:
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {folder}/key.pem -out {folder}/cert.pem"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return (folder / "key.pem").read_bytes(), (folder / "cert.pem").read_bytes()


def test_tls(tmp_path: Path) -> None:
    """With the server's authority it works; without, the message speaks of TLS."""
    key, certificate = make_certificate(tmp_path)
    server = FakeServer(
        {"lin": FakeModel("lin", 3, 2)},
        credentials=grpc.ssl_server_credentials([(key, certificate)]),
    ).start()
    try:
        with Client(server.target, credentials=grpc.ssl_channel_credentials(certificate)) as client:
            assert client.predict("lin", X).shape == (4, 2)
        once = RetryPolicy(attempts=1)
        with (
            Client(server.target, credentials=grpc.ssl_channel_credentials(), retry=once) as distrustful,
            pytest.raises(nnclient.Unavailable, match="TLS handshake"),
        ):
            distrustful.predict("lin", X)
    finally:
        server.stop()


def test_importing_nnclient_is_cheap() -> None:
    """Neither gRPC nor NumPy is loaded before it is needed, and Numba never is."""
    script = (
        "import sys, nnclient; before = set(sys.modules); nnclient.Client; nnclient.AsyncClient; "
        "assert not {'grpc', 'numpy', 'google.protobuf'} & before, before; "
        "import nnclient.cli, nnclient.load.generator, nnclient.commands.predict; "
        "assert not {'numba', 'nncore', 'nnserver', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    """__all__ and the lazy table agree, and a wrong name is an AttributeError."""
    for name in nnclient.__all__:
        assert getattr(nnclient, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Clinet'"):
        _ = nnclient.Clinet
