"""
Where kernels run, seen over a socket: short ones in the event loop, long ones beside it, in turns.

Kernels are fakes whose time is told by a clock of the test's, so that nothing here depends on the machine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.h2 import RawClient, Running, prefixed, wait_for
from support.server import PREDICT, PREDICT_STREAM
from support.serving import echo_mlp, request_for, rows_of

from nnproto.v1 import inference_pb2 as pb
from nnserver.api.inference import InferenceApi, InferenceLimits
from nnserver.app import _INLINE_LIMIT_S
from nnserver.batcher import Batcher, QueueLimits
from nnserver.engine import GROUP_ROWS, TURN_S, Engine, Lane
from nnserver.repository import Repository, ServedModel
from nnserver.transport import h2_server
from nnserver.transport.h2_server import H2Options, H2Server

Array = NDArray[Any]
US, MS = 1e-6, 1e-3
LOOP, KERNEL = "nnserver-loop", "nnserver-kernel"


class Kernel:
    """
    A model of one input and output that gives back its rows, taking *row_s* a row on a clock of its own.

    threads: the name of the thread of each batch; rows: how many it had.  A kernel with a *gate* waits at it.
    """

    def __init__(self, row_s: float, gate: Gate | None = None) -> None:
        self.row_s = row_s
        self.threads: list[str] = []
        self.rows: list[int] = []
        self._gate = gate
        self._now = 0.0

    def clock(self) -> float:
        return self._now

    def __call__(self, x: Array) -> Array:
        self.threads.append(threading.current_thread().name)
        self.rows.append(len(x))
        if self._gate is not None:
            self._gate.pass_through(self)
        self._now += self.row_s * len(x)
        return x.copy()

    def serve_as(self, name: str, known_row_s: float, **limits: Any) -> ServedModel:
        """A served model, whose row is believed to take *known_row_s*."""
        mlp = echo_mlp(1)
        lane = Lane(Batcher(name, QueueLimits(**limits), self.clock), self, mlp.n_in, mlp.dtype)
        lane.row_cost_s = known_row_s
        return ServedModel(name, "1", mlp, lane)


class Gate:
    """Lets a kernel's batch through when the test says so; *arrived*: whose batches came, in order."""

    def __init__(self) -> None:
        self.arrived: list[Kernel] = []
        self._permits = threading.Semaphore(0)

    def pass_through(self, kernel: Kernel) -> None:
        self.arrived.append(kernel)
        assert self._permits.acquire(timeout=20), "the gate was not opened"

    def let(self, batches: int) -> None:
        self._permits.release(batches)


Serve = Callable[..., RawClient]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves models on the loop as the app does; gives a client."""
    running: list[tuple[Running, Engine, RawClient]] = []

    def start(*models: ServedModel, threads: int = 1) -> RawClient:
        engine = Engine(threads, _INLINE_LIMIT_S["h2"])
        methods = InferenceApi(Repository(models), engine, InferenceLimits()).methods()
        server = H2Server(methods, engine.run_waiting, H2Options("127.0.0.1:0", 1 << 20, 64, 256))
        found: Any = None
        client = RawClient(server.start())
        running.append((Running(found, server, ""), engine, client))
        return client

    yield start
    for found, engine, client in running:
        client.close()
        found.server.drain(1.0)
        engine.close()


def ask(client: RawClient, model: str, rows: int = 1, value: float = 1.0) -> int:
    """Ask for *rows* rows; return the stream."""
    message = request_for(np.full((rows, 1), value, np.float32), model).SerializeToString()
    return client.request(PREDICT.encode(), prefixed(message))


def answer(client: RawClient, stream_id: int) -> Array:
    """The rows that came back."""
    (message,) = client.wait(stream_id).messages
    return rows_of(pb.PredictResponse.FromString(message))


@pytest.mark.parametrize(
    ("row_s", "rows", "where"),
    [(10 * US, 1, LOOP), (10 * US, 19, LOOP), (10 * US, 21, KERNEL), (1 * MS, 1, KERNEL)],
)
def test_200_us_of_work_is_where_a_thread_begins(serve: Serve, row_s: float, rows: int, where: str) -> None:
    kernel = Kernel(row_s)
    client = serve(kernel.serve_as("m", row_s))
    for i in range(5):
        assert np.array_equal(answer(client, ask(client, "m", rows, i)), np.full((rows, 1), i))
    assert {name.partition("_")[0] for name in kernel.threads} == {where}


def test_the_loop_answers_others_while_a_long_kernel_runs(serve: Serve) -> None:
    """Other models, streams and pings, on the same connection; then the long one is answered, too."""
    gate = Gate()
    long, short = Kernel(1 * MS, gate), Kernel(1 * US)
    client = serve(long.serve_as("long", 1 * MS), short.serve_as("short", 1 * US))
    waiting = ask(client, "long", 3, 7.0)
    wait_for(lambda: gate.arrived)
    for i in range(20):
        assert answer(client, ask(client, "short", 2, i))[0] == i
    messages = [request_for(np.full((1, 1), i, np.float32), "short").SerializeToString() for i in range(50)]
    stream = client.wait(client.request(PREDICT_STREAM.encode(), b"".join(map(prefixed, messages))))
    assert [rows_of(pb.PredictResponse.FromString(m))[0, 0] for m in stream.messages] == list(range(50))
    assert not client.answers[waiting].is_over
    gate.let(1)
    assert np.array_equal(answer(client, waiting), np.full((3, 1), 7.0))
    assert set(short.threads) == {LOOP}


def test_requests_that_arrive_during_a_long_kernel_make_the_next_batches(serve: Serve) -> None:
    """Few of them: as many rows go together as a turn of 20 ms has room for."""
    gate = Gate()
    kernel = Kernel(1 * MS, gate)
    served = kernel.serve_as("m", 1 * MS)
    client = serve(served)
    first = ask(client, "m")
    wait_for(lambda: gate.arrived)
    others = [ask(client, "m", 1, i) for i in range(30)]
    wait_for(lambda: len(served.lane.batcher) == 30)
    gate.let(31)
    assert answer(client, first).shape == (1, 1)
    assert [answer(client, stream_id)[0, 0] for stream_id in others] == list(range(30))
    assert kernel.rows[0] == 1
    assert sum(kernel.rows) == 31
    assert len(kernel.rows) <= 6


def test_what_a_row_costs_is_learned(serve: Serve) -> None:
    """A model that was thought short moves out of the loop at once; one that was thought long moves in."""
    slow, quick = Kernel(5 * MS), Kernel(1 * US)
    client = serve(slow.serve_as("slow", 1 * US), quick.serve_as("quick", 300 * US))
    for _ in range(60):
        answer(client, ask(client, "slow"))
        answer(client, ask(client, "quick"))
    assert slow.threads[0] == LOOP
    assert LOOP not in slow.threads[1:]
    assert quick.threads[0] != LOOP
    assert quick.threads[-1] == LOOP


def test_a_saturated_model_lets_others_have_their_turn(serve: Serve) -> None:
    """One kernel thread, a big model with 10 turns of work waiting: another's long batch goes second."""
    gate = Gate()
    big, other = Kernel(1 * MS, gate), Kernel(1 * MS, gate)
    client = serve(big.serve_as("big", 1 * MS), other.serve_as("other", 1 * MS))
    asked = [ask(client, "big", GROUP_ROWS) for _ in range(10)]
    wait_for(lambda: gate.arrived == [big])
    late = ask(client, "other", 5)
    client.h2.ping(b"all sent")
    client.flush()
    client.wait_until(lambda: any(getattr(e, "opaque_data", b"") == b"all sent" for e in client.events))
    gate.let(2)
    assert answer(client, late).shape == (5, 1)
    assert gate.arrived[:2] == [big, other]
    gate.let(20)
    for stream_id in asked:
        assert answer(client, stream_id).shape == (GROUP_ROWS, 1)


