"""Requests of one stream in, an answer to each out, in the same order, however they are made."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque

from nnserver.call import Call
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

    @abstractmethod
    def take(self, message: bytes, slot: Slot) -> None:
        """See to it that *slot* is told the answer to *message*, or raise why there is none."""

    @abstractmethod
    def wrap(self, answer: bytes) -> bytes:
        """Return *answer*, which a slot was told, as a message of the stream."""

    @abstractmethod
    def error_answer(self, message: bytes, error: BaseException) -> bytes:
        """Return the answer to the request *message*, which failed."""

    def on_message(self, message: bytes) -> None:
        slot = Slot(self, self._call, message)
        with self._lock:
            if self._draining:
                return  # The end of the stream is on its way and says so.
            self._slots.append(slot)
        try:
            self.take(message, slot)
        except Exception as error:
            slot.fail(error)

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

    def fill(self, slot: Slot, message: bytes) -> None:
        """Take the answer of *slot*; send every answer that has none before it missing."""
        call, slots = self._call, self._slots
        # Replying under the lock keeps the order of two threads that answer at once.
        with self._lock:
            slot.reply = message
            if slots[0] is not slot:
                return
            count = 0
            while slots and (ready := slots[0].reply) is not None:
                call.reply(ready)
                slots.popleft()
                count += 1
            call.request(count)
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

    __slots__ = ("_message", "_stream", "deadline", "is_cancelled", "reply")

    def __init__(self, stream: OrderedStream, call: Call, message: bytes) -> None:
        self._stream = stream
        self._message = message
        self.deadline = call.deadline
        self.is_cancelled = call.is_cancelled
        self.reply: bytes | None = None

    def answer(self, message: bytes) -> None:
        """Take the answer."""
        self._stream.fill(self, self._stream.wrap(message))

    def fail(self, error: BaseException) -> None:
        """Say that there is none."""
        self._stream.fill(self, self._stream.error_answer(self._message, error))
