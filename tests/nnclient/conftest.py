"""Fixtures: a scripted server with two models, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from support.fake_server import CuttableProxy, FakeModel, FakeServer

from nnclient import Client


def make_models() -> dict[str, FakeModel]:
    """The models of the scripted server."""
    return {
        "lin": FakeModel("lin", 3, 2),
        "shapes": FakeModel("shapes", 4, 3, labels=("square", "circle", "star"), version="7"),
        "double": FakeModel("double", 3, 2, dtype=np.float64),
    }


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer(make_models()).start()
    yield fake
    fake.stop()


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.target, timeout_s=20) as it:
        yield it


@pytest.fixture
def proxy(server: FakeServer) -> Iterator[CuttableProxy]:
    relay = CuttableProxy(server.port)
    yield relay
    relay.close()
