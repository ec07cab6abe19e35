"""The command `nncore`: what it prints, writes and refuses."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nncore

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "server" / "nnserver" / "models"
DIGITS = MODELS / "digits.safetensors"
START = "import sys; from nncore.cli import main; sys.exit(main())"
ROWS = ROOT / "examples" / "digits_rows.csv"


def run(*arguments, stdin=None):
    """(exit status, standard output, standard error) of `nncore` with *arguments*."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from nncore.cli import main; sys.exit(main())",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        input=stdin,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_bundled_models_load_and_are_what_the_readme_says():
    """digits is right on 0.96 of the held-back images or more; primer prints its digits; mnist is whole."""
    with np.load(ROOT / "examples" / "digits_test.npz", allow_pickle=False) as data:
        x, y = data["x"], data["y"]
    digits = nncore.load(DIGITS)
    indices, _ = digits.top_labels_from(digits.forward(x))
    right = int((indices[:, 0] == y).sum())
    assert right / len(y) >= 0.96
    assert f"{right} of {len(y)} held-back images" in (ROOT / "README.md").read_text()
    primer = nncore.load(MODELS / "primer.safetensors")
    assert [f"{value:.8f}" for value in primer.forward([1.0, 0.5])] == ["0.31682708", "0.69627909"]
    assert [layer.n_out for layer in nncore.load(MODELS / "mnist.safetensors").layers] == [50, 100, 10]


def test_inspect_shows_layers_and_counts():
    status, out, _ = run("inspect", DIGITS)
    assert status == 0
    assert "6,570" in out
    assert "relu" in out
    status, out, _ = run("inspect", DIGITS, "--json")
    assert status == 0
    assert json.loads(out)["name"] == "digits"


@pytest.mark.parametrize("output", ["outputs", "probabilities"])
def test_predict_prints_what_forward_answers(output):
    status, out, err = run("predict", DIGITS, ROWS, "--output", output)
    assert status == 0, err
    header, *rows = list(csv.reader(io.StringIO(out)))
    mlp = nncore.load(DIGITS)
    x = np.loadtxt(ROWS, delimiter=",", skiprows=1, dtype=np.float32)
    expected = mlp.forward(x) if output == "outputs" else mlp.predict_proba(x)
    assert len(header) == 10
    assert np.array_equal(np.array(rows, np.float32), expected)


def test_predict_reads_and_writes_npy(tmp_path):
    x = np.random.default_rng(0).random((5, 64), np.float32)
    np.save(tmp_path / "x.npy", x)
    status, _, err = run("predict", DIGITS, tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    assert status == 0, err
    assert np.array_equal(np.load(tmp_path / "y.npy", allow_pickle=False), nncore.load(DIGITS).forward(x))


def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path):
    """A missing model, a file that is none, a wrong number and a wrong width, each with status 1."""
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense" * 9)
    (tmp_path / "word.csv").write_text("1,2\n3,four\n")
    (tmp_path / "wide.csv").write_text("1,2,3\n")
    primer = MODELS / "primer.safetensors"
    for arguments, text in (
        (("inspect", tmp_path / "none.safetensors"), "none.safetensors"),
        (("inspect", tmp_path / "bad.safetensors"), "bad.safetensors"),
        (("predict", primer, tmp_path / "word.csv"), "four"),
        (("predict", primer, tmp_path / "wide.csv"), "2"),
    ):
        status, _, err = run(*arguments)
        assert status == 1
        assert err.startswith("nncore: error: ")
        assert err.count("\n") == 1
        assert text in err


def test_plot_draws_the_gallery_and_single_functions(tmp_path):
    status, _, err = run("plot", "-o", tmp_path / "all.png")
    assert status == 0, err
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")
    status, _, err = run("plot", "elu", "swish", "-o", tmp_path / "two.svg")
    assert status == 0, err
    assert "<svg" in (tmp_path / "two.svg").read_text()
    status, _, err = run("plot", "rose", "-o", tmp_path / "none.png")
    assert status != 0
    assert "rose" in err


def test_usage_errors_exit_with_2():
    assert run("guess")[0] == 2
    assert run("--version")[:2] == (0, f"nncore {nncore.__version__}\n")
