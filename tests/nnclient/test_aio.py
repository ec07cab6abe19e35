"""AsyncClient: what Client promises, without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from typing import Any

import grpc
import numpy as np
import pytest
from support.fake_server import NOT_SERVING, CuttableProxy, FakeServer, Fault

import nnclient
from nnclient import AsyncClient, Labels, RetryPolicy

X = np.arange(12, dtype=np.float32).reshape(4, 3)
QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)


def batch(number: int, rows: int = 2) -> Any:
    return np.full((rows, 3), number, np.float32)


async def seen(server: FakeServer, holds: Callable[[FakeServer], bool]) -> None:
    """Wait for what the server has seen, without blocking the event loop."""
    await asyncio.get_running_loop().run_in_executor(None, server.wait_for, holds)


def run(target: str, work: Callable[[AsyncClient], Awaitable[Any]], **settings: Any) -> Any:
    async def main() -> Any:
        async with AsyncClient(target, **{"timeout_s": 20, "retry": QUICK, **settings}) as client:
            return await work(client)

    return asyncio.run(main())


def test_predict_in_all_kinds(server: FakeServer) -> None:
    """Outputs, probabilities and labels; rows, a row and no rows."""

    async def work(client: AsyncClient) -> None:
        y = await client.predict("lin", X)
        assert np.array_equal(y, server.models["lin"].outputs(X))
        assert (await client.predict("lin", X[0])).shape == (2,)
        assert (await client.predict("lin", X[:0])).shape == (0, 2)
        assert (await client.predict("lin", X, "probabilities")).shape == (4, 2)
        labels = await client.predict("shapes", np.eye(4), "labels", top_k=2)
        assert isinstance(labels, Labels)
        assert labels.shape == (4, 2)
        assert [model.name for model in await client.models()] == ["double", "lin", "shapes"]
        assert (await client.model("shapes")).labels == ("square", "circle", "star")

    run(server.target, work)


def test_large_arrays_are_split_and_joined(server: FakeServer) -> None:
    """As a stream of bounded messages."""
    x = np.random.default_rng(0).integers(-9, 9, (5000, 3)).astype(np.float32)
    y = run(server.target, lambda client: client.predict("lin", x), message_bytes=4096)
    assert np.array_equal(y, server.models["lin"].outputs(x))
    assert max(request.ByteSize() for request in server.requests) <= 4096


def test_many_tasks_share_a_client(server: FakeServer) -> None:
    """Sixty-four at once, each with its own answer."""

    async def work(client: AsyncClient) -> None:
        answers = await asyncio.gather(*(client.predict("lin", batch(n)) for n in range(64)))
        for n, y in enumerate(answers):
            assert np.array_equal(y, server.models["lin"].outputs(batch(n)))

    run(server.target, work)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c: c.predict("nope", X), nnclient.NotFound),
        (lambda c: c.model("nope"), nnclient.NotFound),
        (lambda c: c.predict("lin", X[:, :2]), nnclient.InvalidInput),
        (lambda c: c.predict("lin", 1j * X), nnclient.InvalidInput),
        (lambda c: c.wait_ready(model="nope"), nnclient.NotFound),
    ],
)
def test_errors_are_those_of_client(
    server: FakeServer, call: Callable[[AsyncClient], Awaitable[Any]], error: type[Exception]
) -> None:
    """And the next request works."""

    async def work(client: AsyncClient) -> None:
        with pytest.raises(error):
            await call(client)
        await client.predict("lin", X)

    run(server.target, work)


def test_retries(server: FakeServer) -> None:
    """UNAVAILABLE by the core, a full queue when the server says when."""
    server.faults.extend(
        [
            Fault(grpc.StatusCode.UNAVAILABLE, "draining"),
            Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("retry-after-ms", "1"),)),
            None,
            Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "full"),
        ]
    )

    async def work(client: AsyncClient) -> None:
        assert (await client.predict("lin", X)).shape == (4, 2)
        with pytest.raises(nnclient.Overloaded):
            await client.predict("lin", X)

    run(server.target, work)
    assert server.calls == ["Predict"] * 4


def test_deadline_and_cancellation(server: FakeServer) -> None:
    """A deadline raises; a cancelled task cancels its call; the client works on."""
    server.gate.clear()

    async def work(client: AsyncClient) -> None:
        with pytest.raises(nnclient.DeadlineExceeded, match=r"within 0\.1 s"):
            await client.predict("lin", X, timeout_s=0.1)
        task = asyncio.create_task(client.predict("lin", X))
        await seen(server, lambda s: len(s.requests) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.gate.set()
        assert (await client.predict("lin", X)).shape == (4, 2)

    run(server.target, work)


def test_stream_takes_plain_and_asynchronous_iterables(server: FakeServer) -> None:
    """In order, from either."""
    expected = [server.models["lin"].outputs(batch(n)) for n in range(40)]

    async def produce() -> AsyncIterator[Any]:
        for n in range(40):
            await asyncio.sleep(0)
            yield batch(n)

    async def work(client: AsyncClient) -> None:
        for batches in (produce(), (batch(n) for n in range(40)), [batch(n) for n in range(40)]):
            results = [y async for y in client.stream("lin", batches)]
            assert all(np.array_equal(y, want) for y, want in zip(results, expected, strict=True))
        assert [y async for y in client.stream("lin", [])] == []

    run(server.target, work)


def test_results_come_while_the_input_is_being_produced(server: FakeServer) -> None:
    """A slow input holds no finished result back."""

    async def work(client: AsyncClient) -> None:
        may_go_on = asyncio.Event()

        async def produce() -> AsyncIterator[Any]:
            yield batch(0)
            await may_go_on.wait()
            yield batch(1)

        results = client.stream("lin", produce())
        assert (await anext(results)).shape == (2, 2)
        may_go_on.set()
        assert len([y async for y in results]) == 1

    run(server.target, work)


def test_the_input_is_not_read_ahead_of_the_answers(server: FakeServer) -> None:
    """Never further than max_in_flight beyond what was taken."""
    taken = 0

    def produce() -> Iterator[Any]:
        nonlocal taken
        while True:
            taken += 1
            yield batch(taken)

    async def work(client: AsyncClient) -> None:
        async with aclosing(client.stream("lin", produce(), max_in_flight=3)) as results:
            for expected in range(1, 20):
                await anext(results)
                assert taken <= expected + 3

    run(server.target, work)


def test_errors_of_batches(server: FakeServer) -> None:
    """Raised with the index, or returned in place."""
    batches = [batch(0), np.zeros((2, 5)), "nonsense", batch(3)]

    async def work(client: AsyncClient) -> None:
        results = client.stream("lin", batches)
        await anext(results)
        with pytest.raises(nnclient.InvalidInput, match=r"^batch 1: inputs has shape \(2, 5\)"):
            await anext(results)
        kinds = [type(result).__name__ async for result in client.stream("lin", batches, errors="return")]
        assert kinds == ["ndarray", "InvalidInput", "InvalidInput", "ndarray"]
        only_bad = [result async for result in client.stream("lin", ["a"] * 40, errors="return")]
        assert [error.batch_index for error in only_bad] == list(range(40))

    run(server.target, work)


def test_an_exception_of_the_input_is_raised_in_its_turn(server: FakeServer) -> None:
    """As it is, after the results before it."""

    async def produce() -> AsyncIterator[Any]:
        yield batch(0)
        raise OSError("disk on fire")

    async def work(client: AsyncClient) -> None:
        results = client.stream("lin", produce())
        await anext(results)
        with pytest.raises(OSError, match="disk on fire"):
            await anext(results)

    run(server.target, work)


def test_closing_early_cancels_the_call_and_the_input(server: FakeServer) -> None:
    """The server sees a cancelled call; the input's pending wait is cancelled, too."""
    was_cancelled = False

    async def work(client: AsyncClient) -> None:
        async def produce() -> AsyncIterator[Any]:
            nonlocal was_cancelled
            yield batch(0)
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                was_cancelled = True
                raise

        async with aclosing(client.stream("lin", produce())) as results:
            await anext(results)
        await seen(server, lambda s: s.ended_streams == [False])

    run(server.target, work)
    assert was_cancelled


