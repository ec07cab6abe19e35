"""Bytes in, bytes out: an H2Server without sockets, threads or waiting, whose clock a test moves on."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from nnserver.call import Methods
from nnserver.transport import h2_call, h2_connection, h2_server
from nnserver.transport.h2_connection import H2Connection
from nnserver.transport.h2_server import H2Options, H2Server
from support.h2 import RawClient


class Clock:
    """time.monotonic() of everything in h2_*.py while one is `installed`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def install(self) -> Callable[[], None]:
        """Put the clock in; return what takes it out again."""
        modules = [module for module in (h2_call, h2_connection, h2_server) if hasattr(module, "time")]
        before = [module.time for module in modules]
        for module in modules:
            module.time = SimpleNamespace(monotonic=lambda: self.now)  # type: ignore[attr-defined]

        def remove() -> None:
            for module, time in zip(modules, before, strict=True):
                module.time = time  # type: ignore[attr-defined]

        return remove


# So low that small conversations meet every limit that is not an option.
TIGHT: dict[str, int] = {
    "UNSENT_STREAM_BYTES": 300,
    "JOINED_BYTES": 50,
    "_UNSENT_CONNECTION_BYTES": 3000,
    "_UNCOUNTED_BYTES": 200,
    "_WRITE_BYTES": 1000,
    "_TURN_BYTES": 2000,
    "_KEPT_HEAD_BYTES": 1000,
    "_INFLATED_TICK_BYTES": 500,
}


def install_tight_limits() -> Callable[[], None]:
    """Put TIGHT in place of the transport's own constants; return what takes it out again."""
    before = [
        (module, name, getattr(module, name))
        for module in (h2_call, h2_connection, h2_server)
        for name in TIGHT
        if hasattr(module, name)
    ]
    assert {name for _, name, _ in before} == set(TIGHT), "a constant has another name now"
    for module, name, _ in before:
        setattr(module, name, TIGHT[name])

    def remove() -> None:
        for module, name, value in before:
            setattr(module, name, value)

    return remove


class StillLoop:
    """What the transport asks of an event loop; callbacks run when `run` is called. Timers never do."""

    def __init__(self) -> None:
        self._ready: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()

    def call_soon(self, callback: Callable[..., Any], *arguments: Any) -> None:
        self._ready.append((callback, arguments))

    call_soon_threadsafe = call_soon

    def call_later(self, delay: float, callback: Callable[..., Any], *arguments: Any) -> None:
        pass

    def run(self, most: int = 100_000) -> None:
        """Run callbacks, and those that they bring, until there are none; each message may take one."""
        for _ in range(most):
            if not self._ready:
                return
            callback, arguments = self._ready.popleft()
            callback(*arguments)
        raise AssertionError(f"the loop does not come to rest in {most} callbacks")


class Peer(asyncio.Transport):
    """
    The transport of one connection: takes what the server writes as a socket with a full or an empty
    buffer would, and calls its protocol as an event loop would.
    """

    def __init__(self, loop: StillLoop, connection: H2Connection) -> None:
        super().__init__()
        self._loop = loop
        self._high = 64 << 10
        self._unread = 0
        self._is_closing = False
        self._is_paused = False
        self._is_lost = False
        self.reads_answers = True
        self.is_read_from = True
        # The server has ended the connection without sending what it had written.
        self.was_aborted = False
        self.connection = connection
        self.received: list[bytes] = []
        connection.connection_made(self)

    # What the connection calls.

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert isinstance(data, bytes), "an event loop may keep what it is given"
        if self._is_closing:
            return
        self.received.append(data)
        if not self.reads_answers:
            self._unread += len(data)
            if self._unread > self._high and not self._is_paused:
                self._is_paused = True
                self.connection.pause_writing()

    def pause_reading(self) -> None:
        assert not self._is_closing
        self.is_read_from = False

    def resume_reading(self) -> None:
        self.is_read_from = True

    def close(self) -> None:
        self._is_closing = True
        if not self._unread:
            self.lose()

    def abort(self) -> None:
        self.was_aborted = True
        self._is_closing = True
        self.lose()

    def is_closing(self) -> bool:
        return self._is_closing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 64 << 10 if high is None else high

    def get_write_buffer_size(self) -> int:
        return self._unread

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("192.0.2.1", 1234) if name == "peername" else default

    # What the test does.

    def send(self, data: bytes) -> None:
        """Bytes of the peer's arrive."""
        if not self._is_closing:
            self.connection.data_received(data)

    def read(self) -> None:
        """Take what was written, and go on reading."""
        self.reads_answers = True
        self._unread = 0
        if self._is_closing:
            self.lose()
        elif self._is_paused:
            self._is_paused = False
            self.connection.resume_writing()

    def lose(self) -> None:
        """The connection is over; its protocol hears of it from the loop, once."""
        if not self._is_lost:
            self._is_lost = True
            self._is_closing = True
            self._unread = 0
            self._loop.call_soon(self.connection.connection_lost, None)


class InMemoryServer:
    """An H2Server, its loop and its clock."""

    def __init__(
        self, methods: Methods, after_messages: Callable[[], None] = lambda: None, **options: Any
    ) -> None:
        settings = {"max_message_bytes": 1 << 20, "max_streams": 64, "max_concurrent_calls": 256, **options}
        self.server = H2Server(methods, after_messages, H2Options("127.0.0.1:0", **settings))
        self.loop = StillLoop()
        self.clock = Clock()
        self.server._loop = cast(asyncio.AbstractEventLoop, self.loop)
        self.server.thread_id = threading.get_ident()

    def connect(self) -> Peer:
        """A new connection, to which the server has said hello."""
        peer = Peer(self.loop, H2Connection(self.server))
        self.loop.run()
        return peer

    def wait(self, seconds: float) -> None:
        """Let *seconds* pass, and do now and then what the loop does every few moments."""
        while seconds > 0:
            self.clock.now += min(seconds, 11.0)
            seconds -= 11.0
            self.server._sweep()
            self.loop.run()

    def from_another_thread(self, action: Callable[[], None]) -> None:
        """Do *action* as a kernel's thread would: what it says is posted to the loop."""
        self.server.thread_id, before = -1, self.server.thread_id
        try:
            action()
        finally:
            self.server.thread_id = before


class InMemoryClient(RawClient):
    """A client whose socket is a Peer; *sent* is all that it has said, flush by flush."""

    def __init__(self, server: InMemoryServer, settings: dict[int, int] | None = None) -> None:
        self.server = server
        self.peer = server.connect()
        self.sent: list[bytes] = []
        self.begin(settings)

    def close(self) -> None:
        self.peer.lose()
        self.server.loop.run()

    def send(self, data: bytes) -> None:
        if data:
            self.sent.append(data)
            self.peer.send(data)
            self.server.loop.run()

    def receive(self, timeout: float = 0.0) -> bool:
        data, self.peer.received = b"".join(self.peer.received), []
        if data:
            self.digest(data)
        return bool(data)
