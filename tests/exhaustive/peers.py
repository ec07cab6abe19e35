"""
Nothing -> functions of float32 arrays: the activations of PyTorch and ONNX Runtime, where they are installed.

`make bench-kernels` installs both, into an environment of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["available"]

Single = NDArray[np.float32]
Function = Callable[[Single], Single]


def available() -> dict[str, dict[str, Function]]:
    """library and version -> activation -> function."""
    found = {}
    for name, functions in (("PyTorch", _pytorch), ("ONNX Runtime", _onnx_runtime)):
        try:
            version, table = functions()
        except ImportError:
            continue
        found[f"{name} {version}"] = table
    return found


def _pytorch() -> tuple[str, dict[str, Function]]:
    import torch
    from torch.nn import functional

    # The caller's threads share the chunks out.
    torch.set_num_threads(1)

    def over_arrays(function: Callable[[Any], Any]) -> Function:
        def call(x: Single) -> Single:
            with torch.inference_mode():
                result: Single = function(torch.from_numpy(x)).numpy()
            return result

        return call

    functions = {
        "leaky_relu": functional.leaky_relu,
        "relu6": functional.relu6,
        "hard_sigmoid": functional.hardsigmoid,
        "hard_swish": functional.hardswish,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "swish": functional.silu,
        "elu": functional.elu,
        "selu": functional.selu,
        "celu": functional.celu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "softplus": functional.softplus,
        "softsign": functional.softsign,
        "mish": functional.mish,
    }
    return torch.__version__, {name: over_arrays(function) for name, function in functions.items()}


def _onnx_runtime() -> tuple[str, dict[str, Function]]:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def session(operator: str, **attributes: Any) -> Function:
        value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
        node = helper.make_node(operator, ["x"], ["y"], **attributes)
        graph = helper.make_graph([node], operator, value[:1], value[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model)
        run = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        ).run

        def call(x: Single) -> Single:
            result: Single = run(None, {"x": x})[0]
            return result

        return call

    functions = {
        "leaky_relu": session("LeakyRelu", alpha=0.01),
        "hard_sigmoid": session("HardSigmoid", alpha=1 / 6, beta=0.5),
        "hard_swish": session("HardSwish"),
        "sigmoid": session("Sigmoid"),
        "tanh": session("Tanh"),
        "elu": session("Elu"),
        "selu": session("Selu"),
        "gelu": session("Gelu"),
        "gelu_tanh": session("Gelu", approximate="tanh"),
        "softplus": session("Softplus"),
        "softsign": session("Softsign"),
        "mish": session("Mish"),
    }
    return onnxruntime.__version__, functions
