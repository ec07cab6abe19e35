"""
This machine in, a table of nncore's forward pass beside its peers out.

    make bench             NumPy alone, from the project's own environment
    make bench-kernels     ONNX Runtime (also with bound buffers), OpenVINO, PyTorch and NumPy, from another

Results are compared before anything is timed. Candidates take turns in one process: each sample of one is
followed by a sample of the next, and times are medians. A ratio is a peer's time over nncore's in the same
round, the median of the rounds, so that a machine that changes its speed does not matter; the table gives
the least of them, the best peer's. A loop of nothing but multiply-adds takes its turn, too: GFLOP/s are given
as a share of what it reached in the same round.

One thread: pin it to a core (`taskset -c 0`). With two, peers are told two threads, and those that are fast
at small batches take part with one as well; nncore takes as many as it says that pay, from its own pool.

`--json PIECE` keeps what was measured for `benchmarks/kernel_report.py`, which makes docs/kernels.md of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np

import nncore
from benchmarks.machine import Machine
from benchmarks.peers import PEERS, reference

Run = Callable[[], Any]

MODELS: dict[str, tuple[tuple[int, ...], str, str]] = {
    "2-3-2-2 sigmoid": ((2, 3, 2, 2), "sigmoid", "identity"),
    "64-64-32-10 relu": ((64, 64, 32, 10), "relu", "softmax"),
    "784-50-100-10 sigmoid": ((784, 50, 100, 10), "sigmoid", "softmax"),
    "20-128-128-1 tanh": ((20, 128, 128, 1), "tanh", "identity"),
    "128-256-256-64 swish": ((128, 256, 256, 64), "swish", "identity"),
    "512-1024-1024-256 relu": ((512, 1024, 1024, 256), "relu", "identity"),
    "1024-4096-4096-1000 relu": ((1024, 4096, 4096, 1000), "relu", "identity"),
}
BATCHES = (1, 8, 32, 128, 1024, 8192)
# A sample is as many calls as fit into this.
SAMPLE_S = 0.004
# Peers' threads go on spinning after a call; with several, each candidate waits until they are asleep.
SETTLE_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure nncore's forward pass beside its peers.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--samples", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="PIECE", help="keep what was measured in this file")
    args = parser.parse_args()
    machine = Machine(args.threads)
    cells = []
    head = f"{'model':26} {'batch':>6} {'nncore us':>10} {'GFLOP/s':>8} {'of peak':>7}"
    print(f"{head}  best peer / nncore   peers us", flush=True)
    for (name, spec), batch in itertools.product(MODELS.items(), args.batches):
        # 8,192 rows of the widest model would take a minute a sample round and show what 1,024 show.
        if args.only not in name or (batch == 8192 and "4096" in name):
            continue
        cell = measure(name, spec, batch, machine, args.samples)
        cells.append(cell)
        peers = "  ".join(f"{peer} {us:.1f}" for peer, us in cell["peers_us"].items())
        print(
            f"{name:26} {batch:6} {cell['us']:10.2f} {cell['gflops']:8.1f} {cell['of_peak']:7.1%}"
            f"  {cell['ratio']:6.2f} ({cell['best_peer']})   {peers}",
            flush=True,
        )
    ratios = [cell["ratio"] for cell in cells]
    mean = exp(statistics.mean(map(log, ratios)))
    print(f"geometric mean of the ratios: {mean:.2f}, least: {min(ratios):.2f}")
    if args.json:
        piece = {"threads": args.threads, "memory_gb_s": machine.read_bytes() / 1e9, "cells": cells}
        args.json.write_text(json.dumps(piece, indent=1))


def measure(
    name: str, spec: tuple[tuple[int, ...], str, str], batch: int, machine: Machine, samples: int
) -> dict[str, Any]:
    """Time a model at a batch, candidates in turns; stops if a candidate's result differs."""
    mlp = model(*spec)
    weights = sum(layer.weights.size for layer in mlp.layers if isinstance(layer, nncore.Layer))
    x = np.random.default_rng(1).standard_normal((batch, mlp.n_in)).astype(np.float32)
    times, pays = time_candidates(mlp, x, machine, samples)
    peaks, ours = times.pop("peak"), times.pop("nncore")
    other = times.pop("nncore otherwise", None)
    by_peer = {
        peer: statistics.median(t / o for t, o in zip(found, ours, strict=True))
        for peer, found in times.items()
    }
    best = min(by_peer, key=lambda peer: by_peer[peer])
    us = statistics.median(ours) * 1e6
    flops = 2 * weights * batch
    return {
        "model": name,
        "batch": batch,
        "threads": pays,
        "weights": weights,
        "us": us,
        "otherwise_us": None if other is None else statistics.median(other) * 1e6,
        "gflops": flops / us / 1e3,
        "peak_gflops": statistics.median(peaks) / 1e9,
        # Of the peak of so many threads as nncore takes.
        "of_peak": statistics.median(
            flops / o / (p * pays / machine.threads) for o, p in zip(ours, peaks, strict=True)
        ),
        "ratio": by_peer[best],
        "best_peer": best,
        "peers_us": {peer: statistics.median(found) * 1e6 for peer, found in times.items()},
    }


def time_candidates(
    mlp: nncore.Mlp, x: Any, machine: Machine, samples: int
) -> tuple[dict[str, list[float]], int]:
    """
    Every candidate's seconds a call, round by round, and the number of threads that nncore takes.

    "peak" is not a time but floating-point operations a second; "nncore otherwise" takes the other number of
    threads, so that the choice can be judged.
    """
    threads = machine.threads
    pays = min(threads, mlp.threads_for(len(x)))
    out = np.empty((len(x), mlp.n_out), np.float32)
    candidates: dict[str, Run] = {"nncore": lambda: mlp.forward(x, out, pays)}
    if threads > 1:
        other = threads if pays == 1 else 1
        candidates["nncore otherwise"] = lambda: mlp.forward(x, out, other)
    for name, make in PEERS.items():
        try:
            candidates.update({f"{name}{suffix}": run for suffix, run in make(mlp, x, threads)})
            if threads > 1 and name in ("onnxruntime", "openvino"):
                candidates.update({f"{name}{suffix}, 1 thread": run for suffix, run in make(mlp, x, 1)})
        except ImportError:
            continue
    expected = reference(mlp, x)
    calls = {}
    for name, run in candidates.items():
        got = np.asarray(run())
        if not np.allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()):
            raise SystemExit(f"{name} computes something else: {np.abs(got - expected).max()}")
        run()
        started = time.perf_counter()
        run()
        calls[name] = max(1, int(SAMPLE_S / max(time.perf_counter() - started, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in ("peak", *candidates)}
    for _ in range(samples):
        if threads > 1:
            time.sleep(SETTLE_S)
        times["peak"].append(machine.multiply_adds())
        for name, run in candidates.items():
            if threads > 1:
                time.sleep(SETTLE_S)
            count = range(calls[name])
            run()  # What the one before has left in the caches is not its fault.
            started = time.perf_counter()
            for _ in count:
                run()
            times[name].append((time.perf_counter() - started) / len(count))
    return times, pays


def model(sizes: tuple[int, ...], hidden: str, last: str) -> nncore.Mlp:
    """A model of random weights."""
    rng = np.random.default_rng(0)
    layers = [
        nncore.Layer(
            (rng.standard_normal((n_in, n_out)) / np.sqrt(n_in)).astype(np.float32),
            (rng.standard_normal(n_out) / 10).astype(np.float32),
            last if index == len(sizes) - 2 else hidden,
        )
        for index, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    ]
    return nncore.Mlp(layers)


if __name__ == "__main__":
    main()
