"""One server for all tests of this folder; `make test-adapters` installs the libraries that they need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.models import random_mlp
from support.server import running

from nnclient import Client

# Smooth, in float64: derivatives can be compared with those that the libraries find themselves.
SURROGATE = random_mlp(11, (5, 16, 16, 3), "tanh", dtype="float64")
SINGLE = random_mlp(12, (4, 8, 1), "swish")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both models."""
    folder = tmp_path_factory.mktemp("models")
    SURROGATE.save(folder / "surrogate.safetensors")
    SINGLE.save(folder / "single.safetensors")
    return folder


@pytest.fixture(scope="session")
def client(models: Path) -> Iterator[Client]:
    with running(str(models)) as server, Client(server.address) as it:
        yield it


@pytest.fixture
def calls(client: Client, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The client's methods that were called, by name."""
    seen: list[str] = []

    def counted(name: str) -> Any:
        method = getattr(client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            seen.append(name)
            return method(*arguments, **named)

        return call

    for name in ("predict", "vjp", "jvp"):
        monkeypatch.setattr(client, name, counted(name))
    return seen
