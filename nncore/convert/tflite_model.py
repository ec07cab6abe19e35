"""
TFLite file -> Mlp: chains of fully connected layers in float32.

Read by the schema that LiteRT's own package has (ai-edge-litert), which only parses. Quantized models are
refused: what they compute is not what their weights say.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nncore.convert import expressions as ex
from nncore.convert import flow as fl
from nncore.convert import lowering
from nncore.convert.expressions import Expression
from nncore.convert.flow import ROWS, Dims, Flow, input_flow
from nncore.errors import ConversionError
from nncore.model import Mlp

Numbers = npt.NDArray[Any]

IDENTIFIER = b"TFL3"
_FLOAT32 = 0
_DTYPES: dict[int, Any] = {0: np.float32, 1: np.float16, 2: np.int32, 4: np.int64, 10: np.float64}
_MOST_PARTS = 100_000


def from_tflite(
    path: str | os.PathLike[str],
    *,
    dtype: npt.DTypeLike = "float32",
    labels: Sequence[str] | None = None,
    feature_names: Sequence[str] | None = None,
    name: str | None = None,
) -> Mlp:
    """
    The model in the TFLite file *path*, if it is a chain of fully connected layers in float32.

    Raises ConversionError, naming the operator and what is wrong with it; OSError from the disk.
    """
    path = Path(path)
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ModuleNotFoundError:
        raise ConversionError("ai-edge-litert is not installed: pip install 'nnserve[tflite]'") from None
    content = path.read_bytes()
    if content[4:8] != IDENTIFIER:
        raise ConversionError(f"{path.name} is not a TFLite file: it does not begin like one")
    try:
        flow, output = _walked(schema, content)
    except ConversionError:
        raise
    except Exception as error:  # whatever a torn buffer makes flatbuffers and NumPy say
        what = f"{type(error).__name__}: {error}"
        raise ConversionError(f"{path.name} is not a TFLite file that is understood ({what})") from None
    layers = lowering.layers_of(output.expression, dtype)
    return Mlp(layers, labels, feature_names, name or path.stem, fl.kept_shape(flow))


@dataclass(frozen=True)
class _Operator:
    """An operator: its inputs (None for those left out) and its options' table, if it has one."""

    schema: Any
    inputs: list[Any]
    proto: Any

    def options(self, kind: str) -> Any:
        """The options as *kind*; None if there are none."""
        table = self.proto.BuiltinOptions()
        if table is None:
            return None
        options = getattr(self.schema, kind)()
        options.Init(table.Bytes, table.Pos)
        return options

    def flow(self, index: int = 0) -> Flow:
        """Input *index*, which must depend on the model's input."""
        value = self.inputs[index]
        if not isinstance(value, Flow):
            raise ConversionError(f"has a constant as input {index}, where the rows were expected")
        return value

    def constant(self, index: int) -> Numbers:
        """Input *index*, which must be a constant."""
        value = self.inputs[index]
        if not isinstance(value, np.ndarray):
            raise ConversionError(f"has input {index} depend on the model's input; expected a constant")
        return value


def _walked(schema: Any, content: bytes) -> tuple[Flow, Flow]:
    """The input of the model in *content* and its output."""
    model = schema.Model.GetRootAs(content, 0)
    if model.SubgraphsLength() != 1:
        raise ConversionError(f"has {model.SubgraphsLength()} subgraphs; expected one")
    graph = model.Subgraphs(0)
    if graph.InputsLength() != 1 or graph.OutputsLength() != 1:
        raise ConversionError(
            f"has {graph.InputsLength()} inputs and {graph.OutputsLength()} outputs; expected one each"
        )
    if max(graph.TensorsLength(), graph.OperatorsLength(), model.BuffersLength()) > _MOST_PARTS:
        raise ConversionError("has too many parts")
    values: dict[int, Any] = {}
    for index in range(graph.TensorsLength()):
        array = _constant(model, graph.Tensors(index))
        if array is not None:
            values[index] = array
    source = graph.Tensors(graph.Inputs(0))
    if source.Type() != _FLOAT32:
        raise ConversionError("takes no float32; quantized models are not supported")
    signature = source.ShapeSignatureAsNumpy() if source.ShapeSignatureLength() else source.ShapeAsNumpy()
    shape = [None if size < 0 else int(size) for size in signature]
    flow = input_flow(shape, "the model's input")
    values[graph.Inputs(0)] = flow
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    for index in range(graph.OperatorsLength()):
        proto = graph.Operators(index)
        code = model.OperatorCodes(proto.OpcodeIndex())
        name = names.get(max(code.BuiltinCode(), code.DeprecatedBuiltinCode()), "?")
        where = f"operator {index} ({name})"
        given = [values.get(i) if i >= 0 else None for i in map(int, proto.InputsAsNumpy())]
        try:
            if name not in _OPERATORS:
                raise ConversionError("the operator is not supported")
            answer = _OPERATORS[name](_Operator(schema, given, proto))
        except ConversionError as error:
            raise ConversionError(f"{where}: {error}") from None
        if isinstance(answer, Flow) and not answer.expression.origin:
            answer.expression.origin = where
        values[proto.Outputs(0)] = answer
    output = values.get(graph.Outputs(0))
    if not isinstance(output, Flow):
        raise ConversionError("has an output that does not depend on its input")
    return flow, output


