"""Results of batches -> a CSV file, a .npy file or a table, written as they come."""

from __future__ import annotations

import contextlib
import csv
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from nnclient.conversation import Prediction
from nnclient.interrupt import cleaned_up_on_interrupt
from nnclient.labels import Labels
from nnclient.models import ModelInfo


class AnswerWriter(Protocol):
    """Takes the results of a file's batches, one after the other."""

    def write(self, result: Prediction) -> None:
        """Append *result*."""

    def finish(self) -> None:
        """Write what could not be written before the last result."""


def column_names(model: ModelInfo, output: str, top_k: int) -> list[str]:
    """Return a name for each column of CSV and table."""
    if output == "labels":
        numbers = [""] if top_k == 1 else [f"_{place}" for place in range(1, top_k + 1)]
        return [f"{name}{number}" for number in numbers for name in ("label", "score")]
    if len(model.labels) == model.n_out:
        return list(model.labels)
    return [f"y{column}" for column in range(model.n_out)]


class CsvWriter:
    """Comma-separated lines, with the shortest digits that give the same number back."""

    def __init__(self, stream: IO[str], columns: Sequence[str]) -> None:
        self._writer = csv.writer(stream, lineterminator="\n")
        self._header: list[Sequence[str]] = [columns]

    def write(self, result: Prediction) -> None:
        # With the first result, not before: a command that fails prints no lone header.
        self._writer.writerows(self._header)
        self._header.clear()
        self._writer.writerows(_cells(result, "{}"))

    def finish(self) -> None:
        pass


class TableWriter:
    """Aligned columns for reading, six digits each."""

    _LEAST_WIDTH = 12

    def __init__(self, stream: IO[str], columns: Sequence[str]) -> None:
        self._stream = stream
        # Fixed from the start: the rows are not known yet.
        self._widths = [max(len(name), self._LEAST_WIDTH) for name in columns]
        self._header: list[Sequence[str]] = [columns]

    def write(self, result: Prediction) -> None:
        rows = [*self._header, *_cells(result, "{:.6g}")]
        self._header.clear()
        for row in rows:
            self._print(row)

    def finish(self) -> None:
        pass

    def _print(self, cells: Sequence[str]) -> None:
        line = "  ".join(cell.rjust(width) for cell, width in zip(cells, self._widths, strict=True))
        print(line, file=self._stream)


class NpyWriter:
    """
    One array, appended to; nothing but the last result is held in memory.

    Labels become a structured array (rows, top_k) with fields label, index and score.
    """

    def __init__(self, stream: IO[bytes], model: ModelInfo) -> None:
        self._stream = stream
        self._label_dtype = np.dtype(
            [("label", f"<U{_longest_label(model)}"), ("index", "<i4"), ("score", "<f8")]
        )
        self._rows = 0
        self._row_shape: tuple[int, ...] = ()
        self._dtype: np.dtype[Any] = np.dtype(np.float32)

    def write(self, result: Prediction) -> None:
        array = self._as_array(result)
        if not self._row_shape:
            self._dtype, self._row_shape = array.dtype, array.shape[1:]
            self._write_header()
        self._rows += len(array)
        self._stream.write(np.ascontiguousarray(array).tobytes())

    def finish(self) -> None:
        self._stream.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the first extent to grow, so that the second header
        # is as long as the first.
        npy_format.write_array_header_1_0(
            self._stream,
            {
                "descr": npy_format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._rows, *self._row_shape),
            },
        )

    def _as_array(self, result: Prediction) -> NDArray[Any]:
        if not isinstance(result, Labels):
            return result
        array = np.empty(result.shape, self._label_dtype)
        array["label"], array["index"], array["score"] = result.labels, result.indices, result.scores
        return array


def _longest_label(model: ModelInfo) -> int:
    # A model without labels answers with indices in decimal; one output is two classes.
    return max(map(len, model.labels or [str(max(model.n_out, 2) - 1)]))


def _cells(result: Prediction, float_format: str) -> list[list[str]]:
    if isinstance(result, Labels):
        return [
            [
                cell
                for label, score in zip(labels, scores, strict=True)
                for cell in (label, float_format.format(score))
            ]
            for labels, scores in zip(result.labels.tolist(), result.scores.tolist(), strict=True)
        ]
    # str of a NumPy scalar: the shortest digits for its own dtype; a Python float would show
    # float32's 0.1 as 0.10000000149011612.
    if float_format == "{}":
        return result.astype(np.str_).tolist()  # type: ignore[no-any-return]
    return [[float_format.format(value) for value in row] for row in result.tolist()]


@contextlib.contextmanager
def replaced_when_whole(path: Path, mode: str) -> Iterator[IO[Any]]:
    """
    Give a file to write to, which takes the place of *path* when the block ends well.

    When it does not, nothing is left behind, and a file that was there stays as it was. What is not
    a regular file (/dev/stdout, a named pipe) is written to as it is.
    """
    kwargs: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    if path.exists() and not path.is_file():
        with open(path, mode, **kwargs) as stream:
            yield stream
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with (
            cleaned_up_on_interrupt(lambda: os.unlink(temporary)),
            open(handle, mode, **kwargs) as stream,
        ):
            yield stream
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    # There is no way to read it but to set it.
    value = os.umask(0)
    os.umask(value)
    return value
