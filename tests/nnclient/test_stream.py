"""Client.stream: order, bounds, errors, early ends and lost connections."""

from __future__ import annotations

import gc
import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from support.fake_server import CuttableProxy, FakeServer, Fault

import nnclient
from nnclient import Client, RetryPolicy
from nnclient.conversation import Conversation
from nnclient.retry import Deadline
from nnclient.streaming import stream_results
from nnclient.wire import Question
from nnproto.v1 import inference_pb2 as pb

QUICK = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.02)


def batch(number: int, rows: int = 2) -> Any:
    return np.full((rows, 3), number, np.float32)


def test_results_come_in_order_from_any_iterable(client: Client, server: FakeServer) -> None:
    """A list, a tuple, a generator; the answers are those of predict."""
    expected = [server.models["lin"].outputs(batch(n)) for n in range(50)]
    for batches in ([batch(n) for n in range(50)], (batch(n) for n in range(50))):
        for y, want in zip(client.stream("lin", batches), expected, strict=True):
            assert np.array_equal(y, want)


def test_an_empty_input_has_no_results(client: Client, server: FakeServer) -> None:
    """And the call ends well."""
    assert list(client.stream("lin", [])) == []
    server.wait_for(lambda s: s.ended_streams == [True])


def test_results_come_while_the_input_is_being_produced(client: Client) -> None:
    """A slow input holds no finished result back."""
    may_go_on = threading.Event()

    def batches() -> Iterator[Any]:
        yield batch(0)
        assert may_go_on.wait(20)
        yield batch(1)

    results = client.stream("lin", batches())
    assert next(results).shape == (2, 2)
    may_go_on.set()
    assert len(list(results)) == 1


def test_the_input_is_not_read_ahead_of_the_answers(client: Client, server: FakeServer) -> None:
    """With no answer at all, max_in_flight batches are taken and sent, and not one more."""
    server.gate.clear()
    taken = 0

    def batches() -> Iterator[Any]:
        nonlocal taken
        while True:
            taken += 1
            yield batch(taken)

    results = client.stream("lin", batches(), max_in_flight=3)
    first: list[Any] = []
    reader = threading.Thread(target=lambda: first.append(next(results)))
    reader.start()
    server.wait_for(lambda s: len(s.requests) >= 1)
    server.gate.set()
    reader.join(20)
    # One result has been taken, so that at most 3 + 1 batches have been wanted so far.
    assert len(first) == 1
    assert taken <= 4
    for expected in range(2, 20):
        next(results)
        assert taken <= expected + 3
    results.close()


def test_different_shapes_and_single_rows_may_follow_each_other(client: Client) -> None:
    """Each result has the form of its own batch."""
    results = client.stream("lin", [batch(1), [1, 2, 3], batch(1, rows=0), batch(1, rows=5)])
    assert [y.shape for y in results] == [(2, 2), (2,), (0, 2), (5, 2)]


def test_labels_stream(client: Client) -> None:
    """Labels come as Labels."""
    (labels,) = client.stream("shapes", [np.eye(4)], "labels", top_k=2)
    assert labels.shape == (4, 2)


def test_large_batches_are_split_and_joined(server: FakeServer) -> None:
    """More pieces than may be in flight, and small batches around."""
    sizes = [1, 3000, 2, 1500, 0]
    with Client(server.target, message_bytes=2048) as client:
        results = list(
            client.stream("lin", (batch(n, size) for n, size in enumerate(sizes)), max_in_flight=4)
        )
    for number, (size, y) in enumerate(zip(sizes, results, strict=True)):
        assert np.array_equal(y, server.models["lin"].outputs(batch(number, size)))
    assert max(request.ByteSize() for request in server.requests) <= 2048


def test_a_failed_batch_raises_with_its_index_after_those_before(client: Client, server: FakeServer) -> None:
    """The results before it are delivered first; the stream is over; the next call works."""
    results = client.stream("lin", [batch(0), np.zeros((2, 5)), batch(2)])
    assert next(results).shape == (2, 2)
    with pytest.raises(nnclient.InvalidInput, match=r"^batch 1: inputs has shape \(2, 5\)") as caught:
        next(results)
    assert caught.value.batch_index == 1
    assert list(results) == []
    assert client.predict("lin", batch(0)).shape == (2, 2)


