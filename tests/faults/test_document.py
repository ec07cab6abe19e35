"""docs/faults.md -> whether its tables are what the tests say."""

from __future__ import annotations

from faults.table import DOCUMENT, lines, updated
from faults.tried import SECTIONS


def test_the_tables_are_those_of_the_tests() -> None:
    """`PYTHONPATH=tests python -m faults.table` writes them."""
    document = DOCUMENT.read_text(encoding="utf-8")
    assert document == updated(document)


def test_every_section_has_lines_and_no_line_is_there_twice() -> None:
    found = lines()
    assert {line.section for line in found} == set(SECTIONS)
    assert len({(line.section, line.what) for line in found}) == len(found)
