"""
A model in, ways to run it on a batch out: NumPy, PyTorch, ONNX Runtime, OpenVINO, each at its best settings.

Every function yields (suffix, run), where run() evaluates the batch and returns the outputs; it raises
ImportError if the peer is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

import nncore

__all__ = ["PEERS", "reference"]

Array = NDArray[np.float32]
Run = Callable[[], Any]

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


PEERS: dict[str, Callable[[nncore.Mlp, Array, int], Iterator[tuple[str, Run]]]] = {
    "numpy": of_numpy,
    "torch": of_torch,
    "onnxruntime": of_onnx,
    "openvino": of_openvino,
}