def test_a_batch_refused_here_raises_in_its_turn_too(client: Client) -> None:
    """Input that never reaches the server is treated like input that it refuses."""
    results = client.stream("lin", [batch(0), "nonsense", batch(2)])
    assert next(results).shape == (2, 2)
    with pytest.raises(nnclient.InvalidInput, match=r"^batch 1: x has dtype"):
        next(results)


def test_errors_can_be_returned_in_place(client: Client) -> None:
    """One bad message in the middle: every other batch is answered."""
    batches = [batch(0), np.zeros((2, 5)), "nonsense", batch(3), 1j * batch(4)]
    results = list(client.stream("lin", batches, errors="return"))
    assert [type(result).__name__ for result in results] == [
        "ndarray",
        "InvalidInput",
        "InvalidInput",
        "ndarray",
        "InvalidInput",
    ]
    assert [error.batch_index for error in (results[1], results[2], results[4])] == [1, 2, 4]


def test_only_bad_batches(client: Client) -> None:
    """A stream that never sends anything still yields an error for each batch, and ends."""
    results = list(client.stream("lin", ["a"] * 40, errors="return", max_in_flight=4))
    assert [error.batch_index for error in results] == list(range(40))


def test_an_exception_of_the_input_is_raised_after_the_results_before_it(client: Client) -> None:
    """As it is, with the results in order before."""

    def batches() -> Iterator[Any]:
        yield batch(0)
        yield batch(1)
        raise OSError("disk on fire")

    results = client.stream("lin", batches(), errors="return")
    assert len([next(results), next(results)]) == 2
    with pytest.raises(OSError, match="disk on fire"):
        next(results)


def test_closing_early_cancels_the_call_and_stops_the_input(client: Client, server: FakeServer) -> None:
    """No further batch is taken once the generator is closed."""
    taken = 0

    def batches() -> Iterator[Any]:
        nonlocal taken
        while True:
            taken += 1
            yield batch(taken)

    results = client.stream("lin", batches(), max_in_flight=4)
    next(results)
    results.close()
    server.wait_for(lambda s: len(s.ended_streams) == 1)
    assert server.ended_streams == [False]
    after = taken
    client.predict("lin", batch(0))
    assert taken == after


def test_an_abandoned_generator_is_cancelled_by_garbage_collection(
    client: Client, server: FakeServer
) -> None:
    """`break` out of a loop is enough."""
    for _ in client.stream("lin", (batch(n) for n in range(10**9))):
        break
    gc.collect()
    server.wait_for(lambda s: s.ended_streams == [False])


def test_a_finished_stream_ends_in_good_order(client: Client, server: FakeServer) -> None:
    """The server sees the client's end of input, not a cancelled call."""
    list(client.stream("lin", [batch(0)]))
    server.wait_for(lambda s: s.ended_streams == [True])


def test_nothing_happens_before_the_first_result_is_asked_for(client: Client, server: FakeServer) -> None:
    """A stream that is made and dropped costs nothing."""
    client.stream("lin", iter([batch(0)]))
    gc.collect()
    client.predict("lin", batch(0))
    assert server.calls == ["Predict"]


def test_a_lost_connection_is_taken_up_where_it_broke(server: FakeServer, proxy: CuttableProxy) -> None:
    """Every batch is answered once, in order, over several connections."""
    with Client(proxy.target, retry=QUICK) as client:
        results = []
        for y in client.stream("lin", (batch(n) for n in range(60)), max_in_flight=5):
            results.append(y)
            if len(results) in (7, 8, 30):
                proxy.cut()
    expected = [server.models["lin"].outputs(batch(n)) for n in range(60)]
    assert all(np.array_equal(y, want) for y, want in zip(results, expected, strict=True))
    assert proxy.connections >= 3


def test_a_connection_lost_while_the_input_waits(server: FakeServer, proxy: CuttableProxy) -> None:
    """The loss is noticed with the next batch, which is sent over a new connection."""
    may_go_on = threading.Event()

    def batches() -> Iterator[Any]:
        yield batch(0)
        assert may_go_on.wait(20)
        yield batch(1)

    with Client(proxy.target, retry=QUICK) as client:
        results = client.stream("lin", batches())
        next(results)
        proxy.cut()
        may_go_on.set()
        assert np.array_equal(next(results), server.models["lin"].outputs(batch(1)))
        assert list(results) == []


