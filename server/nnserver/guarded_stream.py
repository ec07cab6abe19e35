"""
A stream's messages in, those of them that are allowed out: asks about each again, and keeps to a rate.

What exceeds the rate is not refused, it is not asked for: the peer's window closes until there is room again,
as it does for a server that is slow. A client that sends as it can gets as much as it may.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from nnserver.alarms import Alarms
from nnserver.call import Call, Caller, Metadata, Method
from nnserver.errors import ServerError
from nnserver.token_bucket import TokenBucket


class GuardedStream(Call):
    """
    A listener to the transport of *call*, and a call to *method*.

    refusal: why the caller may go on no longer, if so.  bucket: what its messages are taken from, if any.
    """

    def __init__(
        self,
        call: Call,
        method: Method,
        refusal: Callable[[], ServerError | None],
        bucket: Callable[[], TokenBucket | None],
        alarms: Alarms,
    ) -> None:
        self._call = call
        self._refusal = refusal
        self._bucket = bucket
        self._alarms = alarms
        self._is_over = False
        self._lock = threading.Lock()
        # Messages that the api wants and that were not asked for; those that were, and have not come.
        self._wanted = 0
        self._asked = 0
        self._alarm_is_set = False
        self._listener: Any = method.start(self)
        self._takes_many = hasattr(self._listener, "on_messages")

    # What the transport tells.

    def on_message(self, message: bytes) -> None:
        self.on_messages((message,))

    def on_messages(self, messages: Sequence[bytes]) -> None:
        if self._is_over:
            return
        refusal = self._refusal()
        if refusal is not None:
            self._is_over = True
            self._call.fail(refusal)
            self._listener.on_cancel()
            return
        bucket = self._bucket()
        if bucket is not None:
            bucket.charge(len(messages))
        with self._lock:
            self._asked -= len(messages)
        if self._takes_many:
            self._listener.on_messages(messages)
        else:
            for message in messages:
                self._listener.on_message(message)
        if bucket is not None:
            self._ask()

    def on_half_close(self) -> None:
        if not self._is_over:
            self._listener.on_half_close()

    def on_cancel(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._listener.on_cancel()

    def on_drain(self) -> None:
        if not self._is_over:
            self._listener.on_drain()

    # What the api asks.

    def request(self, n: int) -> None:
        with self._lock:
            self._wanted += n
        self._ask()

    def _ask(self) -> None:
        """Ask for as many messages as are wanted and allowed now; for the rest, later."""
        bucket = self._bucket()
        with self._lock:
            n = self._wanted
            if bucket is not None:
                n = max(0, min(n, int(bucket.level()) - self._asked))
                # With some on their way, the next to arrive asks again.
                if (
                    not n
                    and self._wanted
                    and not self._asked
                    and not self._alarm_is_set
                    and not self._is_over
                ):
                    self._alarm_is_set = True
                    self._alarms.after(bucket.wait_s(), self._ask_again)
            self._wanted -= n
            self._asked += n
        if n:
            self._call.request(n)

    def _ask_again(self) -> None:
        with self._lock:
            self._alarm_is_set = False
        self._ask()

    @property
    def caller(self) -> Caller:
        return self._call.caller

    @property
    def method(self) -> str:  # type: ignore[override]
        return self._call.method

    @property
    def metadata(self) -> Metadata:  # type: ignore[override]
        return self._call.metadata

    @property
    def peer(self) -> str:  # type: ignore[override]
        return self._call.peer

    @property
    def origin(self) -> Hashable:  # type: ignore[override]
        return self._call.origin

    @property
    def deadline(self) -> float | None:  # type: ignore[override]
        return self._call.deadline

    def is_cancelled(self) -> bool:
        return self._call.is_cancelled()

    def reply(self, message: bytes) -> None:
        self._call.reply(message)

    def reply_all(self, messages: Sequence[bytes]) -> None:
        self._call.reply_all(messages)

    def add_metadata(self, initial: Metadata = (), trailing: Metadata = ()) -> None:
        self._call.add_metadata(initial, trailing)

    def finish(self) -> None:
        self._call.finish()

    def fail(self, error: BaseException) -> None:
        self._call.fail(error)
