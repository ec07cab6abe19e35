"""Labels index and iterate like an array of LabelScore."""

from __future__ import annotations

import numpy as np
import pytest

from nnclient import Labels, LabelScore
from nnclient.labels import decode_labels
from nnproto.v1 import inference_pb2 as pb


@pytest.fixture
def labels() -> Labels:
    rows = [
        pb.RowLabels(
            top=[
                pb.LabelScore(label="b", index=1, score=0.75),
                pb.LabelScore(label="aa", index=0, score=0.25),
            ]
        ),
        pb.RowLabels(
            top=[
                pb.LabelScore(label="aa", index=0, score=0.5),
                pb.LabelScore(label="b", index=1, score=np.nan),
            ]
        ),
    ]
    return decode_labels(rows, 2)


def test_three_arrays_of_one_shape(labels: Labels) -> None:
    """Names, indices and scores side by side."""
    assert labels.labels.tolist() == [["b", "aa"], ["aa", "b"]]
    assert labels.indices.tolist() == [[1, 0], [0, 1]]
    assert labels.indices.dtype == np.int32
    assert np.array_equal(labels.scores, [[0.75, 0.25], [0.5, np.nan]], equal_nan=True)
    assert labels.shape == (2, 2)
    assert len(labels) == 2


def test_rows_and_entries(labels: Labels) -> None:
    """A row is Labels of its own; an entry is a LabelScore of Python's own types."""
    assert [[entry.label for entry in row] for row in labels] == [["b", "aa"], ["aa", "b"]]
    assert labels[0][0] == LabelScore("b", 1, 0.75)
    assert type(labels[0][0].score) is float
    assert labels[0].shape == (2,)
    assert labels[:1].shape == (1, 2)
    assert labels[1, 0] == ("aa", 0, 0.5)
    label, index, score = labels[0][1]
    assert (label, index, score) == ("aa", 0, 0.25)


def test_equality_compares_everything_and_nan_with_nan(labels: Labels) -> None:
    """So that answers can be compared in tests."""
    assert labels == labels[:]
    assert labels != labels[::-1]
    assert labels != "labels"
    assert "0.75" in repr(labels)


def test_no_rows() -> None:
    """The shape says how many classes there would have been."""
    assert decode_labels([], 3).shape == (0, 3)


def test_a_row_of_another_length_is_refused() -> None:
    """The message names the row."""
    with pytest.raises(ValueError, match="row 0 has 0 labels instead of 1"):
        decode_labels([pb.RowLabels()], 1)
