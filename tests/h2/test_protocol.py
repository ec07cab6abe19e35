"""gRPC over HTTP/2, frame by frame: what the document PROTOCOL-HTTP2 and RFC 9113 ask of a server."""

from __future__ import annotations

import gzip
import random
import threading
import time
import zlib
from pathlib import Path
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ngh2.events import GoAwayReceived, PingAcknowledged, SettingsReceived
from support.h2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    SPECIAL_TEXT,
    Answer,
    RawClient,
    Running,
    block,
    connect,
    frame,
    frames_in,
    head,
    literal,
    prefixed,
    serving,
    started,
    wait_for,
)

from nnserver.transport.h2_server import H2Server

OK = {b"grpc-status": b"0"}


def test_a_unary_call_is_headers_data_trailers(client: RawClient) -> None:
    answer = client.call(b"/t.T/Echo", b"hello")
    assert answer.headers == {b":status": b"200", b"content-type": b"application/grpc"}
    assert answer.messages == [b"hello"]
    assert answer.trailers == OK
    assert answer.reset is None


@pytest.mark.parametrize("size", [0, 1, 16_379, 16_384, 65_535, 65_536, 1_000_000, 1 << 20])
def test_messages_of_every_size(client: RawClient, size: int) -> None:
    message = bytes(i % 251 for i in range(size))
    assert client.call(b"/t.T/Echo", message).messages == [message]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=30), pads=st.lists(st.integers(0, 9), max_size=5)
)
def test_a_body_may_be_cut_anywhere(client: RawClient, sizes: list[int], pads: list[int]) -> None:
    """Frames of any size, empty ones and padding among them, make the same messages."""
    messages = [b"a" * 3, b"", b"b" * 100]
    body = b"".join(map(prefixed, messages))
    stream_id = client.request(b"/t.T/Chat64")
    for i, size in enumerate(sizes):
        piece, body = body[:size], body[size:]
        if i < len(pads):
            padded = bytes((pads[i],)) + piece + bytes(pads[i])
            client.send(frame(DATA, PADDED, stream_id, padded))
        else:
            client.send(frame(DATA, 0, stream_id, piece))
    client.send(frame(DATA, END_STREAM, stream_id, body))
    answer = client.wait(stream_id)
    assert answer.messages == messages
    assert answer.trailers == OK


def test_frames_may_be_cut_anywhere(client: RawClient) -> None:
    """A connection that comes byte by byte is understood."""
    stream_id = client.own_stream()
    data = frame(HEADERS, END_HEADERS, stream_id, block())
    data += frame(DATA, END_STREAM, stream_id, prefixed(b"hi"))
    for byte in data:
        client.send(bytes((byte,)))
    assert client.wait(stream_id).messages == [b"hi"]


def test_headers_may_be_continued(running: Running) -> None:
    """A header block in a HEADERS and a few CONTINUATION frames is one block."""
    fields = block()
    with connect(running.address) as sock:
        sock.sendall(PREFACE + frame(SETTINGS, 0, 0))
        sock.sendall(frame(HEADERS, 0, 1, fields[:10]))
        sock.sendall(frame(CONTINUATION, 0, 1, fields[10:20]))
        sock.sendall(frame(CONTINUATION, END_HEADERS, 1, fields[20:]))
        sock.sendall(frame(DATA, END_STREAM, 1, prefixed(b"hi")))
        found = b""
        while prefixed(b"hi") not in found:
            found += sock.recv(10_000)
    assert [kind for kind, _, stream_id, _ in frames_in(found) if stream_id == 1][:2] == [HEADERS, DATA]
    running.wait_until_idle()


def test_the_prefix_may_come_apart_from_the_message(client: RawClient) -> None:
    stream_id = client.request(b"/t.T/Echo", b"\0\0", ends=False)
    for piece in (b"\0\0", b"\x03", b"ab", b"c"):
        client.h2.send_data(stream_id, piece)
        client.flush()
    client.h2.end_stream(stream_id)
    client.flush()
    assert client.wait(stream_id).messages == [b"abc"]


