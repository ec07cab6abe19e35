"""A Call that records what an api does with it: demand, replies and the one end."""

from __future__ import annotations

import threading

from nnserver.call import Call, Caller, Metadata, check_metadata


class FakeCall(Call):
    """
    A call without a transport.

    replies: messages in the order of `reply`.  demand: messages asked for, in total.
    initial, trailing: metadata that the api added.
    error: what the call failed with.  A second end is ignored, as the seam says; a reply after
    the end is an error here, so that a test sees it.
    """

    def __init__(self, deadline: float | None = None, caller: Caller | None = None) -> None:
        self._caller = caller or Caller()
        self.method = "/test.Service/Method"
        self.metadata = ()
        self.peer = "test"
        self.deadline = deadline
        self.origin = self.peer
        self.demand = 0
        self.replies: list[bytes] = []
        self.initial: Metadata = ()
        self.trailing: Metadata = ()
        self.error: BaseException | None = None
        self.is_finished = False
        self.has_gone = False
        self._ended = threading.Event()
        self._lock = threading.Lock()

    @property
    def caller(self) -> Caller:
        return self._caller

    def is_cancelled(self) -> bool:
        return self.has_gone

    def request(self, n: int) -> None:
        with self._lock:
            self.demand += n

    def reply(self, message: bytes) -> None:
        assert isinstance(message, bytes)
        with self._lock:
            assert not self._ended.is_set(), "a reply after the end"
            self.replies.append(message)

    def add_metadata(self, initial: Metadata = (), trailing: Metadata = ()) -> None:
        check_metadata((*initial, *trailing))
        with self._lock:
            self.initial += initial
            self.trailing += trailing

    def finish(self) -> None:
        with self._lock:
            if not self._ended.is_set():
                self.is_finished = True
                self._ended.set()

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if not self._ended.is_set():
                self.error = error
                self._ended.set()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def wait_for_end(self) -> None:
        """Wait until an engine's thread has ended the call; give up after ten seconds."""
        assert self._ended.wait(10), "the call was not ended"
