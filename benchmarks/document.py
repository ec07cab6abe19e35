"""A document and what was measured in, the document out with that between its two marks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def write_measured(document: Path, lines: Iterable[str]) -> None:
    """Put *lines* between the marks of *document*; what is written around them by hand stays."""
    text = document.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")
