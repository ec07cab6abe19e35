"""
.pt2 file (torch.export) -> Mlp, without torch: its graph is JSON, its weights are plain bytes.

Nothing of a file is unpickled or run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.convert import archives, lowering
from nncore.convert.flow import MAX_WIDTH, Flow, input_flow, kept_shape
from nncore.convert.torch_operators import BATCH, apply, as_output, naming
from nncore.errors import ConversionError
from nncore.model import Mlp

Numbers = npt.NDArray[Any]

# torch._export.serde.schema.ScalarType -> NumPy; bfloat16 (13) is decoded.
_DTYPES: dict[int, Any] = {
    **{1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float16},
    **{7: np.float32, 8: np.float64, 12: np.bool_, 13: np.uint16},
}
_BFLOAT16 = 13


def from_pt2(
    path: str | os.PathLike[str],
    *,
    dtype: npt.DTypeLike | None = None,
    labels: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    name: str | None = None,
) -> Mlp:
    """The model in a .pt2 file, as torch.export.save writes it. Arguments and errors are from_torch's."""
    path = Path(path)
    with archives.opened(path) as archive:
        names = archive.names()
        model_name = the_one(names, "models/model.json", path)
        root = model_name.removesuffix("models/model.json")
        try:
            graph_module = json.loads(archive.read(model_name))["graph_module"]
            values, flow = inputs_of(graph_module, archive, root)
            output = _walked(graph_module["graph"], values)
        except ConversionError:
            raise
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ConversionError(f"{path.name} is not a .pt2 file that is understood ({what})") from None
    arrays = [value for value in values.values() if isinstance(value, np.ndarray)]
    natural = "float64" if any(array.dtype == np.float64 for array in arrays) else "float32"
    layers = lowering.layers_of(output.expression, natural if dtype is None else dtype)
    return Mlp(layers, labels, feature_names, name or path.stem, kept_shape(flow))


def the_one(names: Sequence[str], ending: str, path: Path) -> str:
    found = [name for name in names if name.endswith(ending)]
    if len(found) != 1:
        raise ConversionError(
            f"{path.name} has {len(found)} members {ending!r}; expected the one that torch.export.save writes"
            " (torch 2.8 or newer)"
        )
    return found[0]


def inputs_of(graph_module: Any, archive: archives.Archive, root: str) -> tuple[dict[str, Any], Flow]:
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
            array = _array(weights, entry[f"{kind}_name"], archive, f"{root}data/weights/")
            values[entry["arg"]["name"]] = array
        elif kind == "tensor_constant":
            array = _array(constants, entry["tensor_constant_name"], archive, f"{root}data/constants/")
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


def _array(config: Mapping[str, Any], name: str, archive: archives.Archive, folder: str) -> Numbers:
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


def _walked(graph: Any, values: dict[str, Any]) -> Flow:
    for node in graph["nodes"]:
        parts = node["target"].split(".")
        name = parts[3] if node["target"].startswith("torch.ops.aten.") else parts[-1]
        outputs = [output_name(output) for output in node["outputs"]]
        where = f"operation {(outputs or ['?'])[0]!r} ({name})"
        with naming(where):
            keywords = {given["name"]: argument_value(given["arg"], values) for given in node["inputs"]}
            if "training" in keywords and keywords["training"] is True and "norm" in name:
                raise ConversionError("is in training mode; export the module after module.eval()")
            answer = apply(name, [], keywords)
        if isinstance(answer, Flow) and not answer.expression.origin:
            answer.expression.origin = where
        values[outputs[0]] = answer
    outputs = [output["as_tensor"]["name"] for output in graph["outputs"]]
    if len(outputs) != 1:
        raise ConversionError(f"the program returns {len(outputs)} tensors; expected one")
    return as_output(values[outputs[0]])


def output_name(output: Mapping[str, Any]) -> str:
    ((kind, value),) = output.items()
    if kind == "as_tensors":
        return str(value[0]["name"])
    return str(value.get("name") or value.get("as_name"))


def argument_value(argument: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    """An argument of the serialized graph as a value."""
    ((kind, value),) = argument.items()
    if kind == "as_none":
        return None
    if kind == "as_tensor":
        return values[value["name"]]
    if kind == "as_tensors":
        return [values[each["name"]] for each in value]
    if kind in ("as_sym_int", "as_sym_ints"):
        sizes = [_size(each, values) for each in (value if kind == "as_sym_ints" else [value])]
        return sizes if kind == "as_sym_ints" else sizes[0]
    if kind in ("as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_string"):
        return value
    if kind in ("as_scalar_type", "as_device", "as_layout", "as_memory_format"):
        return None
    raise ConversionError(f"has an argument of kind {kind!r}")


def _size(size: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    if "as_int" in size:
        return size["as_int"]
    value = values.get(size["as_name"])
    return BATCH if value is None else value
