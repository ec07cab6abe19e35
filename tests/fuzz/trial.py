"""An Input in, nothing out if the server bore it: feeds a connection, checks what must always hold."""

from __future__ import annotations

import gc
import logging
import time
from collections import defaultdict
from collections.abc import Iterable

from support.h2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    block,
    frame,
    prefixed,
)
from support.h2_in_memory import InMemoryServer, Peer, install_tight_limits

from fuzz.mutations import ANSWER, READ, STOP_READING, Input, frames_of
from fuzz.served import Served
from fuzz.strict_api import StrictApi, StrictCall
from nnserver.transport.h2_call import H2Call
from nnserver.transport.h2_connection import H2Connection

# Of processor time. The longest that was seen is a tenth of it.
INPUT_LIMIT_S = 2.0

_SENT_BY_SERVERS = frozenset((DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION))
_BYSTANDER = (
    PREFACE
    + frame(SETTINGS, 0, 0)
    + frame(HEADERS, END_HEADERS, 1, block(b"/f/Echo"))
    + frame(DATA, END_STREAM, 1, prefixed(b"bystander"))
)


class Failure(Exception):
    """Something did not hold."""


class _Log(logging.Handler):
    """Keeps what is no peer's fault."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.found.append(logging.Formatter().format(record))


class Trial:
    """
    A server in memory, tried with one input after the other.

    is_tight: its limits are so low that inputs run into them.
    """

    def __init__(self, conversations: dict[str, list[bytes]], is_tight: bool = False) -> None:
        limit = 2000 if is_tight else 1 << 20
        self.api = StrictApi(limit)
        tight = {
            "max_message_bytes": limit,
            "max_streams": 2,
            "max_concurrent_calls": 3,
            "max_connection_calls": 4,
            "max_buffered_bytes": 20_000,
        }
        served = Served(limit)
        methods = {**self.api.methods(), **served.methods}
        self.server = InMemoryServer(methods, served.after_messages, **(tight if is_tight else {}))
        self._log = _Log()
        self._logger = logging.getLogger("nnserver")
        self._logger.addHandler(self._log)
        self._is_tight = is_tight
        self._expected: dict[str, dict[int, bytes]] = {}
        if not is_tight:
            for name, sent in conversations.items():
                answers = _answers(self._run(Input(name, list(sent))))
                for reset in (f.stream_id for f in frames_of(b"".join(sent)) if f.kind == RST_STREAM):
                    answers.pop(reset, None)
                self._expected[name] = answers

    def close(self) -> None:
        self._logger.removeHandler(self._log)

    def run(self, tried: Input) -> None:
        """Feed *tried*; raises Failure, or whatever escaped."""
        started = time.process_time()
        peer = self._run(tried)
        took_s = time.process_time() - started
        if took_s > INPUT_LIMIT_S:
            raise Failure(f"it took {took_s:.1f} s of processor time")
        answers = _answers(peer)
        if tried.is_whole and self._expected:
            for stream_id, body in self._expected[tried.name].items():
                if answers.get(stream_id) != body:
                    raise Failure(f"stream {stream_id} was answered otherwise only because reads were cut")

    def check_nothing_is_left(self) -> None:
        """Raise Failure if an object of a connection that is over is still alive."""
        gc.collect()
        kinds = (H2Call, H2Connection, StrictCall, Peer)
        left = [found for found in gc.get_objects() if isinstance(found, kinds)]
        if left:
            raise Failure(f"{len(left)} objects of connections that are over are alive: {left[:3]}")

    def _run(self, tried: Input) -> Peer:
        # Each server has a clock and limits of its own, and they are globals: one at a time.
        removals = [self.server.clock.install()]
        if self._is_tight:
            removals.append(install_tight_limits())
        try:
            return self._feed(tried)
        finally:
            for remove in removals:
                remove()

    def _feed(self, tried: Input) -> Peer:
        server, api, loop = self.server, self.api, self.server.loop
        # One that is silent while time passes would be taken for dead.
        is_timeless = not any(isinstance(step, float) for step in tried.steps)
        bystander = server.connect() if is_timeless else None
        peer = server.connect()
        for step in tried.steps:
            if isinstance(step, bytes):
                peer.send(step)
            elif isinstance(step, float):
                server.wait(step)
            elif step == STOP_READING:
                peer.reads_answers = False
            elif step == READ:
                peer.read()
            elif step == ANSWER:
                server.from_another_thread(api.answer_elsewhere)
                continue  # It is posted; what comes next may come before the loop gets to it.
            elif server.server.is_draining:
                peer.connection.take_no_more()
            else:
                server.server.is_draining = True
                peer.connection.drain()
            loop.run()
        server.server.is_draining = False
        api.answer_waiting()
        peer.read()
        loop.run()
        peer.lose()
        loop.run()
        api.answer_waiting()  # Too late, and no error.
        loop.run()
        bystander = bystander or server.connect()
        bystander.send(_BYSTANDER)
        loop.run()
        if prefixed(b"bystander") not in b"".join(bystander.received):
            raise Failure("a bystander was not answered")
        bystander.lose()
        loop.run()
        self._check_idle()
        return peer

    def _check_idle(self) -> None:
        if self.api.broken or self._log.found:
            what = [*self.api.broken, *self._log.found]
            self.api.broken.clear()
            self._log.found.clear()
            raise Failure("; ".join(what))
        server = self.server.server
        left = {
            "connections": len(server.connections),
            "open_calls": server.open_calls,
            "open_streams": server.open_streams,
            "buffered_bytes": server.buffered_bytes,
            "timed_calls": len(server.timed_calls),
            "calls that heard of no end": len(self.api.open),
            "waiting calls": len(self.api.waiting) + len(self.api.singles),
            "arrivals": len(server.arrivals),
        }
        if any(left.values()):
            raise Failure(f"left behind: { {name: n for name, n in left.items() if n} }")


def _answers(peer: Peer) -> dict[int, bytes]:
    """stream -> body, of all that *peer* was sent; raises Failure if those are not frames in order."""
    received = b"".join(peer.received)
    bodies: dict[int, bytearray] = defaultdict(bytearray)
    has_headers: set[int] = set()
    is_over: set[int] = set()
    at = 0
    while at < len(received):
        head = received[at : at + 9]
        end = at + 9 + int.from_bytes(head[:3], "big")
        if len(head) < 9 or end > len(received):
            if peer.was_aborted:
                break
            raise Failure("the last frame is not whole")
        kind, flags, stream_id = head[3], head[4], int.from_bytes(head[5:], "big")
        payload, at = received[at + 9 : end], end
        if kind not in _SENT_BY_SERVERS:
            raise Failure(f"the server sent a frame of kind {kind}")
        if kind == HEADERS:
            if stream_id in is_over or (stream_id in has_headers and not flags & END_STREAM):
                raise Failure(f"headers out of place on stream {stream_id}")
            has_headers.add(stream_id)
        elif kind == DATA:
            if stream_id in is_over or stream_id not in has_headers:
                raise Failure(f"data out of place on stream {stream_id}")
            bodies[stream_id] += payload
        if kind == RST_STREAM or (kind in (HEADERS, DATA) and flags & END_STREAM):
            is_over.add(stream_id)
            if kind == HEADERS and not _is_whole(bodies[stream_id]):
                raise Failure(f"stream {stream_id} ended inside a message")
    return {stream_id: bytes(body) for stream_id, body in bodies.items()}


def _is_whole(body: bytes | bytearray) -> bool:
    at = 0
    while at < len(body):
        at += 5 + int.from_bytes(body[at + 1 : at + 5], "big")
    return at == len(body)


def describe(tried: Input) -> Iterable[str]:
    """Lines that tell a reader what *tried* is."""
    yield f"conversation: {tried.name}; edits: {', '.join(tried.edits) or 'none'}"
    for step in tried.steps:
        text = repr(step)
        yield f"  {text if len(text) < 300 else text[:300] + f'... {len(text)} characters'}"
