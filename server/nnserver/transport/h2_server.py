"""
Connections in, calls out, over ngh2: gRPC on HTTP/2 in one event loop, one batch a tick.

libnghttp2 does the framing, HPACK, flow control and checks of the protocol; this module does what
the document PROTOCOL-HTTP2 of gRPC puts on top. Every ready socket is read and its messages
delivered; then *after_messages* runs what is waiting, all rows of a tick together; then every
connection that has something to say is written to, once.

Memory is bounded by demand: bytes that no listener has asked for are not acknowledged, so the
peer's window closes; and demand that follows a reply counts only once that reply has left.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import ngh2
from ngh2.events import (
    ConnectionClosed,
    DataReceived,
    PingAcknowledged,
    RequestReceived,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)

from nnserver.call import Call, Listener, Metadata, Method, Methods
from nnserver.errors import (
    BadMessage,
    Expired,
    ServerError,
    TooManyCalls,
    TooManyStreams,
    Unimplemented,
    status_and_text,
)
from nnserver.transport import framing
from nnserver.transport.sockets import bind, printable_address
from nnserver.transport.tls import TlsFiles, ssl_context

logger = logging.getLogger(__name__)

# What the peer may send on one stream, and on a connection, before the first acknowledgement.
# 1 MiB a stream: on loopback, 32 x 784 floats in flight never wait; 4 idle streams cost nothing.
_STREAM_WINDOW = 1 << 20
_CONNECTION_WINDOW = 16 << 20
# Larger frames mean fewer events a message; peers that send 16 KiB frames lose nothing.
_MAX_FRAME_BYTES = 1 << 20
# A message is refused with a text of the api's up to this multiple of the limit; beyond it the call ends.
_HARD_LIMIT_FACTOR = 4
# Answers of one stream that have not left: demand that follows them waits.
_UNSENT_STREAM_BYTES = 256 << 10
# Answers of one connection that have not left: no further call is taken.
_UNSENT_CONNECTION_BYTES = 64 << 20
# One write to a socket; also where the transport's buffer says stop.
_WRITE_BYTES = 1 << 20
# A peer that has not said hello by then, or lets a ping unanswered for so long, is gone.
_HELLO_S = 10.0
_PING_EVERY_S = 60.0
_PING_ANSWER_S = 20.0
# How often deadlines of calls that wait for nothing but their peer are looked at.
_SWEEP_S = 0.05

_RESPONSE_HEADERS = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_OK_TRAILERS = ((b"grpc-status", b"0"),)
_DRAIN_PING = b"nn-drain"
_ALIVE_PING = b"nn-alive"


@dataclass(frozen=True, slots=True)
class H2Options:
    """What the transport needs to know; see the settings of the same names."""

    listen: str
    max_message_bytes: int
    max_streams: int
    max_concurrent_calls: int
    max_connections: int = 10_000
    tls: TlsFiles | None = None


class H2Server:
    """
    A gRPC server for *methods*.

    *after_messages* is called once a tick, when every listener was given what had arrived.
    """

    def __init__(self, methods: Methods, after_messages: Callable[[], None], options: H2Options) -> None:
        self.methods = {path.encode(): method for path, method in methods.items()}
        self.options = options
        self.open_calls = 0
        self.open_streams = 0
        self.timed_calls: set[H2Call] = set()
        self.connections: set[H2Connection] = set()
        self.is_draining = False
        self._after_messages = after_messages
        self._tls = ssl_context(options.tls) if options.tls else None
        self._loop = _new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="nnserver-loop", daemon=True)
        self._thread_id = 0
        self._listeners: list[asyncio.Server] = []
        self._touched: list[H2Connection] = []
        self._tick_is_due = False
        self._wake_up_is_due = False
        self._posted: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()

    def start(self) -> str:
        """Listen and serve; return the address, with the port that was chosen if 0 was asked for."""
        sockets = bind(self.options.listen)
        address = printable_address(self.options.listen, sockets[0])
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(sockets), self._loop).result()
        return address

    def drain(self, grace_s: float) -> None:
        """Take no more calls, finish those in flight within *grace_s* seconds, cut off the rest."""
        asyncio.run_coroutine_threadsafe(self._drain(grace_s), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # Work of the loop's thread.

    def touch(self, connection: H2Connection) -> None:
        """See to it that *connection* is written to at the end of this tick."""
        if not connection.is_touched:
            connection.is_touched = True
            self._touched.append(connection)
        if not self._tick_is_due:
            self._tick_is_due = True
            self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        self._tick_is_due = False
        self._after_messages()
        touched, self._touched = self._touched, []
        for connection in touched:
            connection.is_touched = False
            connection.flush()

    def in_loop(self, action: Callable[..., None], *arguments: Any) -> None:
        """
        Run *action* in the loop's thread, in the order of the calls of this; from any thread.

        At once if this is the loop's thread: then what other threads have posted before goes first. Two
        threads that answer one stream, one after the other, would otherwise be heard in the wrong order.
        """
        if threading.get_ident() == self._thread_id:
            if self._posted:
                self._run_posted()
            action(*arguments)
            return
        self._posted.append((action, arguments))
        if not self._wake_up_is_due:  # One wake-up serves all that is waiting.
            self._wake_up_is_due = True
            with contextlib.suppress(RuntimeError):  # The loop has ended, and with it the calls.
                self._loop.call_soon_threadsafe(self._run_posted)

    def _run_posted(self) -> None:
        # First: whoever appends from here on wakes the loop again, once too often rather than never.
        self._wake_up_is_due = False
        while self._posted:
            action, arguments = self._posted.popleft()
            action(*arguments)

    def _run_loop(self) -> None:
        self._thread_id = threading.get_ident()
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(_log_loop_error)
        self._loop.call_later(_SWEEP_S, self._sweep)
        self._loop.run_forever()

    async def _listen(self, sockets: list[socket.socket]) -> None:
        for sock in sockets:
            server = await self._loop.create_server(
                lambda: H2Connection(self),
                sock=sock,
                backlog=1024,
                ssl=self._tls,
                ssl_handshake_timeout=_HELLO_S if self._tls else None,
            )
            self._listeners.append(server)

    async def _drain(self, grace_s: float) -> None:
        self.is_draining = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self.connections):
            connection.drain()
        end = time.monotonic() + grace_s
        while self.connections and time.monotonic() < end:
            await asyncio.sleep(0.01)
        for connection in list(self.connections):
            connection.abort()
        await asyncio.sleep(0)

    def _sweep(self) -> None:
        """End calls whose deadline has passed; look after connections that have gone quiet."""
        now = time.monotonic()
        for call in [call for call in self.timed_calls if call.deadline is not None and call.deadline <= now]:
            call.fail(Expired("the deadline passed before the call ended"))
        for connection in list(self.connections):
            if connection.next_check <= now:
                connection.check_alive(now)
        self._loop.call_later(_SWEEP_S, self._sweep)


class H2Connection(asyncio.Protocol):
    """One peer: bytes -> HTTP/2 events -> calls, and back."""

    transport: asyncio.Transport

    def __init__(self, server: H2Server) -> None:
        self.server = server
        self.is_touched = False
        self.peer = ""
        # When to look next whether the peer is still there, on time.monotonic()'s clock.
        self.next_check = time.monotonic() + _HELLO_S
        self.h2 = ngh2.Connection(ngh2.Role.SERVER, ngh2.Configuration(auto_window_update=False))
        self._calls: dict[int, H2Call] = {}
        self._said_hello = False
        self._ping_is_out = False
        self._is_paused = False
        self._is_draining = False
        # Calls whose demand waits for their replies to leave; streams to reset once all has left.
        self._parked: set[H2Call] = set()
        self._to_reset: list[int] = []

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's has another base.
        self.peer = _peer_name(transport)
        tls = transport.get_extra_info("ssl_object")
        is_refused = len(self.server.connections) >= self.server.options.max_connections
        if is_refused or self.server.is_draining or (tls and tls.selected_alpn_protocol() != "h2"):
            self.transport.abort()
            return
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.transport.set_write_buffer_limits(high=_WRITE_BYTES)
        self.server.connections.add(self)
        self.h2.initiate_connection(
            {
                ngh2.Setting.MAX_CONCURRENT_STREAMS: self.server.options.max_concurrent_calls,
                ngh2.Setting.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
                ngh2.Setting.MAX_FRAME_SIZE: _MAX_FRAME_BYTES,
                ngh2.Setting.MAX_HEADER_LIST_SIZE: 16 << 10,
            }
        )
        self.h2.set_local_window_size(_CONNECTION_WINDOW)
        self.server.touch(self)

    def data_received(self, data: bytes) -> None:
        try:
            self.h2.receive_data(data)
            self._handle_events()
        except ngh2.NGH2Error as error:
            logger.info("connection closed peer=%s reason=%s", self.peer, error)
            self._say_goodbye()
            return
        self.server.touch(self)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self.server.touch(self)

    def eof_received(self) -> bool:
        return False  # A peer that has closed its side reads no answers: close ours.

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        for call in list(self._calls.values()):
            self._drop(call)

    # What the server asks of it.

    def flush(self) -> None:
        """Write what there is to write, as far as the peer takes it."""
        transport = self.transport
        while not self._is_paused and not transport.is_closing():
            data = self.h2.data_to_send(_WRITE_BYTES)
            if not data:
                break
            transport.write(data)
        if self._to_reset:
            self._reset_what_has_left()
        if self._parked:
            self._unpark()
        if self._is_draining and not self._calls and self.h2.queued_body_size() == 0:
            self._say_goodbye()
        elif not (self.h2.want_read or self.h2.want_write):
            transport.close()

    def drain(self) -> None:
        """Let the peer know that no more calls are taken, once it can no longer have sent any unawares."""
        for call in list(self._calls.values()):
            call.listener.on_drain()
        with contextlib.suppress(ngh2.NGH2Error):
            self.h2.send_shutdown_notice()
            # Its answer proves that the peer has read the notice: see PingAcknowledged below.
            self.h2.ping(_DRAIN_PING)
        self.server.touch(self)

    def abort(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def check_alive(self, now: float) -> None:
        """Ping a peer that is to be asked whether it is there; give up one that has not answered."""
        if not self._said_hello or self._ping_is_out:
            logger.info("connection closed peer=%s reason=silent", self.peer)
            self.transport.abort()
            return
        self._ping_is_out = True
        self.next_check = now + _PING_ANSWER_S
        with contextlib.suppress(ngh2.NGH2Error):
            self.h2.ping(_ALIVE_PING)
        self.server.touch(self)

    # Events of HTTP/2.

    def _handle_events(self) -> None:
        calls = self._calls
        event: Any  # Narrowed by its exact type: isinstance costs more, and this is the hot path.
        for event in self.h2.events():
            kind = type(event)
            if kind is DataReceived:
                call = calls.get(event.stream_id)
                if call is None:
                    # Of a call that has ended: only the connection's window is given back.
                    self.h2.acknowledge_received_data(len(event.data), event.stream_id)
                else:
                    call.receive(event.data, event.end_stream)
            elif kind is RequestReceived:
                self._open(event.stream_id, event.headers, event.end_stream)
            elif kind is StreamClosed or kind is StreamReset:
                call = calls.get(event.stream_id)
                if call is not None:
                    self._drop(call)
            elif kind is WindowUpdated:
                pass  # The flush at the end of the tick sends what fits now.
            elif kind is TrailersReceived:
                call = calls.get(event.stream_id)
                if call is not None:
                    call.receive(b"", True)
            elif kind is SettingsReceived:
                if not self._said_hello:
                    self._said_hello = True
                    self.next_check = time.monotonic() + _PING_EVERY_S
            elif kind is PingAcknowledged:
                if event.opaque_data == _DRAIN_PING:
                    self.h2.send_goaway()
                    self._is_draining = True
                else:
                    self._ping_is_out = False
                    self.next_check = time.monotonic() + _PING_EVERY_S
            elif kind is ConnectionClosed:
                self._say_goodbye()
                return

    def _open(self, stream_id: int, headers: tuple[tuple[bytes, bytes], ...], ends: bool) -> None:
        """Begin the call that *headers* ask for, or refuse it."""
        try:
            head = framing.read_headers(headers)
        except framing.NotGrpc as refusal:
            self.h2.send_response(stream_id, ((b":status", refusal.http_status),), end_stream=True)
            self._reset_later(stream_id, ends)
            return
        method = self.server.methods.get(head.path)
        call = H2Call(self, stream_id, method or _NO_METHOD, head)
        error = self._refusal(method, head)
        if error is not None:
            call.refuse(error, ends)
            return
        self._calls[stream_id] = call
        call.begin()
        if ends:
            call.receive(b"", True)

    def _refusal(self, method: Method | None, head: framing.RequestHead) -> ServerError | None:
        server, options = self.server, self.server.options
        if method is None:
            return Unimplemented(f"unknown method {head.path.decode('ascii', 'replace')[:200]}")
        if not head.has_known_encoding:
            return Unimplemented("unknown grpc-encoding; this server takes identity, gzip and deflate")
        if server.open_calls >= options.max_concurrent_calls:
            return TooManyCalls(
                f"{server.open_calls} calls are open, the most this server keeps (max_concurrent_calls)"
            )
        is_stream = method.client_streams or method.server_streams
        if is_stream and server.open_streams >= options.max_streams:
            return TooManyStreams(
                f"{server.open_streams} streams are open, the most this server keeps (max_streams)"
            )
        if self.h2.queued_body_size() > _UNSENT_CONNECTION_BYTES:
            return TooManyCalls("too many bytes of answers on this connection have not been read")
        return None

    # What calls ask of it.

    def ended(self, call: H2Call, is_half_closed: bool) -> None:
        """Forget *call*; tell its peer to stop sending once the answer has left."""
        if self._calls.pop(call.stream_id, None) is not None:
            call.release()
        self._parked.discard(call)
        self._reset_later(call.stream_id, is_half_closed)
        self.server.touch(self)

    def park(self, call: H2Call) -> None:
        """Look at *call*'s demand again when more of its replies have left."""
        self._parked.add(call)

    def _drop(self, call: H2Call) -> None:
        """The peer has given *call* up."""
        if self._calls.pop(call.stream_id, None) is not None:
            call.release()
            self._parked.discard(call)
            call.cancel()

    def _reset_later(self, stream_id: int, is_half_closed: bool) -> None:
        if not is_half_closed:
            self._to_reset.append(stream_id)

    def _reset_what_has_left(self) -> None:
        """RST_STREAM(NO_ERROR) after the trailers: the peer need not send the rest (RFC 9113, 8.1)."""
        waiting = []
        for stream_id in self._to_reset:
            if self._is_paused or self.h2.queued_body_size(stream_id):
                waiting.append(stream_id)
            else:
                with contextlib.suppress(ngh2.NGH2Error):
                    self.h2.reset_stream(stream_id, ngh2.ErrorCode.NO_ERROR)
        if len(waiting) < len(self._to_reset):
            self.server.touch(self)
        self._to_reset = waiting

    def _unpark(self) -> None:
        for call in list(self._parked):
            if self.h2.queued_body_size(call.stream_id) <= _UNSENT_STREAM_BYTES:
                self._parked.discard(call)
                call.unpark()

    def _say_goodbye(self) -> None:
        """Send what the protocol has left to say (GOAWAY) and close."""
        with contextlib.suppress(ngh2.NGH2Error):
            self.transport.write(self.h2.data_to_send(_WRITE_BYTES))
        self.transport.close()