def _constant(model: Any, tensor: Any) -> Numbers | None:
    """The numbers of a tensor that has a buffer of its own; None for others."""
    buffer = model.Buffers(tensor.Buffer())
    if buffer is None or buffer.DataLength() == 0:
        return None
    kind = tensor.Type()
    quantization = tensor.Quantization()
    if kind not in _DTYPES or (quantization is not None and quantization.ScaleLength()):
        name = (tensor.Name() or b"?").decode("utf-8", "replace")
        raise ConversionError(f"tensor {name!r} is quantized; only float32 models are supported")
    shape = [int(size) for size in tensor.ShapeAsNumpy()] if tensor.ShapeLength() else []
    element = np.dtype(_DTYPES[kind]).newbyteorder("<")
    content = buffer.DataAsNumpy().tobytes()
    if len(content) != math.prod(shape) * element.itemsize:
        raise ConversionError(f"a tensor of shape {tuple(shape)} has {len(content)} bytes")
    return np.frombuffer(content, element).reshape(shape)


# Operators

_Function: TypeAlias = Callable[[_Operator], Any]


def _on(x: Flow, function: Callable[..., Expression], *arguments: Any) -> Flow:
    return fl.elementwise(x, function(x.expression, *arguments))


def _plus(x: Flow, constant: Numbers) -> Flow:
    x, shift = fl.with_constant(x, constant)
    return _on(x, ex.scale, 1.0, shift)


def _times(x: Flow, constant: Numbers) -> Flow:
    x, factor = fl.with_constant(x, constant)
    return _on(x, ex.scale, factor)


def _fused(x: Flow, code: int) -> Flow:
    """x after a fused activation: ActivationFunctionType of the schema."""
    if code == 0:
        return x
    if code == 2:
        return _on(x, ex.clip, -1.0, 1.0)
    names = {1: "relu", 3: "relu6", 4: "tanh"}
    if code not in names:
        raise ConversionError(f"has fused activation number {code}, which is not supported")
    return _on(x, ex.activated, names[code])


def _fully_connected(o: _Operator) -> Flow:
    options = o.options("FullyConnectedOptions")
    if options is not None and options.WeightsFormat() != 0:
        raise ConversionError("has shuffled weights")
    x = o.flow(0)
    weights = o.constant(1)
    if len(x.shape) > 2:  # it flattens by itself
        x = fl.reshaped(x, [ROWS if ROWS in x.shape else 1, x.n], zero_copies=False)
    y = fl.times_matrix(x, weights.T)
    if len(o.inputs) > 2 and o.inputs[2] is not None:
        y = _plus(y, o.constant(2))
    return _fused(y, options.FusedActivationFunction() if options is not None else 0)


def _arithmetic(kind: str, both: Any, right: Any, left: Any) -> _Function:
    def apply(o: _Operator) -> Flow:
        a, b = o.inputs[0], o.inputs[1]
        if isinstance(a, Flow) and isinstance(b, Flow):
            shape = fl.joined(a, b)
            y = Flow(both(a.expression, b.expression), shape.shape, shape.batch)
        elif isinstance(a, Flow):
            y = right(a, o.constant(1))
        else:
            y = left(o.flow(1), o.constant(0))
        options = o.options(kind)
        return _fused(y, options.FusedActivationFunction() if options is not None else 0)

    return apply


def _reshape(o: _Operator) -> Flow:
    x = o.flow(0)
    if len(o.inputs) > 1 and isinstance(o.inputs[1], Dims):
        return fl.reshaped(x, o.inputs[1].values, zero_copies=False)
    if len(o.inputs) > 1 and isinstance(o.inputs[1], np.ndarray):
        target = o.inputs[1].reshape(-1)
    else:
        options = o.options("ReshapeOptions")
        if options is None or not options.NewShapeLength():
            raise ConversionError("computes its shape")
        target = options.NewShapeAsNumpy()
    return fl.reshaped(x, [int(size) for size in target], zero_copies=False)


def _shape(o: _Operator) -> Dims:
    return Dims(o.flow().shape)


def _strided_slice(o: _Operator) -> Any:
    """A part of a shape: the number of rows, most often."""
    source = o.inputs[0]
    options = o.options("StridedSliceOptions")
    if not isinstance(source, Dims) or options is None or options.EllipsisMask() or options.NewAxisMask():
        raise ConversionError("takes a part of the rows")
    begin, end, stride = (int(o.constant(index).reshape(-1)[0]) for index in (1, 2, 3))
    first = None if options.BeginMask() & 1 else begin
    if options.ShrinkAxisMask() & 1:
        return Dims((source.values[begin],), is_scalar=True)
    return Dims(source.values[first : None if options.EndMask() & 1 else end : stride])


