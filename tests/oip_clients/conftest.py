"""One nnserver a transport, for clients that others wrote; it may be told to load and unload models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.server import ServerProcess, running

import nncore

# Classes with labels, rows of 4: enough to see what belongs where.
N_IN, LABELS = 4, ["setosa", "versicolor", "virginica"]


@pytest.fixture(scope="session")
def iris() -> nncore.Mlp:
    rng = np.random.default_rng(0)
    hidden = nncore.Layer(rng.standard_normal((N_IN, 8), np.float32), activation="relu")
    return nncore.Mlp([hidden, nncore.Layer(rng.standard_normal((8, 3), np.float32))], LABELS)


@pytest.fixture(scope="session", params=("h2", "grpcio"))
def transport(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def folder(transport: str, iris: nncore.Mlp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with iris, versions 1 and 2, and a double of it in float64."""
    folder: Path = tmp_path_factory.mktemp(transport)
    for version in (1, 2):
        (folder / "iris" / str(version)).mkdir(parents=True)
        iris.save(folder / "iris" / str(version) / "model.safetensors")
    (folder / "iris" / "config.toml").write_text('version_policy = "all"')
    iris.astype("float64").save(folder / "iris64.safetensors")
    return folder


@pytest.fixture(scope="session")
def server(transport: str, folder: Path) -> Iterator[ServerProcess]:
    with running(str(folder), "--transport", transport, "--model-control") as process:
        yield process
