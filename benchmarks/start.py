"""
Fresh processes -> how long each takes from its start to its first answer, with a full cache and without one.

    python benchmarks/start.py                         medians of 7 warm and 3 cold starts
    python benchmarks/start.py --warm 3 --cold 0

Each case is first run once: that fills the cache and warms the files up, and its answer is compared with that
of this process. A cold start has an empty cache folder of its own, and warm files.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import nncore
from nnclient import Client
from nncore.compilation import cache_folder

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "server" / "nnserver" / "models" / "digits.safetensors"
ROWS = np.loadtxt(ROOT / "examples" / "digits_rows.csv", delimiter=",", skiprows=1, dtype=np.float32)
COMMANDS = Path(sys.executable).parent

FORWARD = f"""
import nncore, sys
y = nncore.load({str(DIGITS)!r}).forward({ROWS.tolist()!r})
print(y.tobytes().hex(), flush=True)
"""


def first_forward(environment: dict[str, str]) -> tuple[float, bytes]:
    """Seconds to the answer of a Python process that imports nncore and loads digits, and the answer."""
    started = time.perf_counter()
    command = [sys.executable, "-c", FORWARD]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        elapsed_s = time.perf_counter() - started
    return elapsed_s, bytes.fromhex(line)


def inspected(environment: dict[str, str]) -> tuple[float, bytes]:
    """Seconds that `nncore inspect` takes; it computes nothing."""
    started = time.perf_counter()
    subprocess.run([COMMANDS / "nncore", "inspect", DIGITS], env=environment, capture_output=True, check=True)
    return time.perf_counter() - started, b""


def first_answer(transport: str) -> Callable[[dict[str, str]], tuple[float, bytes]]:
    """As `first_forward`, for a server on a Unix socket and a client in this process."""

    def measure(environment: dict[str, str]) -> tuple[float, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            listen = f"unix:{folder}/socket"
            command = [str(COMMANDS / "nnserver"), "--listen", listen, "--transport", transport]
            started = time.perf_counter()
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                if not process.stdout.readline():
                    sys.exit("nnserver did not start")
                with Client(listen) as client:
                    y = client.predict("digits", ROWS)
                    elapsed_s = time.perf_counter() - started
                process.send_signal(signal.SIGTERM)
        return elapsed_s, np.asarray(y, np.float32).tobytes()

    return measure


CASES = {
    "nncore: import, load digits, first forward": first_forward,
    "nnserver --transport grpcio: first answer": first_answer("grpcio"),
    "nnserver --transport h2: first answer": first_answer("h2"),
    "nncore inspect: done": inspected,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--warm", type=int, default=7, help="warm starts of each case (default 7)")
    parser.add_argument("--cold", type=int, default=3, help="cold starts of each case (default 3)")
    arguments = parser.parse_args()
    expected = nncore.load(DIGITS).forward(ROWS).tobytes()
    warm = {**os.environ, "NNCORE_CACHE_DIR": str(cache_folder())}
    for name, measure in CASES.items():
        _, answer = measure(warm)
        if answer not in (b"", expected):
            sys.exit(f"{name}: the answer differs from that of this process")

    print("| what, from the start of the process | warm, s | (range) | cold, s | (range) |")
    print("| --- | --- | --- | --- | --- |")
    warm_s: dict[str, list[float]] = {name: [] for name in CASES}
    cold_s: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(arguments.warm):  # taking turns, so that a machine that changes its speed is fair to all
        for name, measure in CASES.items():
            warm_s[name].append(measure(warm)[0])
    for _ in range(arguments.cold):
        for name, measure in CASES.items():
            with tempfile.TemporaryDirectory() as folder:
                cold_s[name].append(measure({**os.environ, "NNCORE_CACHE_DIR": folder})[0])
    for name in CASES:
        print(f"| {name} | {summary(warm_s[name])} | {summary(cold_s[name])} |")


def summary(seconds: list[float]) -> str:
    """The median, and the least and the greatest."""
    if not seconds:
        return "- | -"
    return f"{statistics.median(seconds):.2f} | {min(seconds):.2f}-{max(seconds):.2f}"


if __name__ == "__main__":
    main()
