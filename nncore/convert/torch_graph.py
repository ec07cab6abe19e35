"""
PyTorch module -> Mlp, by torch.fx, which runs its forward with stand-ins for tensors.

Paths are those of .pt2 files, `nncore.convert.torch_pt2`'s part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.convert import expressions as ex
from nncore.convert import lowering
from nncore.convert.flow import ROWS, Flow, input_flow, kept_shape
from nncore.convert.torch_operators import apply, as_output, naming
from nncore.convert.torch_pt2 import from_pt2
from nncore.errors import ConversionError
from nncore.model import Mlp

Numbers = npt.NDArray[Any]


def from_torch(
    module: Any,
    *,
    input_shape: Sequence[int] | None = None,
    dtype: npt.DTypeLike | None = None,
    labels: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    name: str | None = None,
) -> Mlp:
    """
    The model in *module*, as it is in evaluation mode: an nn.Module, or the path of a .pt2 file.

    input_shape: of one input, without the batch; needed only where no layer of the module says how many
    numbers it takes, or where an input of several axes is more than flattened.
    dtype: "float32" or "float64"; by default float64 if any parameter is, else float32.
    name: by default "mlp", or a file's without its suffix.

    Raises ConversionError, naming the module or operation and what is wrong with it.
    """
    if isinstance(module, str | os.PathLike):
        if input_shape is not None:
            raise ConversionError("input_shape is given, but a .pt2 file says its own")
        return from_pt2(module, dtype=dtype, labels=labels, feature_names=feature_names, name=name)
    traced = _traced(module)
    if input_shape is None:
        flow = Flow(ex.Input(_width_of(traced)), (ROWS, _width_of(traced)))
    else:
        flow = input_flow([None, *input_shape], "the input")
    output = _walked(traced, flow)
    natural = _natural_dtype(parameter for parameter in module.parameters())
    layers = lowering.layers_of(output.expression, natural if dtype is None else dtype)
    return Mlp(layers, labels, feature_names, name or "mlp", kept_shape(flow))


# torch.fx


def _traced(module: Any) -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        raise ConversionError("torch is not installed: pip install 'nnserve[torch]'") from None
    if not isinstance(module, torch.nn.Module):
        raise ConversionError(f"{type(module).__name__} is no torch.nn.Module")
    if isinstance(module, torch.jit.ScriptModule):
        raise ConversionError("a scripted module cannot be traced; convert the module it was made of")
    if _is_leaf(module):
        module = torch.nn.Sequential(module)
    modes = [(each, each.training) for each in module.modules()]
    try:
        module.eval()
        return torch.fx.symbolic_trace(module)
    except Exception as error:  # whatever the module's own forward raises
        raise ConversionError(f"torch.fx cannot trace {type(module).__name__}: {error}") from None
    finally:
        for each, is_training in modes:
            each.training = is_training


def _is_leaf(module: Any) -> bool:
    kind = type(module)
    return kind.__module__.startswith("torch.nn") and kind.__name__ not in ("Sequential", "ModuleList")


def _width_of(traced: Any) -> int:
    """The numbers a row, which the first layer that has weights says."""
    from torch import nn

    for node in traced.graph.nodes:
        if node.op != "call_module":
            if node.op == "call_function" and getattr(node.target, "__name__", "") == "linear":
                return int(_parameter(traced, node.args[1].target).shape[1])
            continue
        module = traced.get_submodule(node.target)
        if isinstance(module, nn.Linear):
            return int(module.in_features)
        if isinstance(module, nn.BatchNorm1d):
            return int(module.num_features)
        if isinstance(module, nn.LayerNorm):
            return int(np.prod(module.normalized_shape))
    raise ConversionError("no layer says how many numbers it takes; give input_shape")


def _walked(traced: Any, flow: Flow) -> Flow:
    """The output of the graph for the input *flow*."""
    values: dict[Any, Any] = {}
    has_input = False

    def value_of(argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [value_of(each) for each in argument]
        if type(argument).__name__ == "Node" and argument in values:
            return values[argument]
        return argument

    for node in traced.graph.nodes:
        arguments = [value_of(argument) for argument in node.args]
        keywords = {key: value_of(argument) for key, argument in node.kwargs.items()}
        if node.op == "placeholder":
            if not node.users or (has_input and node.args):
                continue  # an argument with a default
            if has_input:
                raise ConversionError(f"forward takes several tensors; the second is {node.name!r}")
            values[node], has_input = flow, True
        elif node.op == "output":
            return as_output(arguments[0])
        elif node.op == "get_attr":
            values[node] = _parameter(traced, node.target)
        elif node.op == "call_module":
            module = traced.get_submodule(node.target)
            with naming(f"module {node.target!r} ({type(module).__name__})"):
                values[node] = _labelled(_module_applied(module, arguments[0]), node.target, module)
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
            with naming(f"operation {node.name!r} ({name})"):
                if name == "getattr":
                    values[node] = _attribute(*arguments)
                    continue
                answer = apply(name, _in_one_list(name, arguments), keywords)
                if isinstance(answer, Flow) and not answer.expression.origin:
                    answer.expression.origin = f"operation {node.name!r} ({name})"
                values[node] = answer
    raise ConversionError("the module returns nothing")


def _labelled(answer: Any, target: str, module: Any) -> Any:
    if isinstance(answer, Flow) and not answer.expression.origin:
        answer.expression.origin = f"module {target!r} ({type(module).__name__})"
    return answer


def _attribute(value: Any, name: str) -> Any:
    if name == "shape":
        return apply("size", [value], {})
    if name == "T":
        return apply("t", [value], {})
    raise ConversionError(f"asks for {name!r} of a tensor")


def _in_one_list(name: str, arguments: list[Any]) -> list[Any]:
    """The arguments of x.view(a, b) as those of x.view([a, b]); the same for reshape and permute."""
    if name in ("view", "reshape", "permute") and len(arguments) > 1 and not isinstance(arguments[1], list):
        return [arguments[0], arguments[1:]]
    return arguments


def _parameter(traced: Any, target: str) -> Numbers:
    value = traced
    for part in target.split("."):
        value = getattr(value, part)
    return _numbers(value)


def _numbers(tensor: Any) -> Numbers:
    """A tensor as an array; narrow floats as float32."""
    import torch

    if tensor is None:
        return None  # type: ignore[return-value]
    if not isinstance(tensor, torch.Tensor) or tensor.is_meta or tensor.is_quantized or tensor.is_complex():
        raise ConversionError("has parameters that are no plain numbers")
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    array: Numbers = tensor.numpy()
    return array


def _natural_dtype(parameters: Iterator[Any]) -> str:
    return (
        "float64" if any(str(parameter.dtype) == "torch.float64" for parameter in parameters) else "float32"
    )


# nn.Module -> operation and the attributes that are its arguments, by the names they have there.
_MODULES: dict[str, tuple[str, dict[str, str]]] = {
    "Flatten": ("flatten", {"start_dim": "start_dim", "end_dim": "end_dim"}),
    "Unflatten": ("unflatten", {"dim": "dim", "unflattened_size": "sizes"}),
    "Identity": ("identity", {}),
    "ReLU": ("relu", {}),
    "ReLU6": ("relu6", {}),
    "Sigmoid": ("sigmoid", {}),
    "Tanh": ("tanh", {}),
    "SiLU": ("silu", {}),
    "Mish": ("mish", {}),
    "Softsign": ("softsign", {}),
    "Hardswish": ("hardswish", {}),
    "Hardsigmoid": ("hardsigmoid", {}),
    "SELU": ("selu", {}),
    "LogSigmoid": ("logsigmoid", {}),
    "GELU": ("gelu", {"approximate": "approximate"}),
    "ELU": ("elu", {"alpha": "alpha"}),
    "CELU": ("celu", {"alpha": "alpha"}),
    "LeakyReLU": ("leaky_relu", {"negative_slope": "negative_slope"}),
    "RReLU": ("rrelu", {"lower": "lower", "upper": "upper"}),
    "Hardtanh": ("hardtanh", {"min_val": "min_val", "max_val": "max_val"}),
    "Threshold": ("threshold", {"threshold": "threshold", "value": "value"}),
    "Softplus": ("softplus", {"beta": "beta", "threshold": "threshold"}),
    "Softmax": ("softmax", {"dim": "dim"}),
    "LogSoftmax": ("log_softmax", {"dim": "dim"}),
    "Softmin": ("softmin", {"dim": "dim"}),
}
_DROPOUTS = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")


def _module_applied(module: Any, x: Any) -> Any:
    """The output of a leaf *module* for x."""
    from torch import nn

    name = type(module).__name__
    if isinstance(module, nn.Linear):  # also where its weight is parametrized
        return apply("linear", [x, _numbers(module.weight), _numbers(module.bias)], {})
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        statistics = [module.running_mean, module.running_var, module.weight, module.bias]
        return apply("batch_norm", [x, *map(_numbers, statistics)], {"eps": module.eps})
    if isinstance(module, nn.LayerNorm):
        arrays = [_numbers(module.weight), _numbers(module.bias)]
        return apply("layer_norm", [x, module.normalized_shape, *arrays], {"eps": module.eps})
    if isinstance(module, nn.PReLU):
        return apply("prelu", [x, _numbers(module.weight)], {})
    if name in _DROPOUTS:
        return x
    if name not in _MODULES or type(module) is not getattr(nn, name):
        raise ConversionError("the module is not supported")
    operation, attributes = _MODULES[name]
    return apply(operation, [x], {ours: getattr(module, theirs) for theirs, ours in attributes.items()})
