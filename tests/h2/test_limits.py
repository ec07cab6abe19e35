"""What one peer can make the server hold or do, counted: in memory, on a clock that the test moves on."""

from __future__ import annotations

import gc
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from support.h2 import (
    END_HEADERS,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    TestApi,
    block,
    frame,
    frames_in,
    literal,
    prefixed,
)
from support.h2_in_memory import InMemoryClient, InMemoryServer, Peer, install_tight_limits

from nnserver.transport.framing import RequestHead

HELLO = PREFACE + frame(SETTINGS, 0, 0)
LIMIT = 1 << 20


class Limited(InMemoryServer):
    """A server of TestApi; *ticks* counts how often its apis were told that all has been delivered."""

    def __init__(self, **options: Any) -> None:
        self.api = TestApi()
        super().__init__(self.api.methods(), self.api.after_messages, **options)

    def hello(self) -> Peer:
        """A connection whose peer has said hello."""
        peer = self.connect()
        peer.send(HELLO)
        self.loop.run()
        return peer

    def is_connected(self, peer: Peer) -> bool:
        return peer.connection in self.server.connections


@pytest.fixture
def make() -> Iterator[Any]:
    """Makes servers, one at a time, whose clock is everybody's."""
    removals = []

    def make_server(**options: Any) -> Limited:
        server = Limited(**options)
        removals.append(server.clock.install())
        return server

    yield make_server
    for remove in reversed(removals):
        remove()


# Time.


def test_a_peer_that_says_nothing_is_let_go(make: Any) -> None:
    """10 s for the preface and the first SETTINGS, however slowly they trickle in."""
    server = make()
    silent, slow, other = server.connect(), server.connect(), server.hello()
    for byte in HELLO[:9]:
        server.wait(1.0)
        slow.send(bytes((byte,)))
    assert server.is_connected(silent)
    assert server.is_connected(slow)
    server.wait(1.1)
    assert not server.is_connected(silent)
    assert not server.is_connected(slow)
    assert server.is_connected(other)


def test_a_peer_that_answers_no_ping_is_let_go(make: Any) -> None:
    """A ping every 60 s; 20 s for its answer. One that answers is kept for ever."""
    server = make()
    dead, alive = server.hello(), InMemoryClient(server)
    for _ in range(5):
        server.wait(61.0)
        while alive.receive():
            pass
        server.wait(19.0)
    assert not server.is_connected(dead)
    assert server.is_connected(alive.peer)
    assert alive.call(b"/t.T/Echo", b"x").messages == [b"x"]


def test_a_peer_that_does_not_take_the_last_words_is_cut_off(make: Any) -> None:
    server = make()
    peer = server.hello()
    peer.reads_answers = False
    peer.send(frame(SETTINGS, 0, 1))  # On a stream: an error of the connection.
    server.loop.run()
    assert server.is_connected(peer)
    server.wait(2.1)
    assert not server.is_connected(peer)


@pytest.mark.parametrize("drop", [0, 1, 200])
def test_a_request_that_comes_in_drops_is_ended(make: Any, drop: int) -> None:
    """Fewer than 240 bytes a second, for 40 s: DEADLINE_EXCEEDED, and the server holds nothing of it."""
    server = make()
    client = InMemoryClient(server)
    stream_id = client.request(b"/t.T/Echo", b"\0\0\1\0\0", ends=False)
    for _ in range(6):
        server.wait(10.0)
        if drop and not client.answers[stream_id].is_over:
            client.h2.send_data(stream_id, bytes(drop))
            client.flush()
        client.receive()
    answer = client.wait(stream_id)
    assert answer.status == 4
    assert answer.headers[b"grpc-message"] == b"the rest of the request did not come"
    assert server.server.buffered_bytes == 0


def test_a_request_that_comes_slowly_is_waited_for(make: Any) -> None:
    """300 bytes a second is slow, and fast enough."""
    server = make()
    client = InMemoryClient(server)
    message = bytes(100_000)
    body = prefixed(message)
    stream_id = client.request(b"/t.T/Echo", body[:5], ends=False)
    for start in range(5, len(body), 3000):
        server.wait(5.0)
        server.wait(5.0)
        client.h2.send_data(stream_id, body[start : start + 3000])
        client.flush()
        while client.receive():
            pass
    client.h2.end_stream(stream_id)
    client.flush()
    assert client.wait(stream_id).messages == [message]


