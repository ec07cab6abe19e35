"""A transport and a kind of connection in, a running server out, and what a client needs to reach it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from support.server import NNSERVER, ServerProcess, running
from support.tls import Authority

TRANSPORTS = ("h2", "grpcio")
KINDS = ("tcp", "unix", "tls", "mtls")
ENDPOINTS = [(transport, kind) for transport in TRANSPORTS for kind in KINDS]
# For tests of what does not depend on the kind of connection.
OVER_TCP = [(transport, "tcp") for transport in TRANSPORTS]

NNSERVER_COMMAND = (str(NNSERVER),)
TEST_SERVICE_COMMAND = (sys.executable, "-m", "interop.server")
_TESTS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Certificates:
    """PEM files: the authority's, the server's, and the client's."""

    ca: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]

    @classmethod
    def made_in(cls, folder: Path) -> Certificates:
        """Make all of them."""
        authority = Authority(folder)
        return cls(authority.certificate, authority.sign("server"), authority.sign("client"))


@dataclass(frozen=True)
class Endpoint:
    """A running server; *ca* unless it is plaintext, *client* if clients must show a certificate."""

    process: ServerProcess
    transport: str
    kind: str
    ca: Path | None = None
    client: tuple[Path, Path] | None = None

    @property
    def address(self) -> str:
        address: str = self.process.address
        return address

    @property
    def arguments(self) -> list[str]:
        """The command line of a client that is a program of its own."""
        arguments = ["--target", self.address]
        if self.ca:
            arguments += ["--ca", str(self.ca)]
        if self.client:
            arguments += ["--certificate", str(self.client[0]), "--key", str(self.client[1])]
        return arguments

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """What grpcio needs; None for plaintext."""
        if not self.ca:
            return None
        certificate, key = (file.read_bytes() for file in self.client) if self.client else (None, None)
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), key, certificate)


def channel_to(endpoint: Endpoint, api: Any, address: str = "") -> Any:
    """A channel of *api* (grpc or grpc.aio) with a connection of its own; *address*: of a proxy."""
    target, options = address or endpoint.address, [("grpc.use_local_subchannel_pool", 1)]
    if endpoint.credentials is None:
        return api.insecure_channel(target, options)
    return api.secure_channel(target, endpoint.credentials, options)


@contextlib.contextmanager
def serving(
    command: Sequence[str], transport: str, kind: str, certificates: Certificates, folder: Path
) -> Iterator[Endpoint]:
    """Run a server for the block; a Unix socket lies in *folder*."""
    arguments = ["--transport", transport]
    listen = f"unix:{folder}/s" if kind == "unix" else "127.0.0.1:0"
    ca = client = None
    if kind in ("tls", "mtls"):
        certificate, key = certificates.server
        arguments += ["--tls-certificate", str(certificate), "--tls-key", str(key)]
        ca = certificates.ca
    if kind == "mtls":
        arguments += ["--tls-client-ca", str(certificates.ca)]
        client = certificates.client
    env = {"PYTHONPATH": str(_TESTS)}
    with running(*arguments, command=command, listen=listen, env=env) as process:
        yield Endpoint(process, transport, kind, ca, client)
