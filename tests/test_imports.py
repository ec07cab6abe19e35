"""The sources' import statements -> who knows whom: imports go one way, nothing heavy early."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "nncore": ROOT / "nncore",
    "nnserver": ROOT / "server" / "nnserver",
    "nnclient": ROOT / "client" / "nnclient",
}
OUR_OWN = {"nncore", "nnserver", "nnclient", "nnproto"}
ALLOWED = {
    "nncore": {"numpy", "numba", "llvmlite", "safetensors", "matplotlib"},
    "nnserver": {
        *("nncore", "nnproto", "numpy", "google", "grpc", "grpc_health", "grpc_reflection", "ngh2", "uvloop"),
        "prometheus_client",
        "opentelemetry",
        "aiohttp",
    },
    # The last three by modules of their own, see below.
    "nnclient": {"nnproto", "numpy", "google", "grpc", "rich", "uvloop", "torch", "jax", "matplotlib"},
}


def imports(file: Path) -> Iterator[str]:
    """The full names of all modules that *file* imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_below(folder: Path, but: str = "") -> set[str]:
    files = [file for file in folder.rglob("*.py") if but not in file.relative_to(folder).parts]
    return {name for file in files for name in imports(file)}


@pytest.mark.parametrize("package", list(ROOMS))
def test_a_package_imports_only_what_the_architecture_allows(package: str) -> None:
    tops = {name.split(".")[0] for name in imported_below(ROOMS[package], but="convert")}
    strangers = tops - set(sys.stdlib_module_names) - ALLOWED[package] - {package}
    assert not strangers


def test_other_tools_are_known_to_converters_only() -> None:
    """What the extras install is imported in nncore.convert alone, and there inside functions."""
    others = {
        "onnx",
        "onnxruntime",
        "google",
        "torch",
        "keras",
        "h5py",
        "sklearn",
        "joblib",
        "ai_edge_litert",
    }
    tops = {name.split(".")[0] for name in imported_below(ROOMS["nncore"] / "convert")}
    assert not tops - set(sys.stdlib_module_names) - {"nncore", "numpy", "safetensors", "rich"} - others
    code = (
        "import importlib, pkgutil, sys, nncore.convert as package\n"
        "names = [module.name for module in pkgutil.iter_modules(package.__path__)]\n"
        "for name in names: importlib.import_module('nncore.convert.' + name)\n"
        f"print(len(names) > 4, [name for name in {sorted(others)!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"


def test_libraries_that_models_are_lent_to_are_known_to_their_adapters_only() -> None:
    """nnclient/torch.py alone imports torch, and so on; nothing imports these modules."""
    known = {
        library: {file.stem for file in ROOMS["nnclient"].rglob("*.py") if library in tops_of(file)}
        for library in ("torch", "jax", "scipy", "matplotlib")
    }
    assert known == {"torch": {"torch"}, "jax": {"jax"}, "scipy": set(), "matplotlib": set()}
    inside = {"nnclient.torch", "nnclient.jax", "nnclient.scipy"}
    assert not inside & imported_below(ROOMS["nnclient"])
    (bridge,) = (file for file in ROOMS["nnserver"].rglob("*.py") if "aiohttp" in tops_of(file))
    assert bridge.name == "umbridge.py"


def tops_of(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(file)}


@pytest.mark.parametrize(
    ("room", "unknown"),
    [
        ("api", ("grpc", "ngh2", "nnserver.transport", "socket", "asyncio")),
        ("transport", ("google", "nnproto", "nncore", "numpy", "nnserver.api", "nnserver.repository")),
        ("batcher.py", ("google", "nnproto", "grpc", "ngh2", "nnserver.api", "nnserver.transport")),
        ("engine.py", ("google", "nnproto", "grpc", "ngh2", "nnserver.api", "nnserver.transport")),
        ("call.py", ("google", "nnproto", "nncore", "grpc", "ngh2", "nnserver.api", "nnserver.transport")),
    ],
)
def test_a_room_does_not_know_what_it_must_not(room: str, unknown: tuple[str, ...]) -> None:
    path = ROOMS["nnserver"] / room
    names = set(imports(path)) if path.is_file() else imported_below(path)
    found = {name for name in names for other in unknown if name == other or name.startswith(other + ".")}
    assert not found


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("nncore", ("numba", "numpy", "safetensors", "matplotlib", "sklearn")),
        ("nncore.cli", ("numba", "matplotlib", "sklearn")),
        ("nnserver.cli", ("grpc", "numba", "ngh2", "google.protobuf")),
        ("nnserver.app", ("prometheus_client", "opentelemetry")),
        ("nnclient", ("rich", "numba")),
    ],
)
def test_importing_does_no_heavy_work(module: str, late: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {late!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
