"""The wheel nnclient, from the tree or from its source distribution -> the client alone, without numba."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from support.fake_server import FakeServer

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    # Without PYTHON* variables: the environment under test stands on its own.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, dist: Path, *flags: str) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", *flags, "--outdir", dist, source, cwd=dist)


@pytest.fixture(scope="module")
def wheel_of_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `pip install ./client` builds it."""
    dist = tmp_path_factory.mktemp("tree")
    build(ROOT / "client", dist, "--wheel")
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("sdist")
    build(ROOT / "client", dist, "--sdist")
    return next(dist.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel_of_sdist(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As users of the source archive build it: far from the repository."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    build(folder / sdist.name.removesuffix(".tar.gz"), folder, "--wheel")
    return next(folder.glob("*.whl"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_both_ways_give_the_same_wheel(wheel_of_tree: Path, wheel_of_sdist: Path) -> None:
    """File by file, byte by byte."""
    assert contents(wheel_of_tree) == contents(wheel_of_sdist)


def test_the_wheel_holds_the_client_and_the_contract(wheel_of_tree: Path) -> None:
    """Two typed packages, nothing else at the top, nothing of the server."""
    names = contents(wheel_of_tree)
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"nnclient", "nnproto"}
    for name in (
        "nnclient/py.typed",
        "nnclient/load/worker.py",
        "nnproto/py.typed",
        "nnproto/v1/inference.proto",
    ):
        assert name in names
    assert "nnproto/v1/inference_pb2.py" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    metadata = next(text.decode() for name, text in names.items() if name.endswith("METADATA"))
    required = {
        line.removeprefix("Requires-Dist: ").split(">")[0].split("<")[0]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    assert required == {"grpcio", "numpy", "protobuf", "rich"}


def test_the_licence_is_the_projects() -> None:
    """A copy, since a build cannot reach outside of its folder for it."""
    assert (ROOT / "client" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_installed_command_asks_a_server(wheel_of_tree: Path, server: FakeServer, tmp_path: Path) -> None:
    """In an empty environment, from any folder: version, list, prediction; and numba is not there."""
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python, nnclient = environment / "bin" / "python", environment / "bin" / "nnclient"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "-c", ROOT / "constraints.txt", wheel_of_tree, cwd=tmp_path)
    assert run(nnclient, "--version", cwd=tmp_path) == "nnclient 0.1.0\n"
    assert "shapes" in run(nnclient, "models", "--target", server.target, cwd=tmp_path)
    (tmp_path / "rows.csv").write_text("1,2,3\n")
    assert run(nnclient, "predict", "lin", "rows.csv", "--target", server.target, cwd=tmp_path).startswith(
        "y0,y1\n"
    )
    installed = run(*pip, "list", cwd=tmp_path)
    assert "numba" not in installed
    assert "nnserve" not in installed
    where = run(python, "-c", "import nnclient, nnproto.v1; print(nnclient.__file__)", cwd=tmp_path)
    assert str(environment) in where
