"""The documents -> the tests that they name: a claim that a test shows must have that test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = {
    node.name
    for file in (ROOT / "tests").rglob("test_*.py")
    if "node_modules" not in file.parts
    for node in ast.parse(file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
}


@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_the_tests_that_a_document_names_exist(document: Path) -> None:
    named = set(re.findall(r"`(test_\w+)`", document.read_text(encoding="utf-8")))
    assert named <= TESTS


def test_the_document_on_the_protocol_names_tests() -> None:
    """Else the test above could pass for want of names."""
    assert len(re.findall(r"`test_\w+`", (ROOT / "docs" / "protocol.md").read_text(encoding="utf-8"))) > 30