def test_trailers_may_end_a_request(client: RawClient) -> None:
    stream_id = client.request(b"/t.T/Echo", prefixed(b"x"), ends=False)
    client.h2.send_trailers(stream_id, [(b"x-trailer", b"1")])
    client.flush()
    assert client.wait(stream_id).messages == [b"x"]


def test_an_error_before_any_message_is_trailers_only(client: RawClient) -> None:
    """One HEADERS frame that ends the stream, with a text in percent-encoded UTF-8."""
    answer = client.call(b"/t.T/Fail", b"")
    assert answer.trailers == {}
    assert answer.headers[b":status"] == b"200"
    assert answer.headers[b"content-type"] == b"application/grpc"
    assert answer.headers[b"grpc-status"] == b"2"
    assert unquote(answer.headers[b"grpc-message"].decode()) == SPECIAL_TEXT


def test_an_error_whose_text_is_huge_still_has_its_status(client: RawClient) -> None:
    answer = client.call(b"/t.T/Fail", b"x" * 200_000)
    assert answer.headers[b"grpc-status"] == b"2"
    assert len(answer.headers[b"grpc-message"]) == 4096


@pytest.mark.parametrize("method", [b"/t.T/Break", b"/t.T/BreakStream"])
def test_a_fault_of_the_api_is_internal_and_tells_nothing(
    client: RawClient, method: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client.call(method, b"x")
    assert answer.status == 13
    assert answer.headers[b"grpc-message"] == b"internal error; the server's log has the details"
    assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]
    assert "a fault of the api" in caplog.text


@pytest.mark.parametrize("path", [b"/t.T/None", b"/no.Service/Echo", b"/", b"/t.T/Echo/", b"/t.t/echo"])
def test_unknown_methods_are_unimplemented(client: RawClient, path: bytes) -> None:
    answer = client.call(path, b"x")
    assert answer.status == 12
    assert answer.headers[b"grpc-message"] == b"unknown method " + path


def test_an_unknown_encoding_is_unimplemented_and_told_which_are_known(client: RawClient) -> None:
    answer = client.call(b"/t.T/Echo", b"x", (b"grpc-encoding", b"snappy"))
    assert answer.status == 12
    assert answer.headers[b"grpc-accept-encoding"] == b"identity,deflate,gzip"


@pytest.mark.parametrize(("name", "squeeze"), [(b"gzip", gzip.compress), (b"deflate", zlib.compress)])
def test_compressed_requests_are_answered_plain(client: RawClient, name: bytes, squeeze: object) -> None:
    message = b"squeeze me " * 1000
    encoding = (b"grpc-encoding", name)
    body = prefixed(squeeze(message), 1)  # type: ignore[operator]
    answer = client.wait(client.request(b"/t.T/Echo", body, encoding))
    assert answer.messages == [message]
    assert answer.body[0] == 0
    assert b"grpc-encoding" not in answer.headers
    # Who compresses must be told which ways are known (gRPC's document "compression").
    assert answer.headers[b"grpc-accept-encoding"] == b"identity,deflate,gzip"
    # Named, but not used: each message says for itself whether it is compressed.
    assert client.call(b"/t.T/Echo", message, encoding).messages == [message]
    both = client.wait(client.request(b"/t.T/Chat64", body + prefixed(b"plain"), encoding))
    assert both.messages == [message, b"plain"]


