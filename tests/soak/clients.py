"""Questions in, an account of their answers out: clients that ask, change their minds, or have no time."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from support.server import PREDICT, PREDICT_STREAM

from nnproto.oip import inference_pb2 as oip
from nnproto.v1 import inference_pb2 as own
from soak.ledger import Ledger
from soak.questions import MAX_MESSAGE_BYTES, Question, Questions

# A call that takes longer is lost.
LOST_S = 60.0
_INFER = "/inference.GRPCInferenceService/ModelInfer"
_STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
# Codes that the errors of a nnproto stream have.
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class Gate:
    """Holds clients between two calls, so that an idle server can be looked at."""

    def __init__(self) -> None:
        self._is_open = threading.Event()
        self._lock = threading.Condition()
        self._inside = 0

    def enter(self) -> None:
        self._is_open.wait()
        with self._lock:
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            self._lock.notify_all()

    def open(self) -> None:
        self._is_open.set()

    def close(self) -> None:
        """Return once all clients are between two calls."""
        self._is_open.clear()
        with self._lock:
            assert self._lock.wait_for(lambda: not self._inside, 2 * LOST_S), "a client is stuck"


class Client(threading.Thread):
    """Asks the server at *address* questions of all kinds, one call after the other, until it is stopped."""

    def __init__(self, address: str, folder: Path, ledger: Ledger, gate: Gate, seed: int) -> None:
        super().__init__(name=f"client {seed}", daemon=True)
        self._random = random.Random(seed)
        self._questions = Questions(folder, seed)
        self._ledger = ledger
        self._gate = gate
        self._is_stopped = False
        self.fault: BaseException | None = None
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._predict = self._method("unary_unary", PREDICT, own.PredictResponse)
        self._infer = self._method("unary_unary", _INFER, oip.ModelInferResponse)
        self._predict_stream = self._method("stream_stream", PREDICT_STREAM, own.PredictResponse)
        self._infer_stream = self._method("stream_stream", _STREAM_INFER, oip.ModelStreamInferResponse)

    def stop(self) -> None:
        self._is_stopped = True

    def run(self) -> None:
        ways: Sequence[tuple[Callable[[], None], float]] = (
            (self._ask, 10),
            (self._ask_and_cancel, 2),
            (self._ask_in_a_hurry, 2),
            (self._ask_wrongly, 1),
            (self._stream, 3),
            (self._stream_and_cancel, 1),
        )
        calls, weights = zip(*ways, strict=True)
        try:
            while not self._is_stopped:
                self._gate.enter()
                try:
                    self._random.choices(calls, weights)[0]()
                finally:
                    self._gate.leave()
        except BaseException as error:
            self.fault = error
        finally:
            self._channel.close()

    def _method(self, kind: str, path: str, answer: Any) -> Any:
        return getattr(self._channel, kind)(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )

    def _question(self) -> tuple[Question, Any]:
        """A question of either service, and the method for it."""
        if self._random.random() < 0.5:
            return self._questions.own(), self._predict
        return self._questions.oip(), self._infer

    def _ask(self) -> None:
        question, method = self._question()
        self._ledger.make(question.kind)
        self._note(question, question.kind, method.future(question.message, timeout=LOST_S))

    def _ask_wrongly(self) -> None:
        question = self._questions.wrong()
        self._ledger.make(question.kind)
        self._note(question, question.kind, self._predict.future(question.message, timeout=LOST_S))

    def _ask_and_cancel(self) -> None:
        """Anywhere between before it is sent and after it is answered."""
        question, method = self._question()
        self._ledger.make("cancelled")
        call = method.future(question.message, timeout=LOST_S)
        threading.Event().wait(self._random.choice((0, 0.0002, 0.001, 0.005)))
        call.cancel()
        self._note(question, "cancelled", call, "CANCELLED")

    def _ask_in_a_hurry(self) -> None:
        question, method = self._question()
        self._ledger.make("short of time")
        call = method.future(question.message, timeout=self._random.choice((0.0, 0.0003, 0.001, 0.003, 0.01)))
        # Refused at once, if the work before it takes longer than it has.
        self._note(question, "short of time", call, "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")

    def _note(self, question: Question, kind: str, call: Any, *allowed: str) -> None:
        """Wait for the end of *call*, and account for it."""
        try:
            answer = call.result()
        except (grpc.RpcError, grpc.FutureCancelledError):
            self._ledger.fail(kind, call.code().name, (*allowed, *question.allowed))
        else:
            self._check(question, kind, answer)

    def _check(self, question: Question, kind: str, answer: Any) -> None:
        problem = question.problem(answer)
        if problem:
            self._ledger.wrong(kind, problem)
        else:
            self._ledger.answer(kind, question.rows)

    def _stream(self) -> None:
        self._converse("streams", cancel_after=None)

    def _stream_and_cancel(self) -> None:
        self._converse("streams, cancelled", cancel_after=self._random.randrange(8))

    def _converse(self, kind: str, cancel_after: int | None) -> None:
        """Ask up to 40 questions on a stream, some ahead of their answers; perhaps cancel it amid them."""
        is_own = self._random.random() < 0.5
        ask = self._questions.own if is_own else self._questions.oip
        asked: queue.SimpleQueue[Question] = queue.SimpleQueue()
        count = self._random.randint(0, 40)
        ahead = threading.Semaphore(8)
        lock = threading.Lock()
        has_ended = False

        def messages() -> Iterator[Any]:
            """In a thread of grpcio's, which may come too late: nothing is asked after the stream's end."""
            for _ in range(count):
                while not ahead.acquire(timeout=1.0) and not has_ended:
                    pass
                question = ask()
                with lock:
                    if has_ended:
                        return
                    self._ledger.make(kind)
                    asked.put(question)
                yield question.message

        method = self._predict_stream if is_own else self._infer_stream
        call = method(messages(), timeout=LOST_S)
        answers, status, is_cancelled = 0, "OK", False
        try:
            for answer in call:
                self._check_streamed(asked.get(timeout=LOST_S), kind, answer, is_own)
                answers += 1
                ahead.release()
                if answers == cancel_after:
                    is_cancelled = call.cancel()
        except grpc.RpcError:
            status = call.code().name
        with lock:
            has_ended = True
        if status == "OK":
            if answers != count:
                self._ledger.wrong(kind, f"a stream of {count} requests ended well after {answers} answers")
        else:
            self._ledger.fail(kind, status, ("CANCELLED",) if is_cancelled else (), asked.qsize())

    def _check_streamed(self, question: Question, kind: str, answer: Any, is_own: bool) -> None:
        """Account for one answer of a stream: it may be an error of its own."""
        if is_own and answer.HasField("error"):
            self._ledger.fail(kind, _CODES[answer.error.code], question.allowed)
        elif not is_own and answer.error_message:
            status = "NOT_FOUND" if answer.error_message.startswith("unknown model") else answer.error_message
            self._ledger.fail(kind, status, question.allowed)
        else:
            self._check(question, kind, answer if is_own else answer.infer_response)


assert MAX_MESSAGE_BYTES < 4 << 20  # What a Python client sends and takes without being told.
