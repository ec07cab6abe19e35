"""
PyTorch module -> Mlp, by torch.fx; .pt2 file -> Mlp, from its own text and numbers.

A module is traced by torch.fx, which runs its forward with stand-ins for tensors. A .pt2 file (torch.export)
is read without torch: its graph is JSON, its weights are plain bytes, and nothing of it is unpickled or run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.convert import archives, lowering
from nncore.convert import expressions as ex
from nncore.convert.flow import MAX_WIDTH, ROWS, Flow, input_flow
from nncore.convert.torch_operators import BATCH, apply
from nncore.errors import ConversionError
from nncore.model import Mlp

Numbers = npt.NDArray[Any]

# torch._export.serde.schema.ScalarType -> NumPy; bfloat16 (13) is decoded.
_DTYPES: dict[int, Any] = {
    **{1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float16},
    **{7: np.float32, 8: np.float64, 12: np.bool_, 13: np.uint16},
}
_BFLOAT16 = 13


def from_torch(
    module: Any,
    *,
    input_shape: Sequence[int] | None = None,
    dtype: npt.DTypeLike | None = None,
    labels: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    name: str = "mlp",
) -> Mlp:
    """
    The model in *module*, as it is in evaluation mode: an nn.Module, or the path of a .pt2 file.

    input_shape: of one input, without the batch; needed only where no layer of the module says how many
    numbers it takes, or where an input of several axes is more than flattened.
    dtype: "float32" or "float64"; by default float64 if any parameter is, else float32.

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
    return Mlp(layers, labels, feature_names, name, _kept_shape(flow))


def _kept_shape(flow: Flow) -> tuple[int, ...] | None:
    sizes = tuple(size for size in flow.shape if size is not ROWS)
    return sizes if len(sizes) > 1 else None


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
            return _as_output(arguments[0])
        elif node.op == "get_attr":
            values[node] = _parameter(traced, node.target)
        elif node.op == "call_module":
            module = traced.get_submodule(node.target)
            with _naming(f"module {node.target!r} ({type(module).__name__})"):
                values[node] = _labelled(_module_applied(module, arguments[0]), node.target, module)
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
            with _naming(f"operation {node.name!r} ({name})"):
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


def _as_output(answer: Any) -> Flow:
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, Flow):
        raise ConversionError("the module returns something else than one tensor that depends on its input")
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


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{where}: {error}") from None


# .pt2


def from_pt2(
    path: str | os.PathLike[str],
    *,
    dtype: npt.DTypeLike | None = None,
    labels: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    name: str | None = None,
) -> Mlp:
    """The model in a .pt2 file, as torch.export.save writes it. See `from_torch`."""
    path = Path(path)
    with archives.opened(path) as archive:
        names = archive.names()
        model_name = the_one(names, "models/model.json", path)
        root = model_name.removesuffix("models/model.json")
        try:
            graph_module = json.loads(archive.read(model_name))["graph_module"]
            values, flow = pt2_inputs(graph_module, archive, root)
            output = _pt2_walked(graph_module["graph"], values)
        except ConversionError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ConversionError(f"{path.name} is not a .pt2 file that is understood ({what})") from None
    arrays = [value for value in values.values() if isinstance(value, np.ndarray)]
    natural = "float64" if any(array.dtype == np.float64 for array in arrays) else "float32"
    layers = lowering.layers_of(output.expression, natural if dtype is None else dtype)
    return Mlp(layers, labels, feature_names, name or path.stem, _kept_shape(flow))


def the_one(names: Sequence[str], ending: str, path: Path) -> str:
    found = [name for name in names if name.endswith(ending)]
    if len(found) != 1:
        raise ConversionError(
            f"{path.name} has {len(found)} members {ending!r}; expected the one that torch.export.save writes"
            " (torch 2.8 or newer)"
        )
    return found[0]


