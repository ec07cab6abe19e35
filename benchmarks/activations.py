"""
This machine in, a table of the activations' times beside NumPy's expressions and PyTorch out.

    make bench-activations                                      everything: two minutes
    make bench-activations ARGS="gelu mish"                     some of it
    make bench-activations ARGS="--markdown docs/activations.md"  the table as a document

One thread, float32, a million numbers (4 MB), each result written into an array that is there already.
Results are compared before anything is timed. Candidates take turns in one process, times are medians, and a
ratio is a peer's time over nncore's in the same round, the median of the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nncore

Array = NDArray[Any]
Expression = Callable[[Array, Array], Any]
Run = Callable[[], Any]

SIZE = 1_000_000
# A sample is as many calls as fit into this.
SAMPLE_S = 0.004

SELU_LAMBDA, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772
SQRT_HALF, SQRT_2_OVER_PI = 0.7071067811865476, 0.7978845608028654


def _gelu(x: Array, out: Array) -> Any:
    from scipy.special import erf  # NumPy has none

    return np.multiply(0.5 * x, 1 + erf(x * x.dtype.type(SQRT_HALF)), out=out)


def _elu(x: Array, out: Array) -> Any:
    out[...] = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def _step(x: Array, out: Array) -> Any:
    out[...] = x > 0


def _thresholded_relu(x: Array, out: Array) -> Any:
    out[...] = np.where(x > 1, x, 0)


# What one writes with NumPy alone, the last operation into out.
NUMPY: dict[str, Expression] = {
    "identity": lambda x, out: np.copyto(out, x),
    "step": _step,
    "relu": lambda x, out: np.maximum(x, 0, out=out),
    "leaky_relu": lambda x, out: np.maximum(x, 0.01 * x, out=out),
    "prelu": lambda x, out: np.maximum(x, 0.25 * x, out=out),
    "relu6": lambda x, out: np.clip(x, 0, 6, out=out),
    "sigmoid": lambda x, out: np.divide(1, 1 + np.exp(-x), out=out),
    "tanh": lambda x, out: np.tanh(x, out=out),
    "swish": lambda x, out: np.divide(x, 1 + np.exp(-x), out=out),
    "elu": _elu,
    "selu": lambda x, out: np.multiply(
        SELU_LAMBDA, np.where(x > 0, x, SELU_ALPHA * np.expm1(np.minimum(x, 0))), out=out
    ),
    "celu": _elu,
    "thresholded_relu": _thresholded_relu,
    "gelu": _gelu,
    "gelu_tanh": lambda x, out: np.multiply(
        0.5 * x, 1 + np.tanh(SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)), out=out
    ),
    "softplus": lambda x, out: np.add(np.maximum(x, 0), np.log1p(np.exp(-np.abs(x))), out=out),
    "softsign": lambda x, out: np.divide(x, 1 + np.abs(x), out=out),
    "mish": lambda x, out: np.multiply(x, np.tanh(np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))), out=out),
    "hard_sigmoid": lambda x, out: np.clip(x / 6 + 0.5, 0, 1, out=out),
    "hard_swish": lambda x, out: np.multiply(x, np.clip(x / 6 + 0.5, 0, 1), out=out),
    "hard_tanh": lambda x, out: np.clip(x, -1, 1, out=out),
}


def pytorch() -> dict[str, Expression]:
    """PyTorch's functions, each into a given tensor; empty where it is not installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)
    aten: Any = torch.ops.aten

    def softsign(x: Any, out: Any) -> Any:
        return torch.div(x, x.abs() + 1, out=out)  # as torch.nn.functional has it

    return {
        "identity": lambda x, out: out.copy_(x),
        "step": lambda x, out: torch.gt(x, 0, out=out),
        "relu": lambda x, out: torch.clamp_min(x, 0, out=out),
        "leaky_relu": lambda x, out: aten.leaky_relu.out(x, 0.01, out=out),
        "prelu": lambda x, out: aten.leaky_relu.out(x, 0.25, out=out),
        "relu6": lambda x, out: aten.hardtanh.out(x, 0.0, 6.0, out=out),
        "sigmoid": lambda x, out: torch.sigmoid(x, out=out),
        "tanh": lambda x, out: torch.tanh(x, out=out),
        "swish": lambda x, out: aten.silu.out(x, out=out),
        "elu": lambda x, out: aten.elu.out(x, out=out),
        "selu": lambda x, out: aten.elu.out(x, SELU_ALPHA, SELU_LAMBDA, out=out),
        "celu": lambda x, out: aten.elu.out(x, 1.0, 1.0, 1.0, out=out),
        "thresholded_relu": lambda x, out: aten.threshold.out(x, 1.0, 0.0, out=out),
        "gelu": lambda x, out: aten.gelu.out(x, out=out),
        "gelu_tanh": lambda x, out: aten.gelu.out(x, approximate="tanh", out=out),
        "softplus": lambda x, out: aten.softplus.out(x, out=out),
        "softsign": softsign,
        "mish": lambda x, out: aten.mish.out(x, out=out),
        "hard_sigmoid": lambda x, out: aten.hardsigmoid.out(x, out=out),
        "hard_swish": lambda x, out: aten.hardswish.out(x, out=out),
        "hard_tanh": lambda x, out: aten.hardtanh.out(x, out=out),
    }


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Time the activations beside NumPy and PyTorch.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="activations; default: all")
    parser.add_argument("--samples", type=int, default=31)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - nncore.ACTIVATIONS.keys()
    if unknown:
        parser.error(f"no such activation: {', '.join(sorted(unknown))}")
    torch_functions = pytorch()
    rows = []
    print(f"{'':14}{'us':>8}{'derivative':>12}{'NumPy us':>10}{'ratio':>7}{'PyTorch us':>12}{'ratio':>7}")
    for name in arguments.names or nncore.ACTIVATIONS:
        row = measured(name, torch_functions.get(name), arguments.samples)
        rows.append((name, *row))
        us, slope_us, numpy_us, numpy_ratio, torch_us, torch_ratio = row
        print(
            f"{name:14}{us:8.0f}{slope_us:12.0f}{numpy_us:10.0f}{numpy_ratio:7.2f}{torch_us:12.0f}{torch_ratio:7.2f}",
            flush=True,
        )
    if arguments.markdown:
        arguments.markdown.write_text(document(rows))


