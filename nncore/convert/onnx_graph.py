"""
ONNX file -> Mlp: any graph that is a multi-layer perceptron in effect.

The graph is walked once, from its input on. A value is a constant, which is computed here and now, or a
`Flow`; `nncore.convert.onnx_operators` says what each operator makes of them. What an operator cannot do is
an error only if the output depends on it, and then names the node.

Read with the onnx package, which only parses: nothing is executed. External data are read from files inside
the model's folder, never from anywhere else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nncore.convert import lowering
from nncore.convert.flow import ROWS, Flow, input_flow, kept_shape
from nncore.convert.onnx_node import ClassLabels, Failure, Node, Value
from nncore.convert.onnx_operators import apply
from nncore.errors import ConversionError
from nncore.model import Mlp

# onnx.TensorProto.DataType -> NumPy; bfloat16 and narrower types are left to onnx itself.
_FLOATS: dict[int, Any] = {1: np.float32, 10: np.float16, 11: np.float64, 16: np.float32}
_INTEGERS: dict[int, Any] = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64}
_INTEGERS |= {9: np.bool_, 12: np.uint32, 13: np.uint64}
_STRING = 8
_EXTERNAL = 1
_SHOWN = 8
_SHOWN_TEXT = 80
# What constants that a graph computes from others may take together.
_MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class Conversion:
    """
    A converted graph, and what it takes to run the graph beside it.

    input_name, output_name: of the source's tensors.  shape: of the input; None for the rows.
    batch: the number of rows that the graph insists on, if any.
    """

    mlp: Mlp
    proto: Any
    input_name: str
    output_name: str
    shape: tuple[int | None, ...]
    batch: int | None
    input_dtype: npt.DTypeLike


def from_onnx(
    path: str | os.PathLike[str],
    *,
    output: str | None = None,
    dtype: npt.DTypeLike | None = None,
    labels: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    name: str | None = None,
) -> Mlp:
    """
    The model in the ONNX file *path*, if its graph is a multi-layer perceptron in effect.

    output: the graph's output to answer, needed only if it has several that could be meant.
    dtype: "float32" or "float64"; by default float64 if the graph's weights are, else float32.
    labels, feature_names: by default what the graph says (scikit-learn's class labels).
    name: by default the file's, without its suffix.

    Raises ConversionError, naming the node, its operator and what is wrong; OSError from the disk.
    """
    return convert(path, output, dtype, labels, feature_names, name).mlp


def convert(
    path: str | os.PathLike[str],
    output: str | None = None,
    dtype: npt.DTypeLike | None = None,
    labels: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    name: str | None = None,
) -> Conversion:
    """`from_onnx`, and what is needed to check its answer."""
    path = Path(path)
    model = _parsed(path)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    source = _the_input(graph, constants)
    shape, element = _input_shape(source)
    flow = input_flow(shape, f"input {source.name!r}")
    values: dict[str, Value] = {source.name: flow}
    for tensor_name, tensor in constants.items():
        values[tensor_name] = _constant_or_failure(tensor, path.parent)
    for sparse in graph.sparse_initializer:
        values[sparse.values.name] = Failure(f"initializer {sparse.values.name!r} is sparse")
    found_labels: list[tuple[str, ...]] = []
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    made_bytes = 0
    for index, proto in enumerate(graph.node):
        node = _node(proto, index, values, opsets, path.parent)
        answers = apply(node)
        for output_name, answer in zip(proto.output, answers, strict=False):
            values[output_name] = answer
            made_bytes += answer.nbytes if isinstance(answer, np.ndarray) else 0
            if isinstance(answer, ClassLabels):
                found_labels.append(answer.labels)
        found_labels += node.labels
        if made_bytes > _MOST_BYTES:
            raise ConversionError(f"{node.where}: the graph's constants take more than {_MOST_BYTES:,} bytes")
    output_name, answer = _chosen_output(graph, values, output)
    natural = "float64" if element is np.float64 else "float32"
    layers = lowering.layers_of(answer.expression, natural if dtype is None else dtype)
    if labels is None:
        labels = next((found for found in found_labels if len(found) == max(2, layers[-1].n_out)), None)
    mlp = Mlp(layers, labels, feature_names, name or path.stem, kept_shape(flow))
    batch = flow.batch
    return Conversion(mlp, model, source.name, output_name, tuple(flow.shape), batch, element)


def _parsed(path: Path) -> Any:
    """The ModelProto in *path*, its local functions put in place of their calls."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ModuleNotFoundError:
        raise ConversionError("onnx is not installed: pip install 'nnserve[onnx]'") from None
    content = path.read_bytes()
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError:
        raise ConversionError(f"{path.name} is not an ONNX file: it does not parse") from None
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ConversionError(f"{path.name} is not an ONNX model: it has no graph")
    if model.functions:
        from onnx import inliner

        try:
            model = inliner.inline_local_functions(model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConversionError(f"the model's local functions cannot be put in place: {error}") from None
    return model


def _the_input(graph: Any, constants: dict[str, Any]) -> Any:
    used = {*_used_names(graph)}
    inputs = [value for value in graph.input if value.name not in constants and value.name in used]
    if len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs[:_SHOWN]) or "none"
        raise ConversionError(
            f"the graph has {len(inputs)} inputs ({names}); expected one of shape (rows, n)"
        )
    return inputs[0]


def _used_names(graph: Any) -> Iterator[str]:
    """The tensors that *graph* reads, those that graphs inside its nodes read from it among them."""
    yield from (output.name for output in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _used_names(inner)


def _input_shape(source: Any) -> tuple[list[int | None], npt.DTypeLike]:
    what = f"input {source.name!r}"
    if source.type.WhichOneof("value") != "tensor_type":
        raise ConversionError(f"{what} is no tensor")
    tensor = source.type.tensor_type
    element = tensor.elem_type
    if element not in _FLOATS and element not in _INTEGERS:
        raise ConversionError(f"{what} has element type {_type_name(element)}; expected numbers")
    if not tensor.HasField("shape"):
        raise ConversionError(f"{what} has no shape; expected (rows, n)")
    shape: list[int | None] = []
    for index, dimension in enumerate(tensor.shape.dim):
        size = dimension.dim_value if dimension.WhichOneof("value") == "dim_value" else 0
        shape.append(size if size > 0 else None)
        if index and size <= 0:
            name = dimension.dim_param or "unknown"
            raise ConversionError(f"{what} has size {name!r} on axis {index}; only the first may be unknown")
    return shape, _FLOATS.get(element, _INTEGERS.get(element, np.float32))


def _type_name(element: int) -> str:
    import onnx

    try:
        return str(onnx.TensorProto.DataType.Name(element)).lower()
    except ValueError:
        return f"number {element}"


def _node(proto: Any, index: int, values: dict[str, Value], opsets: dict[str, int], folder: Path) -> Node:
    domain = proto.domain or "ai.onnx"
    inputs: list[Value | None] = []
    for name in proto.input:
        if not name:
            inputs.append(None)
        else:
            inputs.append(values.get(name, Failure(f"tensor {name!r} is computed nowhere before it is used")))
    attributes: dict[str, Any] = {}
    for attribute in proto.attribute:
        attributes[attribute.name] = _attribute(attribute, folder)
    return Node(
        where=f"node {proto.name or f'#{index}'!r} ({proto.op_type})",
        operator=proto.op_type if domain == "ai.onnx" else f"{domain}.{proto.op_type}",
        inputs=inputs,
        attributes=attributes,
        outputs=len(proto.output),
        opset=opsets.get(domain, 1),
    )


def _attribute(attribute: Any, folder: Path) -> Any:
    """The value of an attribute: a number, bytes, a list, an array, or Failure for graphs and the like."""
    import onnx

    kind = attribute.type
    if kind == onnx.AttributeProto.TENSOR:
        return _constant_or_failure(attribute.t, folder)
    if kind in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        return Failure("holds a graph of its own")
    try:
        return onnx.helper.get_attribute_value(attribute)
    except (ValueError, TypeError):
        return Failure(f"attribute {attribute.name!r} has an unknown type")


# Tensors


def _constant_or_failure(tensor: Any, folder: Path) -> Value:
    try:
        return _array(tensor, folder)
    except ConversionError as error:
        return Failure(f"tensor {tensor.name!r} {error}")


def _array(tensor: Any, folder: Path) -> npt.NDArray[Any]:
    """The numbers of a TensorProto; strings as an array of str."""
    import onnx

    shape = tuple(tensor.dims)
    if any(size < 0 for size in shape):
        raise ConversionError(f"has shape {shape}")
    if tensor.data_type == _STRING:
        return np.array([text.decode("utf-8", "replace") for text in tensor.string_data], object).reshape(-1)
    if tensor.data_type not in _FLOATS and tensor.data_type not in _INTEGERS:
        raise ConversionError(f"has element type {_type_name(tensor.data_type)}, which is not supported")
    count = math.prod(shape)
    if tensor.data_location == _EXTERNAL:
        return _external(tensor, folder, shape)
    if tensor.HasField("raw_data"):
        element = _little_endian(tensor.data_type)
        if len(tensor.raw_data) != count * element.itemsize:
            raise ConversionError(f"has {len(tensor.raw_data)} bytes; its shape {shape} needs another number")
        return _decoded(np.frombuffer(tensor.raw_data, element), tensor.data_type).reshape(shape)
    try:
        array = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, OverflowError) as error:
        raise ConversionError(f"cannot be read: {error}") from None
    return np.asarray(array, _FLOATS.get(tensor.data_type, array.dtype))


def _little_endian(data_type: int) -> np.dtype[Any]:
    kind: Any = np.uint16 if data_type == 16 else _FLOATS.get(data_type) or _INTEGERS[data_type]
    little: np.dtype[Any] = np.dtype(kind).newbyteorder("<")
    return little


def _decoded(numbers: npt.NDArray[Any], data_type: int) -> npt.NDArray[Any]:
    if data_type == 16:  # bfloat16: the upper half of a float32
        return (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers


def _external(tensor: Any, folder: Path, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """The numbers of a tensor that lie in a file beside the model: inside its folder, links followed."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    try:
        file = Path(os.path.realpath(folder / location))
        is_file = file.is_file()
    except (OSError, ValueError):  # what no file can be called
        raise ConversionError(
            f"has its data in {location[:_SHOWN_TEXT]!r}, which is no file's name"
        ) from None
    if not location or not file.is_relative_to(os.path.realpath(folder)):
        raise ConversionError(f"has its data in {location!r}, outside the model's folder")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
    except ValueError:
        raise ConversionError(f"has external data at {entries}") from None
    element = _little_endian(tensor.data_type)
    needed = math.prod(shape) * element.itemsize
    if not is_file:
        raise ConversionError(f"has its data in {location!r}, and there is no such file")
    if offset < 0 or length not in (-1, needed) or offset + needed > file.stat().st_size:
        raise ConversionError(f"needs {needed} bytes from {offset} on in {location!r}, which has others")
    numbers = np.fromfile(file, element, count=math.prod(shape), offset=offset)
    return _decoded(numbers, tensor.data_type).reshape(shape)


# Outputs


def _chosen_output(graph: Any, values: dict[str, Value], wanted: str | None) -> tuple[str, Flow]:
    names = [output.name for output in graph.output]
    if wanted is not None:
        if wanted not in names:
            raise ConversionError(f"there is no output {wanted!r}; the graph has {_quoted(names)}")
        return wanted, _as_flow(wanted, values)
    candidates = [output.name for output in graph.output if not _is_label(output)]
    if not candidates:
        raise ConversionError(f"the graph has no output of numbers; it has {_quoted(names) or 'none'}")
    flows = [(name, _as_flow(name, values)) for name in candidates]
    if any(flow.expression is not flows[0][1].expression for _, flow in flows):
        raise ConversionError(f"the graph has {len(flows)} outputs; name one of {_quoted(candidates)}")
    return flows[0]


def _is_label(output: Any) -> bool:
    """Whether *output* holds class labels or whole numbers."""
    kind = output.type.WhichOneof("value")
    return kind == "tensor_type" and (
        output.type.tensor_type.elem_type in _INTEGERS or output.type.tensor_type.elem_type == _STRING
    )


def _as_flow(name: str, values: dict[str, Value]) -> Flow:
    value = values.get(name, Failure(f"output {name!r} is computed by no node"))
    if isinstance(value, Failure):
        raise ConversionError(value.message)
    if not isinstance(value, Flow):
        raise ConversionError(f"output {name!r} does not depend on the input")
    return value


def _quoted(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, … ({len(names)} in all)"


# For the source


def self_contained(conversion: Conversion, folder: Path) -> Any:
    """The graph with its external data in it: onnx's reference evaluator takes no other."""
    import onnx

    for tensor in conversion.proto.graph.initializer:
        if tensor.data_location == _EXTERNAL:
            tensor.CopyFrom(onnx.numpy_helper.from_array(_array(tensor, folder), tensor.name))
    return conversion.proto


def batches(conversion: Conversion, x: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """The rows of *x* in arrays such as the graph takes."""
    size = len(x) if conversion.batch is None else conversion.batch
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        if len(rows) < size:
            rows = np.concatenate([rows, np.zeros((size - len(rows), x.shape[1]), x.dtype)])
        shape = [len(rows) if axis is ROWS else axis for axis in conversion.shape]
        yield rows.reshape(shape).astype(conversion.input_dtype)
