"""The command nnclient as a user sees it: output, exit status, and what is said when something is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from support.fake_server import FakeServer, Fault

import nnclient
from nnclient.cli import main

ROWS = "1,2,3\n4,5,6\n"


@pytest.fixture
def target(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> str:
    address: str = server.target
    monkeypatch.setenv("NNCLIENT_TARGET", address)
    return address


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    try:
        status = main([str(argument) for argument in argv])
    except SystemExit as end:
        status = int(end.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """The version of the package; examples and every command in the help."""
    assert run(capsys, "--version") == (0, f"nnclient {nnclient.__version__}\n", "")
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert "examples:" in out
    for command in ("models", "predict", "load"):
        assert f"\n    {command} " in out
        assert "--target" in run(capsys, command, "--help")[1]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["predict", "lin"],
        ["predict", "lin", "x.csv", "--top-k", "2"],
        ["predict", "lin", "x.csv", "--output", "labels", "--top-k", "0"],
        ["predict", "lin", "x.csv", "--format", "npy"],
        ["predict", "lin", "x.csv", "-o", "answers.txt"],
        ["load"],
        ["load", "--model", "lin", "--rate", "1", "--concurrency", "2"],
        ["load", "--model", "lin", "--rows", "many"],
    ],
)
def test_wrong_use_is_2_with_the_usage(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    """Before any server is asked."""
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert out == ""
    assert err.startswith("usage: nnclient")
    assert "error: " in err


def test_models_as_table_csv_and_json(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The same models in each."""
    status, out, err = run(capsys, "models")
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["name", "version", "layers", "activations", "dtype", "parameters", "labels"]
    assert lines[3] == ["shapes", "7", "4-3", "identity", "float32", "12", "3:", "square", "circle", "star"]
    _, out, _ = run(capsys, "models", "--format", "csv")
    assert out.splitlines()[3] == "shapes,7,4-3,identity,float32,12,square circle star"
    _, out, _ = run(capsys, "models", "--format", "json")
    models = json.loads(out)
    assert [model["name"] for model in models] == ["double", "lin", "shapes"]
    assert models[2]["labels"] == ["square", "circle", "star"]
    assert models[0]["dtype"] == "float64"


def test_predict_prints_csv_into_a_pipe(
    target: str, server: FakeServer, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of names, then a line a row."""
    status, out, err = run(capsys, "predict", "lin", rows)
    y = server.models["lin"].outputs(np.array([[1, 2, 3], [4, 5, 6]]))
    assert (status, err) == (0, "")
    assert out == "y0,y1\n" + "".join(f"{a},{b}\n" for a, b in y)
    assert "y0" in run(capsys, "predict", "lin", rows, "--format", "table")[1]


def test_predict_labels(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names and scores, the best first."""
    (tmp_path / "x.csv").write_text("1,0,0,0\n")
    _, out, _ = run(capsys, "predict", "shapes", tmp_path / "x.csv", "--output", "labels", "--top-k", "2")
    header, row = out.splitlines()
    assert header == "label_1,score_1,label_2,score_2"
    assert row.split(",")[::2] == ["star", "circle"]


@pytest.mark.parametrize("source", ["csv", "npy"])
@pytest.mark.parametrize("destination", ["csv", "npy"])
def test_predict_from_file_to_file(
    target: str,
    server: FakeServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    destination: str,
) -> None:
    """Ten thousand rows in several messages, from either kind of file to either."""
    x = np.random.default_rng(0).integers(-9, 9, (10_000, 3)).astype(np.float64)
    path, answers = tmp_path / f"x.{source}", tmp_path / f"y.{destination}"
    if source == "csv":
        np.savetxt(path, x, delimiter=",")
    else:
        np.save(path, x)
    assert run(capsys, "predict", "lin", path, "-o", answers) == (0, "", "")
    y = np.load(answers) if destination == "npy" else np.loadtxt(answers, delimiter=",", skiprows=1)
    assert np.array_equal(y, server.models["lin"].outputs(x))
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["predict", "nope", "ROWS"], "no model 'nope' is served here"),
        (["predict", "lin", "/no/such/file.csv"], "/no/such/file.csv: No such file or directory"),
        (["predict", "shapes", "ROWS"], "rows.csv, line 1: 3 columns; expected 4"),
        (["predict", "lin", "ROWS", "-o", "/no/such/folder/y.csv"], "No such file or directory"),
        (["models", "--target", "127.0.0.1:1"], "no server answered at 127.0.0.1:1 (connection refused)"),
        (["models", "--target", "localhost"], "expected HOST:PORT"),
        (["models", "--tls-key", "key.pem"], "--tls-certificate and --tls-key go together"),
        (["models", "--tls-ca", "/no/ca.pem"], "/no/ca.pem: No such file or directory"),
        (["load", "--model", "nope"], "no model 'nope' is served here"),
        (["load", "--model", "lin", "--data", "/no/x.npy"], "/no/x.npy: No such file or directory"),
        (["load", "--model", "lin", "--duration-s", "0"], "duration_s is 0.0; expected more than 0"),
        (
            ["load", "--model", "lin", "--concurrency", "1", "--processes", "2"],
            "cannot share a concurrency",
        ),
    ],
)
def test_failures_are_1_with_one_line(
    target: str, rows: Path, capsys: pytest.CaptureFixture[str], argv: list[str], text: str
) -> None:
    """What was wrong, on standard error, without a traceback."""
    status, out, err = run(capsys, *(rows if argument == "ROWS" else argument for argument in argv))
    assert status == 1
    assert out == ""
    assert err.startswith("nnclient: error: ")
    assert text in err
    assert err.count("\n") == 1


