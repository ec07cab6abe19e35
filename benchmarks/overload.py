"""
This machine in, curves of goodput and latency under too much load out: both transports, open loop.

    make bench-overload           builds the generators (Debian: libgrpc++-dev) and runs this
    ... ARGS="--json F --plot P"  keeps the figures, draws them

The server has the first core, the generator the second. Requests of 16 rows for a model of
64-2048-2048-64 come over 8 connections at the times of a Poisson process, at multiples of the rate
that a closed loop reaches. Every answer is compared with nncore's own. Latency counts from when a
request was due. Then a small model is asked beside the large one, alone and while that is saturated.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import nncore
from benchmarks.serving import LOAD_CORE, SERVER_CORE, check_answer
from benchmarks.with_server import Server, running_server
from nncore import Layer, Mlp
from nnproto.v1 import inference_pb2 as pb

HERE = Path(__file__).parent
LARGE, SMALL = (64, 2048, 2048, 64), (64, 64, 32, 10)
LARGE_ROWS, SMALL_ROWS = 16, 1
CONNECTIONS = 8
UNLOADED = 0.1
LOADS = (0.5, 1.0, 2.0, 4.0)
WARM_UP_S, MEASURE_S = 1.0, 3.0
# A turn of the engine, the longest that a batch is meant to take: see TURN_S in engine.py.
BATCH_MS = 20.0
SMALL_RATE = 300

# What a server is started with, and the deadline that requests have, in milliseconds; 0: none.
CASES = {
    "bounded": (("--max-queue-ms", "15"), 0),
    "deadlines": ((), 50),
}

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure goodput and latency under too much load.")
    parser.add_argument("--transports", default="h2,grpcio")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--no-models", action="store_true", help="without the two models side by side")
    parser.add_argument("--peers", type=Path, default=HERE / "cpp" / "build", help="folder of the generators")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--plot", type=Path, help="draw the figures (needs matplotlib)")
    args = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("two cores are needed: one for the server, one for the generator")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = make_model(folder, "large", LARGE, LARGE_ROWS)
        small = make_model(folder, "small", SMALL, SMALL_ROWS)
        for transport in args.transports.split(","):
            results[transport] = {}
            with running([str(folder / "models"), "--transport", transport, "--max-queue-ms", "0"]) as server:
                capacity = Generator(args.peers, server, large).closed()["rate"]
            for case in args.cases.split(","):
                flags, deadline_ms = CASES[case]
                with running([str(folder / "models"), "--transport", transport, *flags]) as server:
                    results[transport][case] = curve(
                        Generator(args.peers, server, large), capacity, deadline_ms
                    )
                _print_curve(f"{transport}, {case}", results[transport][case])
            if not args.no_models:
                flags, _ = CASES["bounded"]
                with running([str(folder / "models"), "--transport", transport, *flags]) as server:
                    results[transport]["side_by_side"] = found = side_by_side(
                        Generator(args.peers, server, large), Generator(args.peers, server, small), capacity
                    )
                _print_pair(transport, found)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


def running(arguments: list[str]) -> contextlib.AbstractContextManager[Server]:
    """Run nnserver with *arguments* on its core; stop it."""
    return running_server(arguments, {SERVER_CORE})


def make_model(folder: Path, name: str, sizes: tuple[int, ...], rows: int) -> Path:
    """Write a model of random weights, a request for it and its answer; return their common path."""
    random = np.random.default_rng(0)
    layers = [
        Layer(
            (random.standard_normal((n_in, n_out)) / np.sqrt(n_in)).astype(np.float32),
            np.zeros(n_out, np.float32),
            activation="relu" if n_out != sizes[-1] else "identity",
        )
        for n_in, n_out in itertools.pairwise(sizes)
    ]
    mlp = Mlp(layers)
    (folder / "models").mkdir(exist_ok=True)
    mlp.save(folder / "models" / f"{name}.safetensors")
    mlp = nncore.load(folder / "models" / f"{name}.safetensors")
    x = random.random((rows, mlp.n_in), dtype=np.float32)
    y = mlp.forward(x)
    inputs, outputs = (
        pb.Tensor(shape=array.shape, dtype=pb.DATA_TYPE_FLOAT32, data=array.tobytes()) for array in (x, y)
    )
    path = folder / name
    path.with_suffix(".request").write_bytes(pb.PredictRequest(model=name, inputs=inputs).SerializeToString())
    path.with_suffix(".answer").write_bytes(
        pb.PredictResponse(model=name, version="1", outputs=outputs).SerializeToString()
    )
    return path


class Generator:
    """Loads *server* with the requests of one model, from its core."""

    def __init__(self, peers: Path, server: Server, model: Path) -> None:
        self.server = server
        self._peers = peers
        self._files = [str(model.with_suffix(".request")), str(model.with_suffix(".answer"))]
        request, answer = (Path(file).read_bytes() for file in self._files)
        check_answer(server.address, request, answer)

    def closed(self, seconds: float = MEASURE_S) -> Figures:
        """Return the figures of a closed loop that saturates the server."""
        return self._run("load", "unary", str(CONNECTIONS), "8", f"{seconds:g}", *self._files)

    def open(self, rate: float, deadline_ms: int = 0, connections: int = CONNECTIONS) -> Figures:
        """Return the figures of an open loop at *rate* requests a second."""
        return self.finish(self.start_open(rate, deadline_ms, connections))

    def start_open(self, rate: float, deadline_ms: int, connections: int) -> subprocess.Popen[str]:
        """Begin an open loop; `finish` returns its figures."""
        times = [f"{rate:.1f}", f"{WARM_UP_S:g}", f"{MEASURE_S:g}", str(deadline_ms)]
        return self._start("open_load", str(connections), *times, *self._files)

    def _run(self, program: str, *arguments: str) -> Figures:
        return self.finish(self._start(program, *arguments))

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        command = ["taskset", "-c", str(LOAD_CORE), str(self._peers / program), self.server.address]
        return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True)

    def finish(self, process: subprocess.Popen[str]) -> Figures:
        """Wait for a loop that was started; return its figures."""
        printed, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"a generator failed (exit status {process.returncode})")
        figures: Figures = json.loads(printed)
        return figures


def curve(generator: Generator, capacity: float, deadline_ms: int) -> dict[str, Any]:
    """Return the figures without load, and those at each multiple of the capacity."""
    unloaded = generator.open(UNLOADED * capacity, deadline_ms)
    loads = []
    for load in LOADS:
        before = generator.server.memory_mib()
        figures = generator.open(load * capacity, deadline_ms)
        loads.append({"load": load, **figures, "memory_mib": [before, generator.server.memory_mib()]})
    return {"capacity": capacity, "unloaded": unloaded, "loads": loads}


def side_by_side(large: Generator, small: Generator, capacity: float) -> dict[str, Figures]:
    """Return the figures of the small model, alone and while the large one is saturated."""
    alone = small.open(SMALL_RATE, connections=1)
    background = large.start_open(1.2 * capacity, 0, CONNECTIONS)
    time.sleep(0.2)  # So that the generators' windows lie over each other.
    beside = small.open(SMALL_RATE, connections=1)
    return {"alone": alone, "beside": beside, "large": large.finish(background)}


def _print_curve(name: str, found: dict[str, Any]) -> None:
    capacity, unloaded = found["capacity"], found["unloaded"]
    allowed = 5 * unloaded["p99_ms"] + BATCH_MS
    print(f"{name}: capacity {capacity:,.0f} requests/s; unloaded p99 {unloaded['p99_ms']:.1f} ms")
    print("  load   offered/s   goodput   of capacity  refused    p50 ms    p99 ms  allowed   refusals' p99")
    for figures in found["loads"]:
        offered = figures["offered"] / MEASURE_S
        print(
            f"  {figures['load']:3.1f}x {offered:10,.0f} {figures['goodput']:9,.0f} "
            f"{figures['goodput'] / capacity:11.0%} {figures['refused'] / figures['offered']:9.0%} "
            f"{figures['p50_ms']:9.1f} {figures['p99_ms']:9.1f} {allowed:8.1f} "
            f"{figures['refusal_p99_ms']:12.1f}   expired {figures['expired']:,} "
            f"failed {figures['failed']:,} "
            f"sent late by {figures['lag_p99_ms']:.1f} ms, "
            f"memory {figures['memory_mib'][0]:.0f} -> {figures['memory_mib'][1]:.0f} MiB"
        )
    print(flush=True)


def _print_pair(transport: str, found: dict[str, Figures]) -> None:
    alone, beside = found["alone"], found["beside"]
    print(f"{transport}, a small model alone, and beside a saturated large one:", end=" ")
    for name in ("p50_ms", "p99_ms"):
        print(f"{name} {alone[name]:.2f} -> {beside[name]:.2f}", end="  ")
    print("\n", flush=True)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw goodput and p99 over the load, a line a transport and case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = {"bounded": "-", "deadlines": "--"}
    names = {"bounded": "--max-queue-ms 15", "deadlines": "50 ms deadlines"}
    for color, (transport, cases) in zip(("tab:blue", "tab:orange"), results.items(), strict=False):
        for case in CASES:
            if case not in cases:
                continue
            found = cases[case]
            loads = [figures["load"] for figures in found["loads"]]
            goodput = [figures["goodput"] / found["capacity"] for figures in found["loads"]]
            style = {"color": color, "linestyle": styles[case], "marker": "o"}
            left.plot(loads, goodput, label=f"{transport}, {names[case]}", **style)
            right.plot(loads, [figures["p99_ms"] for figures in found["loads"]], **style)
            if case == "bounded":
                allowed = 5 * found["unloaded"]["p99_ms"] + BATCH_MS
                right.axhline(allowed, color=color, linestyle=":", linewidth=1)
    left.plot([0, 1, 4], [0, 1, 1], color="grey", linewidth=1, zorder=0, label="all that is possible")
    left.set(xlabel="requests offered, in capacities", ylabel="answers, in capacities", ylim=(0, 1.15))
    right.set(xlabel="requests offered, in capacities", ylabel="p99 of what was answered, ms")
    right.set_ylim(bottom=0)
    right.set_title("dotted: five times the unloaded p99, and a batch", fontsize=9)
    left.set_title("64-2048-2048-64, 16 rows a request, one core", fontsize=9)
    left.legend(fontsize=8, loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
