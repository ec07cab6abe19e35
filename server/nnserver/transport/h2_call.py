"""Pieces of a request's body in, messages to the api, its replies and status back: a stream as a Call."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from threading import get_ident
from typing import TYPE_CHECKING

import ngh2

from nnserver.call import RETRY_PUSHBACK, Call, Caller, Listener, Metadata, Method, check_metadata
from nnserver.errors import (
    BadMessage,
    Expired,
    ServerError,
    Unimplemented,
    retry_after_ms,
    status_and_text,
)
from nnserver.transport import framing

if TYPE_CHECKING:
    from nnserver.transport.h2_connection import H2Connection

logger = logging.getLogger(__name__)

# Answers of one stream that have not left: demand that follows them waits.
UNSENT_STREAM_BYTES = 256 << 10
# Answers below this size are copied behind their prefix: cheaper than to hand over two pieces. Larger ones
# are looked after until all of them has left.
JOINED_BYTES = 16 << 10
# A message is refused with a text of the api's up to this multiple of the limit; beyond it the call ends.
_HARD_LIMIT_FACTOR = 4
# Looks, with hardly a byte between them, after which the rest of a request is not waited for. The looks are
# ten seconds apart; 240 bytes a second is what ASP.NET's server asks of a request's body.
_STUCK_LOOKS = 3
_LEAST_BYTES_A_LOOK = 2400

_RESPONSE_HEADERS = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_OK_TRAILERS = ((b"grpc-status", b"0"),)


class Nobody:
    """The listener of calls that have not begun or have ended."""

    def on_message(self, message: bytes) -> None:
        pass

    def on_half_close(self) -> None:
        pass

    def on_cancel(self) -> None:
        pass

    def on_drain(self) -> None:
        pass


_NOBODY = Nobody()


class H2Call(Call):
    """
    One stream of a connection, as an api sees it.

    A call whose client sends one message begins, and counts, once that message is there: a client that
    never gets to the end of its request takes up no call of another's.
    """

    # What most calls never change stands here: to set it on each would cost more than all else of a call.
    deadline: float | None = None
    _assembler: framing.Assembler | None = None
    _listener: Listener = _NOBODY
    _credits = 0
    # Asked for after replies that have not left.
    _parked_credits = 0
    # Of the stream's window: received and not acknowledged yet.
    _held_bytes = 0
    # In memory, and counted as such: received and not delivered yet.
    _buffered_bytes = 0
    _message: bytes | None = None
    _looks = 0
    _bytes_at_look = 0
    # Framed replies that libnghttp2 has not been given yet.
    _replies: list[bytes] | None = None
    _has_begun = False
    _is_half_closed = False
    _said_half_close = False
    _takes_many = False
    _is_cancelled = False
    _is_delivering = False
    _is_held_up = False
    _has_ended = False
    _wrote_headers = False
    _headers: framing.Headers = _RESPONSE_HEADERS
    _initial: framing.Headers = ()
    _trailing: framing.Headers = ()

    def __init__(
        self, connection: H2Connection, stream_id: int, method: Method, head: framing.RequestHead
    ) -> None:
        self.stream_id = stream_id
        self._connection = connection
        self._method = method
        self.head = head
        if head.timeout_s is not None:
            self.deadline = time.monotonic() + head.timeout_s
        if head.encoding:
            # Who compresses is told which ways are known.
            self._headers = (*self._headers, framing.ACCEPT_ENCODING)
        if head.compresses:
            self._headers = (*self._headers, framing.GZIP_ENCODING)

    @property
    def method(self) -> str:  # type: ignore[override]
        return self._method.path

    @property
    def origin(self) -> H2Connection:  # type: ignore[override]
        return self._connection

    @property
    def peer(self) -> str:  # type: ignore[override]
        return self._connection.peer

    @property
    def metadata(self) -> Metadata:  # type: ignore[override]
        return framing.metadata(self.head.headers)

    @property
    def caller(self) -> Caller:
        return self._connection.caller_of(self.head)

    def is_cancelled(self) -> bool:
        return self._is_cancelled

    # What the api asks, from any thread.

    def request(self, n: int) -> None:
        self._connection.server.in_loop(self._request, n)

    def reply(self, message: bytes) -> None:
        self._connection.server.in_loop(self._reply, message)

    def reply_all(self, messages: Sequence[bytes]) -> None:
        self._connection.server.in_loop(self._reply_all, messages)

    def add_metadata(self, initial: Metadata = (), trailing: Metadata = ()) -> None:
        check_metadata((*initial, *trailing))
        headers = framing.metadata_headers(initial), framing.metadata_headers(trailing)
        self._connection.server.in_loop(self._add_metadata, *headers)

    def finish(self) -> None:
        self._connection.server.in_loop(self._finish)

    def fail(self, error: BaseException) -> None:
        self._connection.server.in_loop(self._fail, error)

    def answer(self, message: bytes) -> None:
        connection = self._connection
        server = connection.server
        if get_ident() != server.thread_id or server.posted:
            server.in_loop(self._answer, message)
        elif not self._has_ended:
            # _answer, which is on the way of each request.
            self._has_ended = True
            connection.answered.append((self, message))
            if not connection.is_touched:
                server.touch(connection)

    # What the connection tells.

    def begin(self) -> None:
        """Take the call up; a stream of the client's starts its listener at once."""
        if self.deadline is not None:
            self._connection.server.timed_calls.add(self)
        if self._method.client_streams:
            try:
                self._start()
            except Exception as error:
                self.abandon(error)

    def release(self) -> None:
        """Count the call no longer, and hold nothing for it any more."""
        server = self._connection.server
        if self._assembler is not None:
            self._assembler = self._message = None
            if self._held_bytes:
                self._acknowledge_held()
            if self._buffered_bytes:
                self._connection.note_buffered(-self._buffered_bytes)
                self._buffered_bytes = 0
        if self._has_begun:
            server.dismiss(self._method)
        if self.deadline is not None:
            server.timed_calls.discard(self)

    def refuse(self, error: BaseException, is_half_closed: bool) -> None:
        """End a call that is not taken up."""
        self._is_half_closed = is_half_closed
        self._fail(error)

    def cancel(self) -> None:
        """The peer has gone, or has reset the stream."""
        self._is_cancelled = True
        if not self._has_ended:
            self._has_ended = True
            listener, self._listener = self._listener, _NOBODY
            self._tell(listener.on_cancel)

    def abandon(self, error: BaseException) -> None:
        """End the call with the status of *error*, and let the api know that nobody waits any more."""
        if not self._has_ended:
            self._is_cancelled = True
            listener = self._listener
            self._fail(error)
            self._tell(listener.on_cancel)

    def drain(self) -> None:
        """Let the api finish what was received."""
        self._tell(self._listener.on_drain)

    def receive(self, data: bytes, ends: bool) -> None:
        """Take *data* of the stream's body; *ends*: it was the last. `deliver` is to be called after it."""
        assembler = self._assembler
        if ends:
            self._is_half_closed = True
        if assembler is None:
            limit = self._connection.server.options.max_message_bytes
            assembler = framing.Assembler(_HARD_LIMIT_FACTOR * limit, limit, self.head.encoding)
            self._assembler = assembler
        if data:
            self._held_bytes += len(data)
            assembler.feed(data)

    def send_replies(self) -> None:
        """Give libnghttp2 what was replied in this tick; then count the demand that followed."""
        self._send_replies()
        credits, self._parked_credits = self._parked_credits, 0
        if credits:
            self._request(credits)

    def arrives_whole(self, data: bytes) -> bool:
        """
        Take *data*, which ends the body, if it is one message and nothing came before it.

        It is handled in this tick, with all others that have arrived.
        """
        # The prefix as one number: a message that is compressed is too long here.
        size = len(data) - framing.PREFIX_BYTES
        server = self._connection.server
        if (
            int.from_bytes(data[: framing.PREFIX_BYTES], "big") != size
            or self._assembler is not None
            or self._method.handle_all is None
            or size > server.options.max_message_bytes
            or server.open_calls >= server.options.max_concurrent_calls
        ):
            return False
        server.open_calls += 1
        self._has_begun = self._is_half_closed = True
        server.arrivals[self._method].append((self, data[framing.PREFIX_BYTES :]))
        return True

    def _arrive(self, message: bytes) -> None:
        """Have the one message of the request handled in this tick."""
        server = self._connection.server
        error = server.admit(self._method)
        if error is not None:
            self._fail(error)
            return
        self._has_begun = True
        server.arrivals[self._method].append((self, message))

    def unpark(self) -> None:
        """The replies before the parked demand have left."""
        self._credits += self._parked_credits
        self._parked_credits = 0
        self._is_held_up = False
        self.deliver()
        self._connection.server.touch(self._connection)

    def end_if_stuck(self) -> None:
        """End a call whose single request began to come and then stopped, look after look."""
        if self._has_begun or self._is_held_up:
            return
        # They do not shrink while a request comes in.
        if self._buffered_bytes - self._bytes_at_look >= _LEAST_BYTES_A_LOOK:
            self._looks = 0
        self._bytes_at_look = self._buffered_bytes
        self._looks += 1
        if self._looks > _STUCK_LOOKS:
            self.abandon(Expired("the rest of the request did not come"))

    def _start(self) -> None:
        error = self._connection.server.admit(self._method)
        if error is not None:
            raise error
        self._has_begun = True
        listener = self._method.start(self)
        if not self._has_ended:  # Else they would keep each other alive until the next collection.
            self._listener = listener
            self._takes_many = hasattr(listener, "on_messages")

    def deliver(self) -> None:
        """Hand over every complete message that was asked for; acknowledge what is no longer held."""
        # While it is being delivered, a listener has asked for more: the loop below sees it.
        if self._is_delivering or self._has_ended:
            return
        self._is_delivering = True
        try:
            if self._connection.is_clogged:
                self._hold_up()
            elif self._method.client_streams:
                self._deliver_stream()
            elif not self._has_begun:
                self._deliver_single()
        except Exception as error:
            self.abandon(error)
        self._is_delivering = False
        if self._has_ended:
            return  # Released, and held no more.
        assembler = self._assembler
        buffered = assembler.size if assembler else 0
        if self._message is not None and not self._has_begun:
            buffered += len(self._message)
        if buffered != self._buffered_bytes:
            change, self._buffered_bytes = buffered - self._buffered_bytes, buffered
            self._connection.note_buffered(change)
        # With demand, a message that is being put together is waited for: let the peer go on.
        if (
            not self._is_held_up
            and (self._credits > 0 or not self._method.client_streams)
            and self._held_bytes
        ):
            self._acknowledge_held()

    def _deliver_stream(self) -> None:
        assembler = self._assembler
        while self._credits > 0 and assembler and not self._has_ended:
            if self.head.encoding:
                message = self._next_compressed(assembler)
                messages = [] if message is None else [message]
            else:
                messages = assembler.take_messages(self._credits)
            if not messages:
                break
            self._credits -= len(messages)
            if self._takes_many:
                self._listener.on_messages(messages)  # type: ignore[attr-defined]
                continue
            for message in messages:
                self._listener.on_message(message)
        if self._is_half_closed and self._credits > 0 and not (self._has_ended or self._is_held_up):
            if assembler and assembler.size:
                raise BadMessage("the stream ended inside a message")
            if not self._said_half_close:
                self._said_half_close = True
                self._listener.on_half_close()

    def _deliver_single(self) -> None:
        assembler = self._assembler
        assert assembler is not None
        if self._message is None:
            if self.head.encoding:
                self._message = self._next_compressed(assembler)
            else:
                self._message = assembler.next_message()
        if self._message is None:
            if self._is_half_closed and not self._is_held_up:
                if assembler.size:
                    raise BadMessage("the stream ended inside a message")
                raise Unimplemented(f"{self.method} takes exactly one message")
            return
        if assembler.size:
            raise Unimplemented(f"{self.method} takes exactly one message")
        if self._is_half_closed:
            message, self._message = self._message, None
            if self._method.handle_all:
                self._arrive(message)
                return
            self._start()
            self._listener.on_message(message)
            self._listener.on_half_close()

    def _next_compressed(self, assembler: framing.Assembler) -> bytes | None:
        """Return the next message, if it is there and not too much work for this tick."""
        server = self._connection.server
        if not server.may_inflate():
            self._hold_up()
            return None
        try:
            message = assembler.next_message()
        except ServerError:
            # It may have been inflated up to the limit before that showed.
            server.note_inflated(server.options.max_message_bytes)
            raise
        if message is not None:
            server.note_inflated(len(message))
        return message

    def _hold_up(self) -> None:
        """Go on in a later tick, when the connection's answers have left or the others had their turn."""
        self._is_held_up = True
        self._connection.park(self)

    def _acknowledge_held(self) -> None:
        held, self._held_bytes = self._held_bytes, 0
        self._connection.acknowledge(held, self.stream_id)

    def _request(self, n: int) -> None:
        if self._has_ended:
            return
        connection = self._connection
        if self._replies:
            self._parked_credits += n
            return
        if self._wrote_headers and connection.h2.queued_body_size(self.stream_id) > UNSENT_STREAM_BYTES:
            self._parked_credits += n
            connection.park(self)
            return
        had_none = self._credits == 0
        self._credits += n
        if had_none and (self._held_bytes or self._is_half_closed) and self._method.client_streams:
            self.deliver()
            connection.server.touch(connection)  # What was delivered is to be run.

    @property
    def _response_headers(self) -> framing.Headers:
        return (*self._headers, *self._initial) if self._initial else self._headers

    def _add_metadata(self, initial: framing.Headers, trailing: framing.Headers) -> None:
        self._initial += initial
        self._trailing += trailing

    def _reply(self, message: bytes) -> None:
        self._reply_all((message,))

    def _reply_all(self, messages: Sequence[bytes]) -> None:
        if self._has_ended:
            return
        if self._replies is None:
            self._replies = []
            self._connection.replied(self)
        replies = self._replies
        for message in messages:
            if self.head.compresses:
                replies += framing.compressed(message)
            else:
                replies.append(framing.prefix(message))
                replies.append(message)

    def _send_replies(self) -> None:
        replies, self._replies = self._replies, None
        if not replies:
            return
        h2 = self._connection.h2
        with contextlib.suppress(ngh2.NGH2Error):  # The stream has closed; its event is on the way.
            if not self._wrote_headers:
                h2.send_response(self.stream_id, self._response_headers)
                self._wrote_headers = True
            data = b"".join(replies)
            h2.send_data(self.stream_id, data)
            if len(data) >= JOINED_BYTES:
                self._connection.note_large(self.stream_id, len(data))

    def _answer(self, message: bytes) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._connection.answered.append((self, message))
            self._connection.server.touch(self._connection)

    @property
    def answer_headers(self) -> tuple[framing.Headers, framing.Headers]:
        """What goes before the one message of an answer, and after it."""
        if self._initial or self._trailing:
            return (*self._headers, *self._initial), (*_OK_TRAILERS, *self._trailing)
        return self._headers, _OK_TRAILERS

    def _finish(self) -> None:
        self._end(_OK_TRAILERS)

    def _fail(self, error: BaseException) -> None:
        if not self._has_ended:
            trailers = framing.error_trailers(*status_and_text(error))
            pause_ms = retry_after_ms(error)
            if pause_ms is not None:
                trailers += ((RETRY_PUSHBACK.encode(), b"%d" % pause_ms),)
                self._connection.server.note_refused()
            self._end(trailers)

    def _end(self, trailers: framing.Headers) -> None:
        if self._has_ended:
            return
        self._send_replies()
        self._has_ended = True
        self._listener = _NOBODY
        h2 = self._connection.h2
        if self._trailing:
            trailers = (*trailers, *self._trailing)
        with contextlib.suppress(ngh2.NGH2Error):
            if self._initial and not self._wrote_headers:
                h2.send_response(self.stream_id, self._response_headers)
                self._wrote_headers = True
            if self._wrote_headers:
                h2.send_trailers(self.stream_id, trailers)
            else:
                h2.send_response(self.stream_id, (*self._headers, *trailers), end_stream=True)
        self._connection.ended(self, self._is_half_closed)

    def _tell(self, what: Callable[[], None]) -> None:
        try:
            what()
        except Exception:
            logger.exception("an api failed to hear of the end of a call method=%s", self.method)
