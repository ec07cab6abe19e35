"""One server of the test service, and one nnserver, for each transport and kind of connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from interop import programs
from interop.endpoints import (
    ENDPOINTS,
    NNSERVER_COMMAND,
    TEST_SERVICE_COMMAND,
    Certificates,
    Endpoint,
    serving,
)
from interop.programs import NotAtHand, Program
from support.tls import Authority

T = TypeVar("T")


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates.made_in(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="session")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of an authority that has signed nothing of the servers'."""
    certificate: Path = Authority(tmp_path_factory.mktemp("other")).certificate
    return certificate


@pytest.fixture(scope="session", params=ENDPOINTS, ids="-".join)
def endpoint(
    request: pytest.FixtureRequest, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """A server of grpc.testing.TestService."""
    folder = tmp_path_factory.mktemp("s")
    with serving(TEST_SERVICE_COMMAND, *request.param, certificates, folder) as found:
        yield found


@pytest.fixture(scope="session", params=ENDPOINTS, ids="-".join)
def nnserver(
    request: pytest.FixtureRequest, certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """An nnserver with the bundled models."""
    folder = tmp_path_factory.mktemp("n")
    with serving(NNSERVER_COMMAND, *request.param, certificates, folder) as found:
        yield found


def _found(find: Callable[[], T]) -> T:
    try:
        return find()
    except NotAtHand as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    """One event loop for all: grpcio's poller goes on calling a loop that was closed."""
    with asyncio.Runner() as found:
        yield found


@pytest.fixture(scope="session")
def grpc_js() -> Program:
    """The client on Node.js, or a skip that says what is missing."""
    return _found(programs.grpc_js)


@pytest.fixture(scope="session")
def cpp() -> Program:
    """The client on the C++ library, or a skip that says what is missing."""
    return _found(programs.cpp)


@pytest.fixture(scope="session")
def h2load() -> str:
    """The path of h2load, or a skip that says it is missing."""
    path: str = _found(programs.h2load)
    return path
