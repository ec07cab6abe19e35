"""The wheel nnserve, installed into an empty environment -> working commands from any folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = ("nncore", "nnserver", "nnclient")


def run(*command: str | Path, cwd: Path) -> str:
    # Without PYTHON* variables: the environment under test stands on its own.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `make dist` builds it: from the source distribution."""
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT, cwd=dist)
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with nothing but the wheel and what it requires."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=True)
    pip = (environment / "bin" / "python", "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "-c", ROOT / "constraints.txt", wheel, cwd=environment)
    return environment / "bin"


def test_wheel_holds_the_four_packages_and_nothing_else_at_the_top(wheel: Path) -> None:
    """No top-level `server`, `client` or `tests` that would shadow a user's own module."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {
        "nncore",
        "nnproto",
        "nnserver",
        "nnclient",
    }
    for file in ("nnproto/v1/inference.proto", "nnproto/v1/inference_pb2.pyi", "nncore/py.typed"):
        assert file in names
    models = {Path(name).name for name in names if name.startswith("nnserver/models/")}
    assert models == {"digits.safetensors", "mnist.safetensors", "primer.safetensors"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_work_from_any_folder(command: str, bin_folder: Path, tmp_path: Path) -> None:
    """Each console script starts and knows its version."""
    assert run(bin_folder / command, "--version", cwd=tmp_path).split()[:2] == [command, "0.1.0"]


def test_installed_server_answers_the_installed_client(bin_folder: Path, tmp_path: Path) -> None:
    """The three-layer network's outputs come back through the two installed commands."""
    rows = tmp_path / "rows.csv"
    rows.write_text("1.0,0.5\n")
    with subprocess.Popen(
        [str(bin_folder / "nnserver"), "--listen", f"unix:{tmp_path}/socket"],
        cwd=tmp_path,
        env={**os.environ, "NNCORE_CACHE_DIR": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            assert server.stdout is not None
            assert "ready on" in server.stdout.readline()
            target = ("--target", f"unix:{tmp_path}/socket")
            printed = run(bin_folder / "nnclient", "predict", "primer", rows, *target, cwd=tmp_path)
            assert "0.3168" in printed
            assert "0.6962" in printed
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=30) == 0
