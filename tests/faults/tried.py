"""Tests in, the table of docs/faults.md out: what was tried, what happens, and the test that shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])

SECTIONS = (
    "Shapes",
    "Payloads",
    "Names",
    "Values",
    "Parameters",
    "Protocol",
    "Time",
    "Load",
    "Model files",
    "Lifecycle",
    "Exposure",
)


@dataclass(frozen=True, slots=True)
class Tried:
    """One line of the table."""

    section: str
    what: str
    happens: str
    test: str


def tried(section: str, what: str, happens: str) -> Callable[[Test], Test]:
    """Decorate a test with the line of the table that it shows."""

    def decorate(test: Test) -> Test:
        lines = (*getattr(test, "tried", ()), Tried(section, what, happens, test.__name__))
        test.tried = lines  # type: ignore[attr-defined]
        return test

    return decorate


def table(lines: list[Tried]) -> str:
    """Return the tables of all sections, as Markdown."""
    parts = []
    for section in SECTIONS:
        parts += [f"### {section}", "", "| tried | what happens | shown by |", "| --- | --- | --- |"]
        for line in lines:
            if line.section == section:
                parts.append(f"| {line.what} | {line.happens} | `{line.test}` |")
        parts.append("")
    return "\n".join(parts)
