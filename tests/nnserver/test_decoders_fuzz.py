"""The corpus and a few thousand inputs of `make fuzz-decoders`, and that it would find what it looks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from fuzz import decoders as fuzz
from fuzz.decoder_inputs import MOST_BYTES, Mutator, joined, split
from fuzz.decoder_trial import WAYS, Failure, Trial, seeds

from nnserver.api import crumbs, forms, inference, oip_infer

INPUTS = 5000


@pytest.fixture
def trial() -> Iterator[Trial]:
    found = Trial()
    yield found
    found.close()


def test_the_corpus_and_the_first_mutations_of_it_hold(trial: Trial) -> None:
    assert fuzz.run_blind(trial, INPUTS, 0) is None


def test_an_input_is_the_same_each_time_and_no_longer_than_may_be() -> None:
    one, other = Mutator(seeds(), WAYS), Mutator(seeds(), WAYS)
    other.input(1000)
    inputs = [one.input(seed) for seed in range(500)]
    assert inputs == [other.input(seed) for seed in range(500)]
    assert max(map(len, inputs)) <= MOST_BYTES + 1


def test_what_is_split_is_joined_again() -> None:
    for seed in seeds():
        assert joined(split(seed[1:])) == seed[1:]


def test_the_corpus_reaches_what_the_first_messages_do_not(trial: Trial) -> None:
    """It was found by coverage, and is worth its place."""

    def reached(inputs: list[bytes]) -> set[fuzz.Arc]:
        return set().union(*(fuzz.arcs_of(partial(trial.run, data)) for data in inputs))

    assert len(reached(fuzz.corpus()) - reached(seeds())) > 20


def forgetful(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Faulty: the sign of a number is lost on the way."""
    return lambda *arguments: abs(decode(*arguments))


def lenient(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Faulty: a shape that has a dimension too many is taken."""

    def decode_rows(request: Any, model: Any) -> Any:
        for tensor in request.inputs:
            del tensor.shape[2:]
        return decode(request, model)

    return decode_rows


def careless(decode: Callable[..., Any]) -> Callable[..., Any]:
    """Faulty: an exception of Python's for a request with two inputs."""

    def decode_rows(request: Any, model: Any) -> Any:
        (_,) = request.inputs
        return decode(request, model)

    return decode_rows


def generous(refuse: Callable[..., Any]) -> Callable[..., Any]:
    """Faulty: one field more is let through."""

    def refuse_crumbs(kind: Any, message: bytes) -> None:
        crumbs.MOST_FIELDS += 1
        try:
            refuse(kind, message)
        finally:
            crumbs.MOST_FIELDS -= 1

    return refuse_crumbs


def talkative(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Faulty: an error's text names a file."""
    return lambda note, error: answer(note, type(error)("cannot read /srv/models/iris.safetensors"))


def greedy(find: Callable[..., Any]) -> Callable[..., Any]:
    """Faulty: what is recognised is one row short, where it has more than one."""

    def find_shorter(self: Any, message: bytes) -> Any:
        known = find(self, message)
        return (
            known if known is None or known[0].rows < 2 else (known[0], known[1][:-12] + bytes(12), known[2])
        )

    return find_shorter


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "a sign that is lost": (inference, "decode_rows", forgetful),
    "a shape that is taken": (oip_infer, "decode_rows", lenient),
    "an exception": (oip_infer, "decode_rows", careless),
    "a field too many": (crumbs, "refuse_crumbs", generous),
    "a path in a text": (inference, "error_answer", talkative),
    "rows that are lost": (forms.Templates, "find", greedy),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the corpus and a few thousand mutations of it; without the fault, what was found holds."""
    where, attribute, spoil = FAULTS[name]
    monkeypatch.setattr(where, attribute, spoil(getattr(where, attribute)))
    faulty = Trial()
    found = fuzz.run_blind(faulty, INPUTS, 0)
    faulty.close()
    assert found is not None
    assert found.startswith("input ")
    monkeypatch.undo()
    sound = Trial()
    sound.run(bytes.fromhex(found.split()[1]))
    sound.close()


def keep(leaks: fuzz.LeakCheck, make: Callable[[], Any], most: int) -> None:
    """Note *most* inputs, of each of which something stays."""
    kept = []
    for _ in range(most):
        kept.append(make())
        leaks.note_input()


@pytest.fixture
def leaks(monkeypatch: pytest.MonkeyPatch) -> fuzz.LeakCheck:
    """A check that looks early and allows little."""
    monkeypatch.setattr(fuzz, "LOOK_EVERY", 5)
    monkeypatch.setattr(fuzz, "WARM_UP_INPUTS", 10)
    monkeypatch.setattr(fuzz, "GROWTH_LIMIT_KIB", 8 << 10)
    monkeypatch.setattr(fuzz, "GROWTH_LIMIT_OBJECTS", 50)
    return fuzz.LeakCheck()


def test_memory_that_grows_is_found(leaks: fuzz.LeakCheck) -> None:
    with pytest.raises(Failure, match="memory grew from"):
        keep(leaks, lambda: b"x" * (1 << 20), 100)


def test_objects_that_stay_alive_are_found(leaks: fuzz.LeakCheck) -> None:
    with pytest.raises(Failure, match=r"objects stayed alive: .*'Mutator'"):
        keep(leaks, lambda: Mutator([b""], 1), 500)
