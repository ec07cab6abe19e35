"""The Python of client/README.md -> it runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fake_server import FakeModel, FakeServer

README = Path(__file__).parents[2] / "client" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def names(server: FakeServer, tmp_path: Path) -> dict[str, Any]:
    """What the examples take for granted: a server with digits at its usual place, and files of rows."""
    server.models["digits"] = FakeModel("digits", 64, 10, labels=tuple("0123456789"))
    x = np.random.default_rng(0).normal(size=(3, 64))
    np.save(tmp_path / "x.npy", x)
    return {"x": x, "paths": [tmp_path / "x.npy"] * 3, "np": np}


def at(server: FakeServer, block: str) -> str:
    return block.replace("127.0.0.1:50051", server.target)


def test_predict(server: FakeServer, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the two best labels of each of three rows."""
    exec(at(server, BLOCKS[0]), names)
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_stream_and_asyncio(server: FakeServer, names: dict[str, Any]) -> None:
    """The stream within a client of the first example, and the same with asyncio."""
    indented = BLOCKS[2].replace("\n", "\n    ")
    script = f"from nnclient import Client\nwith Client('{server.target}') as client:\n    {indented}"
    exec(script, names)
    imports, body = at(server, BLOCKS[3]).split("\n\n", 1)
    indented = body.replace("\n", "\n    ")
    exec(f"import asyncio\n{imports}\nasync def main():\n    {indented}\nasyncio.run(main())", names)
    assert {"Predict", "PredictStream"} <= set(server.calls)
