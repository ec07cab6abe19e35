"""docs/open-inference-protocol.md and README.md: what they show of tritonclient, run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.server import ServerProcess, running

ROOT = Path(__file__).parent.parent.parent
(EXAMPLE,) = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/open-inference-protocol.md").read_text(encoding="utf-8"), re.DOTALL
)
(ONE_LINER,) = re.findall(
    r'python -c "\n(.*?)"(?: +# ([^\n]*))\n', (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
)


@pytest.fixture(scope="module")
def bundled() -> Iterator[ServerProcess]:
    with running() as process:
        yield process


def run(code: str, server: ServerProcess) -> str:
    program = re.sub(r"127\.0\.0\.1:50051", server.address, code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_the_docs(bundled: ServerProcess) -> None:
    """Three rows of ten probabilities and a label each."""
    printed = run(EXAMPLE, bundled)
    assert len(re.findall(r"\d\.\d+e?[-+]?\d*", printed)) == 30
    assert len(re.findall(r"b'\d'", printed)) == 3


def test_the_example_of_the_readme(bundled: ServerProcess) -> None:
    """It prints what its comment says."""
    code, expected = ONE_LINER
    lines = [line.removeprefix("    ") for line in code.splitlines()]
    assert run("\n".join(lines), bundled).strip() == expected