def test_answers_are_compressed_for_clients_that_take_gzip_if_the_server_is_told_to() -> None:
    """Those that gzip makes shorter and that are neither tiny nor huge; each says whether it is."""
    long, noise, huge = b"squeeze me " * 1000, random.Random(0).randbytes(11_000), b"0" * ((1 << 20) + 1)
    messages = [long, b"short", noise, huge]
    body = b"".join(map(prefixed, messages))
    takes_gzip = (b"grpc-accept-encoding", b"identity, deflate, gzip")
    with serving(compress_answers=True) as running, running.client() as client:
        for path, bodies in ((b"/t.T/Echo", [prefixed(m) for m in messages]), (b"/t.T/Chat64", [body])):
            answers = [client.wait(client.request(path, each, takes_gzip)) for each in bodies]
            assert all(answer.headers[b"grpc-encoding"] == b"gzip" for answer in answers)
            assert all(answer.status == 0 for answer in answers)
            squeezed, *others = [message for answer in answers for message in answer.messages]
            assert gzip.decompress(squeezed) == long
            assert others == [b"short", noise, huge]
            assert [answer.body[0] for answer in answers] == [1, 0, 0, 0][: len(answers)]
        for more in ((), ((b"grpc-accept-encoding", b"identity,deflate"),)):
            plain = client.wait(client.request(b"/t.T/Echo", prefixed(long), *more))
            assert plain.messages == [long]
            assert b"grpc-encoding" not in plain.headers


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 12),  # no message
        (prefixed(b"a") + prefixed(b"b"), 12),  # two messages
        (prefixed(b"abc")[:-1], 13),  # cut short
        (b"\0\0", 13),
        (prefixed(b"x", 1), 13),  # compressed by nothing
        (prefixed(b"x", 7), 13),
        (b"\0\xff\xff\xff\xff", 8),  # 4 GiB
        (prefixed(bytes(5 << 20))[:1000], 8),
    ],
)
def test_bodies_that_are_not_one_message(client: RawClient, body: bytes, status: int) -> None:
    assert client.wait(client.request(b"/t.T/Echo", body)).status == status
    assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]


def test_a_stream_that_ends_inside_a_message_is_told(client: RawClient) -> None:
    answer = client.wait(client.request(b"/t.T/Chat64", prefixed(b"whole") + prefixed(b"half")[:-1]))
    assert answer.messages == [b"whole"]
    assert answer.status == 13


def altered(client: RawClient, replaced: dict[bytes, bytes | None]) -> Answer:
    """The answer to a message whose headers have other values, or are left out."""
    fields = [(name, replaced.get(name, value)) for name, value in head()]
    stream_id = client.h2.send_request([(name, value) for name, value in fields if value is not None])
    client.answers[stream_id] = Answer()
    client.h2.send_data(stream_id, prefixed(b"x"), end_stream=True)
    client.flush()
    return client.wait(stream_id)


@pytest.mark.parametrize(
    ("replaced", "headers"),
    [
        ({b"content-type": b"application/json"}, {b":status": b"415"}),
        ({b"content-type": b"application/grpc-web+proto"}, {b":status": b"415"}),
        ({b"content-type": None}, {b":status": b"415"}),
        ({b":method": b"GET"}, {b":status": b"405", b"allow": b"POST"}),
        ({b":method": b"PUT"}, {b":status": b"405", b"allow": b"POST"}),
    ],
)
def test_what_is_not_grpc_gets_an_http_status(
    client: RawClient, replaced: dict[bytes, bytes | None], headers: dict[bytes, bytes]
) -> None:
    """No grpc-status: who does not speak gRPC would take HTTP's 200 for success."""
    answer = altered(client, replaced)
    assert answer.headers == headers
    assert not answer.trailers
    assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]


@pytest.mark.parametrize(
    "replaced",
    [
        {b"content-type": b"application/grpc+proto"},
        {b"content-type": b"application/grpc+anything"},
        {b"content-type": b"application/grpc; charset=utf-8"},
        {b":scheme": b"https"},
        {b":authority": b"[::1]:50051"},
        {b"te": None},
    ],
)
def test_what_clients_may_say_otherwise(client: RawClient, replaced: dict[bytes, bytes | None]) -> None:
    """A lost "te" tells of a proxy that may lose trailers; if it does, the client sees no status."""
    assert altered(client, replaced).messages == [b"x"]


def test_the_api_sees_method_metadata_peer_and_deadline(client: RawClient) -> None:
    answer = client.call(
        b"/t.T/Info", b"", (b"x-text", b"v"), (b"x-bin", b"AAEC,AQ"), (b"grpc-timeout", b"30S")
    )
    (message,) = answer.messages
    assert eval(message) == (
        "/t.T/Info",
        (("x-text", "v"), ("x-bin", b"\0\1\2"), ("x-bin", b"\1")),
        "ipv4",
        30.0,
    )


