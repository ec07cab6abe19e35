"""
All 2^32 float32 numbers -> a table of each function's and derivative's largest and mean error, in ULP.

    python tests/exhaustive/run.py                              everything: about a minute a row and core
    python tests/exhaustive/run.py --stride 1009                every 1009th number: seconds
    python tests/exhaustive/run.py sigmoid gelu_grad            some of it
    python tests/exhaustive/run.py --markdown docs/accuracy.md  the table as a document
    python tests/exhaustive/run.py --peers                      beside PyTorch and ONNX Runtime, if installed

The references are the C library's functions in float64 (`references`). An error in ULP is the distance from
the exact value, over the gap between float32 numbers there: 0.5 is as near as a float32 can be. Exits with 1
if a bound of `BOUNDS` does not hold, or if one result is NaN, infinite or finite where it must not be.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import peers  # type: ignore[import-not-found]  # beside this script
import references  # type: ignore[import-not-found]
from numpy.typing import NDArray

import nncore

Single = NDArray[np.float32]
Function = Callable[[Single], Single]

# ULP of float32 that no result may be off by more than. Piecewise-linear ones are exact: rounded once (with
# room for the second rounding of those that are computed in float64).
PIECEWISE_LINEAR = (
    *("identity", "step", "relu", "leaky_relu", "prelu", "relu6", "hard_tanh", "hard_sigmoid"),
    "thresholded_relu",
)
BOUNDS = {
    **dict.fromkeys(references.FUNCTIONS, 2.0),
    **dict.fromkeys(PIECEWISE_LINEAR, 0.5 + 2.0**-20),
    **{f"{name}_grad": 4.0 for name in references.DERIVATIVES},
    **{f"{name}_grad": 0.5 for name in PIECEWISE_LINEAR},
}


CHUNK = 1 << 20


@dataclass
class Errors:
    """What is known of one function after some of the inputs."""

    count: int = 0
    total: float = 0.0
    largest: float = 0.0
    worst: float = math.nan
    wrong: int = 0
    wrong_at: float = math.nan

    @property
    def mean(self) -> float:
        """The mean error in ULP."""
        return self.total / max(self.count, 1)

    def add(self, part: NDArray[np.float64]) -> None:
        """Take in one chunk's figures, as `measure` fills them."""
        self.count += int(part[0])
        self.total += part[1]
        if part[2] > self.largest:
            self.largest, self.worst = part[2], part[3]
        if part[4]:
            self.wrong, self.wrong_at = self.wrong + int(part[4]), part[5]


@numba.njit(nogil=True, error_model="numpy")
def measure(reference: Any, x: Any, y: Any, exact: Any, figures: Any) -> None:
    """
    Compare y with reference(x). x, y: (n,) float32; exact: (n,) float64 for the reference's results.

    figures: count, total, largest, worst x, wrong, one wrong x.
    """
    for i in range(x.size):
        exact[i] = reference(np.float64(x[i]))
    bits = exact.view(np.int64)
    for i in range(x.size):
        true, got = exact[i], np.float64(y[i])
        if math.isnan(x[i]):
            bad = not math.isnan(got)
        elif math.isfinite(true) and math.isfinite(got):
            bad = False
            exponent = max(((bits[i] >> 52) & 0x7FF) - 1023, -126)
            error = abs(got - true) * 2.0 ** (23 - exponent)
            figures[0] += 1
            figures[1] += error
            if error > figures[2]:
                figures[2] = error
                figures[3] = x[i]
        else:
            bad = np.float32(true) != y[i]
        if bad:
            figures[4] += 1
            figures[5] = x[i]


