"""
.csv or .npy file -> rows for a model; a model's answers -> .csv or .npy file.

CSV: comma-separated numbers, a row a line, blank lines skipped. A first line in which nothing is a number is
a header. Where the model has feature names, columns are found by them, in any order and among others;
otherwise the header is skipped and columns count.
"""

from __future__ import annotations

import csv
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from nncore.arrays import FloatArray
from nncore.errors import RowFileError
from nncore.model import Mlp

STANDARD_INPUT = "-"
# Lines that NumPy parses at a time; a fault is looked for in these only.
_CHUNK_LINES = 4096

_NumberedLine = tuple[int, str]


def read_rows(path: str, mlp: Mlp) -> npt.NDArray[Any]:
    """
    The rows in *path*, (rows, n_in), for *mlp*; "-" is CSV on standard input.

    Raises RowFileError, naming line and column, or OSError.
    """
    if path == STANDARD_INPUT:
        return _read_csv(sys.stdin.buffer, "standard input", mlp)
    if Path(path).suffix == ".npy":
        return _read_npy(Path(path), mlp)
    with open(path, "rb") as stream:
        return _read_csv(stream, Path(path).name, mlp)


def write_csv(stream: IO[str], columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a header of *columns*, then *rows*; floats with the fewest digits that give them back."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)


def write_npy(path: str, array: FloatArray | npt.NDArray[np.int32]) -> None:
    """Write *array* to *path* as it is: NumPy itself would add a suffix."""
    with open(path, "wb") as stream:
        np.save(stream, array, allow_pickle=False)


def _read_npy(path: Path, mlp: Mlp) -> npt.NDArray[Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise RowFileError(f"{path.name} cannot be read as .npy: {error}") from None
    if not isinstance(array, np.ndarray):
        raise RowFileError(f"{path.name} is an archive of arrays; expected one array")
    return np.atleast_2d(array)  # its shape and dtype are checked by the model


def _read_csv(stream: IO[bytes], name: str, mlp: Mlp) -> npt.NDArray[np.float64]:
    lines = _numbered_lines(stream, name)
    first = next(lines, None)
    if first is None:
        raise RowFileError(f"{name} is empty; expected rows of {mlp.n_in} numbers")
    header = [cell.strip() for cell in next(csv.reader([first[1]]))]
    width, columns = mlp.n_in, None
    if any(map(_is_number, header)):
        lines = itertools.chain([first], lines)
    elif mlp.feature_names is not None and len(set(mlp.feature_names)) == mlp.n_in:
        width, columns = len(header), _find_columns(mlp.feature_names, header, name)
    chunks = [np.empty((0, mlp.n_in))]
    while chunk := list(itertools.islice(lines, _CHUNK_LINES)):
        chunks.append(_parse(chunk, width, columns or range(width), name))
    return np.concatenate(chunks)


def _numbered_lines(stream: IO[bytes], name: str) -> Iterator[_NumberedLine]:
    """(number from 1, text) of each line that is not blank."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise RowFileError(f"{name}, line {number}: not text in UTF-8") from None
        if text:
            yield number, text


def _find_columns(wanted: Sequence[str], header: Sequence[str], name: str) -> list[int]:
    """Where in *header* each of the names in *wanted* stands."""
    for feature in wanted:
        if header.count(feature) != 1:
            problem = "two columns" if feature in header else "no column"
            raise RowFileError(f"{name} has {problem} {feature!r}; the model takes one of each feature")
    return [header.index(feature) for feature in wanted]


def _parse(
    lines: Sequence[_NumberedLine], width: int, columns: Sequence[int], name: str
) -> npt.NDArray[np.float64]:
    """The numbers in *columns* of *lines*, each of which has *width* cells."""
    try:
        # NumPy's parser is compiled; looking for what is wrong is left to the case that something is.
        rows = np.loadtxt(
            [text for _, text in lines], delimiter=",", comments=None, quotechar='"', usecols=columns, ndmin=2
        )
    except ValueError:
        rows = None
    # usecols hides lines that are too long.
    is_even = all(text.count(",") == width - 1 for _, text in lines)
    if rows is not None and is_even:
        return rows
    return np.array([_parse_line(line, width, columns, name) for line in lines])


def _parse_line(line: _NumberedLine, width: int, columns: Sequence[int], name: str) -> list[float]:
    number, text = line
    cells = next(csv.reader([text]))
    if len(cells) != width:
        raise RowFileError(f"{name}, line {number}: {len(cells)} columns; expected {width}")
    for column in columns:
        if not _is_number(cells[column]):
            what = (
                f"{cells[column]!r} is not a number"
                if cells[column].strip()
                else "empty; write nan if unknown"
            )
            raise RowFileError(f"{name}, line {number}, column {column + 1}: {what}")
    return [float(cells[column]) for column in columns]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
