"""Rows in, a Job out that keeps what became of it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from nnserver.batcher import Job


class RecordedJob(Job):
    """
    A job whose callbacks write down what they were told.

    outputs: a copy of what *succeed* was given.  error: what *fail* was given.
    answers: how often either was called; must become 1.
    """

    def __init__(self, x: Any, deadline: float | None = None) -> None:
        self.outputs: np.ndarray[Any, Any] | None = None
        self.error: BaseException | None = None
        self.answers = 0
        self.has_gone = False
        self._answered = threading.Event()
        super().__init__(
            np.asarray(x, np.float32), self._succeed, self._fail, lambda: self.has_gone, deadline
        )

    def wait(self) -> None:
        """Wait for the answer; give up after ten seconds."""
        assert self._answered.wait(10), "the job was not answered"

    def _succeed(self, outputs: np.ndarray[Any, Any]) -> None:
        self.outputs = outputs.copy()
        self.answers += 1
        self._answered.set()

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self.answers += 1
        self._answered.set()


def job_of(rows: int, deadline: float | None = None, value: float = 0.0) -> RecordedJob:
    """A job of *rows* rows of one number each: *value*."""
    return RecordedJob(np.full((rows, 1), value), deadline)