def test_a_turn_is_as_long_as_it_may_be_and_no_longer(serve: Serve) -> None:
    """About 20 ms of rows, or one group of the kernels' where that takes longer; one request comes whole."""
    gate = Gate()
    fine, coarse = Kernel(50 * US, gate), Kernel(10 * MS, gate)
    client = serve(fine.serve_as("fine", 50 * US), coarse.serve_as("coarse", 10 * MS), threads=1)
    asked = [ask(client, "fine", 100) for _ in range(20)] + [ask(client, "coarse", 64) for _ in range(8)]
    asked.append(ask(client, "coarse", 1000))
    gate.let(50)
    for stream_id in asked:
        answer(client, stream_id)
    assert max(fine.rows) <= TURN_S / (50 * US)
    assert sum(fine.rows) == 2000
    assert sorted(coarse.rows)[-1] == 1000
    assert max(rows for rows in coarse.rows if rows != 1000) <= GROUP_ROWS


FOR_EVER_S = 3600.0


@pytest.fixture
def endless_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refusal the loop rests for an hour: whoever is answered has ended the rest."""
    monkeypatch.setattr(h2_server, "_REST_A_REFUSAL_S", FOR_EVER_S)
    monkeypatch.setattr(h2_server, "_LONGEST_REST_S", FOR_EVER_S)


@pytest.mark.usefixtures("endless_rests")
def test_after_a_refusal_the_loop_rests_until_a_kernel_thread_answers(serve: Serve) -> None:
    """The refusal leaves before the rest; the answer of the batch that runs ends it, and all goes on."""
    gate = Gate()
    kernel = Kernel(1 * MS, gate)
    client = serve(kernel.serve_as("m", 1 * MS, max_requests=1))
    for i in range(5):
        running = ask(client, "m", 1, i)
        wait_for(lambda i=i: len(gate.arrived) == 2 * i + 1)
        waiting = ask(client, "m", 1, 10.0 + i)
        refused = client.wait(ask(client, "m"))
        assert refused.status == 8
        gate.let(2)
        assert answer(client, running)[0, 0] == i
        assert answer(client, waiting)[0, 0] == 10 + i


@pytest.mark.usefixtures("endless_rests")
def test_a_loop_that_runs_everything_itself_does_not_rest(serve: Serve) -> None:
    """Nobody would wake it: after a refusal the next request is answered."""
    short = Kernel(1 * US)
    client = serve(short.serve_as("full", 1 * US, max_requests=0), short.serve_as("short", 1 * US))
    for i in range(5):
        assert client.wait(ask(client, "full")).status == 8
        assert answer(client, ask(client, "short", 1, i))[0, 0] == i
