"""The loops that send, in virtual time: hours pass in milliseconds, and always in the same way."""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from nnclient.load import traffic as traffic_module
from nnclient.load.arrivals import poisson_arrivals
from nnclient.load.plan import LoadPlan
from nnclient.load.questions import Questions
from nnclient.load.tally import Tally, Window
from nnclient.load.traffic import (
    ClosedPace,
    OpenPace,
    Traffic,
    closed_unary,
    open_unary,
    stream,
)
from nnclient.wire import Question
from nnproto.v1 import inference_pb2 as pb

WINDOW = Window(0.0, 10.0, 110.0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer instead of waiting for it."""

    def __init__(self) -> None:
        loop = self

        class JumpingSelector(selectors.SelectSelector):
            def select(self, timeout: float | None = None) -> Any:
                loop.now += timeout or 0.0
                return super().select(0)

        super().__init__(JumpingSelector())
        self.now = 0.0

    def time(self) -> float:
        return self.now


class VirtualClock:
    """The loop's own time."""

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def wait_until(self, time: float) -> None:
        await asyncio.sleep(max(0.0, time - self.now()))

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def run(main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def make_traffic(window: Window = WINDOW) -> Traffic:
    plan = LoadPlan(target="h:1", model="m")
    batches: list[Any] = [np.full((1, 2), n, np.float32) for n in range(3)]
    return Traffic(Questions(plan, batches), window, VirtualClock())


def answer_to(request: bytes) -> bytes:
    message = pb.PredictRequest.FromString(request)
    return pb.PredictResponse(model="m", version="1", outputs=message.inputs).SerializeToString()


class Server:
    """Answers each request *service_s* after it came, one at a time; between *stall* it does nothing."""

    def __init__(self, service_s: float, stall: tuple[float, float] = (0.0, 0.0)) -> None:
        self._service_s = service_s
        self._stall = stall
        self._free_at = 0.0
        self.in_flight = 0
        self.most_in_flight = 0
        self.asked = 0

    async def __call__(self, request: bytes) -> bytes:
        self.asked += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        now = asyncio.get_running_loop().time()
        start = max(now, self._free_at)
        if self._stall[0] <= start < self._stall[1]:
            start = self._stall[1]
        self._free_at = start + self._service_s
        await asyncio.sleep(self._free_at - now)
        self.in_flight -= 1
        return answer_to(request)


class FakeRpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str = "") -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


class Call:
    """A stream over *answer*, in order; ends with an error after *lasts* answers, if given."""

    def __init__(self, answer: Callable[[bytes], Awaitable[bytes]], lasts: int | None = None) -> None:
        self._answer = answer
        self._lasts = lasts
        self._answers: asyncio.Queue[Any] = asyncio.Queue()
        self._has_failed = False

    async def write(self, request: bytes) -> None:
        if self._has_failed:
            raise asyncio.InvalidStateError
        self._answers.put_nowait(asyncio.create_task(self._answer(request)))  # type: ignore[arg-type]

    async def read(self) -> Any:
        if self._lasts == 0:
            self._has_failed = True
            raise FakeRpcError(grpc.StatusCode.UNAVAILABLE, "gone")
        answer = await self._answers.get()
        if self._lasts is not None:
            self._lasts -= 1
        return answer if answer is grpc.aio.EOF else await answer

    async def done_writing(self) -> None:
        self._answers.put_nowait(grpc.aio.EOF)


def test_a_closed_loop_keeps_so_many_in_flight() -> None:
    """Ten in flight at a server of 5 ms: 200 a second, each after 50 ms."""
    traffic, server = make_traffic(), Server(0.005)
    run(closed_unary(traffic, server, concurrency=10))
    assert server.most_in_flight == 10
    assert server.in_flight == 0
    assert traffic.tally.answered == pytest.approx(200 * 100, rel=0.01)
    assert traffic.tally.latency.percentile_s(50) == pytest.approx(0.05, rel=0.01)
    assert traffic.tally.errors == {}


def test_an_open_loop_sends_when_due() -> None:
    """At the rate it was told, with nothing late, whatever the answers do."""
    traffic, server = make_traffic(), Server(0.001)
    run(open_unary(traffic, server, poisson_arrivals(20.0, 0.0, seed=3)))
    # Standard error of 2000 Poisson arrivals: 2.2 %.
    assert traffic.tally.latency.count == pytest.approx(2000, rel=0.07)
    assert traffic.tally.lag.max_s == pytest.approx(0, abs=1e-9)
    assert traffic.tally.latency.percentile_s(50) == pytest.approx(0.001, rel=0.02)


@pytest.mark.parametrize("mode", ["unary", "stream"])
def test_a_stall_shows_in_an_open_loop(mode: str) -> None:
    """
    A server that stands still for 20 of 100 s: a fifth of all requests wait, 10 s on average.

    A generator that waited for the answers would see one request a slot wait and call it p99.9.
    """
    traffic, server = make_traffic(), Server(0.001, stall=(50.0, 70.0))
    arrivals = poisson_arrivals(100.0, 0.0, seed=5)
    if mode == "unary":
        run(open_unary(traffic, server, arrivals))
    else:

        async def main() -> None:
            await stream(traffic, lambda: Call(server), OpenPace(traffic, arrivals))

        run(main())
    latency = traffic.tally.latency
    assert latency.percentile_s(50) < 0.01
    assert latency.percentile_s(90) == pytest.approx(11, rel=0.15)
    assert latency.percentile_s(99) == pytest.approx(20, rel=0.1)
    assert latency.mean_s() == pytest.approx(2.2, rel=0.15)


def test_the_unanswered_are_bounded_and_their_wait_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of 10 a second, asked 100 a second: no more than the bound in flight; lateness is latency."""
    monkeypatch.setattr(traffic_module, "MOST_OUTSTANDING", 50)
    traffic, server = make_traffic(Window(0.0, 0.0, 20.0)), Server(0.1)
    run(open_unary(traffic, server, poisson_arrivals(100.0, 0.0, seed=1)))
    assert server.most_in_flight == 50
    assert traffic.tally.lag.percentile_s(99) > 100
    assert traffic.tally.latency.percentile_s(100) > traffic.tally.lag.percentile_s(100)
    assert traffic.tally.answered == pytest.approx(200, abs=2)


def test_a_stream_in_a_closed_loop() -> None:
    """Requests in flight are bounded, answers are matched in order, and the last ones are waited for."""
    traffic, server = make_traffic(), Server(0.005)

    async def main() -> None:
        await stream(traffic, lambda: Call(server), ClosedPace(traffic, 10))

    run(main())
    assert server.most_in_flight == 10
    assert server.in_flight == 0
    assert traffic.tally.answered == pytest.approx(200 * 100, rel=0.01)
    assert traffic.tally.latency.percentile_s(50) == pytest.approx(0.05, rel=0.01)
    assert traffic.tally.errors == {}


def test_a_failed_stream_is_opened_again() -> None:
    """What was in flight counts as failed; the rest of the window is used."""
    traffic, server = make_traffic(Window(0.0, 0.0, 10.0)), Server(0.01)
    calls = deque([Call(server, lasts=100), Call(server, lasts=0), Call(server)])

    async def main() -> None:
        await stream(traffic, calls.popleft, ClosedPace(traffic, 4))

    run(main())
    assert not calls
    assert set(traffic.tally.errors) == {"UNAVAILABLE"}
    assert 1 <= traffic.tally.errors["UNAVAILABLE"] <= 2 * 4
    assert traffic.tally.answered == pytest.approx(1000, rel=0.05)
    assert traffic.tally.examples == {"UNAVAILABLE": "gone"}


def test_failures_are_counted_by_status() -> None:
    """One of three requests is refused; the others are answered."""
    traffic, server = make_traffic(), Server(0.01)

    async def call(request: bytes) -> bytes:
        answer = await server(request)
        if server.asked % 3 == 0:
            raise FakeRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full")
        return answer

    run(closed_unary(traffic, call, concurrency=1))
    assert traffic.tally.errors["RESOURCE_EXHAUSTED"] == pytest.approx(10_000 / 3, rel=0.01)
    assert traffic.tally.answered == pytest.approx(10_000 * 2 / 3, rel=0.01)
    assert traffic.tally.examples == {"RESOURCE_EXHAUSTED": "queue full"}


def test_no_busy_loop_against_a_server_that_is_gone() -> None:
    """A connection that fails at once is tried 20 times a second, not as often as the CPU can."""
    traffic, asked = make_traffic(Window(0.0, 0.0, 10.0)), 0

    async def call(request: bytes) -> bytes:
        nonlocal asked
        asked += 1
        raise FakeRpcError(grpc.StatusCode.UNAVAILABLE)

    run(closed_unary(traffic, call, concurrency=2))
    assert asked == pytest.approx(2 * 10 / 0.05, rel=0.02)


def make_questions(output: Any = "outputs", value: float = 1.0) -> Questions:
    plan = LoadPlan(target="h:1", model="m", output=output)
    batches: list[Any] = [np.full((2, 3), value, np.float32)]
    return Questions(plan, batches)


def response(data: Any, **fields: Any) -> bytes:
    array = np.asarray(data, np.float32)
    tensor = pb.Tensor(shape=array.shape, dtype=pb.DATA_TYPE_FLOAT32, data=array.tobytes())
    return pb.PredictResponse(model="m", outputs=tensor, **fields).SerializeToString()


def test_the_same_rows_must_get_the_same_bits() -> None:
    """The first answer is looked at, later ones are compared with it, bit by bit."""
    questions = make_questions()
    right = response([[1.0, 2.0], [3.0, 4.0]])
    assert questions.fault_of(0, right) is None
    assert questions.fault_of(0, right) is None
    off_by_one_bit = response([[1.0, 2.0], [3.0, np.nextafter(np.float32(4), np.float32(5))]])
    assert questions.fault_of(0, off_by_one_bit) == (
        "WRONG_ANSWER",
        "the same rows were answered differently before",
    )


@pytest.mark.parametrize(
    "answer",
    [
        b"\xff\xff",
        response([[1.0, 2.0]]),
        response([1.0, 2.0]),
        response([[1.0, np.nan], [1.0, 1.0]]),
        response([[1.0, np.inf], [1.0, 1.0]]),
        pb.PredictResponse(model="m").SerializeToString(),
    ],
)
def test_rubbish_is_noticed(answer: bytes) -> None:
    """No protobuf, other rows than asked about, NaN from finite rows, nothing at all."""
    status, text = make_questions().fault_of(0, answer) or ("", "")
    assert status == "WRONG_ANSWER"
    assert text


def test_rows_that_are_not_finite_may_have_such_answers() -> None:
    """NaN in, NaN out is right."""
    assert make_questions(value=np.nan).fault_of(0, response([[np.nan, 1.0], [1.0, 1.0]])) is None


def test_an_error_in_a_stream_counts_by_its_status() -> None:
    """As a failed unary call would."""
    answer = pb.PredictResponse(error=pb.Error(code=8, message="queue full")).SerializeToString()
    status, text = make_questions().fault_of(0, answer) or ("", "")
    assert status == "RESOURCE_EXHAUSTED"
    assert "queue full" in text


def test_requests_are_sent_in_turn() -> None:
    """Each as often as the others."""
    questions = make_traffic().questions
    assert [questions.next_number() for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert questions.requests[1] == Question("m").encode(np.full((1, 2), 1, np.float32))


def test_a_tally_starts_empty() -> None:
    """No counts are shared between two of them."""
    one = Tally()
    one.errors["X"] += 1
    one.latency.record(1.0)
    assert (Tally().errors, Tally().latency.count) == ({}, 0)
