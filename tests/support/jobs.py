"""Rows in, a Job out that keeps what became of it."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from nnserver.access_log import RequestFacts
from nnserver.batcher import Job, Watcher
from nnserver.call import Metadata


class RecordedJob(Job):
    """
    A job whose form and caller write down what they were told.

    outputs: a copy of what the engine delivered.  error: what it failed with.
    answers: how often either happened; must become 1.
    """

    kind = "predict"
    watcher: Watcher | None = None
    metadata: Metadata = ()

    def __init__(self, x: Any, deadline: float | None = None, origin: Hashable = None) -> None:
        self.outputs: np.ndarray[Any, Any] | None = None
        self.error: BaseException | None = None
        self.answers = 0
        self.has_gone = False
        self._answered = threading.Event()
        self.x = np.asarray(x, np.float32)
        self.rows, self.nbytes = len(self.x), self.x.nbytes
        self.deadline = deadline
        self.origin: Hashable = origin
        self.is_patient = False
        super().__init__(self, self.x, self)

    def facts(self, job: Job) -> RequestFacts:
        return RequestFacts(self.kind, "test", "1", self.rows, "")

    def wait(self) -> None:
        """Wait for the answer; give up after ten seconds."""
        assert self._answered.wait(10), "the job was not answered"

    def is_cancelled(self) -> bool:
        return self.has_gone

    def deliver(self, jobs: Sequence[Job], y: np.ndarray[Any, Any]) -> int:
        assert jobs == [self], "each has a form of its own"
        self.outputs = y.copy()
        self.answers += 1
        self._answered.set()
        return 0

    def answer(self, message: bytes) -> None:
        raise AssertionError("deliver answers")

    def fail(self, error: BaseException) -> None:
        self.error = error
        self.answers += 1
        self._answered.set()


def job_of(
    rows: int, deadline: float | None = None, value: float = 0.0, origin: Hashable = None
) -> RecordedJob:
    """A job of *rows* rows of one number each: *value*."""
    return RecordedJob(np.full((rows, 1), value), deadline, origin)
