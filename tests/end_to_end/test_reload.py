"""Real servers whose certificates, tokens and configuration change under them, on both transports."""

from __future__ import annotations

import os
import signal
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from support.h2 import wait_for
from support.identities import TokenFile, bearer
from support.server import ServerProcess, Stub, request, rows, running
from support.tls import Authority

import nncore
from nnproto.v1 import inference_pb2 as pb

X = np.random.default_rng(0).uniform(0, 16, (4, 64)).astype(np.float32)
QUICKLY = ("--reload-interval-s", "0.05", "--log-level", "info")


def wait_for_log(server: ServerProcess, text: str) -> str:
    """Read the server's log up to the line with *text*, and return that."""
    assert server.process.stderr is not None
    for line in server.process.stderr:
        if text in line:
            return line
    raise AssertionError(f"the log has no line with {text!r}")


def shown_certificate(address: str, authority: Authority) -> bytes:
    """The certificate that a new connection is shown."""
    host, _, port = address.rpartition(":")
    pem = ssl.get_server_certificate((host, int(port)), ca_certs=str(authority.certificate))
    return ssl.PEM_cert_to_DER_cert(pem)


def put(source: Path, target: Path) -> None:
    """Put a copy of *source* in *target*'s place, at once."""
    new = target.with_suffix(".new")
    new.write_bytes(source.read_bytes())
    os.replace(new, target)