def test_a_stream_may_be_silent_for_ever(make: Any) -> None:
    """Of a stream no more is expected than what its deadline says, if it has one."""
    server = make()
    client = InMemoryClient(server)
    stream_id = client.request(b"/t.T/Chat", prefixed(b"x") + b"\0\0", ends=False)
    for _ in range(100):
        server.wait(30.0)
        while client.receive():
            pass
    assert client.answers[stream_id].messages == [b"x"]
    assert not client.answers[stream_id].is_over


def test_a_drain_waits_for_the_answer_of_a_request_that_was_held_up(make: Any) -> None:
    """It waited for earlier ones to leave; they do, its own is sent, and then the connection is closed."""
    server = make()
    remove = install_tight_limits()
    try:
        peer = server.hello()
        peer.reads_answers = False
        for stream_id in (1, 3, 5):
            peer.send(frame(HEADERS, END_HEADERS, stream_id, block(b"/t.T/Grow")))
            peer.send(frame(0, 1, stream_id, prefixed(b"5000")))
            server.loop.run()
        peer.connection.drain()
        peer.connection.take_no_more()
        server.loop.run()
        assert server.is_connected(peer)
        peer.read()
        server.loop.run()
    finally:
        remove()
    frames = frames_in(b"".join(peer.received))
    for stream_id in (1, 3, 5):
        assert sum(len(f[3]) for f in frames if f[0] == 0 and f[2] == stream_id) == 5005
    assert not server.is_connected(peer)


# Work.


def test_a_peer_has_a_quarter_mebibyte_a_turn(make: Any) -> None:
    """Then nothing is read from it until the others' answers have left."""
    server = make()
    peer = server.hello()
    peer.send(frame(HEADERS, END_HEADERS, 1, block(b"/t.T/Chat")))
    for _ in range(3):
        peer.send(frame(0, 0, 1, bytes(64_000)))
    assert peer.is_read_from
    peer.send(frame(0, 0, 1, bytes(80_000)))
    assert not peer.is_read_from
    server.loop.run()
    assert peer.is_read_from


@pytest.mark.parametrize("is_broken", [False, True], ids=["too large", "broken at their end"])
def test_few_megabytes_are_inflated_a_tick(make: Any, is_broken: bool) -> None:
    """64 bombs of 1 MiB in one read: 4 MiB a tick and one message more, whether or not they are refused."""
    server = make()
    squeezed = bytearray(zlib.compress(bytes(LIMIT if is_broken else LIMIT + 1), 9))
    if is_broken:
        squeezed[-1] ^= 1  # Of the checksum.
    fields = block(b"/t.T/Echo", (b"grpc-encoding", b"deflate"))
    data = b"".join(
        frame(HEADERS, END_HEADERS, stream_id, fields) + frame(0, 1, stream_id, prefixed(bytes(squeezed), 1))
        for stream_id in range(1, 129, 2)
    )
    peer = server.hello()
    ticks = server.api.ticks
    peer.send(data)
    server.loop.run()
    ended = [f for f in frames_in(b"".join(peer.received)) if f[0] == HEADERS]
    assert len(ended) == 64
    assert server.api.ticks - ticks >= 12


# Memory.


def test_headers_of_open_calls_are_counted(make: Any) -> None:
    """32 KiB of headers that were sent as a few bytes are 32 KiB."""
    server = make(max_connection_calls=256)
    peer = server.hello()
    # A field of 4,000 bytes goes into HPACK's table; every later block refers to it, a byte each.
    entry = b"\x40" + literal(b"x-big", b"v" * 3900)[1:]
    for stream_id in range(1, 401, 2):
        fields = block() + (entry if stream_id == 1 else b"") + b"\xbe" * 7
        peer.send(frame(HEADERS, END_HEADERS, stream_id, fields))
    server.loop.run()
    assert server.server.buffered_bytes > 200 * 7 * 3900
    for stream_id in range(1, 401, 2):
        peer.send(frame(RST_STREAM, 0, stream_id, bytes((0, 0, 0, 8))))
    server.loop.run()
    assert server.server.buffered_bytes == 0


