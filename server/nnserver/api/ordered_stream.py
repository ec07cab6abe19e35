"""Requests of one stream in, an answer to each out, in the same order, however they are made."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from nnserver.call import Call, Metadata
from nnserver.errors import Draining


class OrderedStream(ABC):
    """
    A listener that answers each message of a stream once, in the order of the messages.

    At most *window* requests are taken and not yet answered. A request that fails is answered with its
    error, and the stream lives on; a drain ends it once everything that was taken is answered.
    """

    def __init__(self, call: Call, window: int) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._slots: deque[Slot] = deque()
        self._half_closed = False
        self._draining = False
        call.request(window)

    @property
    def metadata(self) -> Metadata:
        """What the call came with."""
        return self._call.metadata

    @abstractmethod
    def take(self, requests: Sequence[tuple[Slot, bytes]]) -> None:
        """See to it that each slot is told the answer to its message, or why there is none."""

    @abstractmethod
    def wrap(self, answer: bytes) -> bytes:
        """Return *answer*, which a slot was told, as a message of the stream."""

    @abstractmethod
    def error_answer(self, message: bytes, error: BaseException) -> bytes:
        """Return the answer to the request *message*, which failed."""

    def on_message(self, message: bytes) -> None:
        self.on_messages((message,))

    def on_messages(self, messages: Sequence[bytes]) -> None:
        """Take *messages*, which have come together."""
        requests = [(Slot(self, self._call, message), message) for message in messages]
        with self._lock:
            if self._draining:
                return  # The end of the stream is on its way and says so.
            self._slots += [slot for slot, _ in requests]
        self.take(requests)

    def on_half_close(self) -> None:
        with self._lock:
            self._half_closed = True
            self._end_if_done()

    def on_cancel(self) -> None:  # noqa: B027
        pass  # Waiting jobs ask call.is_cancelled() before they cost anything.

    def on_drain(self) -> None:
        with self._lock:
            self._draining = True
            self._end_if_done()

    def settle(self) -> None:
        """Send every answer that has none before it missing."""
        call, slots = self._call, self._slots
        # Replying under the lock keeps the order of two threads that answer at once.
        with self._lock:
            ready: list[bytes] = []
            while slots and (reply := slots[0].reply) is not None:
                ready.append(reply)
                slots.popleft()
            if ready:
                call.reply_all(ready)
                call.request(len(ready))
                self._end_if_done()

    def _end_if_done(self) -> None:
        if self._slots:
            return
        if self._half_closed:
            self._call.finish()
        elif self._draining:
            self._call.fail(Draining("the server is draining; send the unanswered requests to another"))


class Slot:
    """One request of a stream and, once known, the reply to it: who waits for the request's job."""

    __slots__ = ("_message", "_stream", "deadline", "is_cancelled", "origin", "reply")

    # The stream's window holds its client back.
    is_patient = True

    def __init__(self, stream: OrderedStream, call: Call, message: bytes) -> None:
        self._stream = stream
        self._message = message
        self.deadline = call.deadline
        self.origin = call.origin
        self.is_cancelled = call.is_cancelled
        self.reply: bytes | None = None

    @property
    def metadata(self) -> Metadata:
        return self._stream.metadata

    def answer(self, message: bytes) -> OrderedStream:
        """Take the answer; the stream sends it once the others of its batch are there, too."""
        self.reply = self._stream.wrap(message)
        return self._stream

    def fail(self, error: BaseException) -> None:
        """Say that there is none."""
        self.reply = self._stream.error_answer(self._message, error)
        self._stream.settle()
