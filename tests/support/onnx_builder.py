"""Random seeds -> ONNX graphs that are multi-layer perceptrons, spelled in many ways; and runs of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

OPSET = 21


class Graph:
    """
    A graph being built. Every method that computes something returns the name of the tensor.

    n: numbers a row of the tensor that was computed last by `walk`.
    """

    def __init__(self, seed: int = 0, dtype: Any = np.float32) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = np.dtype(dtype)
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._count = 0

    def const(self, values: Any, dtype: Any = None) -> str:
        name = self._name("c")
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype or self.dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(list(values), np.int64)

    def node(self, operator: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        names = [self._name("t") for _ in range(outputs)]
        attributes = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(
            helper.make_node(operator, inputs, names, f"n{len(self.nodes)}", domain=domain, **attributes)
        )
        return names[0] if outputs == 1 else names

    def model(
        self,
        outputs: Any,
        shape: Any,
        opset: int = OPSET,
        output_type: int | None = None,
        rank: int | None = None,
    ) -> Any:
        """The ModelProto; shape: of the input "x"."""
        element = TensorProto.DOUBLE if self.dtype == np.float64 else TensorProto.FLOAT
        names = [outputs] if isinstance(outputs, str) else outputs
        x = helper.make_tensor_value_info("x", element, shape)
        answers = [
            helper.make_tensor_value_info(name, output_type or element, [None] * (rank or 2))
            for name in names
        ]
        graph = helper.make_graph(self.nodes, "g", [x], answers, self.initializers)
        imports = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)

    def _name(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    # Random parts: each takes a tensor of n numbers a row and returns one of as many, but for `dense`.

    def vector(self, n: int, low: float = 0.5, high: float = 1.5) -> str:
        return self.const(self.rng.uniform(low, high, n))

    def dense(self, x: str, n: int, n_out: int) -> str:
        w = self.rng.standard_normal((n, n_out)) / math.sqrt(n)
        b = self.rng.standard_normal(n_out)
        kind = self.rng.integers(7)
        if kind == 0:
            return self.node("Gemm", x, self.const(w), self.const(b))
        if kind == 1:
            return self.node("Gemm", x, self.const(w.T), self.const(b[None]), transB=1, alpha=0.5, beta=2.0)
        if kind == 2:
            return self.node("Add", self.node("MatMul", x, self.const(w)), self.const(b))
        if kind == 3:
            return self.node("Add", self.const(b[None]), self.node("MatMul", x, self.const(w)))
        if kind == 4:
            return self.node("MatMul", x, self.const(w))
        if kind == 5:
            turned = self.node("Transpose", x, perm=[1, 0])
            y = self.node("Gemm", turned, self.const(w), self.const(b), transA=1)
            return y
        turned = self.node("Transpose", x, perm=[1, 0])
        y = self.node("MatMul", self.const(w.T), turned)
        return self.node("Transpose", self.node("Add", y, self.const(b[:, None])))

    def affine(self, x: str, n: int) -> str:
        kind = self.rng.integers(8)
        if kind == 0:
            return self.node("Mul", x, self.vector(n))
        if kind == 1:
            return self.node("Div", self.node("Sub", x, self.vector(n)), self.vector(n))
        if kind == 2:
            return self.node("Sub", self.vector(n), x)
        if kind == 3:
            return self.node("Add", self.const(0.25), x)
        if kind == 4:
            statistics = [self.vector(n) for _ in range(4)]
            return self.node("BatchNormalization", x, *statistics, epsilon=1e-3)
        if kind == 5:
            return self.node("Neg", x)
        if kind == 6:
            doubled = self.node("Mul", self.const(0.5), self.vector(n))  # constants to fold
            return self.node("Mul", doubled, x)
        values = {"offset": self.rng.standard_normal(n), "scale": self.rng.uniform(0.5, 2, n)}
        if self.dtype == np.float64:
            return self.node("Neg", x)
        floats = {key: value.astype(np.float32).tolist() for key, value in values.items()}
        return self.node("Scaler", x, domain="ai.onnx.ml", **floats)

    def noise(self, x: str, n: int) -> str:
        """Something that changes nothing."""
        kind = self.rng.integers(7)
        if kind == 0:
            return self.node("Identity", x)
        if kind == 1:
            return self.node("Dropout", x)
        if kind == 2:
            element = TensorProto.DOUBLE if self.dtype == np.float64 else TensorProto.FLOAT
            return self.node("Cast", x, to=element)
        if kind == 3:
            return self.node("Reshape", x, self.ints(-1, n))
        if kind == 4:
            return self.node("Squeeze", self.node("Unsqueeze", x, self.ints(1)), self.ints(1))
        if kind == 5:
            rows = self.node("Gather", self.node("Shape", x), self.const(0, np.int64))
            size = self.node("Concat", self.node("Unsqueeze", rows, self.ints(0)), self.ints(-1), axis=0)
            return self.node("Reshape", x, size)
        return self.node("Flatten", x)

    def activation(self, x: str, n: int) -> str:
        names = [
            *("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Mish", "HardSwish", "Abs"),
            *(method for method in dir(self) if method.startswith("act_")),
        ]
        name = names[self.rng.integers(len(names))]
        return getattr(self, name)(x, n) if name.startswith("act_") else self.node(name, x)

    def act_leaky(self, x: str, n: int) -> str:
        return self.node("LeakyRelu", x, alpha=0.2)

    def act_thresholded(self, x: str, n: int) -> str:
        return self.node("ThresholdedRelu", x, alpha=0.3)

    def act_elu(self, x: str, n: int) -> str:
        return self.node("Elu", x, alpha=1.3)

    def act_celu(self, x: str, n: int) -> str:
        return self.node("Celu", x, alpha=0.7) if self.dtype == np.float32 else self.node("Elu", x)

    def act_selu(self, x: str, n: int) -> str:
        return self.node("Selu", x) if self.rng.integers(2) else self.node("Selu", x, alpha=1.5, gamma=1.1)

    def act_hard_sigmoid(self, x: str, n: int) -> str:
        return self.node("HardSigmoid", x, alpha=1 / 6 if self.rng.integers(2) else 0.3)

    def act_gelu(self, x: str, n: int) -> str:
        return self.node("Gelu", x, approximate="tanh" if self.rng.integers(2) else None)

    def act_prelu(self, x: str, n: int) -> str:
        return self.node("PRelu", x, self.vector(n if self.rng.integers(2) else 1, -0.5, 1.5))

    def act_clip(self, x: str, n: int) -> str:
        bounds = [(-1.0, 1.0), (0.0, 6.0), (-0.3, 0.8), (0.0, None), (None, 0.5), (0.1, None)]
        low, high = bounds[self.rng.integers(len(bounds))]
        arguments = ["" if bound is None else self.const(bound) for bound in (low, high)]
        return self.node("Clip", x, *arguments)

    def act_swish(self, x: str, n: int) -> str:
        beta = 1.702 if self.rng.integers(2) else 1.0
        inner = x if beta == 1.0 else self.node("Mul", x, self.const(beta))
        return self.node("Mul", x, self.node("Sigmoid", inner))

    def act_swish_exp(self, x: str, n: int) -> str:
        e = self.node("Exp", self.node("Neg", x))
        return self.node("Div", x, self.node("Add", e, self.const(1.0)))

    def act_sigmoid_exp(self, x: str, n: int) -> str:
        e = self.node("Exp", self.node("Mul", x, self.const(-1.0)))
        return self.node("Reciprocal", self.node("Add", self.const(1.0), e))

    def act_gelu_erf(self, x: str, n: int) -> str:
        e = self.node("Erf", self.node("Div", x, self.const(math.sqrt(2))))
        gate = self.node("Add", e, self.const(1.0))
        if self.rng.integers(2):
            return self.node("Mul", self.node("Mul", x, self.const(0.5)), gate)
        return self.node("Mul", self.node("Mul", x, gate), self.const(0.5))

    def act_gelu_tanh(self, x: str, n: int) -> str:
        cubed = (
            self.node("Pow", x, self.const(3.0))
            if self.rng.integers(2)
            else self.node("Mul", self.node("Mul", x, x), x)
        )
        inner = self.node("Add", x, self.node("Mul", cubed, self.const(0.044715)))
        gate = self.node("Tanh", self.node("Mul", inner, self.const(math.sqrt(2 / math.pi))))
        half = self.node("Mul", self.const(0.5), x)
        return self.node("Mul", half, self.node("Add", gate, self.const(1.0)))

    def act_mish(self, x: str, n: int) -> str:
        return self.node("Mul", x, self.node("Tanh", self.node("Softplus", x)))

    def act_hard_swish(self, x: str, n: int) -> str:
        if self.rng.integers(2):
            return self.node("Mul", x, self.node("HardSigmoid", x, alpha=1 / 6, beta=0.5))
        clipped = self.node("Clip", self.node("Add", x, self.const(3.0)), self.const(0.0), self.const(6.0))
        return self.node("Div", self.node("Mul", x, clipped), self.const(6.0))

    def act_softplus_log(self, x: str, n: int) -> str:
        return self.node("Log", self.node("Add", self.node("Exp", x), self.const(1.0)))

    def act_softsign_abs(self, x: str, n: int) -> str:
        return self.node("Div", x, self.node("Add", self.node("Abs", x), self.const(1.0)))

    def act_max(self, x: str, n: int) -> str:
        return self.node("Max", x, self.const(0.0))

    def act_layer_norm(self, x: str, n: int) -> str:
        if n == 1:
            return x
        return self.node("LayerNormalization", x, self.vector(n), self.vector(n), epsilon=1e-4)

    def act_layer_norm_in_parts(self, x: str, n: int) -> str:
        if n == 1:
            return x
        centered = self.node("Sub", x, self.node("ReduceMean", x, self.ints(-1)))
        if self.rng.integers(2):
            square = self.node("Pow", centered, self.const(2.0))
        else:
            square = self.node("Mul", centered, centered)
        variance = self.node("Add", self.node("ReduceMean", square, self.ints(-1)), self.const(1e-3))
        y = self.node("Div", centered, self.node("Sqrt", variance))
        return self.node("Add", self.node("Mul", y, self.vector(n)), self.vector(n))

    def act_layer_norm_of_tensorflow(self, x: str, n: int) -> str:
        if n == 1:
            return x
        mean = self.node("ReduceMean", x, self.ints(-1))
        square = self.node("Pow", self.node("Sub", x, mean), self.const(2.0))
        variance = self.node("Add", self.node("ReduceMean", square, self.ints(-1)), self.const(1e-3))
        factor = self.node("Mul", self.node("Reciprocal", self.node("Sqrt", variance)), self.vector(n))
        shift = self.node("Sub", self.vector(n), self.node("Mul", mean, factor))
        return self.node("Add", self.node("Mul", x, factor), shift)

    def walk(self, x: str, n: int) -> str:
        """A random perceptron over *x*."""
        for _ in range(self.rng.integers(1, 4)):
            if self.rng.integers(3) == 0:
                x = self.affine(x, n)
            n_out = int(self.rng.integers(1, 12))
            x, n = self.dense(x, n, n_out), n_out
            for part in (self.affine, self.noise, self.activation, self.noise, self.affine):
                if self.rng.integers(5) < (4 if part == self.activation else 1):
                    x = part(x, n)
        last = self.rng.integers(4)
        if last == 0:
            x = self.node("Softmax", x, axis=-1)
        elif last == 1:
            x = self.node("LogSoftmax", x, axis=1)
        return x


def random_model(seed: int, dtype: Any = np.float32) -> tuple[Any, int]:
    """A random graph and the number of its inputs."""
    graph = Graph(seed, dtype)
    n = int(graph.rng.integers(1, 12))
    return graph.model(graph.walk("x", n), [None, n]), n


def run(model: Any, x: Any, output: int = 0) -> Any:
    """What onnxruntime answers, optimizations off so that nothing is fused."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[output]


def save(model: Any, path: Any) -> Any:
    """*path*, with the model in it."""
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path
