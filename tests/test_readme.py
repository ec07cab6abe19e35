"""README.md -> its Python examples, each run as it stands against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.server import running

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
DEFAULT_ADDRESS = "127.0.0.1:50051"


def test_the_readme_has_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example_prints_what_its_comments_say(index: int, tmp_path: Path) -> None:
    """It runs without a warning, and `print(...)  # text` prints that text."""
    code = EXAMPLES[index]
    expected = re.findall(r"print\(.*\)  # (.*)", code)
    with running() as server:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code.replace(DEFAULT_ADDRESS, server.address)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    for line in expected:
        assert line in done.stdout
