"""
.pt2 file -> its answers, by PyTorch: the operations of the file's graph, one after another.

torch.export.load would unpickle parts of the file. Here the graph is read as JSON, like the weights as bytes,
and only operations that `nncore.convert.torch_operators` knows are looked up in torch.ops.aten.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.convert import archives, torch_pt2
from nncore.convert.flow import ROWS, Flow
from nncore.convert.torch_operators import SIGNATURES

# torch._export.serde.schema.ScalarType -> torch.
_TYPES = {6: "float16", 7: "float32", 8: "float64", 13: "bfloat16"}
_NO_ARGUMENT = object()


def runner(path: Path) -> Callable[[npt.NDArray[Any]], npt.NDArray[Any]]:
    """A function of rows (rows, n_in) that answers (rows, n_out), for a file that has been converted."""
    import torch

    with archives.opened(path) as archive:
        model_name = torch_pt2.the_one(archive.names(), "models/model.json", path)
        graph_module = json.loads(archive.read(model_name))["graph_module"]
        inputs, flow = torch_pt2.inputs_of(
            graph_module, archive, model_name.removesuffix("models/model.json")
        )
    graph = graph_module["graph"]
    given = next(name for name, value in inputs.items() if isinstance(value, Flow))
    element = getattr(torch, _TYPES.get(graph["tensor_values"][given]["dtype"], "float32"))
    shape = [flow.batch or -1 if size is ROWS else size for size in flow.shape]
    parameters = {
        name: _as_declared(torch, value, graph["tensor_values"].get(name, {}).get("dtype"))
        for name, value in inputs.items()
        if not isinstance(value, Flow)
    }

    def run(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        size = flow.batch or len(x)
        answers = []
        for start in range(0, len(x), size):
            rows = x[start : start + size]
            missing = size - len(rows)
            padded = np.concatenate([rows, np.zeros((missing, x.shape[1]))]) if missing else rows
            tensor = torch.from_numpy(np.ascontiguousarray(padded)).to(element).reshape(shape)
            answer = _evaluated(torch, graph, {**parameters, given: tensor})
            answers.append(answer.reshape(size, -1)[: len(rows)].double().numpy())
        return np.concatenate(answers)

    return run


def _as_declared(torch: Any, array: npt.NDArray[Any], dtype: int | None) -> Any:
    """A parameter as a tensor, in the type that the file says, which may be narrower than the array's."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.to(getattr(torch, _TYPES[dtype])) if dtype in _TYPES else tensor


def _evaluated(torch: Any, graph: Mapping[str, Any], values: dict[str, Any]) -> Any:
    with torch.no_grad():
        for node in graph["nodes"]:
            _, _, _, name, overload = node["target"].split(".")
            assert name.removesuffix("_") in SIGNATURES or name in SIGNATURES  # as the conversion has checked
            arguments: list[Any] = []
            keywords: dict[str, Any] = {}
            for entry in node["inputs"]:
                value = _argument(torch, entry["arg"], values)
                if value is _NO_ARGUMENT:
                    continue
                if entry.get("kind", 1) == 1 and not keywords:
                    arguments.append(value)
                else:
                    keywords[entry["name"]] = value
            answer = getattr(getattr(torch.ops.aten, name), overload)(*arguments, **keywords)
            outputs = node["outputs"]
            if isinstance(answer, tuple) and len(outputs) == len(answer):
                for output, part in zip(outputs, answer, strict=True):
                    values[torch_pt2.output_name(output)] = part
            else:
                values[torch_pt2.output_name(outputs[0])] = answer
    return values[graph["outputs"][0]["as_tensor"]["name"]]


def _argument(torch: Any, argument: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    ((kind, value),) = argument.items()
    if kind in ("as_scalar_type",):
        return getattr(torch, _TYPES.get(value, "float32"))
    if kind in ("as_device", "as_layout", "as_memory_format"):
        return _NO_ARGUMENT
    if kind == "as_tensors":
        return [values[each["name"]] for each in value]
    if kind in ("as_sym_int", "as_sym_ints"):
        sizes = [
            each["as_int"] if "as_int" in each else values[each["as_name"]]
            for each in (value if kind == "as_sym_ints" else [value])
        ]
        return sizes if kind == "as_sym_ints" else sizes[0]
    return torch_pt2.argument_value(argument, values)