def test_a_connection_lost_while_another_thread_pulls(server: FakeServer, proxy: CuttableProxy) -> None:
    """What the old call's thread gets from the input goes out with the new call, once."""
    server.gate.clear()
    may_go_on = threading.Event()
    is_pulling = threading.Event()

    def batches() -> Iterator[Any]:
        yield batch(0)
        is_pulling.set()
        assert may_go_on.wait(20)
        yield batch(1)
        yield batch(2)

    with Client(proxy.target, retry=QUICK) as client:
        results: list[Any] = []
        reader = threading.Thread(target=lambda: results.extend(client.stream("lin", batches())))
        reader.start()
        server.wait_for(lambda s: len(s.requests) == 1)
        assert is_pulling.wait(20)
        proxy.cut()
        server.wait_for(lambda s: len(s.requests) == 2)  # batch 0 again
        may_go_on.set()
        server.gate.set()
        reader.join(20)
    expected = [server.models["lin"].outputs(batch(n)) for n in range(3)]
    assert len(results) == 3
    assert all(np.array_equal(y, want) for y, want in zip(results, expected, strict=True))


def test_a_draining_server_is_left_for_its_successor(client: Client, server: FakeServer) -> None:
    """UNAVAILABLE in an answer or as the end of the call: the rest is sent again."""
    server.answer_faults.extend([None, Fault(grpc.StatusCode.UNAVAILABLE, "draining")])
    server.faults.extend([None, None, None, None, Fault(grpc.StatusCode.UNAVAILABLE, "draining")])
    results = list(client.stream("lin", (batch(n) for n in range(8))))
    expected = [server.models["lin"].outputs(batch(n)) for n in range(8)]
    assert all(np.array_equal(y, want) for y, want in zip(results, expected, strict=True))
    assert server.calls == ["PredictStream"] * 3


