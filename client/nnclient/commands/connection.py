"""Flags about the server -> a Client."""

from __future__ import annotations

import argparse

from nnclient.client import Client
from nnclient.tls import credentials_of, tls_files_of
from nnclient.tokens import token_of


def client_of(args: argparse.Namespace) -> Client:
    """Return the client that the command line describes. Raises OSError, InvalidInput."""
    return Client(
        args.target,
        credentials=credentials_of(tls_files_of(args)),
        token=token_of(args),
        allow_insecure_token=args.allow_insecure_token,
    )
