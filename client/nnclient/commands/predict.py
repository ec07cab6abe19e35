"""`nnclient predict` -> a file of rows, answered in pieces while it is still being read."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from nnclient.answer_files import (
    AnswerWriter,
    CsvWriter,
    NpyWriter,
    TableWriter,
    column_names,
    replaced_when_whole,
)
from nnclient.commands.connection import client_of
from nnclient.conversation import Prediction
from nnclient.errors import NnclientError
from nnclient.interrupt import cleaned_up_on_interrupt
from nnclient.models import ModelInfo
from nnclient.row_files import RowFile, open_rows


def run(args: argparse.Namespace) -> int:
    """Answer the rows of args.file; return the exit status. Wrong use ends in args.parser.error."""
    if args.top_k != 1 and args.output != "labels":
        args.parser.error("--top-k is for --output labels")
    args.format = args.format or _default_format(args)
    if args.format == "npy" and not args.destination:
        args.parser.error("npy is not for a terminal or a pipe; give -o FILE.npy")

    with client_of(args) as client:
        model = client.model(args.model, args.model_version)
        with (
            open_rows(args.file, model.n_in, skip_header=args.skip_header) as rows,
            contextlib.closing(
                client.stream(args.model, rows, args.output, args.top_k, model.version)
            ) as results,
            _open_writer(args, model) as writer,
        ):
            # Beside a table on the same terminal, a bar would be in the way.
            is_bar_wanted = sys.stderr.isatty() and (args.destination or not sys.stdout.isatty())
            try:
                for result in _with_bar(results, rows) if is_bar_wanted else results:
                    writer.write(result)
            except NnclientError as error:
                _locate(error, rows)
                raise
            writer.finish()
    return 0


def _default_format(args: argparse.Namespace) -> str:
    if not args.destination:
        return "table" if sys.stdout.isatty() else "csv"
    ending = Path(args.destination).suffix
    if ending not in (".csv", ".npy"):
        args.parser.error(f"-o {args.destination}: expected a .csv or .npy file, or --format")
    return ending[1:]


@contextlib.contextmanager
def _open_writer(args: argparse.Namespace, model: ModelInfo) -> Iterator[AnswerWriter]:
    columns = column_names(model, args.output, args.top_k)
    text_writer = TableWriter if args.format == "table" else CsvWriter
    if not args.destination:
        yield text_writer(sys.stdout, columns)
        return
    with replaced_when_whole(Path(args.destination), "wb" if args.format == "npy" else "w") as stream:
        yield NpyWriter(stream, model) if args.format == "npy" else text_writer(stream, columns)


def _locate(error: NnclientError, rows: RowFile) -> None:
    """Make *error* say where in the file the batch that failed begins."""
    if error.batch_index is not None:
        first = error.batch_index * rows.batch_rows
        error.message = f"{rows.name}, rows from {first + 1} on: {error.message}"
        error.batch_index = None


def _with_bar(results: Iterable[Prediction], rows: RowFile) -> Iterator[Prediction]:
    """Yield *results*, with a bar on standard error of how much of the file has been read."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with cleaned_up_on_interrupt(bar.stop), bar:
        # Without its folders: a long path would push the counts out of the line.
        task = bar.add_task(os.path.basename(rows.name), total=rows.size, rows=0)
        answered = 0
        for result in results:
            answered += len(result)
            bar.update(task, completed=rows.done, rows=answered)
            yield result