def test_a_cancelled_consumer_cancels_the_call(server: FakeServer) -> None:
    """The task that reads the results is enough."""
    server.gate.clear()

    async def work(client: AsyncClient) -> None:
        async def consume() -> None:
            async for _ in client.stream("lin", [batch(0)]):
                pass

        task = asyncio.create_task(consume())
        await seen(server, lambda s: len(s.requests) == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.gate.set()
        await seen(server, lambda s: len(s.ended_streams) == 1)

    run(server.target, work)


def test_a_finished_stream_ends_in_good_order(server: FakeServer) -> None:
    """The server sees the client's end of input, not a cancelled call."""

    async def work(client: AsyncClient) -> None:
        assert len([y async for y in client.stream("lin", [batch(0)])]) == 1
        await seen(server, lambda s: s.ended_streams == [True])

    run(server.target, work)


def test_lost_connections_are_taken_up_where_they_broke(server: FakeServer, proxy: CuttableProxy) -> None:
    """Every batch is answered once, in order; the asynchronous input survives."""

    async def produce() -> AsyncIterator[Any]:
        for n in range(60):
            await asyncio.sleep(0)
            yield batch(n)

    async def work(client: AsyncClient) -> list[Any]:
        results = []
        async for y in client.stream("lin", produce(), max_in_flight=5):
            results.append(y)
            if len(results) in (7, 8, 30):
                proxy.cut()
        return results

    results = run(proxy.target, work)
    expected = [server.models["lin"].outputs(batch(n)) for n in range(60)]
    assert all(np.array_equal(y, want) for y, want in zip(results, expected, strict=True))
    assert proxy.connections >= 3


def test_a_stream_gives_up_when_nothing_is_answered(server: FakeServer) -> None:
    """As many tries as the policy says."""
    server.faults.extend([Fault(grpc.StatusCode.UNAVAILABLE, "gone for good")] * 99)

    async def work(client: AsyncClient) -> None:
        with pytest.raises(nnclient.Unavailable, match="gone for good"):
            await anext(client.stream("lin", [batch(0)]))

    run(server.target, work, retry=RetryPolicy(attempts=3, initial_backoff_s=0.001))
    assert server.calls == ["PredictStream"] * 3


def test_wait_ready(server: FakeServer) -> None:
    """Returns when the server serves; says what it waited for when time is up."""

    async def work(client: AsyncClient) -> None:
        await client.wait_ready(model="lin")
        server.health = NOT_SERVING
        with pytest.raises(nnclient.DeadlineExceeded, match=r"waited 0\.2 s for the server at .*not serving"):
            await client.wait_ready(timeout_s=0.2)

    run(server.target, work)


def test_a_closed_client_says_so(server: FakeServer) -> None:
    """For unary calls and streams; closing twice is no error."""

    async def main() -> None:
        client = AsyncClient(server.target)
        await client.predict("lin", X)
        await client.close()
        await client.close()
        with pytest.raises(RuntimeError, match="has been closed"):
            await client.predict("lin", X)
        with pytest.raises(RuntimeError, match="has been closed"):
            client.stream("lin", [X])

    asyncio.run(main())


def test_a_client_may_be_made_outside_of_an_event_loop(server: FakeServer) -> None:
    """The connection belongs to the loop in which it is first used."""
    client = AsyncClient(server.target)

    async def main() -> Any:
        async with client:
            return await client.predict("lin", X)

    assert asyncio.run(main()).shape == (4, 2)