def test_a_failed_batch_is_named_by_its_rows(
    target: str, server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by the number of a batch that the user never made."""
    np.save(tmp_path / "x.npy", np.zeros((10_000, 3)))

    server.answer_faults.extend([None, Fault(grpc.StatusCode.INVALID_ARGUMENT, "NaN in row 2")])
    status, _, err = run(capsys, "predict", "lin", tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    assert status == 1
    assert f"{tmp_path / 'x.npy'}, rows from 4097 on: NaN in row 2" in err
    assert not (tmp_path / "y.npy").exists()


def test_two_distributions_in_one_environment_are_warned_of(
    target: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line on standard error that says how to mend it; nothing where there is one."""
    assert "warning" not in run(capsys, "models")[2]
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: name)
    status, _, err = run(capsys, "models")
    assert status == 0
    assert err.startswith("nnclient: warning: both nnserve and nnclient are installed")
    assert "pip uninstall nnclient" in err
    assert err.count("\n") == 1


def start(*argv: Any, **kwargs: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "nnclient", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        **kwargs,
    )


def test_ctrl_c_is_quiet(target: str, server: FakeServer, rows: Path, tmp_path: Path) -> None:
    """Status 130, no traceback, and no half-written file."""
    server.gate.clear()
    process = start("predict", "lin", rows, "-o", tmp_path / "y.csv")
    server.wait_for(lambda s: len(s.requests) == 1)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.communicate() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_a_reader_that_goes_away_is_no_error(target: str, tmp_path: Path) -> None:
    """`nnclient predict ... | head -1`: status 141 as of SIGPIPE, and nothing on standard error."""
    np.save(tmp_path / "x.npy", np.zeros((200_000, 3), np.float32))
    process = start("predict", "lin", tmp_path / "x.npy")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "y0,y1\n"
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_predict_reads_a_pipe_while_it_is_written(target: str) -> None:
    """Standard input, without a file in between."""
    process = start("predict", "lin", "-", stdin=subprocess.PIPE)
    out, err = process.communicate(ROWS, timeout=30)
    assert (process.returncode, err) == (0, "")
    assert len(out.splitlines()) == 3


def test_a_progress_bar_only_where_someone_looks(target: str, tmp_path: Path) -> None:
    """On standard error if that is a terminal; standard output stays clean."""
    pty = pytest.importorskip("pty")
    np.save(tmp_path / "x.npy", np.zeros((50_000, 3), np.float32))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "nnclient", "predict", "lin", tmp_path / "x.npy", "-o", tmp_path / "y.npy"],
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while chunk := _read(ours):
        shown += chunk
    assert process.wait(30) == 0
    assert process.communicate()[0] == b""
    assert b"rows" in shown
    assert b"50,000" in shown


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other side has closed it
        os.close(terminal)
        return b""
