"""A token -> the metadata that carries it; refused where others could read it on its way."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from pathlib import Path

from nnclient.errors import InvalidInput

ENVIRONMENT = "NNCLIENT_TOKEN"

_TOKEN = re.compile(r"[\x21-\x7e]+")
_LOCAL = re.compile(r"(?:ipv4:|ipv6:)?(\[[^\]]+\]|[^:,/\s]+):\d+")


def token_metadata(token: str, target: str, is_encrypted: bool, may_be_read: bool) -> tuple[str, str]:
    """
    Return the pair of metadata that carries *token* to *target*.

    may_be_read: the caller has said that the way there is safe without encryption.
    Raises InvalidInput for what is no token, and for one that would go to another machine in clear text.
    """
    if not _TOKEN.fullmatch(token):
        # Not shown: it may be a token with something around it.
        raise InvalidInput("the token is empty or has characters in it that no token has, such as spaces")
    if not (is_encrypted or may_be_read or is_this_machine(target)):
        raise InvalidInput(
            f"a token would travel to {target} in clear text; use TLS (credentials, --tls), or, where "
            "something else encrypts the way there, allow_insecure_token (--allow-insecure-token)"
        )
    return "authorization", f"Bearer {token}"


def is_this_machine(target: str) -> bool:
    """Return whether what is sent to *target* stays on this machine, by its address alone."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    match = _LOCAL.fullmatch(target)
    if match is None:
        return False
    host = match[1].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_of(args: argparse.Namespace) -> str | None:
    """Return the token that the command line or the environment names. Raises OSError, InvalidInput."""
    if args.token_file is None:
        return os.environ.get(ENVIRONMENT) or None
    token = Path(args.token_file).read_text(encoding="utf-8", errors="replace").strip()
    if not token:
        raise InvalidInput(f"the file {args.token_file} has no token in it")
    return token
