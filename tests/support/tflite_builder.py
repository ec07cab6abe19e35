"""Random seeds -> TFLite files, put together by the schema of LiteRT's own package; and runs of them."""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter


class Builder:
    """A TFLite graph being built: tensors by number."""

    def __init__(self, n_in: int, seed: int = 0, kind: int = schema.TensorType.FLOAT32) -> None:
        self.rng = np.random.default_rng(seed)
        self.buffers = [schema.BufferT()]
        self.tensors: list[Any] = []
        self.codes: list[int] = []
        self.operators: list[Any] = []
        self.input = self.tensor((1, n_in), kind=kind)

    def tensor(self, shape: Any, data: Any = None, kind: int = schema.TensorType.FLOAT32) -> int:
        buffer = 0
        if data is not None:
            entry = schema.BufferT()
            entry.data = np.frombuffer(data.tobytes(), np.uint8)
            self.buffers.append(entry)
            buffer = len(self.buffers) - 1
        tensor = schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = np.array(shape, np.int32), kind, buffer
        tensor.shapeSignature = np.array([-1, *shape[1:]], np.int32) if data is None else None
        tensor.name = f"t{len(self.tensors)}"
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def const(self, values: Any) -> int:
        array = np.asarray(values, np.float32)
        return self.tensor(array.shape, array)

    def node(self, code: int, inputs: list[int], n: int, options: Any = None, kind: str = "NONE") -> int:
        output = self.tensor((1, n))
        operator = schema.OperatorT()
        if code not in self.codes:
            self.codes.append(code)
        operator.opcodeIndex = self.codes.index(code)
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array([output], np.int32)
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        operator.builtinOptions = options
        self.operators.append(operator)
        return output

    def dense(self, x: int, n: int, n_out: int, fused: int = 0) -> int:
        options = schema.FullyConnectedOptionsT()
        options.fusedActivationFunction = fused
        inputs = [x, self.const(self.rng.standard_normal((n_out, n)) / np.sqrt(n))]
        if self.rng.integers(4):
            inputs.append(self.const(self.rng.standard_normal(n_out)))
        code = schema.BuiltinOperator.FULLY_CONNECTED
        return self.node(code, inputs, n_out, options, "FullyConnectedOptions")

    def arithmetic(self, name: str, inputs: list[int], n: int, fused: int = 0) -> int:
        options = getattr(schema, f"{name.title()}OptionsT")()
        options.fusedActivationFunction = fused
        return self.node(getattr(schema.BuiltinOperator, name), inputs, n, options, f"{name.title()}Options")

    def content(self, output: int) -> bytes:
        graph = schema.SubGraphT()
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs = np.array([self.input], np.int32), np.array([output], np.int32)
        model = schema.ModelT()
        model.version, model.subgraphs, model.buffers = 3, [graph], self.buffers
        model.operatorCodes = []
        for code in self.codes:
            entry = schema.OperatorCodeT()
            entry.builtinCode, entry.deprecatedBuiltinCode, entry.version = code, min(code, 127), 1
            model.operatorCodes.append(entry)
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def random_content(seed: int) -> tuple[bytes, int]:
    """A chain of fully connected layers, activations and scales, and the number of its inputs."""
    rng = np.random.default_rng(seed)
    n = n_in = int(rng.integers(1, 9))
    builder = Builder(n_in, seed)
    x = builder.input
    for _ in range(rng.integers(1, 4)):
        n_out = int(rng.integers(1, 9))
        x, n = builder.dense(x, n, n_out, int(rng.choice([0, 1, 2, 3]))), n_out
        kind = rng.integers(9)
        op = schema.BuiltinOperator
        if kind < 5:
            x = builder.node([op.LOGISTIC, op.TANH, op.RELU, op.ELU, op.HARD_SWISH][kind], [x], n)
        elif kind == 5:
            x = builder.arithmetic("MUL", [x, builder.const(rng.uniform(0.5, 1.5, n))], n)
            x = builder.arithmetic("SUB", [builder.const(rng.uniform(0.5, 1.5, n)), x], n, fused=1)
        elif kind == 6:
            x = builder.arithmetic("MUL", [x, builder.node(op.LOGISTIC, [x], n)], n)
        elif kind == 7:
            options = schema.LeakyReluOptionsT()
            options.alpha = 0.25
            x = builder.node(op.LEAKY_RELU, [x], n, options, "LeakyReluOptions")
    if rng.integers(3) == 0:
        options = schema.SoftmaxOptionsT()
        options.beta = 1.5
        x = builder.node(schema.BuiltinOperator.SOFTMAX, [x], n, options, "SoftmaxOptions")
    return builder.content(x), n_in


def run(content: bytes, x: Any) -> Any:
    """What LiteRT answers, row by row."""
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    entry, out = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    rows = []
    for row in x:
        interpreter.set_tensor(entry["index"], row.reshape(entry["shape"]))
        interpreter.invoke()
        rows.append(interpreter.get_tensor(out["index"]).reshape(-1).copy())
    return np.stack(rows)
