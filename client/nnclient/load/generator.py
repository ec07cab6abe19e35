"""A plan -> what was counted: starts worker processes, gives them one clock, and adds up."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from nnclient.client import Client
from nnclient.errors import InternalError
from nnclient.interrupt import cleaned_up_on_interrupt, interrupt_ignored
from nnclient.load.plan import LoadPlan
from nnclient.load.questions import make_questions
from nnclient.load.tally import Tally, Window
from nnclient.load.worker import work
from nnclient.models import ModelInfo
from nnclient.tls import credentials_of

# From when the workers are told the window to its start: enough for the slowest to hear of it.
_HEADSTART_S = 0.2

# Told how it goes: (seconds since the start, answers so far in the window).
Progress = Callable[[float, int], None]


@dataclass
class Outcome:
    """What a plan has led to."""

    plan: LoadPlan
    model: ModelInfo
    tally: Tally


@dataclass
class _Worker:
    process: Any
    pipe: Connection[Any, Any]
    answered: int = 0
    tally: Tally | None = None


def generate_load(plan: LoadPlan, progress: Progress) -> Outcome:
    """
    Carry out *plan*. Raises NnclientError if it cannot be started. For the main thread.

    The first request is sent, and its answer looked at, before any process is started.
    """
    model = _try_out(plan)
    with _started(plan, model) as workers:
        for worker in workers:
            _expect(worker, "ready")
        start = time.monotonic() + _HEADSTART_S
        window = Window(start, start + plan.warmup_s, start + plan.warmup_s + plan.duration_s)
        for worker in workers:
            worker.pipe.send(window)
        _collect(workers, window, progress)
    total = Tally()
    for worker in workers:
        assert worker.tally is not None
        total.add(worker.tally)
    return Outcome(plan, model, total)


def _try_out(plan: LoadPlan) -> ModelInfo:
    """Return the model's description; raise what is wrong with the plan, seen from the server."""
    with Client(
        plan.target,
        credentials=credentials_of(plan.tls),
        token=plan.token,
        allow_insecure_token=plan.allow_insecure_token,
        timeout_s=plan.timeout_s,
    ) as client:
        model = client.model(plan.model, plan.version)
        questions = make_questions(plan, model)
        client.predict(
            plan.model, questions.batches[0], plan.output, plan.top_k, plan.version, timeout_s=plan.timeout_s
        )
    return model


@contextlib.contextmanager
def _started(plan: LoadPlan, model: ModelInfo) -> Iterator[list[_Worker]]:
    # Fresh interpreters: gRPC does not survive a fork.
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []

    def kill() -> None:
        for worker in workers:
            worker.process.kill()

    with cleaned_up_on_interrupt(kill):
        try:
            for number in range(plan.processes):
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(theirs, plan.share(number), model), daemon=True)
                # Ctrl-C reaches every process of a terminal; what becomes of the workers is decided here.
                with interrupt_ignored(), _environment_of_workers():
                    process.start()
                    workers.append(_Worker(process, ours))
                # Now only the worker holds its end, so that its death is seen at ours.
                theirs.close()
            yield workers
            for worker in workers:
                worker.process.join()
        finally:
            kill()
            for worker in workers:
                worker.process.join()
                worker.pipe.close()


@contextlib.contextmanager
def _environment_of_workers() -> Iterator[None]:
    """Have what is started in the block find the faster of gRPC's two poll engines, unless the user chose."""
    # CPU a request of one row, grpcio 1.85 and uvloop 0.23: unary 65 -> 51 us, stream 74 -> 63 us.
    if "GRPC_EXPERIMENTS" in os.environ:
        yield
        return
    os.environ["GRPC_EXPERIMENTS"] = "-event_engine_client,-event_engine_listener"
    try:
        yield
    finally:
        del os.environ["GRPC_EXPERIMENTS"]


def _collect(workers: list[_Worker], window: Window, progress: Progress) -> None:
    by_pipe = {worker.pipe: worker for worker in workers}
    while by_pipe:
        for pipe in wait(list(by_pipe)):
            assert isinstance(pipe, Connection)
            worker = by_pipe[pipe]
            kind, value = _receive(worker)
            if kind == "done":
                worker.tally = value
                del by_pipe[pipe]
            else:
                worker.answered = value
        progress(time.monotonic() - window.start, sum(worker.answered for worker in workers))


def _expect(worker: _Worker, kind: str) -> None:
    received = _receive(worker)
    assert received[0] == kind, received


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        kind, value = worker.pipe.recv()
    except EOFError:
        worker.process.join()
        raise InternalError(
            f"a worker process ended with status {worker.process.exitcode} before its time"
        ) from None
    if kind == "failed":
        raise value
    return kind, value