def test_a_deadline_ends_a_call_that_nobody_answers(running: Running, client: RawClient) -> None:
    begun = time.monotonic()
    cancelled = running.api.cancelled
    answer = client.call(b"/t.T/Sleep", b"x", (b"grpc-timeout", b"100m"))
    assert answer.status == 4
    assert 0.1 <= time.monotonic() - begun < 2
    # An api that keeps calls, as those that watch health are kept, must hear that this one is over.
    assert running.api.cancelled == cancelled + 1
    assert running.api.sleeping.pop().is_cancelled()


def test_a_deadline_that_has_passed_already_costs_no_work(running: Running, client: RawClient) -> None:
    answer = client.call(b"/t.T/Sleep", b"x", (b"grpc-timeout", b"0n"))
    assert answer.status == 4
    assert not running.api.sleeping


@pytest.mark.parametrize("timeout", [b"", b"1", b"-1S", b"123456789S", b"1 S", b"1s", b"1.5S"])
def test_a_deadline_that_cannot_be_read_is_no_licence_to_go_on_for_ever(
    client: RawClient, timeout: bytes
) -> None:
    answer = client.call(b"/t.T/Echo", b"x", (b"grpc-timeout", timeout))
    assert answer.status == 13
    assert answer.headers[b"grpc-message"].startswith(b"grpc-timeout must be at most eight digits")
    assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]


def test_a_deadline_ends_a_request_that_does_not_come(client: RawClient) -> None:
    stream_id = client.request(b"/t.T/Echo", b"\0\0", (b"grpc-timeout", b"50m"), ends=False)
    answer = client.wait(stream_id)
    assert answer.status == 4
    while not answer.is_closed:
        assert client.receive()
    assert answer.reset == 0  # NO_ERROR: the rest of the request is not wanted.


def test_a_reset_cancels_the_call(running: Running, client: RawClient) -> None:
    before = running.api.cancelled
    stream_id = client.request(b"/t.T/Sleep", prefixed(b"x"))
    wait_for(lambda: running.api.sleeping)
    client.h2.reset_stream(stream_id)
    client.flush()
    wait_for(lambda: running.api.cancelled == before + 1)
    call = running.api.sleeping.pop()
    assert call.is_cancelled()
    call.reply(b"late")
    call.finish()
    call.fail(RuntimeError("later"))
    call.request(1)
    assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]


def test_a_lost_connection_cancels_its_calls(running: Running) -> None:
    before = running.api.cancelled
    with running.client() as client:
        for _ in range(5):
            client.request(b"/t.T/Sleep", prefixed(b"x"))
        wait_for(lambda: len(running.api.sleeping) == 5)
    wait_for(lambda: running.api.cancelled == before + 5)
    running.wait_until_idle()
    assert all(call.is_cancelled() for call in running.api.sleeping)
    for call in running.api.sleeping:
        call.reply(b"late")
        call.finish()
    running.api.sleeping.clear()


def test_streams_of_all_kinds(client: RawClient) -> None:
    assert client.call(b"/t.T/Count", b"1000").messages == [str(i).encode() for i in range(1000)]
    body = b"".join(prefixed(bytes(1000)) for _ in range(100))
    assert client.wait(client.request(b"/t.T/Collect", body)).messages == [b"100000"]
    assert client.wait(client.request(b"/t.T/Collect", b"")).messages == [b"0"]
    messages = [str(i).encode() for i in range(1000)]
    answer = client.wait(client.request(b"/t.T/Chat", b"".join(map(prefixed, messages))))
    assert answer.messages == messages
    assert answer.trailers == OK


