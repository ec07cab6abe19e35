"""
Connections in, calls out, over ngh2: gRPC on HTTP/2 in one event loop, one batch a tick.

libnghttp2 does the framing, HPACK, flow control and checks of the protocol; h2_connection.py and
h2_call.py do what the document PROTOCOL-HTTP2 of gRPC puts on top. Every ready socket is read and its
messages delivered; then *after_messages* runs what is waiting, all rows of a tick together; then
every connection that has something to say is written to, once.

Memory is bounded by demand: bytes that no listener has asked for are not acknowledged, so the peer's
window closes; demand that follows a reply counts only once that reply has left; and a connection with
too many answers unread is given no more messages. What all connections hold together is counted:
beyond *max_buffered_bytes* the one that holds most is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import Any

from nnserver.call import Call, Method, Methods
from nnserver.errors import Expired, ServerError, TooManyCalls, TooManyStreams
from nnserver.transport.h2_call import H2Call
from nnserver.transport.h2_connection import H2Connection
from nnserver.transport.load import TransportLoad
from nnserver.transport.sockets import bind, printable_address, unlink
from nnserver.transport.tls import TlsFiles, ssl_context
from nnserver.transport.tls_layer import TlsLayer

logger = logging.getLogger(__name__)

# How often deadlines of calls that wait for nothing but their peer are looked at.
_SWEEP_S = 0.05
# Inflated in one tick: about 10 ms of zlib. A peer can ask for a thousand times what it sends.
_INFLATED_TICK_BYTES = 4 << 20
# Read from a socket at once.
_READ_BYTES = 256 << 10
# After refusals, if other threads run what waits, requests are left to gather before they are read: so long
# for each that was refused in the tick, but not longer than that. Read one by one they would cost more, and
# most would be refused, too: without rests, at four times the capacity, a third of a core went into refusals.
_REST_A_REFUSAL_S, _LONGEST_REST_S = 0.5e-3, 8e-3
# When draining, a peer without calls has this long to show that it has heard of it.
_SETTLE_S = 1.0


@dataclass(frozen=True, slots=True)
class H2Options:
    """What the transport needs to know; see the settings of the same names."""

    listen: str
    max_message_bytes: int
    max_streams: int
    max_concurrent_calls: int
    max_connection_calls: int = 256
    max_connections: int = 10_000
    max_buffered_bytes: int = 512 << 20
    compress_answers: bool = False
    reuse_port: bool = False
    busy_poll_us: int = 0
    tls: TlsFiles | None = None
    # A peer that has not said hello by then is gone; so is one that lets a ping unanswered for so long,
    # or does not take what was written before the end.
    hello_s: float = 10.0
    ping_every_s: float = 60.0
    ping_answer_s: float = 20.0
    goodbye_s: float = 2.0
    # How often calls whose request has begun to come are looked at: see H2Call.end_if_stuck.
    upload_look_s: float = 10.0


class H2Server:
    """
    A gRPC server for *methods*.

    *after_messages* is called once a tick, when every listener was given what had arrived. What it returns
    is true if other threads go on with that.
    """

    def __init__(self, methods: Methods, after_messages: Callable[[], object], options: H2Options) -> None:
        self.methods = {path.encode(): method for path, method in methods.items()}
        self.options = options
        self.open_calls = 0
        self.open_streams = 0
        # Of requests that were not delivered yet and of answers that have not left.
        self.buffered_bytes = 0
        self.timed_calls: set[H2Call] = set()
        self.connections: set[H2Connection] = set()
        self.is_draining = False
        # Whether calls of known methods may be refused at their heads.
        self.is_choosy = any(method.gate is not None for method in methods.values())
        # What is read from any socket, until it is handled at once: no copy of it is made for Python.
        self.read_buffer = memoryview(bytearray(_READ_BYTES))
        # Whole requests of this tick, by method.
        self.arrivals: defaultdict[Method, list[tuple[Call, bytes]]] = defaultdict(list)
        self._after_messages = after_messages
        self._tls = ssl_context(options.tls) if options.tls else None
        self._loop: asyncio.AbstractEventLoop
        self._thread = threading.Thread(target=self._run_loop, name="nnserver-loop", daemon=True)
        self.thread_id = 0
        self._listeners: list[asyncio.Server] = []
        self._touched: list[H2Connection] = []
        self._tick_is_due = False
        self._polls_until = 0.0
        self._inflated_bytes = 0
        self._next_look_at_uploads = 0.0
        self._wake_up_is_due = False
        self.posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._is_running_posted = False
        self._refused = 0
        self._is_resting = False
        self._end_of_rest = threading.Event()

    def start(self) -> str:
        """Listen and serve; return the address, with the port that was chosen if 0 was asked for."""
        sockets = bind(self.options.listen, reuse_port=self.options.reuse_port)
        address = printable_address(self.options.listen, sockets[0])
        self._loop = new_event_loop()
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(sockets), self._loop).result()
        return address

    def renew_tls(self, files: TlsFiles) -> None:
        """Use *files* for new connections; raises ConfigError, and changes nothing, if they are unfit."""
        assert self._tls is not None
        self._tls = ssl_context(files)

    def drain(self, grace_s: float) -> None:
        """Take no more calls, finish those in flight within *grace_s* seconds, cut off the rest."""
        asyncio.run_coroutine_threadsafe(self._drain(grace_s), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def load(self) -> TransportLoad:
        """Return what is open now; from any thread."""
        return TransportLoad(len(self.connections), self.open_streams)

    # Work of the loop's thread.

    def touch(self, connection: H2Connection) -> None:
        """See to it that *connection* is written to at the end of this tick."""
        if not connection.is_touched:
            connection.is_touched = True
            self._touched.append(connection)
        if not self._tick_is_due:
            self._tick_is_due = True
            self._loop.call_soon(self._tick)

    def in_loop(self, action: Callable[..., None], *arguments: Any) -> None:
        """
        Run *action* in the loop's thread, in the order of the calls of this; from any thread.

        At once if this is the loop's thread and nothing was posted before by another: two threads that
        answer one stream, one after the other, would otherwise be heard in the wrong order.
        """
        if get_ident() == self.thread_id:
            if not self.posted:
                action(*arguments)
            elif self._is_running_posted:
                # Behind the others, not by running them from here: each could bring the next.
                self.posted.append((action, arguments))
            else:
                self._run_posted()
                action(*arguments)
            return
        self.posted.append((action, arguments))
        if self._is_resting:
            self._end_of_rest.set()
        if not self._wake_up_is_due:  # One wake-up serves all that is waiting.
            self._wake_up_is_due = True
            with contextlib.suppress(RuntimeError):  # The loop has ended, and with it the calls.
                self._loop.call_soon_threadsafe(self._run_posted)

    def admit(self, method: Method) -> ServerError | None:
        """Count one more call of *method*, or return why there cannot be one."""
        options = self.options
        if self.open_calls >= options.max_concurrent_calls:
            return TooManyCalls(
                f"{self.open_calls} calls are open, the most this server keeps (max_concurrent_calls)"
            )
        if method.client_streams or method.server_streams:
            if self.open_streams >= options.max_streams:
                return TooManyStreams(
                    f"{self.open_streams} streams are open, the most this server keeps (max_streams)"
                )
            self.open_streams += 1
        self.open_calls += 1
        return None

    def dismiss(self, method: Method) -> None:
        """Count a call of *method* no longer."""
        self.open_calls -= 1
        if method.client_streams or method.server_streams:
            self.open_streams -= 1

    def note_buffered(self, change: int) -> None:
        """Count *change* more bytes that are held; close the connection that holds most if it is too much."""
        self.buffered_bytes += change
        if change > 0 and self.buffered_bytes > self.options.max_buffered_bytes and self.connections:
            biggest = max(self.connections, key=lambda connection: connection.buffered_bytes)
            biggest.give_up(
                f"it holds {biggest.buffered_bytes} bytes, most of {self.buffered_bytes} (max_buffered_bytes)"
            )

    def note_refused(self) -> None:
        """Take note that a caller was told to come back later."""
        self._refused += 1

    def may_inflate(self) -> bool:
        """Whether another message may be decompressed in this tick."""
        return self._inflated_bytes < _INFLATED_TICK_BYTES

    def note_inflated(self, size: int) -> None:
        """Count the bytes that a message had when decompressed."""
        self._inflated_bytes += size

    def _tick(self) -> None:
        self._tick_is_due = False
        self._inflated_bytes = 0
        if self.arrivals:
            arrivals, self.arrivals = self.arrivals, defaultdict(list)
            for method, requests in arrivals.items():
                assert method.handle_all is not None
                try:
                    method.handle_all(requests)
                except Exception as error:
                    logger.exception("an api failed to take requests method=%s", method.path)
                    for call, _ in requests:
                        call.fail(error)
        others_run: object = False
        try:
            others_run = self._after_messages()
        except Exception:
            logger.exception("cannot run what is waiting")
        touched, self._touched = self._touched, []
        for connection in touched:
            connection.is_touched = False
            try:
                connection.flush()
            except Exception:  # One connection's fault; the others are to be written to.
                logger.exception("cannot write to peer=%s", connection.peer)
                connection.give_up("of the error above")
        if self.options.busy_poll_us:
            self._poll_for_a_while()
        if self._refused:
            refused, self._refused = self._refused, 0
            if others_run:
                self._rest(min(refused * _REST_A_REFUSAL_S, _LONGEST_REST_S))

    def _rest(self, seconds: float) -> None:
        """Let requests gather, until another thread has something to say or the time is over."""
        self._end_of_rest.clear()
        self._is_resting = True
        if not self.posted:  # By another thread, which may not have seen that this one rests.
            self._end_of_rest.wait(seconds)
        self._is_resting = False

    def _poll_for_a_while(self) -> None:
        """Keep the loop from sleeping: to be woken costs a lone request some 40 us on a virtual machine."""
        now = time.monotonic()
        if now >= self._polls_until:  # Else _poll is due already.
            self._loop.call_soon(self._poll)
        self._polls_until = now + 1e-6 * self.options.busy_poll_us

    def _poll(self) -> None:
        if time.monotonic() < self._polls_until:
            self._loop.call_soon(self._poll)

    def _run_posted(self) -> None:
        # First: whoever appends from here on wakes the loop again, once too often rather than never.
        self._wake_up_is_due = False
        self._is_running_posted = True
        while self.posted:
            action, arguments = self.posted.popleft()
            try:
                action(*arguments)
            except Exception:
                logger.exception("cannot do what another thread asked for")
        self._is_running_posted = False

    def _run_loop(self) -> None:
        self.thread_id = get_ident()
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(_log_loop_error)
        self._loop.call_later(_SWEEP_S, self._sweep)
        self._loop.run_forever()

    async def _listen(self, sockets: list[socket.socket]) -> None:
        for sock in sockets:
            server = await self._loop.create_server(
                self._new_protocol,
                sock=sock,
                backlog=1024,
            )
            self._listeners.append(server)

    def _new_protocol(self) -> asyncio.BaseProtocol:
        connection = H2Connection(self)
        return TlsLayer(self._tls, "h2", connection) if self._tls else connection

    async def _drain(self, grace_s: float) -> None:
        self.is_draining = self.is_choosy = True
        unlink(self.options.listen)  # First: from then on the path may be another server's.
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            connection.drain()
        started = time.monotonic()
        while self.connections and time.monotonic() < started + grace_s:
            if time.monotonic() >= started + _SETTLE_S:
                for connection in list(self.connections):
                    connection.take_no_more()
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.give_up("the time to drain is over")
        while self.connections:  # Each is told that it is lost by a callback.
            await asyncio.sleep(0)

    def _sweep(self) -> None:
        """End calls whose deadline has passed; look after connections that have gone quiet."""
        now = time.monotonic()
        self._loop.call_later(_SWEEP_S, self._sweep)
        for call in [call for call in self.timed_calls if call.deadline is not None and call.deadline <= now]:
            call.abandon(Expired("the deadline passed before the call ended"))
        for connection in list(self.connections):
            if connection.next_check <= now:
                connection.check_alive(now)
            if connection.has_written_much:
                self.touch(connection)  # The socket may have taken it since, and nobody tells.
        if now >= self._next_look_at_uploads:
            self._next_look_at_uploads = now + self.options.upload_look_s
            for connection in list(self.connections):
                connection.end_stuck_uploads()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed: as fast as a bare epoll loop, twice asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A fault of a peer (TLS, a reset) is no news; one of ours is."""
    error = context.get("exception")
    if isinstance(error, OSError):
        logger.info("connection failed reason=%s", error)
    else:
        logger.error("error in the event loop: %s", context.get("message"), exc_info=error)
