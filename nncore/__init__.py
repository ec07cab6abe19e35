"""
nncore: multi-layer perceptrons, evaluated fast and exactly.

    mlp = nncore.load("digits.safetensors")
    mlp.forward(x)                      # (rows, n_in) -> (rows, n_out)
    nncore.elu(x, alpha)                # every activation and its derivative is a NumPy ufunc
    nncore.elu_grad(x, alpha)

Everything is imported, and compiled, when it is first used.
"""

import importlib
import time
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Sources that are younger are not what this process runs: see `nncore.compilation`.
_IMPORTED_AT = time.time()

if TYPE_CHECKING:
    from nncore.activations import ACTIVATIONS as ACTIVATIONS
    from nncore.activations import Activation as Activation
    from nncore.classic import three_layer as three_layer
    from nncore.convert.keras_model import from_keras as from_keras
    from nncore.convert.onnx_graph import from_onnx as from_onnx
    from nncore.convert.plain_weights import from_weights as from_weights
    from nncore.convert.sklearn_estimator import from_sklearn as from_sklearn
    from nncore.convert.tflite_model import from_tflite as from_tflite
    from nncore.convert.torch_graph import from_torch as from_torch
    from nncore.errors import ArgumentError as ArgumentError
    from nncore.errors import ConversionError as ConversionError
    from nncore.errors import DtypeError as DtypeError
    from nncore.errors import ModelError as ModelError
    from nncore.errors import ModelFileError as ModelFileError
    from nncore.errors import NncoreError as NncoreError
    from nncore.errors import RowFileError as RowFileError
    from nncore.errors import ShapeError as ShapeError
    from nncore.model import Layer as Layer
    from nncore.model import LayerNorm as LayerNorm
    from nncore.model import LayerTrace as LayerTrace
    from nncore.model import Mlp as Mlp
    from nncore.model_file import load as load
    from nncore.row_softmax import log_softmax as log_softmax
    from nncore.row_softmax import softmax as softmax
    from nncore.warming import warm as warm

# Public name -> module that has it. No module bears a public name, as importing it would hide the function.
# The activations come on top: nncore.relu, nncore.relu_grad, ….
_MODULES = {
    "ACTIVATIONS": "activations",
    "Activation": "activations",
    "three_layer": "classic",
    "from_keras": "convert.keras_model",
    "from_onnx": "convert.onnx_graph",
    "from_sklearn": "convert.sklearn_estimator",
    "from_tflite": "convert.tflite_model",
    "from_torch": "convert.torch_graph",
    "from_weights": "convert.plain_weights",
    "ArgumentError": "errors",
    "ConversionError": "errors",
    "DtypeError": "errors",
    "ModelError": "errors",
    "ModelFileError": "errors",
    "NncoreError": "errors",
    "RowFileError": "errors",
    "ShapeError": "errors",
    "Layer": "model",
    "LayerNorm": "model",
    "LayerTrace": "model",
    "Mlp": "model",
    "load": "model_file",
    "log_softmax": "row_softmax",
    "softmax": "row_softmax",
    "warm": "warming",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f"nncore.{_MODULES[name]}"), name)
    else:
        value = _activation_function(name)
    globals()[name] = value
    return value


def _activation_function(name: str) -> Any:
    """The ufunc called *name*: an activation, or with the suffix _grad its derivative."""
    if not name.startswith("_"):
        activation = __getattr__("ACTIVATIONS").get(name.removesuffix("_grad"))
        if activation is not None:
            return activation.derivative if name.endswith("_grad") else activation.function
    raise AttributeError(f"module 'nncore' has no attribute {name!r}")


def __dir__() -> list[str]:
    activations = __getattr__("ACTIVATIONS")
    return sorted({*globals(), *_MODULES, *activations, *(f"{name}_grad" for name in activations)})
