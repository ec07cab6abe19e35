"""Command line -> exit status: `nnclient models`, `nnclient predict`, `nnclient load`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnclient import __version__

if TYPE_CHECKING:
    from nnclient.answer_files import AnswerWriter
    from nnclient.models import ModelInfo
    from nnclient.row_files import RowFile

# argparse itself exits with 2 for wrong use; the last two are what a shell reports for SIGINT and SIGPIPE.
OK, FAILED, INTERRUPTED, BROKEN_PIPE = 0, 1, 130, 141

_EXAMPLES = """\
examples:
  nnclient models                                         what the server at 127.0.0.1:50051 serves
  nnclient predict digits rows.csv --output labels        the best class of each row
  nnclient predict digits rows.npy -o answers.npy         a large file, sent and written in pieces
  nnclient load --model digits --concurrency 64           how fast the server answers

The server is --target, or NNCLIENT_TARGET in the environment, or 127.0.0.1:50051.
"""

_PREDICT_EXAMPLES = """\
examples:
  nnclient predict primer rows.csv                        outputs as a table, or as CSV into a pipe
  nnclient predict digits rows.csv --output labels --top-k 3
  nnclient predict digits rows.npy --output probabilities -o answers.npy
  echo 0.5,0.5 | nnclient predict primer -

A CSV file has one row a line, numbers separated by commas, and may begin with a line of names.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv* (default: the process's own) and return its exit status."""
    # Before grpc is loaded: what its core would log about a lost connection, the error says better.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        args = _parser().parse_args(argv)
        _warn_of_two_distributions()
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        if _is_nnclient_error(error):
            return _fail(str(error))
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        if _is_nnclient_error(error):
            return _fail(str(error))
        raise


def _is_nnclient_error(error: Exception) -> bool:
    # Late: --help and a wrong flag need neither gRPC nor NumPy.
    from nnclient.errors import NnclientError

    return isinstance(error, NnclientError)


def _fail(message: str) -> int:
    print(f"nnclient: error: {message}", file=sys.stderr)
    return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnclient",
        description="Ask an nnserver for predictions.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nnclient {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--target",
        default=os.environ.get("NNCLIENT_TARGET") or "127.0.0.1:50051",
        metavar="HOST:PORT",
        help="the server, also unix:PATH (default: NNCLIENT_TARGET, or 127.0.0.1:50051; now %(default)s)",
    )

    models = commands.add_parser("models", parents=[common], help="list the models being served")
    models.add_argument(
        "--format", choices=("table", "csv", "json"), default="table", help="default: %(default)s"
    )
    models.set_defaults(run=_models)

    predict = commands.add_parser(
        "predict",
        parents=[common],
        help="send the rows of a file through a model",
        epilog=_PREDICT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    predict.add_argument("model", metavar="MODEL", help="name of the model")
    predict.add_argument("file", metavar="FILE", help="rows: a .csv or .npy file, or - for standard input")
    predict.add_argument(
        "--output",
        choices=("outputs", "probabilities", "labels"),
        default="outputs",
        help="what to answer with (default: %(default)s)",
    )
    predict.add_argument(
        "--top-k",
        type=_at_least(1),
        default=1,
        metavar="N",
        help="classes a row with --output labels (default: 1)",
    )
    predict.add_argument(
        "--model-version", default="", metavar="VERSION", help="default: the server's choice"
    )
    predict.add_argument(
        "-o",
        dest="destination",
        metavar="FILE",
        help="write to FILE, a .csv or .npy (default: standard output)",
    )
    predict.add_argument(
        "--format",
        choices=("table", "csv", "npy"),
        help="default: by FILE's ending; table on a terminal, csv into a pipe",
    )
    predict.add_argument(
        "--skip-header", action="store_true", help="the CSV file's first line is names that look like numbers"
    )
    predict.set_defaults(run=_predict, parser=predict)
    return parser


def _at_least(low: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return value

    parse.__name__ = "whole number"
    return parse


def _warn_of_two_distributions() -> None:
    from importlib.metadata import PackageNotFoundError, distribution

    for name in ("nnserve", "nnclient"):
        try:
            distribution(name)
        except PackageNotFoundError:
            return
    print(
        "nnclient: warning: both nnserve and nnclient are installed here and share files; "
        "keep nnserve, which holds all of nnclient: "
        "pip uninstall nnclient && pip install --force-reinstall --no-deps nnserve",
        file=sys.stderr,
    )


def _models(args: argparse.Namespace) -> int:
    from nnclient.client import Client
    from nnclient.text_table import format_table

    with Client(args.target) as client:
        models = client.models()
    if args.format == "json":
        print(json.dumps([_as_json(model) for model in models], indent=2))
        return OK
    header = ["name", "version", "layers", "activations", "dtype", "parameters", "labels"]
    rows = [
        [
            model.name,
            model.version,
            model.architecture,
            " ".join(layer.activation for layer in model.layers),
            str(model.dtype),
            str(model.parameter_count) if args.format == "csv" else f"{model.parameter_count:,}",
            _summary(model.labels),
        ]
        for model in models
    ]
    if args.format == "csv":
        import csv

        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])
    else:
        print(format_table(header, rows, right=[5]))
    return OK