def test_a_chat_is_answered_message_by_message(client: RawClient) -> None:
    stream_id = client.request(b"/t.T/Chat", prefixed(b"0"), ends=False)
    answer = client.answers[stream_id]
    for i in range(1, 20):
        client.wait_until(lambda i=i: len(answer.messages) == i)
        client.h2.send_data(stream_id, prefixed(str(i).encode()))
        client.flush()
    client.h2.end_stream(stream_id)
    client.flush()
    assert client.wait(stream_id).messages == [str(i).encode() for i in range(20)]


def test_answers_from_other_threads_arrive_each_on_its_stream(client: RawClient) -> None:
    streams = {client.request(b"/t.T/Slow", prefixed(str(i).encode())): i for i in range(100)}
    for stream_id, i in streams.items():
        assert client.wait(stream_id).messages == [str(i).encode()]


def test_a_call_that_ends_early_tells_its_client_to_stop(client: RawClient) -> None:
    """After the trailers, RST_STREAM with NO_ERROR (RFC 9113, 8.1)."""
    stream_id = client.request(b"/t.T/None", prefixed(b"more to come"), ends=False)
    answer = client.wait(stream_id)
    while not answer.is_closed:
        assert client.receive()
    assert answer.status == 12
    assert answer.reset == 0


def test_the_servers_settings_are_its_limits(client: RawClient) -> None:
    settings_ = client.wait_for(SettingsReceived).settings
    assert settings_[3] == 256  # MAX_CONCURRENT_STREAMS
    assert settings_[4] == 1 << 20  # INITIAL_WINDOW_SIZE
    assert settings_[6] == 16 << 10  # MAX_HEADER_LIST_SIZE


def test_pings_are_answered(client: RawClient) -> None:
    client.h2.ping(b"12345678")
    client.flush()
    assert client.wait_for(PingAcknowledged).opaque_data == b"12345678"


NO_PATH = block()[: block().index(literal(b":path", b"")[:7])]


@pytest.mark.parametrize(
    "fields",
    [block() + literal(b"A", b"b"), NO_PATH, block(b"Echo"), block() + literal(b"connection", b"close")],
    ids=["a name in capitals", "no path", "a path without a slash", "a field of HTTP/1"],
)
def test_a_malformed_request_costs_its_stream_only(client: RawClient, fields: bytes) -> None:
    stream_id = client.own_stream()
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, stream_id, fields))
    client.wait_until(lambda: client.answers[stream_id].is_closed)
    assert client.answers[stream_id].reset == 1  # PROTOCOL_ERROR
    assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]


def test_a_path_that_is_no_text_is_unimplemented(client: RawClient) -> None:
    stream_id = client.own_stream()
    client.send(frame(HEADERS, END_HEADERS | END_STREAM, stream_id, block(b"/\xff\xfe%\x80")))
    assert client.wait(stream_id).status == 12


def test_limits_of_calls_and_streams() -> None:
    """Beyond a limit a call fails with the setting's name; below it again the next one works."""
    with serving(max_concurrent_calls=4, max_streams=2) as running, running.client() as client:
        streams = [client.request(b"/t.T/Chat", prefixed(b"x"), ends=False) for _ in range(2)]
        for stream_id in streams:
            client.wait_until(lambda s=stream_id: client.answers[s].messages)
        surplus = client.call(b"/t.T/Chat", b"x")
        assert surplus.status == 8
        assert b"max_streams" in surplus.headers[b"grpc-message"]
        for _ in range(2):
            client.request(b"/t.T/Sleep", prefixed(b"x"))
        wait_for(lambda: len(running.api.sleeping) == 2)
        surplus = client.call(b"/t.T/Echo", b"x")
        assert surplus.status == 8
        assert b"max_concurrent_calls" in surplus.headers[b"grpc-message"]
        for call in running.api.sleeping:
            call.finish()
        assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]
        client.h2.end_stream(streams[0])
        client.flush()
        assert client.wait(streams[0]).trailers == OK
        assert client.call(b"/t.T/Chat", b"x").messages == [b"x"]