def measured(name: str, of_torch: Expression | None, samples: int) -> tuple[float, ...]:
    """us of nncore, its derivative, NumPy, the ratio, PyTorch, the ratio; stops on a wrong result."""
    activation = nncore.ACTIVATIONS[name]
    rng = np.random.default_rng(0)
    x = (3 * rng.standard_normal(SIZE)).astype(np.float32)
    outs: dict[str, Array] = {key: np.empty_like(x) for key in ("nncore", "derivative", "numpy", "torch")}
    runs: dict[str, Run] = {
        "nncore": lambda: activation.function(x, out=outs["nncore"]),
        "derivative": lambda: activation.derivative(x, out=outs["derivative"]),
        "numpy": lambda: NUMPY[name](x, outs["numpy"]),
    }
    if of_torch is not None:
        import torch

        tensors = torch.from_numpy(x), torch.from_numpy(outs["torch"])

        def run() -> None:
            with torch.inference_mode():
                of_torch(*tensors)

        runs["torch"] = run

    exact = np.empty(SIZE)
    NUMPY[name](x.astype(np.float64), exact)
    for key, call in runs.items():
        call()
        # float32's own rounding, and what NumPy's expressions cancel.
        if key != "derivative" and not np.allclose(outs[key], exact, rtol=1e-5, atol=2e-6):
            raise SystemExit(f"{key}'s {name} is off by {np.abs(outs[key] - exact).max()}")
    times = in_turns(runs, samples)
    us = {key: statistics.median(found) * 1e6 for key, found in times.items()}

    def ratio(key: str) -> float:
        found = times.get(key)
        if found is None:
            return float("nan")
        return statistics.median(t / ours for t, ours in zip(found, times["nncore"], strict=True))

    nan = float("nan")
    return us["nncore"], us["derivative"], us["numpy"], ratio("numpy"), us.get("torch", nan), ratio("torch")


def in_turns(runs: dict[str, Run], samples: int) -> dict[str, list[float]]:
    """Every candidate's seconds a call, round by round."""
    calls = {}
    for key, run in runs.items():
        started = time.perf_counter()
        run()
        calls[key] = max(1, int(SAMPLE_S / (time.perf_counter() - started)))
    times: dict[str, list[float]] = {key: [] for key in runs}
    for _, (key, run) in itertools.product(range(samples), runs.items()):
        run()  # What the one before has left in the caches is not its fault.
        started = time.perf_counter()
        for _ in range(calls[key]):
            run()
        times[key].append((time.perf_counter() - started) / calls[key])
    return times


def document(rows: list[tuple[Any, ...]]) -> str:
    """The table as Markdown."""
    versions = [f"Python {platform.python_version()}", f"NumPy {np.__version__}"]
    if "torch" in sys.modules:
        versions.append(f"PyTorch {sys.modules['torch'].__version__}")
    lines = [
        "# The activations' speed",
        "",
        f"Written by `make bench-activations`: float32, {SIZE:,} numbers into a given array, one thread;",
        f"{', '.join(versions)}, {cpu()}.",
        "Medians in microseconds; a ratio is the peer's time over nncore's, above 1 where nncore is faster.",
        "NumPy: the expression one writes with it, gelu with SciPy's `erf`.",
        "",
        "| | nncore | its derivative | NumPy | ratio | PyTorch | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, us, slope_us, numpy_us, numpy_ratio, torch_us, torch_ratio in rows:
        lines.append(
            f"| {name} | {us:,.0f} | {slope_us:,.0f} | {numpy_us:,.0f} | {numpy_ratio:.2f} "
            f"| {torch_us:,.0f} | {torch_ratio:.2f} |"
        )
    return "\n".join(lines) + "\n"


def cpu() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
