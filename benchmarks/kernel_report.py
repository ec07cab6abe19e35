"""
Pieces of what `benchmarks/kernels.py --json` has measured in, docs/kernels.md and its plot out.

    python benchmarks/kernel_report.py PIECE... --markdown docs/kernels.md --plot docs/kernels.png

A piece holds some models on one number of threads. Tables take the place of what is between the two marks in
the document; what is written around them by hand stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from math import exp, log
from pathlib import Path
from typing import Any

from benchmarks.document import write_measured

__all__ = ["main"]

Cell = dict[str, Any]

# Models of fewer weights live from low overhead; from so many on their arithmetic, or memory, is the limit.
SMALL_WEIGHTS = 100_000
LARGE_WEIGHTS = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a document and a plot of measured pieces.")
    parser.add_argument("pieces", type=Path, nargs="+")
    parser.add_argument("--markdown", type=Path, required=True, help="the document to bring up to date")
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    by_threads: dict[int, list[Cell]] = {}
    memory: dict[int, list[float]] = {}
    for path in args.pieces:
        piece = json.loads(path.read_text())
        by_threads.setdefault(piece["threads"], []).extend(piece["cells"])
        memory.setdefault(piece["threads"], []).append(piece["memory_gb_s"])
    for cells in by_threads.values():
        cells.sort(key=lambda cell: (cell["weights"], cell["batch"]))
    rates = {threads: statistics.median(found) for threads, found in memory.items()}
    lines = [line for t in sorted(by_threads) for line in section(t, by_threads[t], rates[t])]
    write_measured(args.markdown, lines)
    plot(by_threads, args.plot)


def section(threads: int, cells: list[Cell], memory_gb_s: float) -> Iterable[str]:
    """The part of the document about one number of threads."""
    peak = statistics.median(cell["peak_gflops"] for cell in cells)
    yield f"## {'One thread' if threads == 1 else f'{threads} threads'}"
    yield ""
    yield (
        f"Peak of fused multiply-adds: {peak:.0f} GFLOP/s; of reading memory: {memory_gb_s:.1f} GB/s "
        f"(medians of the run)."
    )
    yield ""
    columns = ["model", "batch", "us", "ratio", "best peer", "its us", "GFLOP/s", "% of peak"]
    if threads > 1:
        columns[2:2] = ["threads"]
        columns.append("us with the other count")
    yield f"| {' | '.join(columns)} |"
    yield "|" + " --- |" * len(columns)
    for cell in cells:
        # Arithmetic says little where a call takes a microsecond.
        says_much = cell["weights"] >= SMALL_WEIGHTS or cell["batch"] >= 32
        values = [
            cell["model"],
            str(cell["batch"]),
            number(cell["us"]),
            f"{cell['ratio']:.2f}",
            cell["best_peer"],
            number(cell["peers_us"][cell["best_peer"]]),
            f"{cell['gflops']:.1f}" if says_much else "",
            f"{100 * cell['of_peak']:.0f}" if says_much else "",
        ]
        if threads > 1:
            values[2:2] = [str(cell["threads"])]
            values.append(number(cell["otherwise_us"]))
        yield f"| {' | '.join(values)} |"
    yield ""
    yield from summary(cells, memory_gb_s)


def summary(cells: list[Cell], memory_gb_s: float) -> Iterable[str]:
    """What the targets ask for, one line each."""
    small = [cell for cell in cells if cell["weights"] < SMALL_WEIGHTS]
    large = [cell for cell in cells if cell["weights"] >= LARGE_WEIGHTS and cell["batch"] >= 32]
    middle = [
        cell for cell in cells if SMALL_WEIGHTS <= cell["weights"] < LARGE_WEIGHTS and cell["batch"] >= 32
    ]
    yield f"- Geometric mean of the ratios: {mean(cells):.2f}; least: {least(cells)}."
    alone = [cell for cell in small if cell["batch"] == 1]
    if alone:
        yield f"- Models under 100,000 weights: least at batch 1 {least(alone)}; at any batch {least(small)}."
    for cell in alone:
        if cell["weights"] < 20_000:
            yield f"- One row of {cell['model']}: {number(cell['us'])} us."
    if large:
        yield f"- Widths from 1,024, batch from 32: {shares(large)} % of the peak."
    if middle:
        yield f"- Width 256, batch from 32: {shares(middle)} % of the peak."
    for cell in cells:
        # Weights that no cache holds are read once for a row.
        if cell["batch"] == 1 and 4 * cell["weights"] > 64 << 20:
            rate = 4 * cell["weights"] / cell["us"] / 1e3
            yield (
                f"- One row of {cell['model']} reads its weights at {rate:.1f} GB/s, "
                f"{100 * rate / memory_gb_s:.0f} % of the memory's."
            )
    yield ""


def mean(cells: list[Cell]) -> float:
    """The geometric mean of the ratios."""
    return exp(statistics.mean(log(cell["ratio"]) for cell in cells))


def least(cells: list[Cell]) -> str:
    """The least ratio and where it is."""
    cell = min(cells, key=lambda cell: float(cell["ratio"]))
    return f"{cell['ratio']:.2f} ({cell['model']}, batch {cell['batch']})"


def shares(cells: list[Cell]) -> str:
    """The range of shares of the peak, in percent."""
    found = [100 * cell["of_peak"] for cell in cells]
    return f"{min(found):.0f} to {max(found):.0f}"


def number(us: float) -> str:
    """A time in microseconds, to three digits or to the microsecond."""
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 100 else f"{us:,.0f}"


def plot(by_threads: dict[int, list[Cell]], path: Path) -> None:
    """The ratio of every model at every batch, a panel a number of threads."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(by_threads)
    figure, axes = plt.subplots(
        1, count, figsize=(6.2 * count, 5.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, (threads, cells) in zip(axes[0], sorted(by_threads.items()), strict=True):
        for model in dict.fromkeys(cell["model"] for cell in cells):
            found = [cell for cell in cells if cell["model"] == model]
            batches, ratios = [cell["batch"] for cell in found], [cell["ratio"] for cell in found]
            axis.plot(batches, ratios, marker="o", markersize=4, linewidth=1.5, label=model)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        batches = sorted({cell["batch"] for cell in cells})
        axis.set_xticks(batches, [f"{batch:,}" for batch in batches])
        ticks = [0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set_xlabel("rows in a batch")
        axis.set_title("one thread" if threads == 1 else f"{threads} threads")
    axes[0][0].set_ylabel("best peer's time / nncore's")
    axes[0][-1].legend(fontsize="small", frameon=False)
    figure.suptitle(
        "The forward pass beside ONNX Runtime, OpenVINO, PyTorch, NumPy; above 1 nncore is faster"
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