class H2Call(Call):
    """One stream of a connection, as an api sees it."""

    __slots__ = (
        "_assembler",
        "_connection",
        "_credits",
        "_has_ended",
        "_head",
        "_held_bytes",
        "_is_cancelled",
        "_is_delivering",
        "_is_half_closed",
        "_method",
        "_parked_credits",
        "_unary_message",
        "_wrote_headers",
        "deadline",
        "listener",
        "method",
        "stream_id",
    )

    listener: Listener

    def __init__(
        self, connection: H2Connection, stream_id: int, method: Method, head: framing.RequestHead
    ) -> None:
        self.stream_id = stream_id
        self.method = method.path
        self.deadline = None if head.timeout_s is None else time.monotonic() + head.timeout_s
        self._connection = connection
        self._method = method
        self._head = head
        limit = _HARD_LIMIT_FACTOR * connection.server.options.max_message_bytes
        self._assembler = framing.Assembler(limit, head.encoding)
        self._credits = 0
        self._parked_credits = 0
        self._held_bytes = 0
        self._unary_message: bytes | None = None
        self._is_half_closed = False
        self._is_cancelled = False
        self._is_delivering = False
        self._has_ended = False
        self._wrote_headers = False

    @property
    def peer(self) -> str:  # type: ignore[override]
        return self._connection.peer

    @property
    def metadata(self) -> Metadata:  # type: ignore[override]
        return framing.metadata(self._head.headers)

    def is_cancelled(self) -> bool:
        return self._is_cancelled

    # What the api asks, from any thread.

    def request(self, n: int) -> None:
        self._connection.server.in_loop(self._request, n)

    def reply(self, message: bytes) -> None:
        self._connection.server.in_loop(self._reply, message)

    def finish(self) -> None:
        self._connection.server.in_loop(self._finish)

    def fail(self, error: BaseException) -> None:
        self._connection.server.in_loop(self._fail, error)

    # What the connection tells.

    def begin(self) -> None:
        """Count the call and start its listener."""
        server = self._connection.server
        server.open_calls += 1
        if self._method.client_streams or self._method.server_streams:
            server.open_streams += 1
        if self.deadline is not None:
            server.timed_calls.add(self)
        self.listener = self._method.start(self)

    def release(self) -> None:
        """Count the call no longer, and hold none of the connection's window any more."""
        self._acknowledge_held()
        server = self._connection.server
        server.open_calls -= 1
        if self._method.client_streams or self._method.server_streams:
            server.open_streams -= 1
        server.timed_calls.discard(self)

    def refuse(self, error: ServerError, is_half_closed: bool) -> None:
        """End a call that never began."""
        self._is_half_closed = is_half_closed
        self._fail(error)

    def cancel(self) -> None:
        """The peer has gone, or has reset the stream."""
        self._is_cancelled = True
        if not self._has_ended:
            self._has_ended = True
            self.listener.on_cancel()

    def receive(self, data: bytes, ends: bool) -> None:
        """Take *data* of the stream's body; *ends*: it was the last."""
        self._is_half_closed = self._is_half_closed or ends
        self._held_bytes += len(data)
        if data:
            self._assembler.feed(data)
        self._deliver()

    def unpark(self) -> None:
        """The replies before the parked demand have left."""
        self._credits += self._parked_credits
        self._parked_credits = 0
        self._deliver()

    def _deliver(self) -> None:
        """Hand over every complete message that was asked for; acknowledge what is no longer held."""
        if self._is_delivering:
            return  # A listener asked for more meanwhile: the loop below sees it.
        self._is_delivering = True
        try:
            while self._credits > 0 and not self._has_ended:
                message = self._assembler.next_message()
                if message is None:
                    break
                if self._method.client_streams:
                    self._credits -= 1
                    self.listener.on_message(message)
                elif self._unary_message is None:
                    self._unary_message = message
                else:
                    raise Unimplemented(f"{self.method} takes exactly one message")
            if self._is_half_closed and not self._has_ended and self._credits > 0:
                self._half_close()
        except Exception as error:
            self._fail(error)
        self._is_delivering = False
        # With demand, a message that is being put together is waited for: let the peer go on.
        if self._credits > 0 or self._has_ended:
            self._acknowledge_held()

    def _acknowledge_held(self) -> None:
        held, self._held_bytes = self._held_bytes, 0
        if held:
            with contextlib.suppress(ngh2.NGH2Error):
                self._connection.h2.acknowledge_received_data(held, self.stream_id)

    def _half_close(self) -> None:
        if self._assembler.has_part:
            raise BadMessage("the stream ended inside a message")
        if not self._method.client_streams:
            self._credits = 0
            if self._unary_message is None:
                raise Unimplemented(f"{self.method} takes exactly one message")
            message, self._unary_message = self._unary_message, None
            self.listener.on_message(message)
        self.listener.on_half_close()

    def _request(self, n: int) -> None:
        connection = self._connection
        if self._wrote_headers and connection.h2.queued_body_size(self.stream_id) > _UNSENT_STREAM_BYTES:
            self._parked_credits += n
            connection.park(self)
            return
        had_none = self._credits == 0
        self._credits += n
        if had_none and (self._held_bytes or self._is_half_closed) and not self._has_ended:
            self._deliver()

    def _reply(self, message: bytes) -> None:
        if self._has_ended:
            return
        connection = self._connection
        try:
            if not self._wrote_headers:
                connection.h2.send_response(self.stream_id, _RESPONSE_HEADERS)
                self._wrote_headers = True
            connection.h2.send_data(self.stream_id, framing.frame(message))
        except ngh2.NGH2Error:
            return  # The stream has closed; its event is on the way.
        connection.server.touch(connection)

    def _finish(self) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        h2 = self._connection.h2
        with contextlib.suppress(ngh2.NGH2Error):
            if self._wrote_headers:
                h2.send_trailers(self.stream_id, _OK_TRAILERS)
            else:
                h2.send_response(self.stream_id, (*_RESPONSE_HEADERS, *_OK_TRAILERS), end_stream=True)
        self._connection.ended(self, self._is_half_closed)

    def _fail(self, error: BaseException) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        h2 = self._connection.h2
        trailers = framing.error_trailers(*status_and_text(error))
        with contextlib.suppress(ngh2.NGH2Error):
            if self._wrote_headers:
                h2.send_trailers(self.stream_id, trailers)
            else:
                h2.send_response(self.stream_id, (*_RESPONSE_HEADERS, *trailers), end_stream=True)
        self._connection.ended(self, self._is_half_closed)


class _Nobody:
    """The listener of calls that never begin."""

    def on_message(self, message: bytes) -> None:
        pass

    def on_half_close(self) -> None:
        pass

    def on_cancel(self) -> None:
        pass

    def on_drain(self) -> None:
        pass


_NO_METHOD = Method("", lambda call: _Nobody())


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed: as fast as a bare epoll loop, twice asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _peer_name(transport: asyncio.BaseTransport) -> str:
    """Return the peer as grpcio writes it: ipv4:HOST:PORT, ipv6:[HOST]:PORT or unix:."""
    name = transport.get_extra_info("peername")
    if not isinstance(name, tuple):
        return "unix:"
    return f"ipv6:[{name[0]}]:{name[1]}" if len(name) == 4 else f"ipv4:{name[0]}:{name[1]}"


def _log_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A fault of a peer (TLS, a reset) is no news; one of ours is."""
    error = context.get("exception")
    if isinstance(error, OSError):
        logger.info("connection failed reason=%s", error)
    else:
        logger.error("error in the event loop: %s", context.get("message"), exc_info=error)