def pt2_inputs(graph_module: Any, archive: archives.Archive, root: str) -> tuple[dict[str, Any], Flow]:
    """The graph's inputs by name: arrays for parameters, and the flow of the one tensor a user gives."""
    values: dict[str, Any] = {}
    flow: Flow | None = None
    weights = json.loads(archive.read(f"{root}data/weights/model_weights_config.json"))["config"]
    constants_name = f"{root}data/constants/model_constants_config.json"
    constants = (
        json.loads(archive.read(constants_name))["config"] if constants_name in archive.names() else {}
    )
    for spec in graph_module["signature"]["input_specs"]:
        ((kind, entry),) = spec.items()
        if kind in ("parameter", "buffer"):
            array = _pt2_array(weights, entry[f"{kind}_name"], archive, f"{root}data/weights/")
            values[entry["arg"]["name"]] = array
        elif kind == "tensor_constant":
            array = _pt2_array(constants, entry["tensor_constant_name"], archive, f"{root}data/constants/")
            values[entry["arg"]["name"]] = array
        elif kind == "user_input" and "as_tensor" in entry["arg"]:
            if flow is not None:
                raise ConversionError("the program takes several tensors; expected one")
            tensor_name = entry["arg"]["as_tensor"]["name"]
            sizes = graph_module["graph"]["tensor_values"][tensor_name]["sizes"]
            shape = [size.get("as_int") for size in sizes]
            flow = input_flow(shape, f"input {tensor_name!r}")
            values[tensor_name] = flow
        elif kind != "user_input":
            raise ConversionError(f"the program has an input of kind {kind!r}, which is not supported")
    if flow is None:
        raise ConversionError("the program takes no tensor")
    return values, flow


def _pt2_array(config: Mapping[str, Any], name: str, archive: archives.Archive, folder: str) -> Numbers:
    entry = config[name]
    if entry["use_pickle"]:
        raise ConversionError(f"parameter {name!r} is pickled, and nothing is unpickled here")
    meta = entry["tensor_meta"]
    if meta["dtype"] not in _DTYPES:
        raise ConversionError(f"parameter {name!r} has element type number {meta['dtype']}")
    shape = [int(size["as_int"]) for size in meta["sizes"]]
    strides = [int(stride["as_int"]) for stride in meta["strides"]]
    offset = int(meta["storage_offset"]["as_int"])
    element = np.dtype(_DTYPES[meta["dtype"]]).newbyteorder("<")
    flat = np.frombuffer(archive.read(folder + entry["path_name"], archives.MAX_NUMBER_BYTES), element)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if min([0, offset, *strides, *[size - 1 for size in shape]]) < 0 or last >= flat.size:
        raise ConversionError(f"parameter {name!r} does not lie inside its bytes")
    if np.prod([float(size) for size in shape]) > MAX_WIDTH * 64:
        raise ConversionError(f"parameter {name!r} has shape {shape}")
    view = np.lib.stride_tricks.as_strided(
        flat[offset:], shape, [stride * element.itemsize for stride in strides], writeable=False
    )
    if meta["dtype"] == _BFLOAT16:
        return (view.astype(np.uint32) << 16).view(np.float32)
    array = np.array(view)
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _pt2_walked(graph: Any, values: dict[str, Any]) -> Flow:
    for node in graph["nodes"]:
        parts = node["target"].split(".")
        name = parts[3] if node["target"].startswith("torch.ops.aten.") else parts[-1]
        outputs = [pt2_output_name(output) for output in node["outputs"]]
        where = f"operation {(outputs or ['?'])[0]!r} ({name})"
        with _naming(where):
            keywords = {given["name"]: pt2_argument(given["arg"], values) for given in node["inputs"]}
            if "training" in keywords and keywords["training"] is True and "norm" in name:
                raise ConversionError("is in training mode; export the module after module.eval()")
            answer = apply(name, [], keywords)
        if isinstance(answer, Flow) and not answer.expression.origin:
            answer.expression.origin = where
        values[outputs[0]] = answer
    outputs = [output["as_tensor"]["name"] for output in graph["outputs"]]
    if len(outputs) != 1:
        raise ConversionError(f"the program returns {len(outputs)} tensors; expected one")
    return _as_output(values[outputs[0]])


def pt2_output_name(output: Mapping[str, Any]) -> str:
    ((kind, value),) = output.items()
    if kind == "as_tensors":
        return str(value[0]["name"])
    return str(value.get("name") or value.get("as_name"))


def pt2_argument(argument: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """An argument of the serialized graph as a value."""
    ((kind, value),) = argument.items()
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return values[value["name"]]
    if kind == "as_tensors":
        return [values[each["name"]] for each in value]
    if kind in ("as_sym_int", "as_sym_ints"):
        sizes = [_pt2_size(each, values) for each in (value if kind == "as_sym_ints" else [value])]
        return sizes if kind == "as_sym_ints" else sizes[0]
    if kind in ("as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_string"):
        return value
    if kind in ("as_scalar_type", "as_device", "as_layout", "as_memory_format"):
        return None
    raise ConversionError(f"has an argument of kind {kind!r}")


def _pt2_size(size: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    if "as_int" in size:
        return size["as_int"]
    value = values.get(size["as_name"])
    return BATCH if value is None else value
