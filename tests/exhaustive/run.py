"""
All 2^32 float32 numbers -> a table of each function's and derivative's largest and mean error, in ULP.

    python tests/exhaustive/run.py                              everything: some 15 minutes on 2 cores
    python tests/exhaustive/run.py --stride 1009                every 1009th number: seconds
    python tests/exhaustive/run.py sigmoid gelu_grad            some of it
    python tests/exhaustive/run.py --markdown docs/accuracy.md  the table as a document
    python tests/exhaustive/run.py --peers 257                  PyTorch and ONNX Runtime, every 257th number
    python tests/exhaustive/run.py --results FILE               go on where an earlier run has ended

The references are the C library's functions in float64 (`references`). An error in ULP is the distance from
the exact value, over the gap between float32 numbers there: 0.5 is as near as a float32 can be. Exits with 1
if a bound of `BOUNDS` does not hold, or if one result is NaN, infinite or finite where it must not be.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import peers  # type: ignore[import-not-found]  # beside this script
import references  # type: ignore[import-not-found]
from numba.core.registry import cpu_target
from numpy.typing import NDArray

import nncore
from nncore.compilation import target_of

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
# On a machine without fused multiply-add.
BOUNDS_WITHOUT_FMA = BOUNDS | {name: 3.0 for name, bound in BOUNDS.items() if bound == 2.0 or "hard" in name}

CHUNK = 1 << 20

# Columns: nncore over all numbers, and over those that its peers are measured on.
ALL, SAMPLE = "nncore", "nncore, sampled"

TABLE_BEGINS = "<!-- written by tests/exhaustive/run.py -->"
TABLE_ENDS = "<!-- end of what is written -->"


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


# 1 / ULP of float32 at a float64, by its exponent's bits.
PER_ULP = 2.0 ** (23 - np.clip(np.arange(2048.0) - 1023, -126, 127))
# float32 ends before this power of 2; what overflows is taken for it.
END = 2.0**128


@numba.njit(nogil=True, error_model="numpy")
def evaluate(reference: Any, x: Any, exact: Any) -> None:
    """exact[i] = reference(x[i]). x: (n,) float32; exact: (n,) float64."""
    for i in range(x.size):
        exact[i] = reference(np.float64(x[i]))


@numba.njit(nogil=True, error_model="numpy")
def compare(x: Any, y: Any, exact: Any, figures: Any) -> None:
    """
    Compare y with exact, the references for x. x, y: (n,) float32; exact: (n,) float64.

    figures: count, total, largest, worst x, wrong, one wrong x.
    """
    bits = exact.view(np.int64)
    for i in range(x.size):
        got, true = np.float64(y[i]), exact[i]
        error = abs(min(max(got, -END), END) - min(max(true, -END), END)) * PER_ULP[(bits[i] >> 52) & 0x7FF]
        if math.isnan(got) or math.isnan(true) or (math.isinf(true) and error != 0):
            if not (math.isnan(got) and math.isnan(x[i])):
                figures[4] += 1
                figures[5] = x[i]
            continue
        figures[0] += 1
        figures[1] += error
        if error > figures[2]:
            figures[2] = error
            figures[3] = x[i]


def chunks(stride: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the bit patterns first, first + stride, ... of each chunk."""
    total = -(-(2**32) // stride)
    for first in range(0, total, CHUNK):
        yield first * stride, min(CHUNK, total - first)


def errors_of(
    functions: dict[str, Function], reference: Any, stride: int, pool: ThreadPoolExecutor
) -> dict[str, Errors]:
    """The errors of each of *functions* over every stride-th float32."""

    def part(chunk: tuple[int, int]) -> NDArray[np.float64]:
        first, count = chunk
        bits = np.arange(first, first + count * stride, stride, dtype=np.uint64)[:count].astype(np.uint32)
        x, exact = bits.view(np.float32), np.empty(count)
        evaluate(reference, x, exact)
        figures = np.zeros((len(functions), 6))
        for function, row in zip(functions.values(), figures, strict=True):
            compare(x, function(x), exact, row)
        return figures

    errors = {name: Errors() for name in functions}
    for figures in pool.map(part, chunks(stride)):
        for found, row in zip(errors.values(), figures, strict=True):
            found.add(row)
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
    bound = (BOUNDS if target_of(cpu_target.target_context).has_fma else BOUNDS_WITHOUT_FMA)[name]
    if not errors.largest <= bound:
        found.append(f"{name}: {errors.largest:.3f} ULP at {errors.worst:.9g}; the bound is {bound}")
    return found


def main() -> int:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="functions and derivatives; default: all")
    parser.add_argument("--stride", type=int, default=1, help="take every n-th number (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument(
        "--peers", type=int, metavar="N", help="PyTorch and ONNX Runtime on every N-th number"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--results", type=Path, metavar="FILE", help="keep figures there; use what is there")
    arguments = parser.parse_args()

    table = nncore_functions()
    unknown = set(arguments.names) - table.keys()
    if unknown:
        parser.error(f"no such function: {', '.join(sorted(unknown))}")
    rows = read_results(arguments.results, arguments.stride)
    names = arguments.names or list(table)
    others: dict[str, dict[str, Function]] = peers.available() if arguments.peers else {}

    print(f"{'':20}{'max ULP':>12}{'mean':>12}  {'at':<26}{'seconds':>9}", flush=True)
    with ThreadPoolExecutor(arguments.threads) as pool:
        for name in names:
            function, reference = table[name]
            row = rows.setdefault(name, {})
            start = time.monotonic()
            if ALL not in row:
                row.update(errors_of({ALL: function}, reference, arguments.stride, pool))
            found = {peer: functions[name] for peer, functions in others.items() if name in functions}
            if found and not found.keys() <= row.keys():
                row.update(errors_of({SAMPLE: function, **found}, reference, arguments.peers, pool))
            print(f"{name:20}{described(row[ALL])}{time.monotonic() - start:9.1f}", flush=True)
            for peer in found:
                print(f"  {peer:18}{described(row[peer])}", flush=True)
            for line in failures(name, row[ALL]):
                print(f"  {line}", flush=True)
            write_results(arguments.results, arguments.stride, rows)
    if arguments.markdown:
        known = {name: rows[name] for name in table if name in rows}
        replace_table(arguments.markdown, markdown(known, arguments.stride, arguments.peers))
    broken = [line for name, row in rows.items() for line in failures(name, row[ALL])]
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


def read_results(path: Path | None, stride: int) -> dict[str, dict[str, Errors]]:
    """function -> library -> errors, as `write_results` left them; empty if there is no such file."""
    if path is None or not path.exists():
        return {}
    kept = json.loads(path.read_text())
    if kept["stride"] != stride:
        raise SystemExit(f"{path} has figures of stride {kept['stride']}, not {stride}")
    return {
        name: {library: Errors(**errors) for library, errors in row.items()}
        for name, row in kept["rows"].items()
    }


def write_results(path: Path | None, stride: int, rows: dict[str, dict[str, Errors]]) -> None:
    """Keep the figures for a later run."""
    if path is not None:
        plain = {name: {library: asdict(e) for library, e in row.items()} for name, row in rows.items()}
        path.write_text(json.dumps({"stride": stride, "rows": plain}, indent=1))


def described(errors: Errors) -> str:
    """Largest and mean error and where the largest is, in columns."""
    wrong = f"{errors.wrong:,} wrong" if errors.wrong else ""
    return f"{errors.largest:12.3f}{errors.mean:12.4f}  {errors.worst:<26.9g}{wrong}"


def markdown(rows: dict[str, dict[str, Errors]], stride: int, sample: int | None) -> str:
    """The table, and over which inputs it is."""
    inputs = "all 2^32 float32 numbers" if stride == 1 else f"every {stride:,}th of the 2^32 float32 numbers"
    columns = list(dict.fromkeys(library for row in rows.values() for library in row))
    lines = [
        f"The first column is over {inputs}, against float64. Each cell: the largest error, and the mean,",
        "in ULP of the exact result.",
        *([f"The other columns are over every {sample:,}th number, the same for each."] if sample else []),
        "",
        "| | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for name, row in rows.items():
        cells = [cell(row[column]) if column in row else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replace_table(path: Path, table: str) -> None:
    """Put *table* into the document, between the lines that mark its place."""
    before, mark, rest = path.read_text().partition(TABLE_BEGINS)
    _, end, after = rest.partition(TABLE_ENDS)
    if not (mark and end):
        raise SystemExit(f"{path} has no lines {TABLE_BEGINS} and {TABLE_ENDS}")
    path.write_text(f"{before}{mark}\n\n{table}\n\n{end}{after}")


def cell(errors: Errors) -> str:
    """Largest and mean error, short."""
    largest = f"{errors.largest:.2f}" if errors.largest < 1000 else f"{errors.largest:.1e}"
    wrong = f" ({errors.wrong:,} NaN or infinite)" if errors.wrong else ""
    return f"{largest}, {errors.mean:.3f}{wrong}"


if __name__ == "__main__":
    sys.exit(main())
