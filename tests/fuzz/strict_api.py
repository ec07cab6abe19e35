"""Calls in, answers of every kind out; whatever a transport must not do with a call raises ContractBroken."""

from __future__ import annotations

from collections.abc import Callable

from nnserver.call import Call, Method, Methods, single
from nnserver.errors import InvalidArgument


class ContractBroken(AssertionError):
    """The transport did what call.py says that it never does."""


class StrictCall:
    """
    A Listener that knows what it may hear. *answer* is called for each message, as answer(self, message).

    A call has ended when the api has ended it or has heard that it was cancelled; nothing follows.
    """

    def __init__(
        self, api: StrictApi, call: Call, answer: Callable[[StrictCall, bytes], None], window: int
    ) -> None:
        self.api = api
        self.call = call
        self.total = 0
        self.has_ended = False
        # From another thread: the loop may have something to tell before it hears of that.
        self._ended_elsewhere = False
        self._answer = answer
        self._asked_for = 0
        self._is_half_closed = False
        api.open.add(self)
        self.request(window)

    def request(self, n: int) -> None:
        self._asked_for += n
        self.call.request(n)

    def reply(self, message: bytes) -> None:
        self.call.reply(message)

    def end(self, error: Exception | None = None) -> None:
        self._ended_elsewhere = self.api.is_elsewhere
        self._over()
        if error is None:
            self.call.finish()
        else:
            self.call.fail(error)

    def on_message(self, message: bytes) -> None:
        self._must(not self.has_ended, "a message after the end")
        self._must(not self._is_half_closed, "a message after the half-close")
        self._must(self._asked_for > 0, "a message that was not asked for")
        self._must(type(message) is bytes, f"a message that is a {type(message).__name__}")
        self._must(len(message) <= self.api.largest, "a message beyond the limit")
        self._asked_for -= 1
        self._answer(self, message)

    def on_half_close(self) -> None:
        self._must(not self._is_half_closed, "a second half-close")
        self._is_half_closed = True
        if not self.has_ended:
            self._answer(self, b"")

    def on_cancel(self) -> None:
        self._must(not self.has_ended or self._ended_elsewhere, "a cancellation after the end")
        self._must(self.call.is_cancelled(), "a cancelled call that says it is not")
        self._over()

    def on_drain(self) -> None:
        self._must(not self.has_ended or self._ended_elsewhere, "a drain after the end")

    @property
    def is_half_closed(self) -> bool:
        return self._is_half_closed

    def _over(self) -> None:
        self.has_ended = True
        self.api.open.discard(self)
        self.api.waiting.pop(self, None)

    def _must(self, is_so: bool, what: str) -> None:
        if not is_so:
            self.api.broken.append(f"{what} on {self.call.method}")
            raise ContractBroken(what)


class StrictApi:
    """
    /f/Echo and /f/Plain; /f/Wait and /f/Later (answer when `answer_waiting` is called); /f/Fail, /f/Grow (so
    many bytes), /f/Info; /f/Count (a stream of that many messages); /f/Collect; /f/Chat and /f/Chat64 (so
    many at once).

    Echo and Wait take the requests of a tick together, and hear of no end.

    open: calls that have not ended.  waiting, singles: those of Later and Wait, and what they were asked.
    broken: what the transport did wrong.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self.open: set[StrictCall] = set()
        self.waiting: dict[StrictCall, bytes] = {}
        self.broken: list[str] = []
        self.singles: list[tuple[Call, bytes]] = []
        self.is_elsewhere = False
        # What a transport hands over may be larger than the limit, so that the api can say by how much.
        self.largest = 4 * max_message_bytes

    def answer_waiting(self) -> None:
        """Answer every call of Later and Wait that still waits."""
        for call, message in list(self.waiting.items()):
            call.reply(message)
            call.end()
        singles, self.singles = self.singles, []
        for single_call, message in singles:
            single_call.answer(message)

    def answer_elsewhere(self) -> None:
        """The same, said by another thread."""
        self.is_elsewhere = True
        self.answer_waiting()
        self.is_elsewhere = False

    def _take(self, call: Call, message: bytes) -> None:
        if len(message) > self.largest or type(message) is not bytes:
            self.broken.append(f"{len(message)} bytes as a {type(message).__name__} on {call.method}")

    def methods(self) -> Methods:
        def unary(name: str, answer: Callable[[StrictCall, bytes], None], streams: bool = False) -> Method:
            def once(call: StrictCall, message: bytes) -> None:
                if not call.is_half_closed:
                    answer(call, message)

            return Method(f"/f/{name}", lambda call: StrictCall(self, call, once, 1), server_streams=streams)

        def stream(name: str, answer: Callable[[StrictCall, bytes], None], window: int = 1) -> Method:
            return Method(f"/f/{name}", lambda call: StrictCall(self, call, answer, window), True, True)

        def echo(call: StrictCall, message: bytes) -> None:
            call.reply(message)
            call.end()

        def later(call: StrictCall, message: bytes) -> None:
            self.waiting[call] = message

        def fail(call: StrictCall, message: bytes) -> None:
            call.end(InvalidArgument(message.decode("utf-8", "replace") + "\n\u263a"))

        def grow(call: StrictCall, message: bytes) -> None:
            call.reply(bytes(min(int.from_bytes(message[:4], "big"), 400_000)))
            call.end()

        def info(call: StrictCall, message: bytes) -> None:
            call.call.add_metadata(call.call.metadata, (("x-trailer", "v"),))
            call.reply(repr((call.call.method, call.call.metadata, call.call.peer)).encode())
            call.end()

        def count(call: StrictCall, message: bytes) -> None:
            for i in range(min(len(message), 500)):
                call.reply(str(i).encode())
            call.end()

        def collect(call: StrictCall, message: bytes) -> None:
            if call.is_half_closed:
                call.reply(str(call.total).encode())
                call.end()
            else:
                call.total += len(message)
                call.request(1)

        def chat(call: StrictCall, message: bytes) -> None:
            if call.is_half_closed:
                call.end()
            else:
                call.reply(message)
                call.request(1)

        def at_once(call: Call, message: bytes) -> None:
            self._take(call, message)
            call.add_metadata((), (("x-bytes-bin", b"\0\1"),) if message else ())
            call.answer(message)

        def in_time(call: Call, message: bytes) -> None:
            self._take(call, message)
            self.singles.append((call, message))

        found = [
            *(single("/f/Echo", at_once), single("/f/Wait", in_time)),
            *(unary("Plain", echo), unary("Later", later), unary("Fail", fail), unary("Grow", grow)),
            *(unary("Info", info), unary("Count", count, streams=True)),
            *(stream("Collect", collect), stream("Chat", chat), stream("Chat64", chat, 64)),
        ]
        return {method.path: method for method in found}
