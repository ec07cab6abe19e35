"""PEM files of all kinds: what serves, and what is refused at start with the setting's name."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from support.h2 import RawClient, connect, prefixed, serving
from support.tls import Authority

from nnserver.errors import ConfigError
from nnserver.transport.tls import TlsFiles, ssl_context


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def files(authority: Authority) -> TlsFiles:
    certificate, key = authority.sign("localhost")
    return TlsFiles(str(certificate), str(key))


def wrapped(authority: Authority, alpn: list[str], **more: Path) -> Callable[[socket.socket], ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=authority.certificate)
    context.set_alpn_protocols(alpn)
    if more:
        context.load_cert_chain(more["certificate"], more["key"])
    return lambda sock: context.wrap_socket(sock, server_hostname="localhost")


def test_tls_serves_h2(authority: Authority, files: TlsFiles) -> None:
    with serving(tls=files) as running:
        with running.client(wrap=wrapped(authority, ["h2"])) as client:
            assert client.sock.selected_alpn_protocol() == "h2"
            assert client.call(b"/t.T/Echo", bytes(300_000)).messages == [bytes(300_000)]
        running.wait_until_idle()


@pytest.mark.parametrize("alpn", [["http/1.1"], []])
def test_a_client_that_does_not_choose_h2_is_let_go(
    authority: Authority, files: TlsFiles, alpn: list[str]
) -> None:
    with serving(tls=files) as running:
        try:
            client = wrapped(authority, alpn)(connect(running.address))
        except ssl.SSLError:  # no_application_protocol: OpenSSL's own refusal.
            return
        with client:
            assert client.selected_alpn_protocol() != "h2"
            with contextlib.suppress(OSError):
                assert client.recv(100) == b""


def test_mutual_tls_wants_a_certificate_of_the_authority(
    authority: Authority, files: TlsFiles, tmp_path: Path
) -> None:
    with serving(tls=TlsFiles(files.certificate, files.key, str(authority.certificate))) as running:
        certificate, key = authority.sign("client")
        good = wrapped(authority, ["h2"], certificate=certificate, key=key)
        with running.client(wrap=good) as client:
            assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]
        stranger = Authority(tmp_path).sign("client")
        for refused in (
            wrapped(authority, ["h2"]),
            wrapped(authority, ["h2"], certificate=stranger[0], key=stranger[1]),
        ):
            # TLS 1.3: the client's handshake is over before the server looks at its certificate.
            with (
                pytest.raises((OSError, AssertionError)),
                RawClient(running.address, wrap=refused) as client,
            ):
                client.call(b"/t.T/Echo", b"x")
        with running.client(wrap=good) as client:
            assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]
        running.wait_until_idle()


def test_grpcio_speaks_tls_with_it(authority: Authority, files: TlsFiles) -> None:
    credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes())
    options = [("grpc.ssl_target_name_override", "localhost")]
    with (
        serving(tls=files) as running,
        grpc.secure_channel(running.address, credentials, options) as channel,
    ):
        echo = channel.unary_unary("/t.T/Echo")
        assert echo(b"x" * 100_000, timeout=10) == b"x" * 100_000


def test_plaintext_on_a_tls_port_is_closed(authority: Authority, files: TlsFiles) -> None:
    with serving(tls=files) as running:
        with RawClient(running.address) as client:
            client.wait_for_close()
        with running.client(wrap=wrapped(authority, ["h2"])) as client:
            assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]


def test_aborted_handshakes_leave_nothing_behind(authority: Authority, files: TlsFiles) -> None:
    """Also if the server is drained meanwhile."""
    with serving(tls=files) as running:
        left = [connect(running.address) for _ in range(20)]
        for sock in left[:10]:
            sock.sendall(b"\x16\x03\x01\x02\x00\x01")  # The beginning of a ClientHello.
        for sock in left[:5]:
            sock.close()
        with running.client(wrap=wrapped(authority, ["h2"])) as client:
            assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]
    for sock in left[5:]:
        sock.close()


def test_a_handshake_that_stalls_is_given_up(authority: Authority, files: TlsFiles) -> None:
    """A client that stops in the midst of its hello, or trickles it, has as long as one without TLS."""
    with serving(tls=files, hello_s=0.2) as running:
        for beginning in (b"", b"\x16\x03\x01\x02\x00\x01"):
            with connect(running.address) as sock:
                sock.sendall(beginning)
                with contextlib.suppress(ConnectionError):
                    assert sock.recv(100) == b""
        # One that is done with TLS and then silent has no more.
        with wrapped(authority, ["h2"])(connect(running.address)) as sock:
            while sock.recv(1000):  # The server's hello, then the end.
                pass
        running.wait_until_idle()


def test_what_is_no_tls_amid_tls_ends_the_connection(authority: Authority, files: TlsFiles) -> None:
    with serving(tls=files) as running:
        for garbage in (b"\x17\x03\x03\x00\x20" + bytes(32), b"PRI * HTTP/2.0\r\n", bytes(70_000)):
            raw = connect(running.address)
            with wrapped(authority, ["h2"])(raw) as sock:
                # Past the TLS layer of the client's.
                with socket.socket(fileno=os.dup(sock.fileno())) as below:
                    below.sendall(garbage)
                with contextlib.suppress(OSError):
                    while sock.recv(1000):
                        pass
        with running.client(wrap=wrapped(authority, ["h2"])) as client:
            assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]
        running.wait_until_idle()


def test_a_flood_over_tls_is_read_in_turn(authority: Authority, files: TlsFiles) -> None:
    """Reading pauses and goes on below TLS, too: 8 MiB arrive, and another client is answered meanwhile."""
    message = bytes(8 << 20)
    with serving(tls=files, max_message_bytes=8 << 20) as running:
        with (
            running.client(wrap=wrapped(authority, ["h2"])) as other,
            running.client(wrap=wrapped(authority, ["h2"])) as client,
        ):
            stream_id = client.request(b"/t.T/Collect", prefixed(message))
            assert other.call(b"/t.T/Echo", b"x").messages == [b"x"]
            assert client.wait(stream_id).messages == [str(len(message)).encode()]
        running.wait_until_idle()


def test_tls_1_1_is_refused(files: TlsFiles) -> None:
    assert ssl_context(files).minimum_version == ssl.TLSVersion.TLSv1_2


def test_unfit_files_are_refused_by_the_name_of_their_setting(
    authority: Authority, files: TlsFiles, tmp_path: Path
) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    other_key = str(authority.sign("other")[1])
    for broken, name in [
        (TlsFiles("/no/such/file", files.key), "tls_certificate"),
        (TlsFiles(files.certificate, "/no/such/file"), "tls_key"),
        (TlsFiles(str(junk), files.key), "tls_certificate"),
        (TlsFiles(files.certificate, other_key), "tls_key"),
        (TlsFiles(files.certificate, files.key, str(junk)), "tls_client_ca"),
        (TlsFiles(files.certificate, files.key, "/no/such/file"), "tls_client_ca"),
    ]:
        with pytest.raises(ConfigError, match=name):
            ssl_context(broken)
