"""Files of rows -> batches, and faults named by line and column."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnclient import InvalidInput
from nnclient.row_files import open_rows


def read(path: Path | str, n_in: int, **kwargs: Any) -> Any:
    with open_rows(str(path), n_in, **kwargs) as rows:
        return np.concatenate(list(rows))


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "rows.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    "text",
    [
        "1,2\n3,4\n",
        "1,2\r\n3,4",
        "a,b\n1,2\n3,4\n",
        "\ufeffa,b\n1,2\n3,4\n",
        '"the a","b, or ""c"""\n1,2\n\n  \n3,4\n\n',
        " 1 , 2.0\n3e0,+4\n",
    ],
)
def test_csv_with_and_without_names(tmp_path: Path, text: str) -> None:
    """Blank lines, line ends of every system, a byte order mark."""
    assert read(write(tmp_path, text), 2).tolist() == [[1, 2], [3, 4]]


def test_a_line_of_numeric_names_can_be_skipped(tmp_path: Path) -> None:
    """Names such as 0, 1, 2 cannot be told from a row."""
    path = write(tmp_path, "0,1\n3,4\n")
    assert read(path, 2).tolist() == [[0, 1], [3, 4]]
    assert read(path, 2, skip_header=True).tolist() == [[3, 4]]


def test_not_finite_numbers_are_numbers(tmp_path: Path) -> None:
    """nan and inf, in any case."""
    assert np.array_equal(
        read(write(tmp_path, "nan,-INF\nNaN,1\n"), 2), [[np.nan, -np.inf], [np.nan, 1]], equal_nan=True
    )


@settings(deadline=None, max_examples=40)
@given(values=st.lists(st.floats(), min_size=1, max_size=20))
def test_numbers_keep_all_their_bits(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    """What repr wrote, float64 reads back."""
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    path.write_text("\n".join(map(repr, values)))
    assert np.array_equal(read(path, 1)[:, 0], np.array(values), equal_nan=True)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("1,2\n3,x\n", "line 2, column 2: 'x' is not a number"),
        ("a,b\n1,2\n\n3,\n", "line 4, column 2: empty; write nan for a gap"),
        ("1,2\n3\n", "line 2: 1 columns; expected 2"),
        ("1,2,3\n", "line 1: 3 columns; expected 2"),
        ("a,1\n3,4\n", "line 1, column 1: 'a' is not a number"),
        (b"1,2\n\xff\xfe,3\n", "line 2: neither text in UTF-8 nor a .npy file"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str | bytes, fault: str) -> None:
    """By file, line and column, counted as an editor counts them."""
    path = write(tmp_path, text)
    with pytest.raises(InvalidInput) as caught:
        read(path, 2)
    assert str(caught.value) == f"{path}, {fault}"


def test_faults_far_into_a_file_have_their_true_line(tmp_path: Path) -> None:
    """Rows before the fault are delivered."""
    path = write(tmp_path, "1,2\n" * 10_000 + "1,oops\n")
    with open_rows(str(path), 2) as rows:
        assert len(next(iter(rows))) == 4096
        with pytest.raises(InvalidInput, match="line 10001, column 2: 'oops'"):
            list(rows)


@pytest.mark.parametrize("text", ["", "\n\n", "a,b\n"])
def test_a_file_without_rows_is_an_empty_array(tmp_path: Path, text: str) -> None:
    """Of the model's width, so that the answer has its columns."""
    assert read(write(tmp_path, text), 2).shape == (0, 2)


def test_npy_is_known_by_its_first_bytes_and_read_in_pieces(tmp_path: Path) -> None:
    """Whatever its name; dtype and values stay."""
    x = np.arange(30_000, dtype=np.float32).reshape(-1, 3)
    np.save(tmp_path / "x.npy", x)
    path = (tmp_path / "x.npy").rename(tmp_path / "data")
    with open_rows(str(path), 3) as rows:
        batches = list(rows)
        assert rows.size == rows.done == 10_000
    assert len(batches) == 3
    assert np.array_equal(np.concatenate(batches), x)
    assert batches[0].dtype == np.float32


def test_one_dimensional_npy_is_a_row(tmp_path: Path) -> None:
    """As predict takes it."""
    np.save(tmp_path / "x.npy", np.ones(3))
    assert read(tmp_path / "x.npy", 3).shape == (1, 3)


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 3), ()])
def test_npy_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The message has both shapes."""
    np.save(tmp_path / "x.npy", np.ones(shape))
    with pytest.raises(InvalidInput, match=r"has shape .*; expected \(rows, 3\)"):
        read(tmp_path / "x.npy", 3)


def test_npy_that_is_cut_or_holds_objects_is_refused(tmp_path: Path) -> None:
    """Nothing is unpickled."""
    np.save(tmp_path / "objects.npy", np.array([[None]]), allow_pickle=True)
    with pytest.raises(InvalidInput, match=r"cannot be read as \.npy"):
        read(tmp_path / "objects.npy", 1)
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\x00")
    with pytest.raises(InvalidInput, match=r"cannot be read as \.npy"):
        read(tmp_path / "cut.npy", 1)


@pytest.mark.parametrize("kind", ["csv", "npy"])
def test_standard_input(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """`-` is either kind of file, from a pipe."""
    buffer = io.BytesIO(b"1,2\n3,4\n")
    if kind == "npy":
        buffer = io.BytesIO()
        np.save(buffer, np.array([[1.0, 2.0], [3.0, 4.0]]))
        buffer.seek(0)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BufferedReader(buffer)))
    assert read("-", 2).tolist() == [[1, 2], [3, 4]]


def test_progress_is_told_in_bytes_for_csv(tmp_path: Path) -> None:
    """size and done are the file's bytes."""
    path = write(tmp_path, "1,2\n3,4\n")
    with open_rows(str(path), 2) as rows:
        list(rows)
        assert rows.size == rows.done == 8
