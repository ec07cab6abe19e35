"""A .csv or .npy file, or standard input -> batches of rows, and how far through it is."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nnclient.errors import InvalidInput

_NPY_MAGIC = b"\x93NUMPY"


@dataclass
class RowFile:
    """
    Rows of one file. Iterating yields arrays (rows, n_in), each but the last of batch_rows rows.

    size: what there is to do, in rows or bytes; None if it cannot be known (a pipe).
    done: what of it has been read so far, in the same unit.
    """

    name: str
    batches: Iterator[NDArray[Any]]
    batch_rows: int
    size: int | None = None
    done: int = 0

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return self.batches


@contextlib.contextmanager
def open_rows(path: str, n_in: int, *, skip_header: bool = False) -> Iterator[RowFile]:
    """
    Give the rows of *path*, "-" being standard input; .npy is known by its first bytes.

    n_in: columns there must be.
    skip_header: leave out the first line of a CSV file; a line in which nothing is a number is left
    out anyway.

    Raises InvalidInput for what is wrong at the start, and while iterating for what is wrong later
    on, naming line and column; OSError if the file cannot be read.
    """
    name = "standard input" if path == "-" else path
    # A few hundred rows for wide models, thousands for narrow ones: about one message each.
    batch_rows = max(1, min(4096, (1 << 19) // (8 * n_in)))
    with contextlib.ExitStack() as stack:
        reader = sys.stdin.buffer if path == "-" else stack.enter_context(open(path, "rb"))
        if _is_npy(reader):
            yield _open_npy(name, None if path == "-" else Path(path), reader, n_in, batch_rows)
            return
        rows = RowFile(name, iter(()), batch_rows, _file_size(reader))
        rows.batches = _read_csv(rows, reader, n_in, skip_header)
        yield rows


def _is_npy(reader: IO[bytes]) -> bool:
    # Binary files and standard input are buffered readers, which can look ahead.
    assert isinstance(reader, io.BufferedReader)
    return reader.peek(len(_NPY_MAGIC))[: len(_NPY_MAGIC)] == _NPY_MAGIC


def _file_size(reader: IO[bytes]) -> int | None:
    try:
        return os.fstat(reader.fileno()).st_size or None
    except (OSError, ValueError):
        return None


def _open_npy(name: str, path: Path | None, reader: IO[bytes], n_in: int, batch_rows: int) -> RowFile:
    try:
        # Mapped, so that a file larger than memory can be sent; never a pickle.
        array = (
            np.load(io.BytesIO(reader.read()), allow_pickle=False)
            if path is None
            else np.load(path, mmap_mode="r", allow_pickle=False)
        )
    except ValueError as error:
        raise InvalidInput(f"{name} cannot be read as .npy: {error}") from None
    x = np.atleast_2d(array)
    if x.ndim != 2 or x.shape[1] != n_in:
        raise InvalidInput(f"{name} has shape {array.shape}; expected (rows, {n_in})")
    rows = RowFile(name, iter(()), batch_rows, len(x))

    def batches() -> Iterator[NDArray[Any]]:
        for start in range(0, max(len(x), 1), batch_rows):
            yield x[start : start + batch_rows]
            rows.done = min(start + batch_rows, len(x))

    rows.batches = batches()
    return rows


def _read_csv(rows: RowFile, reader: IO[bytes], n_in: int, skip_header: bool) -> Iterator[NDArray[Any]]:
    lines = _numbered_lines(rows, reader)
    first = next(lines, None)
    if first is not None and not skip_header and not _is_header(first[1]):
        lines = itertools.chain([first], lines)
    is_empty = True
    while chunk := list(itertools.islice(lines, rows.batch_rows)):
        yield _parse(rows.name, chunk, n_in)
        is_empty = False
    if is_empty:
        # Still asked, so that the answer is an empty table with the right columns.
        yield np.empty((0, n_in))


def _numbered_lines(rows: RowFile, reader: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text) of each line that is not blank."""
    for number, line in enumerate(reader, 1):
        rows.done += len(line)
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise InvalidInput(f"{rows.name}, line {number}: neither text in UTF-8 nor a .npy file") from None
        if text:
            yield number, text


def _is_header(line: str) -> bool:
    return not any(_is_number(cell) for cell in line.split(","))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _parse(name: str, lines: list[tuple[int, str]], n_in: int) -> NDArray[np.float64]:
    try:
        # NumPy's parser is compiled; looking for what is wrong is left to the case that something is.
        x = np.loadtxt([text for _, text in lines], delimiter=",", comments=None, ndmin=2)
    except ValueError:
        x = None
    if x is not None and x.shape == (len(lines), n_in):
        return x
    raise _first_fault(name, lines, n_in)


def _first_fault(name: str, lines: list[tuple[int, str]], n_in: int) -> InvalidInput:
    for number, text in lines:
        cells = text.split(",")
        if len(cells) != n_in:
            return InvalidInput(f"{name}, line {number}: {len(cells)} columns; expected {n_in}")
        for column, cell in enumerate(cells, 1):
            if not _is_number(cell):
                what = f"{cell.strip()!r} is not a number" if cell.strip() else "empty; write nan for a gap"
                return InvalidInput(f"{name}, line {number}, column {column}: {what}")
    return InvalidInput(f"{name}, lines {lines[0][0]} to {lines[-1][0]} are not numbers separated by commas")
