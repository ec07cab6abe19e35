"""nnclient against a real nnserver process: the product as its users put it together."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.server import ServerProcess

import nnclient
import nncore
import nnserver
from nnclient import AsyncClient, Client
from nnclient.cli import main

DIGITS = nncore.load(Path(nnserver.__file__).parent / "models" / "digits.safetensors")
X = np.random.default_rng(0).uniform(0, 16, (20_000, 64)).astype(np.float32)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as it:
        it.wait_ready(model="digits")
        yield it


def test_answers_are_nncores_bits_however_they_travel(client: Client) -> None:
    """One row, a message, many messages, a stream: the bits of nncore on the same rows."""
    outputs = DIGITS.forward(X)
    assert np.array_equal(client.predict("digits", X[7]), outputs[7])
    assert np.array_equal(client.predict("digits", X[:9]), outputs[:9])
    assert np.array_equal(client.predict("digits", X), outputs)
    streamed = client.stream("digits", (X[start : start + 333] for start in range(0, len(X), 333)))
    assert np.array_equal(np.concatenate(list(streamed)), outputs)
    assert np.array_equal(client.predict("digits", X[:50], "probabilities"), DIGITS.predict_proba(X[:50]))


def test_labels_are_nncores_labels(client: Client) -> None:
    """Names, indices and scores."""
    labels = client.predict("digits", X[:3000], output="labels", top_k=3)
    indices, scores = DIGITS.top_labels_from(DIGITS.forward(X[:3000]), 3)
    assert np.array_equal(labels.indices, indices)
    assert np.array_equal(labels.scores, scores)
    assert labels.labels.tolist() == [[DIGITS.class_labels[i] for i in row] for row in indices]


def test_the_description_is_the_models(client: Client) -> None:
    """Layers, labels and the count of parameters."""
    model = client.model("digits")
    assert model.architecture == "64-64-32-10"
    assert model.parameter_count == DIGITS.parameter_count
    assert [layer.activation for layer in model.layers] == [layer.activation for layer in DIGITS.layers]
    assert {"digits", "mnist", "primer"} <= {model.name for model in client.models()}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("nope", X[:1]), nnclient.NotFound),
        (("digits", X[:1, :5]), nnclient.InvalidInput),
        (("digits", X[:1], "labels", 11), nnclient.InvalidInput),
        (("digits", X[:1], "outputs", 1, "99"), nnclient.NotFound),
        (("digits", X, "outputs", 1, "", 0.001), nnclient.DeadlineExceeded),
    ],
)
def test_wrong_requests_raise_and_the_next_one_works(
    client: Client, arguments: tuple[Any, ...], error: type[Exception]
) -> None:
    """Each failure by its own exception."""
    with pytest.raises(error):
        client.predict(*arguments)
    assert np.array_equal(client.predict("digits", X[:2]), DIGITS.forward(X[:2]))


def test_a_message_above_the_servers_limit_is_named(server: ServerProcess) -> None:
    """As MessageTooLarge, with the setting of the server, and of this client."""
    with Client(server.address, message_bytes=64 << 20) as client:
        with pytest.raises(nnclient.MessageTooLarge, match=r"--max-message-bytes.*message_bytes"):
            client.predict("mnist", np.zeros((4000, 784)))
        assert client.predict("mnist", np.zeros((4, 784))).shape == (4, 10)


def test_64_clients_at_once(server: ServerProcess) -> None:
    """Each over its own connection, each with its own rows and answers."""
    outputs = DIGITS.forward(X)

    def work(number: int) -> bool:
        mine = slice(100 * number, 100 * number + 100)
        with Client(server.address) as client:
            streamed = np.concatenate(list(client.stream("digits", np.array_split(X[mine], 7))))
            return np.array_equal(client.predict("digits", X[mine]), outputs[mine]) and np.array_equal(
                streamed, outputs[mine]
            )

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(work, range(64)))


def test_asyncio(server: ServerProcess) -> None:
    """Unary calls by the dozen and a stream beside them."""
    outputs = DIGITS.forward(X[:640])

    async def work() -> None:
        async with AsyncClient(server.address) as client:
            stream = client.stream("digits", (X[n : n + 1] for n in range(640)))
            unary = asyncio.gather(*(client.predict("digits", X[n]) for n in range(640)))
            assert np.array_equal(np.concatenate([y async for y in stream]), outputs)
            assert np.array_equal(np.stack(await unary), outputs)

    asyncio.run(work())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stream_outlives_its_server(transport: str, tmp_path: Path, how: signal.Signals) -> None:
    """Drained or killed in the middle, and started again: every batch is answered once, in order."""
    listen = f"unix:{tmp_path}/socket"
    first = ServerProcess("--transport", transport, listen=listen)
    servers = [first]
    results = []
    try:
        with Client(listen) as client:
            for y in client.stream("digits", (X[n : n + 4] for n in range(200))):
                results.append(y)
                if len(results) == 100:
                    first.signal(how)
                    first.wait()
                    servers.append(ServerProcess("--transport", transport, listen=listen))
    finally:
        for server in servers[1:]:
            server.stop()
    outputs = DIGITS.forward(X)
    assert all(np.array_equal(y, outputs[n : n + 4]) for n, y in enumerate(results))
    assert len(results) == 200


def test_the_commands(server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """List, predict from file to file, and a load test that finds no wrong answer."""
    target = ["--target", server.address]
    assert main(["models", *target]) == 0
    assert "64-64-32-10" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", X)
    assert main(["predict", "digits", str(tmp_path / "x.npy"), "-o", str(tmp_path / "y.npy"), *target]) == 0
    assert np.array_equal(np.load(tmp_path / "y.npy"), DIGITS.forward(X))
    for mode in ("unary", "stream"):
        report = tmp_path / f"{mode}.json"
        brief = ["--warmup-s", "0.2", "--duration-s", "0.5", "--mode", mode, "--json", str(report)]
        assert main(["load", "--model", "digits", *brief, *target]) == 0
        found = json.loads(report.read_text())
        assert found["answered"] > 50
        assert found["errors"] == {}
