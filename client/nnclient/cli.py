"""Command line -> exit status: `nnclient models`, `nnclient predict`, `nnclient load`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from nnclient import __version__
from nnclient.interrupt import interrupt_ends_process

# Beside these, 2 for wrong use (argparse) and 130 for Ctrl-C; 141 is what a shell reports for SIGPIPE.
FAILED, BROKEN_PIPE = 1, 141

_DEFAULT = "default: %(default)s"

_EXAMPLES = """\
examples:
  nnclient models                                         what the server at 127.0.0.1:50051 serves
  nnclient predict digits rows.csv --output labels        the best class of each row
  nnclient predict digits rows.npy -o answers.npy         a large file, sent and written in pieces
  nnclient load --model digits --concurrency 64           how fast the server answers

The server is --target, or NNCLIENT_TARGET in the environment, or 127.0.0.1:50051. It may ask for a token:
--token-file, or NNCLIENT_TOKEN in the environment.
"""

_PREDICT_EXAMPLES = """\
examples:
  nnclient predict primer rows.csv                        outputs as a table, or as CSV into a pipe
  nnclient predict digits rows.csv --output labels --top-k 3
  nnclient predict digits rows.npy --output probabilities -o answers.npy
  echo 0.5,0.5 | nnclient predict primer -

A CSV file has one row a line, numbers separated by commas, and may begin with a line of names.
"""

_LOAD_EXAMPLES = """\
examples:
  nnclient load --model digits                            closed loop: as fast as it goes, 32 in flight
  nnclient load --model digits --rate 2000                open loop: is this rate answered in time?
  nnclient load --model digits --mode stream --rows 256 --json report.json
  nnclient load --model digits --data rows.npy --output labels

Every answer is checked: its form, and that the same rows are always answered with the same bits.
The exit status is 1 if an answer was wrong or if there was none.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv* (default: the process's own) and return its exit status."""
    # Before grpc is loaded: what its core would log about a lost connection, the error says better.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        with interrupt_ends_process():
            args = _parser().parse_args(argv)
            _warn_of_two_distributions()
            # Late, here and below: --help and wrong use need neither gRPC nor NumPy.
            status: int = import_module(f"nnclient.commands.{args.command}").run(args)
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        message = _message_of(error)
        if message is None:
            raise
        print(f"nnclient: error: {message}", file=sys.stderr)
        return FAILED


def _message_of(error: Exception) -> str | None:
    """Return what to tell about an expected error; None for a fault of this program."""
    from nnclient.errors import NnclientError

    if isinstance(error, NnclientError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnclient",
        description="Ask an nnserver for predictions.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nnclient {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_models(commands)
    _add_predict(commands)
    _add_load(commands)
    return parser


def _add_models(commands: Any) -> None:
    parser = _add_command(commands, "models", "list the models being served")
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help=_DEFAULT)


def _add_predict(commands: Any) -> None:
    parser = _add_command(commands, "predict", "send the rows of a file through a model", _PREDICT_EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="name of the model")
    parser.add_argument("file", metavar="FILE", help="rows: a .csv or .npy file, or - for standard input")
    _add_question(parser)
    parser.add_argument(
        "-o", dest="destination", metavar="FILE", help="a .csv or .npy file (default: standard output)"
    )
    parser.add_argument(
        "--format",
        choices=("table", "csv", "npy"),
        help="default: by FILE's ending; table on a terminal, csv into a pipe",
    )
    parser.add_argument(
        "--skip-header", action="store_true", help="the CSV file's first line is names that look like numbers"
    )


def _add_load(commands: Any) -> None:
    parser = _add_command(commands, "load", "send many requests and measure the answers", _LOAD_EXAMPLES)
    parser.add_argument("--model", required=True, metavar="MODEL", help="name of the model")
    _add_question(parser)
    parser.add_argument("--mode", choices=("unary", "stream"), default="unary", help=_DEFAULT)
    pace = parser.add_mutually_exclusive_group()
    pace.add_argument(
        "--concurrency",
        type=_at_least(1),
        default=32,
        metavar="N",
        help="closed loop: requests in flight in all (default: %(default)s)",
    )
    pace.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="open loop: R requests/s at random times (Poisson); latency counts from when each was due",
    )
    parser.add_argument(
        "--rows", type=_at_least(1), default=1, metavar="N", help=f"rows a request ({_DEFAULT})"
    )
    parser.add_argument(
        "--data", metavar="FILE.npy", help="rows to send (default: normally distributed numbers)"
    )
    parser.add_argument("--warmup-s", type=float, default=2.0, metavar="S", help=_DEFAULT)
    parser.add_argument("--duration-s", type=float, default=10.0, metavar="S", help=_DEFAULT)
    parser.add_argument(
        "--timeout-s", type=float, default=10.0, metavar="S", help=f"time for each request ({_DEFAULT})"
    )
    parser.add_argument(
        "--processes",
        type=_at_least(1),
        metavar="N",
        help="worker processes (default: half of the cores, 8 at most)",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write the report to FILE as JSON as well; - for standard output instead",
    )


def _add_command(
    commands: Any, name: str, help_: str, examples: str | None = None
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_,
        description=f"{help_[0].upper()}{help_[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=name, parser=parser)
    server = parser.add_argument_group("server")
    server.add_argument(
        "--target",
        default=os.environ.get("NNCLIENT_TARGET") or "127.0.0.1:50051",
        metavar="HOST:PORT",
        help="or unix:PATH (default: NNCLIENT_TARGET in the environment, or 127.0.0.1:50051)",
    )
    server.add_argument("--tls", action="store_true", help="use TLS, with the system's authorities")
    server.add_argument(
        "--tls-ca", metavar="FILE", help="PEM file with the server's authorities; turns TLS on"
    )
    server.add_argument("--tls-certificate", metavar="FILE", help="PEM file with this client's certificate")
    server.add_argument("--tls-key", metavar="FILE", help="PEM file with the key of --tls-certificate")
    server.add_argument(
        "--token-file",
        metavar="FILE",
        help="who this client is: a file with a token (default: NNCLIENT_TOKEN in the environment)",
    )
    server.add_argument(
        "--allow-insecure-token",
        action="store_true",
        help="send the token without TLS to another machine: something else encrypts the way there",
    )
    return parser


def _add_question(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-version", default="", metavar="VERSION", help="default: the server's choice")
    parser.add_argument(
        "--output",
        choices=("outputs", "probabilities", "labels"),
        default="outputs",
        help=f"what to answer with ({_DEFAULT})",
    )
    parser.add_argument(
        "--top-k",
        type=_at_least(1),
        default=1,
        metavar="N",
        help=f"classes a row with --output labels ({_DEFAULT})",
    )


def _at_least(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return value

    # What argparse calls it when int() fails.
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


if __name__ == "__main__":
    sys.exit(main())