def test_large_headers_are_let_go_with_their_call(make: Any) -> None:
    """An idle connection holds nothing of a request with 30 KB of headers."""
    server = make()
    client = InMemoryClient(server)
    marker = b"v" * 30_000
    answer = client.call(b"/t.T/Info", b"", (b"x-big", marker))
    assert marker in answer.messages[0]
    held = [found for found in gc.get_objects() if isinstance(found, RequestHead)]
    assert all(found.size < 8192 for found in held)


def test_a_peer_whose_headers_are_too_many_is_closed(make: Any) -> None:
    server = make(max_buffered_bytes=LIMIT)
    peer, other = server.hello(), InMemoryClient(server)
    entry = b"\x40" + literal(b"x-big", b"v" * 3900)[1:]
    for stream_id in range(1, 401, 2):
        fields = block() + (entry if stream_id == 1 else b"") + b"\xbe" * 7
        peer.send(frame(HEADERS, END_HEADERS, stream_id, fields))
        server.loop.run()
    assert not server.is_connected(peer)
    assert server.server.buffered_bytes == 0
    assert other.call(b"/t.T/Echo", b"x").messages == [b"x"]


@pytest.mark.parametrize("path", [b"/t.T/Grow", b"/t.T/Echo"], ids=["a reply", "an answer"])
def test_answers_whose_last_bytes_have_not_left_are_counted(make: Any, path: bytes) -> None:
    """A window that ends just before each of 20 answers: they are all in memory, and counted as such."""
    server = make()
    size = 500_000
    peer = server.hello()
    peer.send(frame(SETTINGS, 1, 0) + frame(SETTINGS, 0, 0, b"\0\4" + (size - 10).to_bytes(4, "big")))
    peer.send(frame(8, 0, 0, (1 << 30).to_bytes(4, "big")))
    message = b"%d" % size if path == b"/t.T/Grow" else bytes(size)
    asked = range(1, 41, 2)
    for stream_id in asked:
        peer.send(
            frame(HEADERS, END_HEADERS, stream_id, block(path)) + frame(0, 1, stream_id, prefixed(message))
        )
        server.loop.run()
    sent = sum(len(f[3]) for f in frames_in(b"".join(peer.received)) if f[0] == 0)
    assert sent == 20 * (size - 10)
    assert 20 * size <= server.server.buffered_bytes < 21 * size
    peer.send(b"".join(frame(8, 0, stream_id, bytes((0, 0, 1, 0))) for stream_id in asked))
    server.loop.run()
    assert server.server.buffered_bytes == 0


def test_answers_that_a_socket_does_not_take_are_counted(make: Any) -> None:
    """As a whole, until all of it has been taken."""
    server = make()
    peer = server.hello()
    peer.reads_answers = False
    peer.send(
        frame(8, 0, 0, (1 << 24).to_bytes(4, "big")) + frame(SETTINGS, 0, 0, b"\0\4" + bytes((0, 16, 0, 0)))
    )
    peer.send(frame(HEADERS, END_HEADERS, 1, block(b"/t.T/Grow")) + frame(0, 1, 1, prefixed(b"900000")))
    server.loop.run()
    assert server.server.buffered_bytes >= 900_000
    peer.read()
    server.wait(0.1)
    assert server.server.buffered_bytes == 0


def test_nothing_is_kept_of_streams_that_were_refused_and_reset(make: Any) -> None:
    """A peer that reads nothing asks 1,500 times for what there is not, and takes it back."""
    server = make()
    peer = server.hello()
    peer.send(frame(HEADERS, END_HEADERS, 1, block(b"/t.T/Grow")) + frame(0, 1, 1, prefixed(b"1000000")))
    peer.send(frame(8, 0, 0, (1 << 24).to_bytes(4, "big")) + frame(8, 0, 1, (1 << 24).to_bytes(4, "big")))
    peer.reads_answers = False
    server.loop.run()
    peer.send(frame(HEADERS, END_HEADERS, 3, block(b"/t.T/Grow")) + frame(0, 1, 3, prefixed(b"1000000")))
    peer.send(frame(8, 0, 3, (1 << 24).to_bytes(4, "big")))
    server.loop.run()
    for stream_id in range(5, 3005, 2):
        peer.send(frame(HEADERS, END_HEADERS, stream_id, block(b"/no/Thing")))
        peer.send(frame(RST_STREAM, 0, stream_id, bytes((0, 0, 0, 8))))
    server.loop.run()
    assert server.is_connected(peer)
    assert len(peer.connection._to_reset) == 0