BUSY = Fault(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue full", retry_after_ms=1)


def test_a_request_that_was_refused_for_now_is_sent_again(client: Client, server: FakeServer) -> None:
    """An answer that says when to come back is followed by another try, and the results are in order."""
    server.answer_faults.extend([BUSY] * 2)
    results = list(client.stream("lin", (batch(n) for n in range(6)), max_in_flight=1))
    for n, y in enumerate(results):
        assert np.array_equal(y, server.models["lin"].outputs(batch(n)))
    assert len(results) == 6
    # Both may have been heard on the first stream: several requests are in flight.
    assert not server.answer_faults
    assert server.calls in (["PredictStream"] * 2, ["PredictStream"] * 3)


def test_a_request_that_is_refused_again_and_again_fails_alone(server: FakeServer) -> None:
    """When the attempts are used up, that batch is Overloaded, with the hint, and the others are answered."""
    server.answer_faults.extend([BUSY] * 2)
    with Client(server.target, retry=RetryPolicy(attempts=2, initial_backoff_s=0.001)) as client:
        results = list(client.stream("lin", (batch(n) for n in range(3)), max_in_flight=1, errors="return"))
    assert isinstance(results[0], nnclient.Overloaded)
    assert results[0].retry_after_s == 0.001
    assert [isinstance(result, nnclient.NnclientError) for result in results] == [True, False, False]


def test_progress_renews_the_attempts(server: FakeServer) -> None:
    """A long stream survives more losses than a single call would, if something is answered between."""
    for _ in range(10):
        server.faults.extend([None, Fault(grpc.StatusCode.UNAVAILABLE, "flapping")])
    with Client(server.target, retry=RetryPolicy(attempts=2, initial_backoff_s=0.001)) as client:
        assert len(list(client.stream("lin", (batch(n) for n in range(10)), max_in_flight=1))) == 10


def test_a_stream_gives_up_when_nothing_is_answered(server: FakeServer) -> None:
    """As many tries as the policy says, then Unavailable, errors="return" or not."""
    server.faults.extend([Fault(grpc.StatusCode.UNAVAILABLE, "gone for good")] * 99)
    with (
        Client(server.target, retry=RetryPolicy(attempts=3, initial_backoff_s=0.001)) as client,
        pytest.raises(nnclient.Unavailable, match="gone for good"),
    ):
        list(client.stream("lin", [batch(0)], errors="return"))
    assert server.calls == ["PredictStream"] * 3


def test_the_deadline_of_a_stream_covers_it_whole(client: Client, server: FakeServer) -> None:
    """And the client's own timeout_s does not apply to streams."""
    server.gate.clear()
    with pytest.raises(nnclient.DeadlineExceeded, match=r"within 0\.1 s"):
        list(client.stream("lin", [batch(0)], timeout_s=0.1))
    server.gate.set()
    with Client(server.target, timeout_s=0.05) as hasty:
        may_go_on = threading.Event()

        def batches() -> Iterator[Any]:
            yield batch(0)
            assert not may_go_on.wait(0.2)
            yield batch(1)

        assert len(list(hasty.stream("lin", batches()))) == 2


def test_a_server_that_ends_the_stream_early_is_at_fault(client: Client, server: FakeServer) -> None:
    """An OK end with answers missing is no success."""
    server.tamper = lambda response: setattr(response, "id", "bogus")
    with pytest.raises(nnclient.InternalError, match="out of turn"):
        list(client.stream("lin", [batch(0)]))


def test_no_threads_are_left_behind(client: Client) -> None:
    """A hundred streams, finished or closed early, leave no thread waiting."""
    before = set(threading.enumerate())
    for n in range(100):
        results = client.stream("lin", (batch(k) for k in range(5)))
        next(results)
        if n % 2:
            results.close()
        else:
            list(results)
    ours = [
        thread for thread in set(threading.enumerate()) - before if "ThreadPoolExecutor" not in thread.name
    ]
    for thread in ours:
        thread.join(20)
    assert not [thread for thread in ours if thread.is_alive()]


class LostCall:
    """A call that answers *count* requests and is then lost, without asking for another."""

    def __init__(self, requests: Iterator[bytes], count: int | None, server: FakeServer) -> None:
        self._requests = requests
        self._count = count
        self._server = server
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._callbacks: list[Any] = []
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        for request in itertools.islice(self._requests, self._count):
            self._answers.put(self._server.answer(pb.PredictRequest.FromString(request)))
        if self._count is None:
            self._answers.put(StopIteration())

    def __next__(self) -> Any:
        try:
            answer = self._answers.get(timeout=0 if self._ended.is_set() else 20)
        except queue.Empty:
            raise FakeRpcError(grpc.StatusCode.UNAVAILABLE, "lost") from None
        if isinstance(answer, StopIteration):
            raise answer
        return answer

    def lose(self) -> None:
        self._ended.set()
        for callback in self._callbacks:
            callback()

    def add_callback(self, callback: Any) -> bool:
        self._callbacks.append(callback)
        return not self._ended.is_set()

    def cancel(self) -> None:
        self._ended.set()


class FakeRpcError(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        return ()


def test_a_call_that_is_lost_with_nothing_in_flight_is_replaced(server: FakeServer) -> None:
    """gRPC's sending thread ends with its call: the reader must not wait for it to send."""
    calls: list[LostCall] = []

    def open_call(requests: Iterator[bytes], timeout_s: float | None) -> LostCall:
        calls.append(LostCall(requests, 2 if not calls else None, server))
        return calls[-1]

    talk = Conversation(Question("lin"), 4096, "host:1", max_in_flight=1)
    results: Iterator[Any] = stream_results(
        open_call, talk, (batch(n) for n in range(5)), deadline=Deadline(None), retry=QUICK
    )
    assert np.array_equal(next(results), server.models["lin"].outputs(batch(0)))
    assert np.array_equal(next(results), server.models["lin"].outputs(batch(1)))
    threading.Timer(0.05, calls[0].lose).start()  # while the reader below is waiting
    rest = list(results)
    assert all(np.array_equal(y, server.models["lin"].outputs(batch(n))) for n, y in enumerate(rest, 2))
    assert (len(rest), len(calls)) == (3, 2)


class WatchedCall(LostCall):
    """Looks, when it is cancelled, whether its requests have come to an end."""

    requests_had_ended: bool | None = None

    def cancel(self) -> None:
        self.requests_had_ended = next(self._requests, None) is None
        super().cancel()


def test_an_early_close_cancels_before_it_ends_the_requests(server: FakeServer) -> None:
    """The other way round, gRPC might half-close: the server would take it for a finished stream."""
    calls: list[WatchedCall] = []

    def open_call(requests: Iterator[bytes], timeout_s: float | None) -> WatchedCall:
        calls.append(WatchedCall(requests, 1, server))
        return calls[-1]

    talk = Conversation(Question("lin"), 4096, "host:1", max_in_flight=1)
    results: Any = stream_results(
        open_call, talk, (batch(n) for n in itertools.count()), deadline=Deadline(None), retry=QUICK
    )
    next(results)
    results.close()
    assert [call.requests_had_ended for call in calls] == [False]
