"""A server a transport and module that attacks are made on, and a bystander who is answered all the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.server import ServerProcess, running

from faults.bystander import Bystander

TRANSPORTS = ("h2", "grpcio")


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def server(transport: str) -> Iterator[ServerProcess]:
    """A server with the bundled models, which must have nothing to say at its end."""
    with running("--transport", transport) as process:
        yield process
    assert process.process.returncode == 0
    assert process.errors == ""


@pytest.fixture
def bystander(server: ServerProcess) -> Iterator[Bystander]:
    """Another client; its request is answered to the bit before the test and after it."""
    with Bystander(server) as found:
        yield found
