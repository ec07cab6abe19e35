"""Python code and settings in, what a fresh interpreter prints out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Settings that would make one test's process differ from another's.
_UNSET = ("NNCORE_CACHE_DIR", "NNCORE_VECTOR_BITS", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")


def environment(cache: Path, **settings: str) -> dict[str, str]:
    """This process's environment, with *cache* as the folder of compiled code and *settings*."""
    kept = {name: value for name, value in os.environ.items() if name not in _UNSET}
    # The code sees what the tests see, and not the folder it is run in.
    path = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    return {**kept, **path, "NNCORE_CACHE_DIR": str(cache), **settings}


def start(code: str, cache: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    """Run *code* beside others; see `finish`."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env=environment(cache, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What *process* has printed. It must have ended well, and without a warning."""
    out, errors = process.communicate(timeout=110)
    assert process.returncode == 0, errors
    assert errors == ""
    return out.strip()


def run(code: str, cache: Path, *arguments: str, **settings: str) -> str:
    """What *code* prints, run to its end."""
    return finish(start(code, cache, *arguments, **settings))


def files(folder: Path) -> dict[str, Any]:
    """Every file below *folder*: name, and what tells one version of it from another."""
    return {
        str(file.relative_to(folder)): (file.stat().st_ino, file.stat().st_mtime_ns, file.stat().st_size)
        for file in folder.rglob("*")
        if file.is_file()
    }
