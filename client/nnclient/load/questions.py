"""A plan and a model -> requests, encoded once; answers -> right, or what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from nnclient.conversation import answer_of
from nnclient.errors import InternalError, InvalidInput, error_from_answer
from nnclient.labels import Labels
from nnclient.load.plan import LoadPlan
from nnclient.models import ModelInfo
from nnclient.wire import as_rows
from nnproto.v1 import inference_pb2 as pb

# Different requests that are sent over and over: enough that nothing answers from a cache of one,
# few enough that the first answer of each is soon known.
_MOST_REQUESTS = 64


class Questions:
    """
    Requests in a fixed round, and the first answer to each, with which later ones are compared.

    The ids of the requests are empty, so that equal answers are equal bytes.
    """

    def __init__(self, plan: LoadPlan, batches: list[NDArray[np.floating]]) -> None:
        self._plan = plan
        self.batches = batches
        self._answers: list[bytes | None] = [None] * len(batches)
        self._numbers = count()
        self.requests = [plan.question.encode(batch) for batch in batches]

    def next_number(self) -> int:
        """Return which request to send next."""
        return next(self._numbers) % len(self.requests)

    def fault_of(self, number: int, answer: bytes) -> tuple[str, str] | None:
        """
        Return None if *answer* is right for request *number*, else a status and a text.

        WRONG_ANSWER is the status of an answer that has the wrong form, is not finite although its
        input is, or has other bits than the first one had.
        """
        if answer == self._answers[number]:
            return None
        return self._look_closer(number, answer)

    def _look_closer(self, number: int, answer: bytes) -> tuple[str, str] | None:
        try:
            response = pb.PredictResponse.FromString(answer)
        except DecodeError:
            return "WRONG_ANSWER", "an answer that is not a PredictResponse"
        if response.HasField("error"):
            error = error_from_answer(response.error.code, response.error.message, target=self._plan.target)
            return error.status or "UNKNOWN", error.message
        if self._answers[number] is not None:
            return "WRONG_ANSWER", "the same rows were answered differently before"
        rows = self.batches[number]
        try:
            result = answer_of(self._plan.question, response, len(rows), False, self._plan.target)
        except InternalError as error:
            return "WRONG_ANSWER", error.message
        numbers = result.scores if isinstance(result, Labels) else result
        if np.isfinite(rows).all() and not np.isfinite(numbers).all():
            return "WRONG_ANSWER", "an answer with NaN or infinity to finite rows"
        self._answers[number] = answer
        return None


def make_questions(plan: LoadPlan, model: ModelInfo) -> Questions:
    """
    Return the requests of *plan*: consecutive rows of its data, over and over, or random ones.

    Raises InvalidInput or OSError if the data cannot be used.
    """
    if plan.data is None:
        numbers = np.random.default_rng(plan.seed)
        dtype = model.dtype
        batches = [
            numbers.standard_normal((plan.rows, model.n_in)).astype(dtype) for _ in range(_MOST_REQUESTS)
        ]
    else:
        batches = list(_batches_of(_load(plan.data, model.n_in), plan.rows))
    return Questions(plan, batches)


def _load(path: str, n_in: int) -> NDArray[np.floating]:
    try:
        data = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise InvalidInput(f"{path} cannot be read as .npy: {error}") from None
    if data.ndim != 2 or data.shape[1] != n_in or not len(data):
        raise InvalidInput(f"{path} has shape {data.shape}; expected (rows, {n_in}) with at least one row")
    return data  # type: ignore[no-any-return]


def _batches_of(data: NDArray[np.floating], rows: int) -> Iterator[NDArray[np.floating]]:
    # As many batches as use every row once, where that is not too many.
    for number in range(min(_MOST_REQUESTS, -(-len(data) // rows))):
        at = np.arange(number * rows, (number + 1) * rows) % len(data)
        yield as_rows(data[at])[0]