def test_a_surplus_stream_of_a_connection_is_refused_as_safe_to_send_again() -> None:
    """REFUSED_STREAM to a client that has not heard of the limit: nothing was done (RFC 9113, 8.7)."""
    calls = b"".join(frame(HEADERS, END_HEADERS, i, block(b"/t.T/Chat")) for i in (1, 3, 5))
    with serving(max_connection_calls=2) as running, connect(running.address) as sock:
        sock.sendall(PREFACE + frame(SETTINGS, 0, 0) + calls)
        found = b""
        while RST_STREAM not in [kind for kind, *_ in frames_in(found)]:
            found += sock.recv(10_000)
        assert [f for f in frames_in(found) if f[0] == RST_STREAM] == [(RST_STREAM, 0, 5, b"\0\0\0\7")]
        assert running.server.open_streams == 2


def test_a_surplus_connection_is_closed() -> None:
    with serving(max_connections=2) as running:
        with running.client() as first, running.client() as second:
            for client in (first, second):
                assert client.call(b"/t.T/Echo", b"x").messages == [b"x"]
            with running.client() as third:
                third.wait_for_close()
            assert first.call(b"/t.T/Echo", b"x").messages == [b"x"]
        running.wait_until_idle()
        with running.client() as again:
            assert again.call(b"/t.T/Echo", b"x").messages == [b"x"]


def test_unix_sockets(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving(f"unix:{path}") as running, running.client() as client:
        assert running.address == f"unix:{path}"
        assert client.call(b"/t.T/Info", b"").messages[0].startswith(b"('/t.T/Info', (), 'unix'")
    assert not path.exists()


# Drain.


def drained(server: H2Server, grace_s: float = 10.0) -> float:
    begun = time.monotonic()
    server.drain(grace_s)
    return time.monotonic() - begun


def test_drain_finishes_what_is_in_flight() -> None:
    """GOAWAY twice: a notice, then the last stream; the call in flight is answered, then the end."""
    running = started()
    api, server = running.api, running.server
    with running.client() as client, running.client() as idle:
        assert idle.call(b"/t.T/Echo", b"x").messages == [b"x"]
        stream_id = client.request(b"/t.T/Sleep", prefixed(b"x"))
        chat = client.request(b"/t.T/Chat", prefixed(b"x"), ends=False)
        wait_for(lambda: api.sleeping)
        client.wait_until(lambda: client.answers[chat].messages)
        took: list[float] = []
        thread = threading.Thread(target=lambda: took.append(drained(server)))
        thread.start()
        client.wait_for(GoAwayReceived)
        client.wait_until(lambda: sum(isinstance(event, GoAwayReceived) for event in client.events) == 2)
        notice, last = (e for e in client.events if isinstance(e, GoAwayReceived))
        assert notice.last_stream_id == 2**31 - 1
        assert last.last_stream_id == chat
        assert api.drained == 1
        assert client.wait(chat).trailers == OK
        api.sleeping[0].reply(b"done")
        api.sleeping[0].finish()
        assert client.wait(stream_id).messages == [b"done"]
        while client.receive():
            pass
        assert client.is_over
        while idle.receive():
            pass
        assert idle.is_over
        thread.join()
    assert took[0] < 5
    assert not server.connections


def test_drain_does_not_wait_for_the_idle_and_the_silent() -> None:
    """Connections without calls are closed, whether or not they answer, long before the grace is over."""
    running = started()
    server, address = running.server, running.address
    silent = [connect(address) for _ in range(3)]
    silent[1].sendall(PREFACE + frame(SETTINGS, 0, 0))
    silent[2].sendall(PREFACE[:5])
    wait_for(lambda: len(server.connections) == 3)
    assert drained(server, 30) < 5
    for sock in silent:
        sock.close()


def test_drain_cuts_off_what_does_not_end() -> None:
    running = started()
    api, server = running.api, running.server
    with running.client() as client:
        client.request(b"/t.T/Sleep", prefixed(b"x"))
        wait_for(lambda: api.sleeping)
        assert 0.3 <= drained(server, 0.3) < 5
        assert api.cancelled == 1
    # The loop is gone; a kernel's thread that comes late is no error.
    api.sleeping[0].reply(b"late")
    api.sleeping[0].finish()