def _pack(o: _Operator) -> Dims:
    """Numbers of a shape, one after another."""
    sizes: list[int | None] = []
    for value in o.inputs:
        if isinstance(value, Dims):
            sizes += value.values
        elif isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind == "i":
            sizes.append(int(value.reshape(-1)[0]))
        else:
            raise ConversionError("stacks something else than sizes")
    return Dims(tuple(sizes))


def _mean(o: _Operator) -> Flow:
    x = o.flow()
    axes = o.constant(1).reshape(-1)
    if axes.size != 1:
        raise ConversionError("takes the mean over several axes")
    axis = fl.whole_row_axis(x, int(axes[0]))
    options = o.options("ReducerOptions")
    kept = (1,) if options is not None and options.KeepDims() else ()
    mean = ex.helper(x.expression, "mean")
    return Flow(mean, (*x.shape[:axis], *kept, *x.shape[axis + 1 :]), x.batch)


def _squared_difference(o: _Operator) -> Flow:
    a, b = o.flow(0), o.flow(1)
    shape = fl.joined(a, b)
    return Flow(ex.power(ex.subtract(a.expression, b.expression), 2.0), shape.shape, shape.batch)


def _squeeze(o: _Operator) -> Flow:
    options = o.options("SqueezeOptions")
    axes = None
    if options is not None and options.SqueezeDimsLength():
        axes = [int(axis) for axis in options.SqueezeDimsAsNumpy()]
    return fl.squeezed(o.flow(), axes)


def _softmax(o: _Operator) -> Flow:
    x = o.flow()
    fl.whole_row_axis(x, -1)
    options = o.options("SoftmaxOptions")
    beta = options.Beta() if options is not None else 1.0
    return _on(x, lambda e: ex.softmax(ex.scale(e, beta)))


def _log_softmax(o: _Operator) -> Flow:
    x = o.flow()
    fl.whole_row_axis(x, -1)
    return _on(x, ex.softmax, True)


def _leaky_relu(o: _Operator) -> Flow:
    options = o.options("LeakyReluOptions")
    return _on(o.flow(), ex.activated, "leaky_relu", options.Alpha() if options is not None else 0.0)


def _prelu(o: _Operator) -> Flow:
    x, slope = fl.with_constant(o.flow(), o.constant(1))
    return _on(x, ex.activated, "prelu", slope)


def _gelu(o: _Operator) -> Flow:
    options = o.options("GeluOptions")
    name = "gelu_tanh" if options is not None and options.Approximate() else "gelu"
    return _on(o.flow(), ex.activated, name)


def _bound(is_upper: bool) -> _Function:
    def apply(o: _Operator) -> Flow:
        at = 0 if isinstance(o.inputs[0], Flow) else 1
        bound = o.constant(1 - at)
        if bound.size != 1:
            raise ConversionError("compares with several numbers")
        value = float(bound.reshape(-1)[0])
        return _on(o.flow(at), ex.clip, *((None, value) if is_upper else (value, None)))

    return apply


def _plain(name: str) -> _Function:
    return lambda o: _on(o.flow(), ex.ELEMENTWISE[name])


_OPERATORS: dict[str, _Function] = {
    "FULLY_CONNECTED": _fully_connected,
    "ADD": _arithmetic("AddOptions", ex.add, _plus, _plus),
    "SUB": _arithmetic(
        "SubOptions",
        ex.subtract,
        lambda x, c: _plus(x, -c),
        lambda x, c: _plus(_on(x, ex.scale, -1.0), c),
    ),
    "MUL": _arithmetic("MulOptions", ex.multiply, _times, _times),
    "DIV": _arithmetic(
        "DivOptions",
        ex.divide,
        lambda x, c: _times(x, 1.0 / c.astype(np.float64)),
        lambda x, c: _times(_on(x, ex.reciprocal), c),
    ),
    "RESHAPE": _reshape,
    "SQUEEZE": _squeeze,
    "SHAPE": _shape,
    "STRIDED_SLICE": _strided_slice,
    "PACK": _pack,
    "MEAN": _mean,
    "SQUARED_DIFFERENCE": _squared_difference,
    "SOFTMAX": _softmax,
    "LOG_SOFTMAX": _log_softmax,
    "LEAKY_RELU": _leaky_relu,
    "PRELU": _prelu,
    "GELU": _gelu,
    "MAXIMUM": _bound(is_upper=False),
    "MINIMUM": _bound(is_upper=True),
    "RELU_N1_TO_1": lambda o: _on(o.flow(), ex.clip, -1.0, 1.0),
    "ELU": lambda o: _on(o.flow(), ex.activated, "elu", 1.0),
    "RSQRT": lambda o: _on(o.flow(), ex.power, -0.5),
    "SQUARE": lambda o: _on(o.flow(), ex.power, 2.0),
    **{
        name: _plain(ours)
        for name, ours in {
            "RELU": "relu",
            "RELU6": "relu6",
            "LOGISTIC": "sigmoid",
            "TANH": "tanh",
            "HARD_SWISH": "hard_swish",
            "NEG": "negative",
            "ABS": "absolute",
            "EXP": "exp",
            "LOG": "log",
            "SQRT": "sqrt",
        }.items()
    },
}
