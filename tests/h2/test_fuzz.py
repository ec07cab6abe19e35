"""A few thousand inputs of `make fuzz-h2`, and that it would find what it looks for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz import h2 as fuzz
from fuzz.mutations import Input
from fuzz.trial import Failure

from nnserver.transport.h2_call import H2Call
from nnserver.transport.h2_connection import H2Connection
from nnserver.transport.h2_server import H2Server

INPUTS = 3000


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[fuzz.Fuzzer]:
    found = fuzz.Fuzzer()
    yield found
    found.close()


def test_the_first_inputs_hold(tmp_path: Path) -> None:
    assert fuzz.run_seeds(0, INPUTS, None, tmp_path) is None


def test_an_input_is_the_same_each_time(fuzzer: fuzz.Fuzzer) -> None:
    again = fuzz.Fuzzer()
    try:
        assert [again.input(seed) for seed in range(300)] == [fuzzer.input(seed) for seed in range(300)]
    finally:
        again.close()


def test_inputs_are_of_every_kind(fuzzer: fuzz.Fuzzer) -> None:
    inputs = [fuzzer.input(seed) for seed in range(2000)]
    assert len({tried.name for tried in inputs}) == 19
    assert len({edit for tried in inputs for edit in tried.edits}) == 18
    assert any(tried.is_whole for tried in inputs)
    moments = {step for tried in inputs for step in tried.steps if not isinstance(step, bytes)}
    assert len(moments) == 7


def forget_nothing(self: Any, call: Any) -> None:
    """Faulty: the call is not counted down."""


def lose_count(self: Any, change: int) -> None:
    self.buffered_bytes += max(change, 0)


def say_it_twice(self: Any, data: bytes, ends: bool) -> None:
    if ends:
        self._is_half_closed = True
    if data:
        self._assembler.feed(data + data[:1])
    self._deliver()


def raise_now_and_then(self: Any) -> None:
    raise RuntimeError("planted")


def tell_nobody(self: Any) -> None:
    self._has_ended = True


FAULTS = {
    "a call that is counted for ever": (H2Server, "dismiss", forget_nothing),
    "bytes that are counted for ever": (H2Server, "note_buffered", lose_count),
    "a byte too many": (H2Call, "receive", say_it_twice),
    "an exception": (H2Connection, "resume_writing", raise_now_and_then),
    "an api that hears of no end": (H2Call, "cancel", tell_nobody),
}


def first_failure(fuzzer: fuzz.Fuzzer) -> tuple[int, Input]:
    for seed in range(1000):
        tried = fuzzer.input(seed)
        try:
            fuzzer.run(tried)
        except (Failure, RuntimeError, AssertionError):
            return seed, tried
    raise AssertionError("nothing was found")


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a thousand inputs; what is printed names the seed, and what is saved is that input."""
    fuzzer = fuzz.Fuzzer()
    monkeypatch.setattr(*FAULTS[name])
    try:
        seed, tried = first_failure(fuzzer)
    finally:
        fuzzer.close()
    text = fuzz.report(seed, tried, "planted", tmp_path)
    assert f"--seed {seed}'" in text
    saved = Input(*ast.literal_eval((tmp_path / f"seed-{seed}.txt").read_text()))
    assert saved.steps == tried.steps
    monkeypatch.undo()
    sound = fuzz.Fuzzer()
    try:
        sound.run(saved)
    finally:
        sound.close()


def test_an_object_left_alive_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    lost = H2Connection.connection_lost

    def keep(self: Any, exc: Exception | None) -> None:
        kept.append(self)
        lost(self, exc)

    fuzzer = fuzz.Fuzzer()
    try:
        fuzzer.check_nothing_is_left()
        monkeypatch.setattr(H2Connection, "connection_lost", keep)
        fuzzer.run(fuzzer.input(0))
        with pytest.raises(Failure, match="are alive"):
            fuzzer.check_nothing_is_left()
    finally:
        fuzzer.close()


def test_a_process_that_dies_is_reported_with_its_seed(tmp_path: Path) -> None:
    """The worker's last note names the input, however it ended."""
    worker = fuzz.Worker(0, 10_000_000, tmp_path, tmp_path)
    while worker.seed < 3:
        assert worker.is_running()
    worker.stop()
    verdict = worker.verdict()
    worker.close()
    assert verdict is not None
    assert f"seed {worker.seed} failed: the process ended with -9" in verdict