def der(path: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(path.read_text())


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def test_certificates_are_exchanged_under_load(transport: str, authority: Authority, tmp_path: Path) -> None:
    """No call fails, old connections live on, new ones see the new certificate; a broken one is not taken."""
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    first, second = authority.sign("localhost"), authority.sign("localhost.second")
    put(first[0], certificate)
    put(first[1], key)
    tls = ("--tls-certificate", str(certificate), "--tls-key", str(key))
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    with running("--transport", transport, *tls, *QUICKLY) as server:
        done, failures, answered = threading.Event(), [], [0]

        def call_all_the_time(keep: bool) -> None:
            """Over one connection, or over a new one for each call."""
            options = [("grpc.use_local_subchannel_pool", 1)]
            kept = grpc.secure_channel(server.address, credentials, options)
            while not done.is_set():
                channel = kept if keep else grpc.secure_channel(server.address, credentials, options)
                try:
                    assert rows(Stub(channel).predict(request(X), timeout=30)).shape == (4, 10)
                    answered[0] += 1
                except grpc.RpcError as error:
                    failures.append(error)
                if not keep:
                    channel.close()
            kept.close()

        load = [threading.Thread(target=call_all_the_time, args=(keep,)) for keep in (True, False)]
        for thread in load:
            thread.start()
        try:
            assert shown_certificate(server.address, authority) == der(first[0])
            put(second[0], certificate)
            put(second[1], key)
            wait_for_log(server, "certificates reloaded")
            wait_for(lambda: shown_certificate(server.address, authority) == der(second[0]))

            certificate.write_text("no certificate")
            line = wait_for_log(server, "certificates not reloaded, those before stay in use")
            assert "are not a PEM certificate and its unencrypted key" in line
            assert shown_certificate(server.address, authority) == der(second[0])

            put(first[0], certificate)  # Whose key is not there.
            wait_for_log(server, "certificates not reloaded, those before stay in use")
            put(first[1], key)
            wait_for_log(server, "certificates reloaded")
            wait_for(lambda: shown_certificate(server.address, authority) == der(first[0]))
            before = answered[0]
            wait_for(lambda: answered[0] > before + 4)
        finally:
            done.set()
            for thread in load:
                thread.join()
        assert failures == []


def code(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        found: grpc.StatusCode = error.code()
        return found
    return grpc.StatusCode.OK


def test_tokens_follow_their_file(transport: str, tmp_path: Path) -> None:
    """A new token is taken, a removed one ends its stream, and a broken file changes nothing."""
    file = TokenFile(tmp_path / "tokens.toml")
    alice = file.add("alice", "infer")
    with running("--transport", transport, "--tokens", str(file.path), *QUICKLY) as server:  # noqa: SIM117
        with server.channel() as channel:
            stub = Stub(channel)

            def calls_of(token: str) -> Callable[[], object]:
                return lambda: stub.predict(request(X), timeout=30, metadata=bearer(token))

            goes_on = threading.Semaphore(0)

            def requests() -> Iterator[pb.PredictRequest]:
                yield request(X)
                goes_on.acquire(timeout=60)
                yield request(X)

            stream = stub.predict_stream(requests(), metadata=bearer(alice), timeout=90)
            next(stream)
            bob = file.add("bob", "infer")
            wait_for_log(server, "tokens reloaded")
            assert code(calls_of(alice)) is code(calls_of(bob)) is grpc.StatusCode.OK

            file.write("alice = {")
            assert "is not TOML" in wait_for_log(server, "tokens not reloaded, those before stay in use")
            assert code(calls_of(alice)) is code(calls_of(bob)) is grpc.StatusCode.OK

            file.remove("alice")
            wait_for_log(server, "tokens reloaded")
            assert code(calls_of(alice)) is grpc.StatusCode.UNAUTHENTICATED
            assert code(calls_of(bob)) is grpc.StatusCode.OK
            goes_on.release()
            assert code(lambda: next(stream)) is grpc.StatusCode.UNAUTHENTICATED


def test_a_hang_up_reads_the_configuration_again(transport: str, tmp_path: Path) -> None:
    """Models, tokens and levels are taken over; what cannot be is named; a broken file changes nothing."""
    models, config, file = tmp_path / "models", tmp_path / "server.toml", TokenFile(tmp_path / "tokens.toml")
    models.mkdir()
    one = nncore.Mlp([nncore.Layer(np.eye(2, dtype=np.float32))])
    one.save(models / "one.safetensors")
    first = file.add("first", "read")

    def write(more: str) -> None:
        config.write_text(f"models = ['{models}']\ntokens = '{file.path}'\n{more}\n")

    def names(server: ServerProcess, token: str) -> list[str]:
        with server.channel() as channel:
            found = Stub(channel).list_models(pb.ListModelsRequest(), timeout=30, metadata=bearer(token))
            return [model.name for model in found.models]

    write("log_level = 'info'")
    # Files are not looked at by themselves here: what happens, the signal does.
    arguments = ("--transport", transport, "--config", str(config), "--reload-interval-s", "3600")
    with running(*arguments) as server:
        one.save(models / "two.safetensors")
        second = file.add("second", "read")
        write("log_level = 'info'\nmax_streams = 7")
        server.signal(signal.SIGHUP)
        assert "setting max_streams was changed and needs a restart; it stays 256" in wait_for_log(
            server, "needs a restart"
        )
        wait_for_log(server, "configuration reloaded")
        assert names(server, first) == names(server, second) == ["one", "two"]

        for broken, reason in [
            ("nonsense = 1", "unknown setting 'nonsense'"),
            ("log_level = 'loud'", "log_level is 'loud'"),
            ("models = [", "is not TOML"),
        ]:
            config.write_text(broken)
            server.signal(signal.SIGHUP)
            assert reason in wait_for_log(server, "configuration not reloaded, the one before stays in use")
        third = file.add("third", "read")
        write(f"log_level = 'info'\ntls_certificate = '{config}'")  # Half of a pair.
        server.signal(signal.SIGHUP)
        wait_for_log(server, "configuration not reloaded, the one before stays in use")
        with pytest.raises(grpc.RpcError, match="not known here"):
            names(server, third)

        (models / "two.safetensors").unlink()
        (models / "bad.safetensors").write_bytes(b"nonsense" * 10)
        write("log_level = 'info'")
        server.signal(signal.SIGHUP)
        wait_for_log(server, "model not loaded name=bad")
        wait_for_log(server, "configuration reloaded")
        assert names(server, third) == ["one"]
        assert server.stop() == 0


def test_a_hang_up_is_no_second_signal(transport: str) -> None:
    """While the server drains it ends nothing; a second SIGTERM would."""
    with running("--transport", transport, "--log-level", "info") as server, server.channel() as channel:
        stub = Stub(channel)
        goes_on = threading.Event()

        def requests() -> Iterator[pb.PredictRequest]:
            yield request(X)
            goes_on.wait(60)

        stream = stub.predict_stream(requests(), timeout=90)
        next(stream)
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGHUP)
        assert code(lambda: next(stream)) is grpc.StatusCode.UNAVAILABLE
        goes_on.set()
        assert server.wait() == 0