def _summary(labels: Sequence[str]) -> str:
    shown = labels if len(labels) <= 4 else [*labels[:2], "…", labels[-1]]
    return f"{len(labels)}: {' '.join(shown)}" if labels else "-"


def _as_json(model: ModelInfo) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(model), "dtype": str(model.dtype)}


def _predict(args: argparse.Namespace) -> int:
    if args.top_k != 1 and args.output != "labels":
        args.parser.error("--top-k is for --output labels")
    format_ = args.format or _default_format(args)
    if format_ == "npy" and not args.destination:
        args.parser.error("npy is not for a terminal or a pipe; give -o FILE.npy")

    from nnclient.client import Client
    from nnclient.errors import NnclientError
    from nnclient.row_files import open_rows

    with Client(args.target) as client:
        model = client.model(args.model, args.model_version)
        with (
            open_rows(args.file, model.n_in, skip_header=args.skip_header) as rows,
            contextlib.closing(
                client.stream(args.model, rows, args.output, args.top_k, model.version)
            ) as results,
            _writer(args, format_, model) as writer,
        ):
            try:
                for result in _with_progress(
                    results, rows, is_wanted=args.destination or not sys.stdout.isatty()
                ):
                    writer.write(result)
            except NnclientError as error:
                raise _located(error, rows) from error
            writer.finish()
    return OK


def _default_format(args: argparse.Namespace) -> str:
    if not args.destination:
        return "table" if sys.stdout.isatty() else "csv"
    ending = Path(args.destination).suffix
    if ending not in (".csv", ".npy"):
        args.parser.error(f"-o {args.destination}: expected a .csv or .npy file, or --format")
    return ending[1:]


@contextlib.contextmanager
def _writer(args: argparse.Namespace, format_: str, model: ModelInfo) -> Iterator[AnswerWriter]:
    from nnclient.answer_files import CsvWriter, NpyWriter, TableWriter, column_names, replaced_when_whole

    columns = column_names(model, args.output, args.top_k)
    if not args.destination:
        yield (TableWriter if format_ == "table" else CsvWriter)(sys.stdout, columns)
        return
    with replaced_when_whole(Path(args.destination), "wb" if format_ == "npy" else "w") as stream:
        if format_ == "npy":
            yield NpyWriter(stream, model)
        else:
            yield (TableWriter if format_ == "table" else CsvWriter)(stream, columns)


def _located(error: Any, rows: RowFile) -> Any:
    """Say which rows of the file the batch that failed was."""
    if error.batch_index is not None:
        first = error.batch_index * rows.batch_rows
        place = f"{rows.name}, row {first + 1} and following" if first else rows.name
        error.message = f"{place}: {error.message}"
        error.batch_index = None
    return error


def _with_progress(results: Iterable[Any], rows: RowFile, *, is_wanted: bool) -> Iterator[Any]:
    """Yield *results*, with a bar on standard error if that is a terminal."""
    if not (is_wanted and sys.stderr.isatty()):
        yield from results
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task(rows.name, total=rows.size, rows=0)
        answered = 0
        for result in results:
            answered += len(result)
            progress.update(task, completed=rows.done, rows=answered)
            yield result


if __name__ == "__main__":
    sys.exit(main())
