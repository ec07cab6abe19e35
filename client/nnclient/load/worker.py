"""
A share of a plan -> its Tally: one process that makes traffic, told when to by a pipe.

The worker says "ready" when it is connected, is then told the window, says how many answers it
has every half second, and at the end what it counted, or why it could not.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from typing import Any

import grpc
import grpc.aio

from nnclient.errors import NnclientError, Unavailable
from nnclient.load.arrivals import poisson_arrivals
from nnclient.load.plan import LoadPlan
from nnclient.load.questions import make_questions
from nnclient.load.tally import Tally, Window
from nnclient.load.traffic import ClosedPace, OpenPace, Traffic, closed_unary, open_unary, stream
from nnclient.models import ModelInfo
from nnclient.options import Options
from nnclient.retry import SERVICE, RetryPolicy
from nnclient.tls import credentials_of

_CONNECT_S = 10.0
_REPORT_EVERY_S = 0.5


def work(pipe: Connection[Any, Any], plan: LoadPlan, model: ModelInfo) -> None:
    """Make the traffic of *plan*, which is this process's own share; for multiprocessing."""
    try:
        tally = _run_in_fastest_loop(lambda: _work(pipe, plan, model))
    except NnclientError as error:
        pipe.send(("failed", error))
    else:
        pipe.send(("done", tally))


def _run_in_fastest_loop(main: Callable[[], Any]) -> Any:
    # uvloop is no requirement: it makes this process about a third faster where it is installed.
    factory = None
    with contextlib.suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())


async def _work(pipe: Connection[Any, Any], plan: LoadPlan, model: ModelInfo) -> Tally:
    questions = make_questions(plan, model)
    # No retries, which would hide failures, and no limit of messages to split at.
    options = Options.make(
        target=plan.target,
        credentials=credentials_of(plan.tls),
        token=plan.token,
        allow_insecure_token=plan.allow_insecure_token,
        retry=RetryPolicy(attempts=1),
    )
    async with options.open_channel(grpc.aio) as channel:
        try:
            await asyncio.wait_for(channel.channel_ready(), _CONNECT_S)
        except TimeoutError:
            raise Unavailable(f"no connection to {plan.target} within {_CONNECT_S:g} s") from None
        pipe.send(("ready", None))
        loop = asyncio.get_running_loop()
        window: Window = await loop.run_in_executor(None, pipe.recv)
        clock = PacedClock(loop)
        traffic = Traffic(questions, window, clock)
        async with _reports(pipe, traffic):
            await clock.wait_until(window.start)
            await _run_traffic(traffic, channel, plan, options.metadata)
        clock.close()
        return traffic.tally


async def _run_traffic(
    traffic: Traffic, channel: Any, plan: LoadPlan, metadata: tuple[tuple[str, str], ...]
) -> None:
    window = traffic.window
    arrivals = poisson_arrivals(plan.rate_per_s, window.start, plan.seed) if plan.rate_per_s else None
    if plan.mode == "unary":
        # Bytes in and out: no serializers.
        method = channel.unary_unary(f"/{SERVICE}/Predict")

        def call(request: bytes) -> Any:
            return method(request, timeout=plan.timeout_s, metadata=metadata)

        if arrivals is None:
            await closed_unary(traffic, call, plan.concurrency)
        else:
            await open_unary(traffic, call, arrivals)
        return
    method = channel.stream_stream(f"/{SERVICE}/PredictStream")
    pace = ClosedPace(traffic, plan.concurrency) if arrivals is None else OpenPace(traffic, arrivals)
    whole_s = window.end - time.monotonic() + plan.timeout_s
    await stream(traffic, lambda: method(timeout=whole_s, metadata=metadata), pace)


@contextlib.asynccontextmanager
async def _reports(pipe: Connection[Any, Any], traffic: Traffic) -> AsyncIterator[None]:
    """Tell the parent how it goes, and measure this process's CPU over the window."""
    task = asyncio.create_task(_report(pipe, traffic))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _report(pipe: Connection[Any, Any], traffic: Traffic) -> None:
    window, tally = traffic.window, traffic.tally
    loop_cpu = all_cpu = begun = None
    while (now := time.monotonic()) < window.end:
        if begun is None and now >= window.begin:
            begun, loop_cpu, all_cpu = now, time.thread_time(), time.process_time()
        if begun is not None and loop_cpu is not None and all_cpu is not None and now > begun:
            tally.loop_cpu = (time.thread_time() - loop_cpu) / (now - begun)
            tally.cpu = (time.process_time() - all_cpu) / (now - begun)
        pipe.send(("progress", tally.answered))
        edge = window.begin if now < window.begin else window.end
        await asyncio.sleep(min(_REPORT_EVERY_S, edge - now))


class PacedClock:
    """
    time.monotonic and a thread that sleeps: exact to about 0.1 ms.

    Event loops round their timers to 1 ms, which is several times the latency that is measured.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._orders: queue.SimpleQueue[tuple[float, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wake_in_time, daemon=True)
        self._thread.start()
        self.now = time.monotonic

    async def wait_until(self, time: float) -> None:
        """Return at *time*."""
        if time <= self.now():
            await asyncio.sleep(0)
            return
        woken = self._loop.create_future()
        self._orders.put((time, woken))
        await woken

    async def pause(self, seconds: float) -> None:
        """Return after *seconds*, to the event loop's own precision."""
        await asyncio.sleep(seconds)

    def close(self) -> None:
        """End the thread."""
        self._orders.put(None)
        self._thread.join()

    def _wake_in_time(self) -> None:
        while (order := self._orders.get()) is not None:
            due, woken = order
            time.sleep(max(0.0, due - time.monotonic()))
            self._loop.call_soon_threadsafe(_wake, woken)


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        woken.set_result(None)
