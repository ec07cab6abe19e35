"""
This machine in, a table of nncore's derivatives beside its own forward pass and torch.func out.

    make bench-gradients

VJP: nncore's time over that of its forward pass for the same rows. Jacobian: the time of torch.func, the
faster of jacrev and jacfwd under vmap, over nncore's. Results are compared before anything is timed;
candidates take turns, a ratio is the median over the rounds. One thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import nncore
from benchmarks.kernels import MODELS, model

BATCHES = (1, 32, 256)
# Results of more numbers are left out: 256 MB of float32.
MOST_NUMBERS = 1 << 26
SAMPLE_S = 0.004


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure nncore's derivatives.")
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument(
        "--most-numbers", type=int, default=MOST_NUMBERS, help="of a Jacobian that is measured"
    )
    parser.add_argument("--samples", type=int, default=7)
    args = parser.parse_args()
    print(f"{'model':26} {'batch':>6} {'forward us':>11} {'vjp us':>10} {'/ forward':>9}", end="")
    print(f" {'jacobian us':>12} {'torch / ours':>12}", flush=True)
    for name, spec in MODELS.items():
        for batch in args.batches if args.only in name else ():
            measure(name, model(*spec), batch, args)


def measure(name: str, mlp: nncore.Mlp, batch: int, args: argparse.Namespace) -> None:
    """Print a line of the table."""
    rng = np.random.default_rng(batch)
    x: Any = rng.standard_normal((batch, mlp.n_in)).astype(np.float32)
    v: Any = rng.standard_normal((batch, mlp.n_out)).astype(np.float32)
    out: Any = np.empty((batch, mlp.n_out), np.float32)
    runs: dict[str, Callable[[], Any]] = {
        "forward": lambda: mlp.forward(x, out),
        "vjp": lambda: mlp.vjp(x, v),
    }
    if batch * mlp.n_out * mlp.n_in <= args.most_numbers:
        runs["jacobian"] = lambda: mlp.jacobian(x)
        runs.update(of_torch(mlp, x))
    expected: Any = runs["jacobian"]() if "jacobian" in runs else None
    for peer in ("jacrev", "jacfwd"):
        if peer in runs and not np.allclose(runs[peer](), expected, atol=1e-4 * np.abs(expected).max()):
            raise SystemExit(f"{peer} computes something else")
    times = timed(runs, args.samples)

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))

    def us(run: str) -> float:
        return statistics.median(times[run]) * 1e6

    line = f"{name:26} {batch:6} {us('forward'):11.2f} {us('vjp'):10.2f} {ratio('vjp', 'forward'):9.2f}"
    if "jacobian" in runs:
        line += f" {us('jacobian'):12.2f}"
    if "jacrev" in runs:
        line += f" {min(ratio(peer, 'jacobian') for peer in ('jacrev', 'jacfwd')):12.2f}"
    print(line, flush=True)


def timed(runs: dict[str, Callable[[], Any]], samples: int) -> dict[str, list[float]]:
    """Every candidate's seconds a call, round by round."""
    calls = {}
    for name, run in runs.items():
        run()
        started = time.perf_counter()
        run()
        calls[name] = range(max(1, int(SAMPLE_S / (time.perf_counter() - started))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, run in runs.items():
            started = time.perf_counter()
            for _ in calls[name]:
                run()
            times[name].append((time.perf_counter() - started) / len(calls[name]))
    return times


def of_torch(mlp: nncore.Mlp, x: Any) -> dict[str, Callable[[], Any]]:
    """torch.func's Jacobians, if PyTorch is there."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)
    functions = {
        "identity": lambda z: z,
        "relu": torch.relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "swish": torch.nn.functional.silu,
        "softmax": lambda z: torch.softmax(z, -1),
    }
    layers: Any = mlp.layers
    weights = [
        (torch.from_numpy(layer.weights.T.copy()), torch.from_numpy(layer.bias.copy())) for layer in layers
    ]

    def network(row: Any) -> Any:
        for layer, (w, b) in zip(layers, weights, strict=True):
            row = functions[layer.activation](torch.nn.functional.linear(row, w, b))
        return row

    tensor = torch.from_numpy(x)
    reverse, ahead = (torch.func.vmap(kind(network)) for kind in (torch.func.jacrev, torch.func.jacfwd))
    return {"jacrev": lambda: reverse(tensor).numpy(), "jacfwd": lambda: ahead(tensor).numpy()}


if __name__ == "__main__":
    main()
