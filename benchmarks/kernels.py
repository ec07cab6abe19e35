"""
This machine in, a table of nncore's forward pass beside its peers out.

    make bench             NumPy alone, from the project's own environment
    make bench-kernels     ONNX Runtime (also with bound buffers), OpenVINO, PyTorch and NumPy, from another

Results are compared before anything is timed. Candidates take turns in one process: each sample of one is
followed by a sample of the next, and times are medians. A ratio is a peer's time over nncore's in the same
round, the median of the rounds, so that a machine that changes its speed does not matter; the table gives
the least of them, the best peer's. Run it pinned to a core (`taskset -c 0`) for one thread.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from math import exp, log
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nncore

Array = NDArray[np.float32]
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure nncore's forward pass beside its peers.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--samples", type=int, default=15)
    args = parser.parse_args()
    ratios = []
    print(f"{'model':26} {'batch':>6} {'nncore us':>10}  best peer / nncore   peers us", flush=True)
    for (name, spec), batch in itertools.product(MODELS.items(), args.batches):
        if args.only not in name or (batch == 8192 and "4096" in name):
            continue
        times = measure(spec, batch, args.threads, args.samples)
        ours = times.pop("nncore")
        by_peer = {
            peer: statistics.median(t / o for t, o in zip(found, ours, strict=True))
            for peer, found in times.items()
        }
        best = min(by_peer, key=lambda peer: by_peer[peer])
        ratios.append(by_peer[best])
        us = statistics.median(ours) * 1e6
        peers = "  ".join(f"{peer} {statistics.median(found) * 1e6:.1f}" for peer, found in times.items())
        print(f"{name:26} {batch:6} {us:10.2f}  {ratios[-1]:6.2f} ({best})   {peers}", flush=True)
    mean = exp(statistics.mean(map(log, ratios)))
    print(f"geometric mean of the ratios: {mean:.2f}, least: {min(ratios):.2f}")


def measure(
    spec: tuple[tuple[int, ...], str, str], batch: int, threads: int, samples: int
) -> dict[str, list[float]]:
    """Return every candidate's seconds a call, round by round; stops if a candidate's result differs."""
    mlp = model(*spec)
    x = np.random.default_rng(1).standard_normal((batch, mlp.n_in)).astype(np.float32)
    out = np.empty((batch, mlp.n_out), np.float32)
    pays = min(threads, mlp.threads_for(batch))
    candidates: dict[str, Run] = {"nncore": lambda: mlp.forward(x, out, pays)}
    expected = reference(mlp, x)
    for name, make in (
        ("numpy", of_numpy),
        ("torch", of_torch),
        ("onnxruntime", of_onnx),
        ("openvino", of_openvino),
    ):
        try:
            candidates.update({f"{name}{suffix}": run for suffix, run in make(mlp, x, threads)})
        except ImportError:
            continue
    calls = {}
    for name, run in candidates.items():
        got = np.asarray(run())
        if not np.allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()):
            raise SystemExit(f"{name} computes something else: {np.abs(got - expected).max()}")
        run()
        started = time.perf_counter()
        run()
        calls[name] = max(1, int(SAMPLE_S / max(time.perf_counter() - started, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _, (name, run) in itertools.product(range(samples), candidates.items()):
        count = range(calls[name])
        run()  # What the one before has left in the caches is not its fault.
        started = time.perf_counter()
        for _ in count:
            run()
        times[name].append((time.perf_counter() - started) / len(count))
    return times


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


_NUMPY: dict[str, Callable[[Any], Any]] = {
    "identity": lambda z: z,
    "relu": lambda z: np.maximum(z, 0),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "tanh": np.tanh,
    "swish": lambda z: z / (1 + np.exp(-z)),
    "softmax": lambda z: (e := np.exp(z - z.max(1, keepdims=True))) / e.sum(1, keepdims=True),
}


def reference(mlp: nncore.Mlp, x: Array) -> NDArray[np.float64]:
    """The outputs in float64."""
    h: Any = x.astype(np.float64)
    for layer in mlp.layers:
        h = _NUMPY[layer.activation](h @ layer.weights.astype(np.float64) + layer.bias)
    result: NDArray[np.float64] = h
    return result


def of_numpy(mlp: nncore.Mlp, x: Array, threads: int) -> Iterator[tuple[str, Run]]:
    """NumPy with its BLAS; as many threads as that was told."""

    def run() -> Any:
        h: Any = x
        for layer in mlp.layers:
            h = _NUMPY[layer.activation](h @ layer.weights + layer.bias)
        return h

    yield "", run


def of_torch(mlp: nncore.Mlp, x: Array, threads: int) -> Iterator[tuple[str, Run]]:
    """PyTorch in inference mode."""
    import torch

    torch.set_num_threads(threads)
    kinds = {
        "relu": torch.nn.ReLU(),
        "sigmoid": torch.nn.Sigmoid(),
        "tanh": torch.nn.Tanh(),
        "swish": torch.nn.SiLU(),
        "softmax": torch.nn.Softmax(-1),
    }
    parts: list[Any] = []
    for layer in mlp.layers:
        linear = torch.nn.Linear(layer.n_in, layer.n_out)
        linear.weight.data = torch.from_numpy(layer.weights.T.copy())
        linear.bias.data = torch.from_numpy(layer.bias.copy())
        parts += [linear] + ([kinds[layer.activation]] if layer.activation in kinds else [])
    network, tensor = torch.nn.Sequential(*parts).eval(), torch.from_numpy(x)

    def run() -> Any:
        with torch.inference_mode():
            return network(tensor)

    yield "", run


def onnx_bytes(mlp: nncore.Mlp) -> bytes:
    """The model as ONNX: Gemm and activations."""
    from onnx import TensorProto, helper, numpy_helper

    names = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "softmax": "Softmax"}
    nodes, tensors, at = [], [], "x"
    for i, layer in enumerate(mlp.layers):
        tensors += [
            numpy_helper.from_array(layer.weights, f"w{i}"),
            numpy_helper.from_array(layer.bias, f"b{i}"),
        ]
        nodes.append(helper.make_node("Gemm", [at, f"w{i}", f"b{i}"], [f"z{i}"]))
        at = f"z{i}"
        if layer.activation in names:
            nodes.append(helper.make_node(names[layer.activation], [at], [f"y{i}"]))
            at = f"y{i}"
        elif layer.activation == "swish":
            nodes.append(helper.make_node("Sigmoid", [at], [f"s{i}"]))
            nodes.append(helper.make_node("Mul", [at, f"s{i}"], [f"y{i}"]))
            at = f"y{i}"
    nodes.append(helper.make_node("Identity", [at], ["y"]))
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", mlp.n_in])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", mlp.n_out])],
        tensors,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    serialized: bytes = made.SerializeToString()
    return serialized


def of_onnx(mlp: nncore.Mlp, x: Array, threads: int) -> Iterator[tuple[str, Run]]:
    """ONNX Runtime, called plainly and with input and output bound once."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx_bytes(mlp), options, providers=["CPUExecutionProvider"])
    yield "", lambda: session.run(None, {"x": x})[0]
    out = np.empty((len(x), mlp.n_out), np.float32)
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y", "cpu", 0, np.float32, out.shape, out.ctypes.data)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return out

    yield " bound", run


def of_openvino(mlp: nncore.Mlp, x: Array, threads: int) -> Iterator[tuple[str, Run]]:
    """OpenVINO's CPU plugin, tuned for latency, for just this batch."""
    import openvino

    core = openvino.Core()
    read = core.read_model(onnx_bytes(mlp))
    read.reshape([len(x), mlp.n_in])
    compiled = core.compile_model(
        read,
        "CPU",
        {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"},
    )
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))

    def run() -> Any:
        request.infer()
        return request.get_output_tensor(0).data

    yield "", run


if __name__ == "__main__":
    main()
