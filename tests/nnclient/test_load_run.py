"""nnclient load against a scripted server, through real processes; and what the report says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_server import FakeServer

from nnclient import InvalidInput, ModelInfo
from nnclient.cli import main
from nnclient.load.generator import Outcome
from nnclient.load.plan import LoadPlan
from nnclient.load.questions import make_questions
from nnclient.load.report import as_json, as_text, bottleneck_of
from nnclient.load.tally import Tally

MODEL = ModelInfo("lin", "1", np.dtype(np.float32), 3, 2, (), (), (), 6)
BRIEF = ["--warmup-s", "0.1", "--duration-s", "0.4"]


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--processes", "2", "--output", "labels", "--top-k", "2"],
        ["--mode", "stream", "--rows", "5"],
        ["--rate", "200"],
        ["--mode", "stream", "--rate", "200", "--output", "probabilities"],
    ],
    ids=" ".join,
)
def test_every_kind_of_load_runs(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """It ends with status 0, answers, no errors, and the same numbers in both reports."""
    report = tmp_path / "report.json"
    argv = ["load", "--target", server.target, "--model", "lin", "--json", str(report), *BRIEF, *flags]
    assert main(argv) == 0
    out = capsys.readouterr().out
    found = json.loads(report.read_text())
    assert found["answered"] > 0
    assert found["errors"] == {}
    assert found["requests_per_s"] == pytest.approx(found["answered"] / 0.4)
    assert found["rows_per_s"] == pytest.approx(found["requests_per_s"] * found["rows_per_request"])
    latency = found["latency_ms"]
    assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]
    assert f"requests/s  {found['requests_per_s']:,.0f}" in out
    assert f"{latency['max']:.3f}" in out
    if "--rate" in flags:
        # Standard deviation of 80 Poisson arrivals: 9.
        assert 30 <= found["answered"] <= 130
        assert found["generator"]["lag_p99_ms"] is not None
    kinds = {"PredictStream"} if "stream" in flags else {"Predict"}
    assert set(server.calls) - {"GetModel", "Predict"} == kinds - {"Predict"}


def test_wrong_answers_fail_the_load_test(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that answers the same rows differently is told so: status 1."""
    answers = iter(range(10**9))

    def spoil(response: Any) -> None:
        response.outputs.data = np.full(2, next(answers), np.float32).tobytes()

    server.tamper = spoil
    assert main(["load", "--target", server.target, "--model", "lin", "--json", "-", *BRIEF]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["errors"]["WRONG_ANSWER"] > 0
    assert found["error_examples"]["WRONG_ANSWER"] == "the same rows were answered differently before"


def test_rows_may_come_from_a_file(server: FakeServer, tmp_path: Path) -> None:
    """Every row of it is sent, and no other."""
    x = np.arange(21, dtype=np.float64).reshape(7, 3)
    np.save(tmp_path / "x.npy", x)
    argv = [
        "load",
        "--target",
        server.target,
        "--model",
        "lin",
        "--data",
        str(tmp_path / "x.npy"),
        "--rows",
        "2",
    ]
    assert main([*argv, *BRIEF]) == 0
    sent = {
        tuple(row) for request in server.requests for row in np.frombuffer(request.inputs.data).reshape(-1, 3)
    }
    assert sent == {tuple(row) for row in x}


def test_ctrl_c_ends_workers_and_is_quiet(server: FakeServer) -> None:
    """Status 130 at once, however long the test was to be."""
    process = subprocess.Popen(
        [sys.executable, "-m", "nnclient", "load", "--target", server.target, "--model", "lin"]
        + ["--duration-s", "600"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    server.wait_for(lambda s: len(s.requests) > 50)
    # As a terminal does it: to the whole group, workers included.
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 130


def outcome(tally: Tally, **plan: Any) -> Outcome:
    return Outcome(LoadPlan(target="h:1", model="lin", **plan), MODEL, tally)


def test_the_report_says_when_the_generator_was_the_bottleneck(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the CPU of an event loop, of all threads, or by sending late."""
    monkeypatch.setattr("nnclient.load.report.usable_cores", lambda: 2)
    assert bottleneck_of(outcome(Tally(loop_cpu=0.5, cpu=0.8))) is None
    assert "95%" in (bottleneck_of(outcome(Tally(loop_cpu=0.95, cpu=0.95))) or "")
    assert bottleneck_of(outcome(Tally(loop_cpu=0.85, cpu=1.9), processes=2)) is not None
    late = Tally()
    for _ in range(100):
        late.lag.record(0.005)
    assert "5.0 ms" in (bottleneck_of(outcome(late, rate_per_s=100.0)) or "")
    assert "warning: " in as_text(outcome(late, rate_per_s=100.0))


def test_a_report_of_nothing_is_still_a_report() -> None:
    """No answer at all: zeros, nulls that JSON knows, and the errors with an example."""
    tally = Tally()
    tally.errors["UNAVAILABLE"] = 1200
    tally.examples["UNAVAILABLE"] = "connection refused"
    found = json.loads(json.dumps(as_json(outcome(tally)), allow_nan=False))
    assert found["requests_per_s"] == 0
    assert found["latency_ms"]["p50"] is None
    text = as_text(outcome(tally))
    assert "errors      1,200 UNAVAILABLE" in text
    assert "UNAVAILABLE: connection refused" in text


def test_data_of_another_width_is_refused(tmp_path: Path) -> None:
    """With both shapes."""
    np.save(tmp_path / "x.npy", np.zeros((5, 4)))
    plan = LoadPlan(target="h:1", model="lin", data=str(tmp_path / "x.npy"))
    with pytest.raises(InvalidInput, match=r"has shape \(5, 4\); expected \(rows, 3\)"):
        make_questions(plan, MODEL)
