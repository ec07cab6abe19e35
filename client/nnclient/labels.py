"""RowLabels messages -> Labels: the best classes of each row, as arrays and as rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nnproto.v1 import inference_pb2 as pb


class LabelScore(NamedTuple):
    """One class of one row: its name, its index from 0 and its probability (or NaN)."""

    label: str
    index: int  # type: ignore[assignment]  # the field hides tuple.index, which no one needs here
    score: float


class Labels:
    """
    The best classes of each row, the most probable first.

    Three arrays of one shape, (rows, top_k), or (top_k,) if a single row was asked about:
    `labels` (str), `indices` (int32), `scores` (float64, in [0, 1] or NaN).

    It is indexed and iterated like an array of LabelScore of that shape:

        for row in client.predict("digits", x, output="labels", top_k=3):
            for label, index, score in row:
                ...
        client.predict("digits", x[0], output="labels")[0].label
    """

    __slots__ = ("indices", "labels", "scores")

    def __init__(
        self, labels: NDArray[np.str_], indices: NDArray[np.int32], scores: NDArray[np.float64]
    ) -> None:
        self.labels = labels
        self.indices = indices
        self.scores = scores

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, top_k), or (top_k,) for a single row."""
        return self.indices.shape

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Any) -> Any:
        """Return a LabelScore where an array would return an element, else Labels."""
        label, index, score = self.labels[key], self.indices[key], self.scores[key]
        if np.ndim(index) == 0:
            return LabelScore(str(label), int(index), float(score))
        return Labels(label, index, score)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Labels):
            return NotImplemented
        return (
            np.array_equal(self.labels, other.labels)
            and np.array_equal(self.indices, other.indices)
            and np.array_equal(self.scores, other.scores, equal_nan=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Labels(labels={self.labels!r}, indices={self.indices!r}, scores={self.scores!r})"


def decode_labels(rows: Sequence[pb.RowLabels], top_k: int) -> Labels:
    """
    Return the (rows, top_k) Labels of a response.

    Raises ValueError if a row has another number of classes than *top_k*.
    """
    for number, row in enumerate(rows):
        if len(row.top) != top_k:
            raise ValueError(f"row {number} has {len(row.top)} labels instead of {top_k}")
    shape = (len(rows), top_k)
    top = [entry for row in rows for entry in row.top]
    return Labels(
        np.array([entry.label for entry in top], dtype=np.str_).reshape(shape),
        np.array([entry.index for entry in top], dtype=np.int32).reshape(shape),
        np.array([entry.score for entry in top], dtype=np.float64).reshape(shape),
    )


def join_labels(parts: Iterable[Labels]) -> Labels:
    """Return the rows of all *parts*, one after the other."""
    parts = list(parts)
    if len(parts) == 1:
        return parts[0]
    return Labels(
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.scores for part in parts]),
    )
