"""The package itself: what it exports, and how little it does when it is imported."""

import ast
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nncore

ROOT = Path(__file__).parents[2]


def run(code):
    """What a fresh interpreter prints."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_version_is_the_distribution_s():
    """nncore.__version__ is the version in pyproject.toml."""
    assert nncore.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_import_is_cheap():
    """Importing nncore imports nothing heavy: not NumPy, not Numba, not an optional library."""
    heavy = {"numpy", "numba", "scipy", "sklearn", "matplotlib", "safetensors"}
    assert run(f"import nncore, sys; print({heavy} & sys.modules.keys())") == "set()"


def test_a_model_is_described_without_numba():
    """`nncore inspect`, and whatever reads a model's layers, imports no compiler."""
    digits = ROOT / "server" / "nnserver" / "models" / "digits.safetensors"
    code = (
        f"import sys; from nncore.cli import main; main(['inspect', {str(digits)!r}])\n"
        "print({'numba', 'llvmlite.binding', 'scipy'} & sys.modules.keys())"
    )
    assert run(code).splitlines()[-1] == "set()"


def test_a_forward_pass_needs_no_optional_library():
    """Serving needs neither SciPy (which Numba imports where it is there), scikit-learn nor matplotlib."""
    code = (
        "import sys\n"
        "for name in ('scipy', 'sklearn', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "import nncore, numpy as np\n"
        "layer = nncore.Layer(np.ones((2, 2), np.float32), activation='tanh')\n"
        "print(nncore.Mlp([layer]).predict_proba([[1, 2]]).shape)"
    )
    assert run(code) == "(1, 2)"


def test_names_for_type_checkers_are_those_that_exist():
    """What a type checker sees under TYPE_CHECKING is what __getattr__ finds, from the same module."""
    tree = ast.parse(Path(nncore.__file__).read_text())
    seen = {
        alias.asname: node.module.removeprefix("nncore.")
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == nncore._MODULES


def test_every_public_name_is_there():
    """Each exported name resolves and is listed by dir()."""
    for name in nncore._MODULES:
        assert getattr(nncore, name).__class__.__name__ != "module"
        assert name in dir(nncore)


def test_every_activation_is_a_function_of_the_package():
    """nncore.<name> and nncore.<name>_grad are the ufuncs of the table."""
    for name, activation in nncore.ACTIVATIONS.items():
        assert getattr(nncore, name) is activation.function
        assert getattr(nncore, f"{name}_grad") is activation.derivative
        assert {name, f"{name}_grad"} <= set(dir(nncore))


def test_no_module_hides_a_public_name():
    """Importing every module of the package leaves its functions in place."""
    modules = {module.name for module in pkgutil.iter_modules(nncore.__path__)}
    public = {*nncore._MODULES, *nncore.ACTIVATIONS, *(f"{name}_grad" for name in nncore.ACTIVATIONS)}
    assert modules & public == set()


@pytest.mark.parametrize("name", ["no_such_name", "relu_grad_grad", "_private", "grad"])
def test_unknown_names_are_attribute_errors(name):
    """A name that is not exported is an AttributeError that says so."""
    with pytest.raises(AttributeError, match=f"module 'nncore' has no attribute '{name}'"):
        getattr(nncore, name)


def test_errors_are_one_tree():
    """Every error is an NncoreError and the built-in that Python would raise."""
    for name, base in {
        "ShapeError": ValueError,
        "DtypeError": TypeError,
        "ArgumentError": ValueError,
        "ModelError": ValueError,
        "ModelFileError": ValueError,
        "RowFileError": ValueError,
        "ConversionError": ValueError,
    }.items():
        assert issubclass(getattr(nncore, name), nncore.NncoreError)
        assert issubclass(getattr(nncore, name), base)
