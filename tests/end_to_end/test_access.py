"""Real servers with identities, on both transports: who is let in, what for, and how often."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from support.h2 import RawClient
from support.identities import TokenFile, bearer
from support.server import PREDICT, PREDICT_STREAM, ServerProcess, Stub, request, running
from support.tls import Authority

from nnclient import AsyncClient, Client, PermissionDenied, Unauthenticated
from nnproto.oip import inference_pb2 as oip
from nnproto.v1 import inference_pb2 as pb

X = np.random.default_rng(0).uniform(0, 16, (4, 64)).astype(np.float32)
OIP = "/inference.GRPCInferenceService"


class Served:
    """A server with identities, and their tokens."""

    def __init__(self, server: ServerProcess, file: TokenFile, tokens: dict[str, str]) -> None:
        self.server = server
        self.file = file
        self.tokens = tokens


@pytest.fixture(scope="module")
def served(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    file = TokenFile(tmp_path_factory.mktemp("access") / "tokens.toml")
    tokens = {
        "user": file.add("user", "infer"),
        "reader": file.add("reader", "read"),
        "operator": file.add("operator", "admin", "infer"),
        "slow": file.add("slow", "infer", rate=0.01, burst=3),
        "paced": file.add("paced", "infer", rate=50, burst=10),
    }
    arguments = ("--transport", transport, "--tokens", str(file.path), "--model-control")
    with running(*arguments) as server:
        yield Served(server, file, tokens)
    assert not any(token in server.errors for token in tokens.values())


@pytest.fixture
def channel(served: Served) -> Iterator[grpc.Channel]:
    with served.server.channel() as channel:
        yield channel


def failure(call: Callable[..., Any], *arguments: Any, **options: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, timeout=30, **options)
    return caught.value


def methods(channel: grpc.Channel) -> dict[str, Callable[..., Any]]:
    """A call of each kind by what it needs."""
    stub = Stub(channel)

    def of_oip(name: str, message: Any) -> Callable[..., Any]:
        call = channel.unary_unary(f"{OIP}/{name}")
        return lambda **options: call(message.SerializeToString(), **options)

    def stream(**options: Any) -> Any:
        return next(channel.stream_stream(PREDICT_STREAM)(iter([request(X).SerializeToString()]), **options))

    return {
        "infer": lambda **options: stub.predict(request(X), **options),
        "infer stream": stream,
        "read": lambda **options: stub.list_models(pb.ListModelsRequest(), **options),
        "read metadata": of_oip("ServerMetadata", oip.ServerMetadataRequest()),
        "read index": of_oip("RepositoryIndex", oip.RepositoryIndexRequest()),
        "admin": of_oip("RepositoryModelLoad", oip.RepositoryModelLoadRequest(model_name="primer")),
    }


def test_without_a_token_nothing_but_health_answers(channel: grpc.Channel) -> None:
    for name, call in methods(channel).items():
        error = failure(call)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED, name
        assert error.details().startswith(
            "this server asks who calls: send the metadata 'authorization: Bear"
        )
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
    )
    assert check(b"", timeout=30).status == health_pb2.HealthCheckResponse.SERVING
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=30)
    next(watch)
    watch.cancel()
    for name in ("ServerLive", "ServerReady"):
        channel.unary_unary(f"{OIP}/{name}")(b"", timeout=30)


def test_a_wrong_token_is_refused_and_not_repeated(channel: grpc.Channel, served: Served) -> None:
    token = served.tokens["user"]
    for wrong in (token[:-1], token.swapcase(), "nns_x", "x" * 5000):
        for call in methods(channel).values():
            error = failure(call, metadata=bearer(wrong))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert error.details() == "the token is not known here; it may have been replaced"


def test_each_scope_opens_its_methods_and_no_other(channel: grpc.Channel, served: Served) -> None:
    for name, scopes in [("user", {"infer"}), ("reader", {"read"}), ("operator", {"admin", "infer"})]:
        for kind, call in methods(channel).items():
            needed = kind.split()[0]
            if needed in scopes:
                call(metadata=bearer(served.tokens[name]), timeout=30)
                continue
            error = failure(call, metadata=bearer(served.tokens[name]))
            assert error.code() is grpc.StatusCode.PERMISSION_DENIED
            assert error.details().startswith(f"'{name}' has no scope '{needed}', which /")


def test_callers_of_one_connection_are_told_apart(channel: grpc.Channel, served: Served) -> None:
    """What was found out about one request's sender is not taken for the next one's."""
    stub = Stub(channel)
    for _ in range(20):
        stub.predict(request(X), timeout=30, metadata=bearer(served.tokens["user"]))
        error = failure(stub.predict, request(X), metadata=bearer(served.tokens["reader"]))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert failure(stub.predict, request(X)).code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_rate_that_is_used_up_says_when_to_come_back(channel: grpc.Channel, served: Served) -> None:
    call = Stub(channel).predict
    for _ in range(3):
        call(request(X), timeout=30, metadata=bearer(served.tokens["slow"]))
    error = failure(call, request(X), metadata=bearer(served.tokens["slow"]))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details().startswith("0.01 requests a second are allowed here, 3 at once; the next in ")
    hints = dict(error.trailing_metadata())
    assert 0 < int(hints["grpc-retry-pushback-ms"]) <= 100_000
    # Nor is a stream opened; another is served meanwhile.
    stream = methods(channel)["infer stream"]
    error = failure(stream, metadata=bearer(served.tokens["slow"]))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    call(request(X), timeout=30, metadata=bearer(served.tokens["user"]))


def test_a_stream_is_slowed_to_its_rate_and_loses_nothing(channel: grpc.Channel, served: Served) -> None:
    """40 messages at 50 a second, of which 9 may come at once, take more than half a second."""
    messages = [request(X[:1] * k) for k in range(40)]
    started = time.monotonic()
    call = channel.stream_stream(PREDICT_STREAM)(
        iter([message.SerializeToString() for message in messages]),
        timeout=60,
        metadata=bearer(served.tokens["paced"]),
    )
    answers = list(call)
    assert time.monotonic() - started > 0.5
    assert len(answers) == 40
    stub = Stub(channel)
    for k in (0, 39):
        expected = stub.predict(messages[k], timeout=30, metadata=bearer(served.tokens["user"]))
        assert answers[k] == expected.SerializeToString()


def test_who_is_refused_is_not_waited_for(transport: str, served: Served) -> None:
    """The answer to a call without credentials comes at its head, though its request never does."""
    # grpcio hands over a unary call only with its request.
    for path in (PREDICT, PREDICT_STREAM) if transport == "h2" else (PREDICT_STREAM,):
        with RawClient(served.server.address) as client:
            answer = client.wait(client.request(path.encode()))
            assert answer.status == grpc.StatusCode.UNAUTHENTICATED.value[0]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def secure_channel(address: str, authority: Authority, client: tuple[Path, Path] | None) -> grpc.Channel:
    """A channel over TLS whose client shows the certificate of *client*."""
    shown = (client[1].read_bytes(), client[0].read_bytes()) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), *shown)
    return grpc.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)])


def test_certificates_are_identities(transport: str, authority: Authority, tmp_path: Path) -> None:
    """By subject and by alternative name; one that is unknown may show a token."""
    file = TokenFile(tmp_path / "tokens.toml")
    file.add_certificate("front", "CN:front.internal", "infer")
    file.add_certificate("dashboard", "DNS:dash.internal", "read")
    token = file.add("user", "infer")
    certificate, key = authority.sign("localhost")
    arguments = ("--tls-certificate", certificate, "--tls-key", key, "--tls-client-ca", authority.certificate)
    tls = [str(argument) for argument in arguments]
    with running("--transport", transport, "--tokens", str(file.path), *tls) as server:
        for name, scopes in [("front.internal", {"infer"}), ("dash.internal", {"read"}), ("other", set())]:
            with secure_channel(server.address, authority, authority.sign(name)) as channel:
                for kind, call in methods(channel).items():
                    if kind.split()[0] in scopes:
                        call(timeout=30)
                        continue
                    error = failure(call)
                    if scopes:
                        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
                    else:
                        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
                        assert error.details().startswith(
                            "the client's certificate has no name that is known"
                        )
                Stub(channel).predict(request(X), timeout=30, metadata=bearer(token))
                error = failure(Stub(channel).predict, request(X), metadata=bearer("wrong"))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        with secure_channel(server.address, authority, None) as channel:
            assert failure(Stub(channel).predict, request(X)).code() is grpc.StatusCode.UNAVAILABLE


def test_identities_with_certificates_need_an_authority(tmp_path: Path) -> None:
    """A file that could let in nobody it means to is refused at start, by name."""
    file = TokenFile(tmp_path / "tokens.toml")
    file.add_certificate("front", "CN:front", "infer")
    with pytest.raises(
        RuntimeError, match="has certificates, and no client is asked for one; set tls_client"
    ):
        ServerProcess("--tokens", str(file.path))


def test_a_file_for_everybody_s_eyes_is_refused(tmp_path: Path) -> None:
    file = TokenFile(tmp_path / "tokens.toml")
    token = file.add("user", "infer")
    file.path.chmod(0o644)
    with pytest.raises(RuntimeError, match="can be read or written by others; run `chmod 600") as caught:
        ServerProcess("--tokens", str(file.path))
    assert token not in str(caught.value)


NNCLIENT = Path(sys.executable).parent / "nnclient"


def test_both_clients_and_the_command_send_a_token(served: Served, tmp_path: Path) -> None:
    address = served.server.address
    with Client(address, token=served.tokens["user"]) as client:
        expected = client.predict("digits", X)
        with pytest.raises(PermissionDenied, match="'user' has no scope 'read'"):
            client.models()
    with Client(address, token="nns_wrong") as client, pytest.raises(Unauthenticated, match="not known here"):
        client.predict("digits", X)

    async def predict() -> Any:
        async with AsyncClient(address, token=served.tokens["user"]) as client:
            return await client.predict("digits", X)

    assert np.array_equal(asyncio.run(predict()), expected)
    file = tmp_path / "token"
    file.write_text(served.tokens["reader"])
    command = [NNCLIENT, "models", "--target", address, "--format", "csv"]
    for arguments, env in [
        (["--token-file", str(file)], {}),
        ([], {"NNCLIENT_TOKEN": served.tokens["reader"]}),
    ]:
        done = subprocess.run(
            [*command, *arguments], env={**os.environ, **env}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0
        assert "digits" in done.stdout
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "asks for credentials or refuses these" in done.stderr


def test_the_python_client_comes_back_when_it_is_told_to(served: Served) -> None:
    """12 requests of which 10 may come at once, and 50 a second after that: it waits for the rest."""
    with Client(served.server.address, token=served.tokens["paced"], timeout_s=30) as client:
        for _ in range(12):
            assert client.predict("digits", X).shape == (4, 10)