def chunks(stride: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the bit patterns first, first + stride, ... of each chunk."""
    total = -(-(2**32) // stride)
    for first in range(0, total, CHUNK):
        yield first * stride, min(CHUNK, total - first)


def errors_of(function: Function, reference: Any, stride: int, pool: ThreadPoolExecutor) -> Errors:
    """The errors of *function* over every stride-th float32."""

    def part(chunk: tuple[int, int]) -> NDArray[np.float64]:
        first, count = chunk
        bits = np.arange(first, first + count * stride, stride, dtype=np.uint64)[:count].astype(np.uint32)
        x = bits.view(np.float32)
        figures = np.zeros(6)
        measure(reference, x, function(x), np.empty(count), figures)
        return figures

    errors = Errors()
    for figures in pool.map(part, chunks(stride)):
        errors.add(figures)
    return errors


def nncore_functions() -> dict[str, tuple[Function, Any]]:
    """name -> function, reference; derivatives end with _grad."""
    table: dict[str, tuple[Function, Any]] = {}
    for name, activation in nncore.ACTIVATIONS.items():
        table[name] = (activation.function, references.FUNCTIONS[name])
    for name, activation in nncore.ACTIVATIONS.items():
        table[f"{name}_grad"] = (activation.derivative, references.DERIVATIVES[name])
    return table


def failures(name: str, errors: Errors) -> list[str]:
    """What is out of bounds, in words."""
    found = []
    if errors.wrong:
        found.append(f"{name}: {errors.wrong} infinities or NaN wrong, one of them at {errors.wrong_at:.9g}")
    if not errors.largest <= BOUNDS[name]:
        found.append(f"{name}: {errors.largest:.3f} ULP at {errors.worst:.9g}; the bound is {BOUNDS[name]}")
    return found


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="functions and derivatives; default: all")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th number (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--peers", action="store_true", help="measure PyTorch and ONNX Runtime, too")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    arguments = parser.parse_args()

    table = nncore_functions()
    unknown = set(arguments.names) - table.keys()
    if unknown:
        parser.error(f"no such function: {', '.join(sorted(unknown))}")
    names = arguments.names or list(table)
    others: dict[str, dict[str, Function]] = peers.available() if arguments.peers else {}

    rows: dict[str, dict[str, Errors]] = {}
    broken: list[str] = []
    print(f"{'':20}{'max ULP':>12}{'mean':>12}  {'at':<26}{'seconds':>9}", flush=True)
    with ThreadPoolExecutor(arguments.threads) as pool:
        for name in names:
            function, reference = table[name]
            start = time.monotonic()
            errors = errors_of(function, reference, arguments.stride, pool)
            rows[name] = {"nncore": errors}
            broken += failures(name, errors)
            print(f"{name:20}{described(errors)}{time.monotonic() - start:9.1f}", flush=True)
            for peer, functions in others.items():
                if name in functions:
                    other = errors_of(functions[name], reference, arguments.stride, pool)
                    rows[name][peer] = other
                    print(f"  {peer:18}{described(other)}", flush=True)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows, list(others), arguments.stride))
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


def described(errors: Errors) -> str:
    """Largest and mean error and where the largest is, in columns."""
    wrong = f"{errors.wrong:,} wrong" if errors.wrong else ""
    return f"{errors.largest:12.3f}{errors.mean:12.4f}  {errors.worst:<26.9g}{wrong}"


def markdown(rows: dict[str, dict[str, Errors]], others: list[str], stride: int) -> str:
    """The document of the table."""
    inputs = "all 2^32 float32 numbers" if stride == 1 else f"every {stride:,}th of the 2^32 float32 numbers"
    columns = ["nncore", *others]
    lines = [
        "# Accuracy of the activations",
        "",
        f"Written by `tests/exhaustive/run.py`, over {inputs}, against float64.",
        "Errors are in units in the last place (ULP) of the exact result; 0.5 is the nearest float32.",
        "Each cell: the largest error, and the mean.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, row in rows.items():
        cells = [cell(row[column]) if column in row else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(errors: Errors) -> str:
    """Largest and mean error, short."""
    largest = f"{errors.largest:.2f}" if errors.largest < 1000 else f"{errors.largest:.1e}"
    wrong = f" ({errors.wrong:,} NaN or infinite)" if errors.wrong else ""
    return f"{largest}, {errors.mean:.3f}{wrong}"


if __name__ == "__main__":
    sys.exit(main())
