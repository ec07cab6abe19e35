"""One peer's bytes in, calls out, and their answers back as bytes: an HTTP/2 connection of the server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from typing import TYPE_CHECKING, Any, cast

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

from nnserver.call import Caller, Method
from nnserver.errors import Draining, Unimplemented
from nnserver.transport import framing
from nnserver.transport.h2_call import JOINED_BYTES, UNSENT_STREAM_BYTES, H2Call, Nobody
from nnserver.transport.tls import certificate_names

if TYPE_CHECKING:
    from nnserver.transport.h2_server import H2Server

logger = logging.getLogger(__name__)

# What the peer may send on one stream, and on a connection, before the first acknowledgement.
# 1 MiB a stream: on loopback, 32 x 784 floats in flight never wait; 4 idle streams cost nothing.
_STREAM_WINDOW = 1 << 20
_CONNECTION_WINDOW = 16 << 20
# Larger frames mean fewer events a message; peers that send 16 KiB frames lose nothing.
_MAX_FRAME_BYTES = 1 << 20
# Answers of one connection that have not left: no further message is taken from it.
_UNSENT_CONNECTION_BYTES = 16 << 20
# One write to a socket.
_WRITE_BYTES = 1 << 20
# Where the transport's buffer says stop. Smaller writes are not counted as buffered.
_UNCOUNTED_BYTES = 64 << 10
# Read from one peer before the others have their turn; libuv would go on for 8 MiB.
_TURN_BYTES = 256 << 10
# gRPC's custom is 8 KiB; what goes beyond the second number ends the connection.
_HEADER_LIST_BYTES = 16 << 10
_HEADER_LIST_HARD_BYTES = 32 << 10
# Headers up to this size are kept when their call has ended: the next call's are often the same.
_KEPT_HEAD_BYTES = 4 << 10

_LIMITS = ngh2.Configuration(
    auto_window_update=False,
    max_inbound_header_list_size=_HEADER_LIST_HARD_BYTES,
    max_inbound_header_count=256,
    # A client whose deadlines pass resets as many streams as it opens, and that is no attack: a call that
    # is opened and reset costs about as much as one that is answered, and takes its turn like one.
    stream_reset_rate_limit=(2000, 1000),
)
_DRAIN_PING = b"nn-drain"
_ALIVE_PING = b"nn-alive"
_NO_HEAD = framing.RequestHead(b"", (), None, b"")
_NO_METHOD = Method("", lambda call: Nobody())


class H2Connection(asyncio.BufferedProtocol):
    """One peer: bytes -> HTTP/2 events -> calls, and back."""

    transport: asyncio.Transport

    def __init__(self, server: H2Server) -> None:
        self.server = server
        self.is_touched = False
        self.peer = ""
        # Bytes that this connection makes the server hold, in both directions.
        self.buffered_bytes = 0
        # So many of its answers are unread that it is given no more messages.
        self.is_clogged = False
        # When to look next whether the peer is still there, on time.monotonic()'s clock.
        self.next_check = time.monotonic() + server.options.hello_s
        self.h2 = ngh2.Connection(ngh2.Role.SERVER, _LIMITS)
        self._calls: dict[int, H2Call] = {}
        self._said_hello = False
        self._ping_is_out = False
        self._is_paused = False
        self._takes_no_more = False
        self._is_closing = False
        # Answers that have not left.
        self._unsent_bytes = 0
        # Headers of open calls, and what of them was counted as buffered: they are noted once a tick.
        self._head_bytes = 0
        self._noted_head_bytes = 0
        # Streams with large replies under way: the size of the largest.
        self._large: dict[int, int] = {}
        # A large write may lie in the transport's buffer.
        self.has_written_much = False
        # Received since the last flush.
        self._turn_bytes = 0
        # Calls that wait for answers to leave; streams to reset once all has left.
        self._parked: set[H2Call] = set()
        self._to_reset: dict[int, None] = {}
        # Calls that were answered in this tick.
        self.answered: list[tuple[H2Call, bytes]] = []
        # Calls with replies of this tick.
        self._replied: list[H2Call] = []
        # The headers of the last request, and what they say: the next one's are often the same.
        self._last_headers: framing.Headers = ()
        self._last_head = _NO_HEAD
        self._last_method: Method | None = None
        # Who sent the last request that was asked about, by its head and by its credentials.
        self._caller: Caller | None = None
        self._caller_head: framing.RequestHead | None = None
        self._credentials: tuple[bytes, ...] = ()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's has another base.
        self.peer = _peer_name(transport)
        if len(self.server.connections) >= self.server.options.max_connections or self.server.is_draining:
            self._is_closing = True
            self.transport.abort()
            return
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # It may have been closed already.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.transport.set_write_buffer_limits(high=_UNCOUNTED_BYTES)
        self.server.connections.add(self)
        options = self.server.options
        self.h2.initiate_connection(
            {
                ngh2.Setting.MAX_CONCURRENT_STREAMS: options.max_connection_calls,
                ngh2.Setting.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
                ngh2.Setting.MAX_FRAME_SIZE: _MAX_FRAME_BYTES,
                ngh2.Setting.MAX_HEADER_LIST_SIZE: _HEADER_LIST_BYTES,
            }
        )
        self.h2.set_local_window_size(_CONNECTION_WINDOW)
        self.server.touch(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.server.read_buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(self.server.read_buffer[:nbytes])

    def data_received(self, data: bytes | memoryview) -> None:
        """Take what was read; also from a TLS layer, which has buffers of its own."""
        if self._is_closing:
            return
        try:
            self.h2.receive_data(data)
            self._handle_events()
        except ngh2.NGH2Error as error:
            self._say_goodbye(str(error))
            return
        except Exception:
            logger.exception("cannot handle what was received peer=%s", self.peer)
            self.give_up("of the error above")
            return
        self._turn_bytes += len(data)
        if self._turn_bytes >= _TURN_BYTES and not self._is_closing:
            self.transport.pause_reading()
        self.server.touch(self)

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self.server.touch(self)

    def eof_received(self) -> bool:
        return False  # A peer that has closed its side reads no answers: close ours.

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closing = True
        self.server.connections.discard(self)
        self._drop_calls()

    # What the server asks of it.

    def flush(self) -> None:
        """Write what there is to write, as far as the peer takes it."""
        if self._is_closing:
            return
        h2, transport = self.h2, self.transport
        if self._turn_bytes >= _TURN_BYTES:
            transport.resume_reading()
        self._turn_bytes = 0
        if self.answered:
            self._send_answers()
        if self._replied:
            replied, self._replied = self._replied, []
            for call in replied:
                call.send_replies()
        try:
            while not self._is_paused:
                data = h2.data_to_send(_WRITE_BYTES)
                if not data:
                    break
                transport.write(data)
                if len(data) >= _UNCOUNTED_BYTES:
                    self.has_written_much = True
                if len(data) < _WRITE_BYTES:
                    break  # That was all.
            is_over = not (h2.want_read or h2.want_write)
        except ngh2.NGH2Error as error:
            self._say_goodbye(str(error))
            return
        unsent = h2.queued_body_size()
        if self._large:
            unsent += self._sent_and_kept()
        if self.has_written_much:
            unsent += self._kept_by_transport()
        if unsent != self._unsent_bytes:
            change, self._unsent_bytes = unsent - self._unsent_bytes, unsent
            self.is_clogged = unsent > _UNSENT_CONNECTION_BYTES
            self.note_buffered(change)
        if self._head_bytes != self._noted_head_bytes:
            change, self._noted_head_bytes = self._head_bytes - self._noted_head_bytes, self._head_bytes
            self.note_buffered(change)
        if self._to_reset:
            self._reset_what_has_left()
        if self._parked and not self.is_clogged:
            self._unpark()
        is_over = is_over or (self._takes_no_more and not self._calls and not unsent)
        # Touched: a call that was held up has just been answered.
        if is_over and not self.is_touched:
            self._say_goodbye("all is said")

    def drain(self) -> None:
        """Let the peer know that no more calls are taken, once it can no longer have sent any unawares."""
        for call in list(self._calls.values()):
            call.drain()
        with contextlib.suppress(ngh2.NGH2Error):
            self.h2.send_shutdown_notice()
            # Its answer proves that the peer has read the notice: see PingAcknowledged below.
            self.h2.ping(_DRAIN_PING)
        self.server.touch(self)

    def take_no_more(self) -> None:
        """Ignore calls that come from here on; close when those in flight have ended."""
        if not self._takes_no_more:
            self._takes_no_more = True
            with contextlib.suppress(ngh2.NGH2Error):
                self.h2.send_goaway()
            self.server.touch(self)

    def give_up(self, reason: str) -> None:
        """End the connection at once, with all that it holds."""
        if not self._is_closing:
            logger.warning("connection closed peer=%s reason=%s", self.peer, reason)
        self._is_closing = True
        self.transport.abort()
        self._drop_calls()

    def check_alive(self, now: float) -> None:
        """Ping a peer that is to be asked whether it is there; give up one that has not answered."""
        if not self._said_hello or self._ping_is_out or self._is_closing:
            logger.info("connection closed peer=%s reason=silent", self.peer)
            self._is_closing = True
            self.transport.abort()
            return
        self._ping_is_out = True
        self.next_check = now + self.server.options.ping_answer_s
        with contextlib.suppress(ngh2.NGH2Error):
            self.h2.ping(_ALIVE_PING)
        self.server.touch(self)

    def end_stuck_uploads(self) -> None:
        """End calls whose request has stopped coming in."""
        for call in list(self._calls.values()):
            call.end_if_stuck()

    # Events of HTTP/2.

    def _handle_events(self) -> None:
        calls = self._calls
        event: Any  # Narrowed by its exact type: isinstance costs more, and this is the hot path.
        h2 = self.h2
        # Calls that have received something: what came in several frames is delivered at once.
        fed: dict[H2Call, None] = {}
        for event in h2.events():
            kind = type(event)
            if kind is DataReceived:
                call = calls.get(event.stream_id)
                if call is None:
                    # Of a call that has ended: only the connection's window is given back.
                    h2.acknowledge_received_data(len(event.data), event.stream_id)
                else:
                    data = event.data
                    if event.end_stream and not self.is_clogged and call.arrives_whole(data):
                        h2.acknowledge_received_data(len(data), event.stream_id)
                    else:
                        call.receive(data, event.end_stream)
                        fed[call] = None
            elif kind is RequestReceived:
                self._open(event.stream_id, event.headers, event.end_stream)
            elif kind is StreamClosed or kind is StreamReset:
                call = calls.get(event.stream_id)
                if call is not None:
                    self._drop(call)
                elif self._to_reset:
                    self._to_reset.pop(event.stream_id, None)
            elif kind is WindowUpdated:
                pass  # The flush at the end of the tick sends what fits now.
            elif kind is TrailersReceived:
                call = calls.get(event.stream_id)
                if call is not None:
                    call.receive(b"", True)
                    fed[call] = None
            elif kind is SettingsReceived:
                if not self._said_hello:
                    self._said_hello = True
                    self.next_check = time.monotonic() + self.server.options.ping_every_s
            elif kind is PingAcknowledged:
                if event.opaque_data == _DRAIN_PING and self.server.is_draining:
                    self.take_no_more()
                else:
                    self._ping_is_out = False
                    self.next_check = time.monotonic() + self.server.options.ping_every_s
            elif kind is ConnectionClosed:
                self._say_goodbye("the protocol was broken")
                return
        for call in fed:
            call.deliver()

    def _open(self, stream_id: int, headers: tuple[tuple[bytes, bytes], ...], ends: bool) -> None:
        """Begin the call that *headers* ask for, or refuse it."""
        if self._is_closing:
            return
        if headers == self._last_headers:
            method, head = self._last_method, self._last_head
        else:
            try:
                head = framing.read_headers(headers, self.server.options.compress_answers)
            except framing.NotGrpc as refusal:
                with contextlib.suppress(ngh2.NGH2Error):  # It may have been reset already.
                    self.h2.send_response(stream_id, refusal.headers, end_stream=True)
                self._reset_later(stream_id, ends)
                return
            method = self.server.methods.get(head.path)
            if head.size <= _KEPT_HEAD_BYTES:
                self._last_headers, self._last_method, self._last_head = headers, method, head
        call = H2Call(self, stream_id, method or _NO_METHOD, head)
        if method is None or head.fault is not None or self.server.is_choosy:
            error = self._refusal(call, method, head)
            if error is not None:
                call.refuse(error, ends)
                return
            assert method is not None
        self._calls[stream_id] = call
        self._head_bytes += head.size
        if call.deadline is not None or method.client_streams:
            call.begin()
        if ends:
            call.receive(b"", True)
            call.deliver()

    def _refusal(
        self, call: H2Call, method: Method | None, head: framing.RequestHead
    ) -> BaseException | None:
        """Why *call* is not to be taken up, if it is not."""
        if method is None:
            return Unimplemented(f"unknown method {head.path.decode('ascii', 'replace')[:200]}")
        if head.fault is not None:
            return head.fault
        if self.server.is_draining and (method.client_streams or method.server_streams):
            return Draining("the server is draining; send the request to another")
        return method.refusal(call)

    def _send_answers(self) -> None:
        """Give libnghttp2 the answers of this tick, each with the end of its call."""
        answered, self.answered = self.answered, []
        h2, calls, prefix_bytes = self.h2, self._calls, framing.PREFIX_BYTES
        for call, message in answered:
            stream_id = call.stream_id
            headers, trailers = call.answer_headers
            size = len(message)
            try:
                h2.send_response(stream_id, headers)
                if call.head.compresses:
                    h2.send_data(stream_id, b"".join(framing.compressed(message)))
                elif size < JOINED_BYTES:
                    h2.send_data(stream_id, size.to_bytes(prefix_bytes, "big") + message)
                else:
                    h2.send_data(stream_id, framing.prefix(message))
                    h2.send_data(stream_id, message)
                    self.note_large(stream_id, size)
                h2.send_trailers(stream_id, trailers)
            except ngh2.NGH2Error:
                pass  # The stream has closed; its event is on the way.
            if calls.pop(stream_id, None) is not None:
                self._head_bytes -= call.head.size
                call.release()
            if self._parked:
                self._parked.discard(call)

    # What calls ask of it.

    def caller_of(self, head: framing.RequestHead) -> Caller:
        """Return who has sent *head*: the same object for as long as the credentials are the same."""
        if self._caller is not None and head is self._caller_head:
            return self._caller
        credentials = tuple(value for name, value in head.headers if name == b"authorization")
        if self._caller is None or credentials != self._credentials:
            texts = tuple(value.decode("latin-1") for value in credentials)
            certificate = certificate_names(self.transport.get_extra_info("peercert"))
            self._caller, self._credentials = Caller(texts, certificate), credentials
        # Only what is kept anyway: heads may be large, and connections many.
        self._caller_head = head if head is self._last_head else None
        return self._caller

    def ended(self, call: H2Call, is_half_closed: bool) -> None:
        """Forget *call*; tell its peer to stop sending once the answer has left."""
        if self._calls.pop(call.stream_id, None) is not None:
            self._head_bytes -= call.head.size
            call.release()
            if self._parked:
                self._parked.discard(call)
        if not is_half_closed:
            self._to_reset[call.stream_id] = None
        if not self.is_touched:
            self.server.touch(self)

    def replied(self, call: H2Call) -> None:
        """Send what *call* has replied at the end of the tick."""
        self._replied.append(call)
        self.server.touch(self)

    def acknowledge(self, size: int, stream_id: int) -> None:
        """Let the peer send *size* bytes more."""
        try:  # noqa: SIM105 - contextlib.suppress would double the price.
            self.h2.acknowledge_received_data(size, stream_id)
        except ngh2.NGH2Error:
            pass

    def park(self, call: H2Call) -> None:
        """Look at *call* again when more of its answers have left."""
        self._parked.add(call)
        self.server.touch(self)

    def note_large(self, stream_id: int, size: int) -> None:
        """Look after a reply of *size* bytes until it has left."""
        self._large[stream_id] = max(size, self._large.get(stream_id, 0))

    def note_buffered(self, change: int) -> None:
        """Count *change* more bytes that this connection makes the server hold."""
        self.buffered_bytes += change
        self.server.note_buffered(change)

    def _drop(self, call: H2Call) -> None:
        """The peer has given *call* up."""
        if self._calls.pop(call.stream_id, None) is not None:
            self._head_bytes -= call.head.size
            call.release()
            self._parked.discard(call)
            call.cancel()

    def _drop_calls(self) -> None:
        for call in list(self._calls.values()):
            self._drop(call)
        change = -self._unsent_bytes - self._noted_head_bytes
        self._unsent_bytes = self._noted_head_bytes = 0
        if change:
            self.note_buffered(change)

    def _sent_and_kept(self) -> int:
        """
        Return the bytes of large replies that have left and are kept, because the last of them have not.

        A peer whose window ends one byte before each answer would hold them all, and none would count.
        """
        kept = 0
        for stream_id, size in list(self._large.items()):
            queued = self.h2.queued_body_size(stream_id)
            if not queued:
                del self._large[stream_id]
            elif queued < size:
                kept += size - queued
        return kept

    def _kept_by_transport(self) -> int:
        """Return what large writes take up in the transport's buffer, which keeps each until all has left."""
        pending = self.transport.get_write_buffer_size()
        self.has_written_much = pending > 0
        return max(pending, _WRITE_BYTES) if pending else 0

    def _reset_later(self, stream_id: int, is_half_closed: bool) -> None:
        if not is_half_closed:
            self._to_reset[stream_id] = None

    def _reset_what_has_left(self) -> None:
        """RST_STREAM(NO_ERROR) after the trailers: the peer need not send the rest (RFC 9113, 8.1)."""
        waiting: dict[int, None] = {}
        for stream_id in self._to_reset:
            if self._is_paused or self.h2.queued_body_size(stream_id):
                waiting[stream_id] = None
            else:
                with contextlib.suppress(ngh2.NGH2Error):
                    self.h2.reset_stream(stream_id, ngh2.ErrorCode.NO_ERROR)
        if len(waiting) < len(self._to_reset):
            self.server.touch(self)
        self._to_reset = waiting

    def _unpark(self) -> None:
        for call in list(self._parked):
            if self.h2.queued_body_size(call.stream_id) <= UNSENT_STREAM_BYTES:
                self._parked.discard(call)
                call.unpark()

    def _say_goodbye(self, reason: str) -> None:
        """Send what the protocol has left to say (GOAWAY) and close."""
        if self._is_closing:
            return
        logger.info("connection closed peer=%s reason=%s", self.peer, reason)
        with contextlib.suppress(ngh2.NGH2Error):
            self.transport.write(self.h2.data_to_send(_WRITE_BYTES))
        self._is_closing = True
        self.next_check = time.monotonic() + self.server.options.goodbye_s
        self.transport.close()
        self._drop_calls()


def _peer_name(transport: asyncio.BaseTransport) -> str:
    """Return the peer as grpcio writes it: ipv4:HOST:PORT, ipv6:[HOST]:PORT or unix:."""
    name = transport.get_extra_info("peername")
    if not isinstance(name, tuple):
        return "unix:"
    return f"ipv6:[{name[0]}]:{name[1]}" if len(name) == 4 else f"ipv4:{name[0]}:{name[1]}"
