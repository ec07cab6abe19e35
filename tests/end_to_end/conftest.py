"""One server a transport and module, shared by the tests that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.server import ServerProcess, Stub, running

TRANSPORTS = ("h2", "grpcio")


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def server(transport: str) -> Iterator[ServerProcess]:
    """A server with the bundled models."""
    with running("--transport", transport) as process:
        yield process


@pytest.fixture
def stub(server: ServerProcess) -> Iterator[Stub]:
    """The service over a connection of the test's own."""
    with server.channel() as channel:
        yield Stub(channel)
