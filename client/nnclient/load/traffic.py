"""
Questions over a call -> a Tally: the loops that send and receive.

A closed loop keeps a number of requests in flight; its rate is the server's. An open loop sends
when a request is due, answered or not, as independent users do. Its latency counts from when a
request was due: if it were counted from when it was sent, the time that a slow server makes
others wait would not show.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio

from nnclient.load.questions import Questions
from nnclient.load.tally import Tally, Window

# Requests that an open loop has sent and that are unanswered: more are held back, late, so that a
# server which cannot keep up does not fill this machine's memory. Lateness counts as latency.
MOST_OUTSTANDING = 10_000

# After a connection has failed at once: without it, trying again would take all of the CPU.
_PAUSE_S = 0.05


class Clock(Protocol):
    """Time as the traffic sees it; a fake one in tests."""

    def now(self) -> float:
        """Return the time in seconds."""

    async def wait_until(self, time: float) -> None:
        """Return at *time*, as exactly as can be. Lets others run in any case."""

    async def pause(self, seconds: float) -> None:
        """Return after *seconds*, more or less."""


class StreamCall(Protocol):
    """The part of a bidirectional grpc.aio call that is used here: bytes out, bytes or EOF in."""

    async def write(self, request: bytes) -> None: ...
    async def read(self) -> Any: ...
    async def done_writing(self) -> None: ...


@dataclass
class Traffic:
    """What all loops share: what to send, when to stop, where to count."""

    questions: Questions
    window: Window
    clock: Clock
    tally: Tally = field(default_factory=Tally)

    def take_answer(self, number: int, due: float, answer: bytes) -> None:
        """Count the answer to request *number*."""
        now = self.clock.now()
        fault = self.questions.fault_of(number, answer)
        if fault is None:
            self.tally.note_answer(self.window, due, now)
        else:
            self.tally.note_error(self.window, due, *fault)

    def note_sending(self, due: float) -> None:
        """Count how late a request that was due at *due* is sent."""
        self.tally.note_lag(self.window, due, self.clock.now())

    def take_failure(self, due: float, error: Any) -> None:
        """Count a request that ended in *error*, a grpc.RpcError."""
        self.tally.note_error(self.window, due, error.code().name, error.details() or "")

    async def ask(self, call: Callable[[bytes], Awaitable[bytes]], due: float) -> bool:
        """Send the next request over *call* and count what comes of it; return False if no one was there."""
        number = self.questions.next_number()
        try:
            answer = await call(self.questions.requests[number])
        except grpc.RpcError as error:
            self.take_failure(due, error)
            return error.code() is not grpc.StatusCode.UNAVAILABLE
        self.take_answer(number, due, answer)
        return True


async def closed_unary(traffic: Traffic, call: Callable[[bytes], Awaitable[bytes]], concurrency: int) -> None:
    """Keep *concurrency* unary requests in flight until the window ends."""
    clock, end = traffic.clock, traffic.window.end

    async def keep_asking() -> None:
        while (now := clock.now()) < end:
            if not await traffic.ask(call, now):
                await clock.pause(_PAUSE_S)

    await asyncio.gather(*(keep_asking() for _ in range(concurrency)))


async def open_unary(
    traffic: Traffic, call: Callable[[bytes], Awaitable[bytes]], arrivals: Iterator[float]
) -> None:
    """Send a unary request at each of *arrivals* until the window ends; wait for the last answers."""
    pace = OpenPace(traffic, arrivals)

    async def ask(due: float) -> None:
        traffic.note_sending(due)
        await traffic.ask(call, due)
        pace.free()

    tasks: set[asyncio.Task[None]] = set()
    while (due := await pace.next_due()) < traffic.window.end:
        task = asyncio.create_task(ask(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


class Pace(Protocol):
    """Says when the next request of a stream is due."""

    async def next_due(self) -> float:
        """Return, when a request may be sent, the time at which it was due."""

    def free(self) -> None:
        """Take note that a request has been answered or has failed."""


class ClosedPace:
    """A request is due when one of the *concurrency* in flight is answered."""

    def __init__(self, traffic: Traffic, concurrency: int) -> None:
        self._clock = traffic.clock
        self._room = asyncio.Semaphore(concurrency)

    async def next_due(self) -> float:
        await self._room.acquire()
        return self._clock.now()

    def free(self) -> None:
        self._room.release()


class OpenPace:
    """A request is due at each of *arrivals*, whatever has become of those before."""

    def __init__(self, traffic: Traffic, arrivals: Iterator[float]) -> None:
        self._clock = traffic.clock
        self._arrivals = arrivals
        self._room = asyncio.Semaphore(MOST_OUTSTANDING)

    async def next_due(self) -> float:
        due = next(self._arrivals)
        await self._clock.wait_until(due)
        await self._room.acquire()
        return due

    def free(self) -> None:
        self._room.release()


async def stream(traffic: Traffic, open_call: Callable[[], StreamCall], pace: Pace) -> None:
    """
    Send requests over a stream at *pace* until the window ends; wait for the last answers.

    When a stream fails, the requests in flight on it count as failed, and a new one is opened.
    """
    while not await _one_stream(traffic, open_call(), pace):
        await traffic.clock.pause(_PAUSE_S)


async def _one_stream(traffic: Traffic, call: StreamCall, pace: Pace) -> bool:
    """Send and receive over *call*; return whether the window has ended."""
    pending: deque[tuple[int, float]] = deque()
    writer = asyncio.create_task(_write(traffic, call, pace, pending))
    status, text = "UNKNOWN", "the server ended the stream before it had answered all"
    try:
        while (answer := await call.read()) is not grpc.aio.EOF:
            traffic.take_answer(*pending.popleft(), answer)
            pace.free()
    except grpc.RpcError as rpc_error:
        error: Any = rpc_error
        status, text = error.code().name, error.details() or ""
    writer.cancel()
    await asyncio.wait([writer])
    for _, due in pending:
        traffic.tally.note_error(traffic.window, due, status, text)
        pace.free()
    return traffic.clock.now() >= traffic.window.end


async def _write(traffic: Traffic, call: StreamCall, pace: Pace, pending: deque[tuple[int, float]]) -> None:
    # A stream that has failed is the reader's business.
    with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
        while (due := await pace.next_due()) < traffic.window.end:
            traffic.note_sending(due)
            number = traffic.questions.next_number()
            pending.append((number, due))
            await call.write(traffic.questions.requests[number])
        await call.done_writing()
