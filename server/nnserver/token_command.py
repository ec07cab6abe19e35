"""`nnserver token`: an identity's name, scopes and rate in, a new token and the line for --tokens out."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nnserver.identities import SCOPES, line_of, make_token

_DESCRIPTION = """\
Make a token for a caller. It is printed once and kept nowhere: the file that --tokens names has its hash.
"""
_EPILOG = """\
The first line of the output is the token, the second the line for the file. A caller sends the token as the
metadata 'authorization: Bearer TOKEN'; nnclient does so with NNCLIENT_TOKEN in its environment.

scopes:
  infer    predictions, one by one and in streams
  read     descriptions of the server and its models, statistics, reflection
  admin    loading and unloading of models, with --model-control

examples:
  nnserver token alice --scopes infer,read
  nnserver token nightly --scopes infer --requests-per-s 100 --burst 500
"""


def run(argv: Sequence[str]) -> int:
    """Print a token and its line; raises ConfigError for a name, scope or rate that cannot be."""
    parser = argparse.ArgumentParser(
        prog="nnserver token",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="the caller: letters, digits, - and _")
    parser.add_argument(
        "--scopes",
        default="infer,read",
        metavar="SCOPE[,SCOPE...]",
        help=f"what it may ask for: some of {', '.join(SCOPES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--requests-per-s",
        type=float,
        metavar="N",
        help="how often it may ask (default: as often as it likes)",
    )
    parser.add_argument(
        "--burst",
        type=int,
        metavar="N",
        help="how often at once, after a pause (default: what a second allows)",
    )
    arguments = parser.parse_args(argv)
    token, hash_ = make_token()
    scopes = [scope.strip() for scope in arguments.scopes.split(",")]
    line = line_of(arguments.name, hash_, scopes, arguments.requests_per_s, arguments.burst)
    print("the token, shown this once:", file=sys.stderr, flush=True)
    print(token, flush=True)
    print("the line for the file of --tokens:", file=sys.stderr, flush=True)
    print(line, flush=True)
    return 0
