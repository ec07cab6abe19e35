"""PEM files -> TLS credentials of a channel."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import grpc

from nnclient.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """
    Paths of PEM files. Raises InvalidInput for half of a pair.

    ca: authorities that may vouch for the server; None for those of the system.
    certificate, key: who this client is, if the server asks.
    """

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if bool(self.certificate) != bool(self.key):
            raise InvalidInput("--tls-certificate and --tls-key go together; only one of them is given")


def tls_files_of(args: argparse.Namespace) -> TlsFiles | None:
    """Return what the command line says about TLS; None if it does not want it."""
    if not (args.tls or args.tls_ca or args.tls_certificate or args.tls_key):
        return None
    return TlsFiles(args.tls_ca, args.tls_certificate, args.tls_key)


def credentials_of(files: TlsFiles | None) -> grpc.ChannelCredentials | None:
    """Return the credentials of a channel; None for a plain one. Raises OSError."""
    if files is None:
        return None
    return grpc.ssl_channel_credentials(_read(files.ca), _read(files.key), _read(files.certificate))


def _read(path: str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
