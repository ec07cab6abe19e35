"""Results -> CSV, .npy and tables that read back as they were."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nnclient import Labels, ModelInfo
from nnclient.answer_files import CsvWriter, NpyWriter, TableWriter, column_names, replaced_when_whole


def model(n_out: int = 2, labels: tuple[str, ...] = ()) -> ModelInfo:
    return ModelInfo("m", "1", np.dtype(np.float32), 3, n_out, (), labels, (), 0)


LABELS = Labels(
    np.array([["a,b", "c"], ["c", "a,b"]]),
    np.array([[0, 1], [1, 0]], np.int32),
    np.array([[0.75, 0.25], [0.5, np.nan]]),
)


@settings(deadline=None, max_examples=60)
@given(
    values=st.sampled_from(["<f4", "<f8"]).flatmap(
        lambda dtype: hnp.arrays(np.dtype(dtype), hnp.array_shapes(min_dims=2, max_dims=2, max_side=6))
    )
)
def test_csv_reads_back_with_the_same_bits(values: Any) -> None:
    """The shortest digits that do, for each dtype."""
    stream = io.StringIO()
    CsvWriter(stream, [f"y{n}" for n in range(values.shape[1])]).write(values)
    lines = list(csv.reader(io.StringIO(stream.getvalue())))[1:]
    assert np.array_equal(np.array(lines, dtype=np.float64).astype(values.dtype), values, equal_nan=True)


def test_csv_writes_float32_in_its_own_digits() -> None:
    """0.1, and not 0.10000000149011612."""
    stream = io.StringIO()
    CsvWriter(stream, ["y0"]).write(np.array([[0.1]], np.float32))
    assert stream.getvalue() == "y0\n0.1\n"


def test_csv_of_labels_quotes_what_needs_it() -> None:
    """Names with commas come back whole."""
    stream = io.StringIO()
    writer = CsvWriter(stream, column_names(model(), "labels", 2))
    writer.write(LABELS)
    writer.write(LABELS[:0])
    rows = list(csv.reader(io.StringIO(stream.getvalue())))
    assert rows == [
        ["label_1", "score_1", "label_2", "score_2"],
        ["a,b", "0.75", "c", "0.25"],
        ["c", "0.5", "a,b", "nan"],
    ]


def test_columns_are_named_for_what_they_are() -> None:
    """Labels where there are as many as outputs, else numbers."""
    assert column_names(model(2, ("no", "yes")), "probabilities", 1) == ["no", "yes"]
    assert column_names(model(1, ("no", "yes")), "outputs", 1) == ["y0"]
    assert column_names(model(2), "labels", 1) == ["label", "score"]


def test_npy_grows_batch_by_batch(tmp_path: Path) -> None:
    """One array in the end, its header as if it had been known from the start."""
    batches = [np.full((rows, 2), rows, np.float32) for rows in (3, 0, 100_000, 1)]
    with open(tmp_path / "y.npy", "wb") as stream:
        writer = NpyWriter(stream, model())
        for batch in batches:
            writer.write(batch)
        writer.finish()
    y = np.load(tmp_path / "y.npy", allow_pickle=False)
    assert np.array_equal(y, np.concatenate(batches))
    np.save(tmp_path / "expected.npy", y)
    assert (tmp_path / "y.npy").stat().st_size == (tmp_path / "expected.npy").stat().st_size


def test_npy_of_labels_is_a_structured_array(tmp_path: Path) -> None:
    """With room for the longest name, and no pickle."""
    with open(tmp_path / "y.npy", "wb") as stream:
        writer = NpyWriter(stream, model(2, ("a,b", "c")))
        writer.write(LABELS)
        writer.finish()
    y = np.load(tmp_path / "y.npy", allow_pickle=False)
    assert y.shape == (2, 2)
    assert y["label"].tolist() == [["a,b", "c"], ["c", "a,b"]]
    assert y["index"].tolist() == [[0, 1], [1, 0]]
    assert np.array_equal(y["score"], LABELS.scores, equal_nan=True)


@pytest.mark.parametrize(("n_out", "longest"), [(1, "1"), (2, "1"), (11, "10")])
def test_npy_has_room_for_indices_as_names(tmp_path: Path, n_out: int, longest: str) -> None:
    """A model without labels answers with indices; one output is two classes."""
    labels = Labels(np.array([[longest]]), np.array([[int(longest)]], np.int32), np.array([[1.0]]))
    with open(tmp_path / "y.npy", "wb") as stream:
        writer = NpyWriter(stream, model(n_out))
        writer.write(labels)
        writer.finish()
    assert np.load(tmp_path / "y.npy", allow_pickle=False)["label"].tolist() == [[longest]]


def test_tables_align() -> None:
    """Every line has the same length, whatever the numbers."""
    stream = io.StringIO()
    writer = TableWriter(stream, ["y0", "a longer name"])
    writer.write(np.array([[1.0, -1.23456789e-300], [np.nan, np.inf]]))
    lines = stream.getvalue().splitlines()
    assert lines[0].split("  ")[-1] == "a longer name"
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["1", "-1.23457e-300"]


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    """What was there stays until the new one is finished, and nothing else is left behind."""
    path = tmp_path / "out.csv"
    path.write_text("before")

    def fail() -> None:
        with replaced_when_whole(path, "w") as stream:
            stream.write("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "before"
    with replaced_when_whole(path, "w") as stream:
        stream.write("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_devices_and_pipes_are_written_to_as_they_are(tmp_path: Path) -> None:
    """-o /dev/null must not replace /dev/null."""
    device = tmp_path / "pipe"
    os.mkfifo(device)
    reader = os.open(device, os.O_RDONLY | os.O_NONBLOCK)
    with replaced_when_whole(device, "w") as stream:
        stream.write("through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert device.is_fifo()
