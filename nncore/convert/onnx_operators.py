"""
One ONNX node with its inputs -> its outputs: what each operator means for rows of numbers.

An operator stands in `_OPERATORS` under its name, those of ai.onnx.ml with their domain before it. Where all
inputs are constants, `_FOLDED` computes the result with NumPy, of a bounded size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nncore.convert import expressions as ex
from nncore.convert import flow as fl
from nncore.convert.expressions import Expression
from nncore.convert.flow import ROWS, Dims, Flow
from nncore.errors import ConversionError

Numbers = npt.NDArray[Any]

# No constant of a model has so many numbers: a small file must not ask for all memory.
_MAX_CONSTANT = 1 << 27

# onnx.TensorProto.DataType of floats; bfloat16 and float16 are taken for float32.
_FLOAT_TYPES = (1, 10, 11, 16)
_INTEGER_TYPES = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_}


@dataclass(frozen=True)
class Failure:
    """A value that cannot be had; the message says where and why."""

    message: str


@dataclass(frozen=True)
class ClassIndex:
    """The index of the greatest number of a row."""


@dataclass(frozen=True)
class ClassLabels:
    """The class of a row; labels: of all classes, by index."""

    labels: tuple[str, ...]


Value: TypeAlias = Flow | Dims | ClassIndex | ClassLabels | Failure | Numbers


@dataclass
class Node:
    """
    A node of a graph.

    where: as messages call it.  operator: its type, with the domain before it unless that is ONNX's own.
    inputs: None for those left out.  outputs: how many are named.
    labels: class labels that come to light here.
    """

    where: str
    operator: str
    inputs: list[Value | None]
    attributes: dict[str, Any]
    outputs: int
    opset: int
    labels: list[tuple[str, ...]] = field(default_factory=list)

    def has(self, index: int) -> bool:
        """Whether there is an input *index*."""
        return index < len(self.inputs) and self.inputs[index] is not None

    def value(self, index: int) -> Value:
        """Input *index*, whatever it is."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if value is None:
            raise ConversionError(f"lacks input {index}")
        return value

    def flow(self, index: int = 0) -> Flow:
        """Input *index*, which must depend on the graph's input."""
        value = self.value(index)
        if not isinstance(value, Flow):
            kind = "a constant" if isinstance(value, np.ndarray) else "no tensor of numbers"
            raise ConversionError(f"has {kind} as input {index}, where the rows were expected")
        return value

    def constant(self, index: int) -> Numbers:
        """Input *index*, which must be constant numbers."""
        value = self.value(index)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
            raise ConversionError(
                f"has an input {index} that depends on the graph's input; expected a constant"
            )
        return value

    def optional(self, index: int) -> Numbers | None:
        """Constant *index*, or None if it is left out."""
        return self.constant(index) if self.has(index) else None

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int | float):
            raise ConversionError(f"has {name} = {value!r}")
        return float(value)

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        value = self.attributes.get(name, default)
        if not isinstance(value, int):
            raise ConversionError(f"has {name} = {value!r}")
        return value

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        value = self.attributes.get(name, default)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    def numbers(self, name: str) -> Numbers | None:
        """A list of numbers as float32 array; None if it is left out."""
        value = self.attributes.get(name)
        return None if value is None else np.asarray(value, np.float32).reshape(-1)

    def axes(self, index: int) -> list[int] | None:
        """The axes: an attribute in old models, input *index* in newer ones."""
        given = self.attributes.get("axes")
        if given is None and self.has(index):
            given = self.constant(index).reshape(-1).tolist()
        return None if given is None else [int(axis) for axis in given]


_Operator: TypeAlias = Callable[[Node], Any]
_OPERATORS: dict[str, _Operator] = {}


def apply(node: Node) -> list[Value]:
    """What *node* computes: a value for each of its outputs; failures instead of errors."""
    for value in node.inputs:
        if isinstance(value, Failure):
            return [value] * node.outputs
    try:
        answer = _computed(node)
    except ConversionError as error:
        return [Failure(f"{node.where}: {error}")] * node.outputs
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        # What a malformed node made NumPy say.
        return [Failure(f"{node.where}: is malformed: {error}")] * node.outputs
    answers = list(answer) if isinstance(answer, tuple) else [answer]
    for value in answers:
        if isinstance(value, Flow) and not value.expression.origin:
            value.expression.origin = node.where
    missing = node.outputs - len(answers)
    return answers + [Failure(f"{node.where}: its further outputs are not supported")] * missing


def _computed(node: Node) -> Any:
    if node.operator not in _OPERATORS and node.operator not in _FOLDED:
        raise ConversionError("the operator is not supported")
    given = [value for value in node.inputs if value is not None]
    if node.operator in _FOLDED and given and all(isinstance(value, np.ndarray) for value in given):
        with np.errstate(all="ignore"):
            return np.asarray(_FOLDED[node.operator](node))
    if node.operator not in _OPERATORS:
        raise ConversionError("the operator is supported for constants only")
    with np.errstate(all="ignore"):
        return _OPERATORS[node.operator](node)


def _operator(*names: str) -> Callable[[_Operator], _Operator]:
    def register(function: _Operator) -> _Operator:
        for name in names:
            _OPERATORS[name] = function
        return function

    return register


def _on(x: Flow, function: Callable[..., Expression], *arguments: Any) -> Flow:
    return fl.elementwise(x, function(x.expression, *arguments))


# --- constants -----------------------------------------------------------------------------------------


def _require_size(shape: Sequence[int]) -> None:
    if math.prod(int(size) for size in shape) > _MAX_CONSTANT or any(size < 0 for size in shape):
        raise ConversionError(f"makes a constant of shape {tuple(int(size) for size in shape)}")


def _binary_fold(function: Callable[[Any, Any], Any]) -> _Operator:
    def fold(node: Node) -> Any:
        a, b = node.constant(0), node.constant(1)
        _require_size(np.broadcast_shapes(a.shape, b.shape))
        return np.asarray(function(a, b), np.result_type(a, b))

    return fold


def _divided(a: Numbers, b: Numbers) -> Numbers:
    if a.dtype.kind in "iu" and b.dtype.kind in "iu":
        if not b.all():
            raise ConversionError("divides whole numbers by zero")
        return np.trunc(a / b)
    return np.asarray(a / b)


def _matmul_fold(node: Node) -> Any:
    a, b = node.constant(0), node.constant(1)
    _require_size((*a.shape[:-1], b.shape[-1]))
    return a @ b


def _expand_fold(node: Node) -> Any:
    x, shape = node.constant(0), [int(size) for size in node.constant(1).reshape(-1)]
    _require_size(shape)
    joint = np.broadcast_shapes(x.shape, tuple(shape))
    _require_size(joint)
    return np.array(np.broadcast_to(x, joint))


def _constant_of_shape_fold(node: Node) -> Any:
    shape = [int(size) for size in node.constant(0).reshape(-1)]
    _require_size(shape)
    value = node.attributes.get("value", np.zeros(1, np.float32))
    return np.full(shape, np.asarray(value).reshape(-1)[0], np.asarray(value).dtype)


def _cast_fold(node: Node) -> Any:
    kind = node.integer("to", 1)
    wanted: Any = (
        np.float64 if kind == 11 else np.float32 if kind in _FLOAT_TYPES else _INTEGER_TYPES.get(kind)
    )
    if wanted is None:
        raise ConversionError(f"casts to element type number {kind}")
    return node.constant(0).astype(wanted)


def _slices(node: Node, rank: int) -> list[tuple[int, int, int, int]]:
    """(axis, start, end, step) of a Slice node."""
    starts, ends = node.attributes.get("starts"), node.attributes.get("ends")
    if starts is None or ends is None:
        starts, ends = node.constant(1).reshape(-1).tolist(), node.constant(2).reshape(-1).tolist()
    axes = node.axes(3) or list(range(len(starts)))
    steps = node.constant(4).reshape(-1).tolist() if node.has(4) else [1] * len(starts)
    return [
        (int(axis) % max(rank, 1), int(start), int(end), int(step))
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    ]


def _slice_fold(node: Node) -> Any:
    x = node.constant(0)
    index = [slice(None)] * x.ndim
    for axis, start, end, step in _slices(node, x.ndim):
        index[axis] = slice(start, end if end > -(1 << 60) else None, step)
    return x[tuple(index)]


def _reshape_fold(node: Node) -> Any:
    x = node.constant(0)
    target = [int(size) for size in node.constant(1).reshape(-1)] if node.has(1) else node.attributes["shape"]
    if not node.integer("allowzero", 0):
        target = [x.shape[axis] if size == 0 else size for axis, size in enumerate(target)]
    return x.reshape(target)


def _squeeze_fold(node: Node) -> Any:
    axes = node.axes(1)
    return np.squeeze(node.constant(0), None if axes is None else tuple(axes))


def _unsqueeze_fold(node: Node) -> Any:
    return np.expand_dims(node.constant(0), tuple(node.axes(1) or ()))


def _concat_fold(node: Node) -> Any:
    parts = [node.constant(index) for index in range(len(node.inputs))]
    _require_size([sum(part.size for part in parts)])
    return np.concatenate(parts, node.integer("axis", 0))


def _gather_fold(node: Node) -> Any:
    x, indices, axis = node.constant(0), node.constant(1), node.integer("axis", 0)
    _require_size([x.size // max(x.shape[axis], 1) * indices.size])
    return np.take(x, indices, axis)


_FOLDED: dict[str, _Operator] = {
    "Add": _binary_fold(np.add),
    "Sub": _binary_fold(np.subtract),
    "Mul": _binary_fold(np.multiply),
    "Div": _binary_fold(_divided),
    "Pow": _binary_fold(np.power),
    "Max": _binary_fold(np.maximum),
    "Min": _binary_fold(np.minimum),
    "Neg": lambda node: -node.constant(0),
    "Abs": lambda node: np.abs(node.constant(0)),
    "Sqrt": lambda node: np.sqrt(node.constant(0)),
    "Exp": lambda node: np.exp(node.constant(0)),
    "Log": lambda node: np.log(node.constant(0)),
    "Reciprocal": lambda node: 1 / node.constant(0),
    "Identity": lambda node: node.value(0),
    "MatMul": _matmul_fold,
    "Transpose": lambda node: np.transpose(node.constant(0), node.attributes.get("perm")),
    "Reshape": _reshape_fold,
    "Squeeze": _squeeze_fold,
    "Unsqueeze": _unsqueeze_fold,
    "Concat": _concat_fold,
    "Gather": _gather_fold,
    "Slice": _slice_fold,
    "Expand": _expand_fold,
    "ConstantOfShape": _constant_of_shape_fold,
    "Cast": _cast_fold,
    "Shape": lambda node: np.array(node.constant(0).shape, np.int64),
    "ReduceProd": lambda node: np.prod(node.constant(0), keepdims=bool(node.integer("keepdims", 1))),
}


@_operator("Constant")
def _constant(node: Node) -> Value:
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in node.attributes:
            value = node.attributes[name]
            if isinstance(value, Failure):
                raise ConversionError(value.message)
            if isinstance(value, np.ndarray):
                return value
            return np.array(value, np.float32 if "float" in name else np.int64)
    if "value_strings" in node.attributes:
        return np.array(
            [text.decode("utf-8", "replace") for text in node.attributes["value_strings"]], object
        )
    raise ConversionError("has no value that is supported")


# --- shapes --------------------------------------------------------------------------------------------


def _dims(value: Value) -> Dims:
    """*value* as integers of a shape."""
    if isinstance(value, Dims):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim <= 1:
        return Dims(tuple(int(size) for size in value.reshape(-1)), value.ndim == 0)
    raise ConversionError("computes a shape from something else than shapes")


def _settled(dims: Dims) -> Value:
    """*dims* as a constant, if the number of rows is not among them."""
    if ROWS in dims.values:
        return dims
    array = np.array(dims.values, np.int64)
    return array.reshape(()) if dims.is_scalar else array


@_operator("Shape")
def _shape(node: Node) -> Value:
    shape = node.flow().shape
    return _settled(Dims(shape[node.integer("start", 0) : node.attributes.get("end")]))


@_operator("Gather")
def _gather(node: Node) -> Value:
    source = node.value(0)
    if isinstance(source, np.ndarray) and isinstance(node.value(1), ClassIndex):
        return ClassLabels(_label_texts(source))
    if isinstance(source, Dims):
        indices = node.constant(1)
        values = tuple(source.values[int(index)] for index in indices.reshape(-1))
        return _settled(Dims(values, indices.ndim == 0))
    x, indices = node.flow(), node.constant(1)
    axis = fl.whole_row_axis(x, node.integer("axis", 0))
    expression = ex.columns(x.expression, indices)
    sizes = indices.shape
    return Flow(expression, (*x.shape[:axis], *sizes, *x.shape[axis + 1 :]), x.batch)


@_operator("Slice")
def _slice(node: Node) -> Value:
    source = node.value(0)
    if isinstance(source, Dims):
        values = source.values
        for _, start, end, step in _slices(node, 1):
            values = values[start:end:step]
        return _settled(Dims(values))
    x = node.flow()
    for axis, start, end, step in _slices(node, len(x.shape)):
        size = x.shape[axis]
        if size is ROWS:
            raise ConversionError("takes some of the rows")
        chosen = np.arange(size)[start : end if end > -(1 << 60) else None : step]
        if len(chosen) == size and step > 0:
            continue
        axis = fl.whole_row_axis(x, axis)
        expression = ex.columns(x.expression, chosen)
        x = Flow(expression, (*x.shape[:axis], expression.n, *x.shape[axis + 1 :]), x.batch)
    return x


@_operator("Concat")
def _concat(node: Node) -> Value:
    values = [node.value(index) for index in range(len(node.inputs))]
    if not any(isinstance(value, Flow) for value in values):
        parts = [_dims(value) for value in values]
        return _settled(Dims(tuple(size for part in parts for size in part.values)))
    flows = [node.flow(index) for index in range(len(values))]
    axis = fl.whole_row_axis(flows[0], node.integer("axis", 0))
    for flow in flows:
        fl.whole_row_axis(flow, axis)
    expression = ex.concatenated([flow.expression for flow in flows])
    shape = list(flows[0].shape)
    shape[axis] = expression.n
    return Flow(expression, tuple(shape), flows[0].batch)


@_operator("Reshape")
def _reshape(node: Node) -> Value:
    if isinstance(node.value(0), ClassLabels | ClassIndex):
        return node.value(0)
    target = _dims(node.value(1)) if node.has(1) else Dims(tuple(node.attributes.get("shape", ())))
    if isinstance(node.value(0), Dims):
        return node.value(0)
    return fl.reshaped(node.flow(), target.values, zero_copies=not node.integer("allowzero", 0))


@_operator("Flatten")
def _flatten(node: Node) -> Value:
    return fl.flattened(node.flow(), node.integer("axis", 1))


@_operator("Squeeze")
def _squeeze(node: Node) -> Value:
    value = node.value(0)
    if isinstance(value, Dims):
        return Dims(value.values, is_scalar=True)
    if isinstance(value, ClassLabels | ClassIndex):
        return value
    return fl.squeezed(node.flow(), node.axes(1))


@_operator("Unsqueeze")
def _unsqueeze(node: Node) -> Value:
    value = node.value(0)
    if isinstance(value, Dims):
        return Dims(value.values)
    return fl.unsqueezed(node.flow(), node.axes(1) or [0])


@_operator("Transpose")
def _transpose(node: Node) -> Value:
    return fl.transposed(node.flow(), node.attributes.get("perm"))


@_operator("Identity", "Dropout")
def _identity(node: Node) -> Value:
    if node.operator == "Dropout" and node.has(2) and node.constant(2).any():
        raise ConversionError("is in training mode")
    return node.value(0)


@_operator("Cast", "CastLike")
def _cast(node: Node) -> Value:
    value = node.value(0)
    if isinstance(value, Flow) and node.operator == "Cast" and node.integer("to", 1) not in _FLOAT_TYPES:
        raise ConversionError("rounds the numbers of a row to whole ones")
    return value


# --- arithmetic ----------------------------------------------------------------------------------------


@_operator("Gemm")
def _gemm(node: Node) -> Value:
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    is_a_transposed, is_b_transposed = node.integer("transA", 0), node.integer("transB", 0)
    if isinstance(node.value(0), Flow):
        x = fl.transposed(node.flow(0), None) if is_a_transposed else node.flow(0)
        weights = node.constant(1).T if is_b_transposed else node.constant(1)
        y = fl.times_matrix(x, _scaled(weights, alpha))
    else:
        x = fl.transposed(node.flow(1), None) if is_b_transposed else node.flow(1)
        weights = node.constant(0).T if is_a_transposed else node.constant(0)
        y = fl.matrix_times(_scaled(weights, alpha), x)
    bias = node.optional(2)
    return y if bias is None else _plus(y, _scaled(bias, beta))


def _scaled(array: Numbers, factor: float) -> Numbers:
    return array if factor == 1.0 else np.asarray(array * array.dtype.type(factor))


def _plus(y: Flow, constant: Numbers) -> Flow:
    y, shift = fl.with_constant(y, constant)
    return _on(y, ex.scale, 1.0, shift)


@_operator("MatMul")
def _matmul(node: Node) -> Value:
    a, b = node.value(0), node.value(1)
    if isinstance(a, Flow) and isinstance(b, Flow):
        raise ConversionError("multiplies two matrices that depend on the input")
    weights = node.constant(1 if isinstance(a, Flow) else 0)
    if weights.ndim > 2 and math.prod(weights.shape[:-2]) == 1:
        weights = weights.reshape(weights.shape[-2:])
    if weights.ndim == 1 and isinstance(a, Flow):
        y = fl.times_matrix(a, weights[:, np.newaxis])
        return Flow(y.expression, y.shape[:-1], y.batch)
    if weights.ndim != 2:
        raise ConversionError(f"multiplies with a constant of shape {weights.shape}")
    return fl.times_matrix(a, weights) if isinstance(a, Flow) else fl.matrix_times(weights, node.flow(1))


def _arithmetic(
    node: Node,
    both: Callable[[Expression, Expression], Expression],
    right: Callable[[Flow, Numbers], Flow],
    left: Callable[[Flow, Numbers], Flow],
) -> Value:
    """both: of two expressions.  right: of a flow and a constant after it.  left: a constant before it."""
    a, b = node.value(0), node.value(1)
    if isinstance(a, Flow) and isinstance(b, Flow):
        shape = fl.joined(a, b)
        return Flow(both(a.expression, b.expression), shape.shape, shape.batch)
    if isinstance(a, Flow):
        return right(a, node.constant(1))
    return left(node.flow(1), node.constant(0))


def _times(x: Flow, constant: Numbers) -> Flow:
    x, factor = fl.with_constant(x, constant)
    return _on(x, ex.scale, factor)


@_operator("Add", "Sum")
def _add(node: Node) -> Value:
    if len(node.inputs) != 2:
        raise ConversionError(f"adds {len(node.inputs)} tensors; two are supported")
    return _arithmetic(node, ex.add, _plus, _plus)


@_operator("Sub")
def _sub(node: Node) -> Value:
    return _arithmetic(
        node,
        ex.subtract,
        lambda x, c: _plus(x, -c),
        lambda x, c: _plus(_on(x, ex.scale, -1.0), c),
    )


@_operator("Mul")
def _mul(node: Node) -> Value:
    return _arithmetic(node, ex.multiply, _times, _times)


@_operator("Div")
def _div(node: Node) -> Value:
    return _arithmetic(
        node,
        ex.divide,
        lambda x, c: _times(x, 1.0 / c.astype(np.float64)),
        lambda x, c: _times(_on(x, ex.reciprocal), c),
    )


@_operator("Pow")
def _pow(node: Node) -> Value:
    exponent = node.constant(1)
    if exponent.size != 1:
        raise ConversionError("raises to several powers")
    return _on(node.flow(), ex.power, float(exponent.reshape(-1)[0]))


@_operator("Max", "Min")
def _max_min(node: Node) -> Value:
    if len(node.inputs) != 2:
        raise ConversionError(f"compares {len(node.inputs)} tensors; a tensor and a number are supported")
    at = 0 if isinstance(node.value(0), Flow) else 1
    bound = node.constant(1 - at)
    if bound.size != 1:
        raise ConversionError("compares with several numbers")
    value = float(bound.reshape(-1)[0])
    bounds = (value, None) if node.operator == "Max" else (None, value)
    return _on(node.flow(at), ex.clip, *bounds)


@_operator("Greater", "Less", "GreaterOrEqual", "LessOrEqual")
def _compare(node: Node) -> Value:
    is_greater = node.operator.startswith("Greater") == isinstance(node.value(0), Flow)
    at = 0 if isinstance(node.value(0), Flow) else 1
    x, bound = fl.with_constant(node.flow(at), node.constant(1 - at))
    sign = 1.0 if is_greater else -1.0
    if not node.operator.endswith("OrEqual"):
        return _on(x, lambda e: ex.activated(ex.scale(e, sign, -sign * bound), "step"))
    return _on(x, lambda e: ex.scale(ex.activated(ex.scale(e, -sign, sign * bound), "step"), -1.0, 1.0))


# --- normalization -------------------------------------------------------------------------------------


@_operator("BatchNormalization")
def _batch_normalization(node: Node) -> Value:
    if node.integer("training_mode", 0):
        raise ConversionError("is in training mode")
    x = node.flow()
    if len(x.shape) < 2:
        raise ConversionError(f"normalizes channels of {fl.shown(x.shape)}")
    gain, shift, mean, variance = (node.constant(index).astype(np.float64) for index in (1, 2, 3, 4))
    if not gain.shape == shift.shape == mean.shape == variance.shape == (x.shape[1],):
        raise ConversionError(
            f"has statistics of shape {mean.shape}; its input has shape {fl.shown(x.shape)}"
        )
    factor = gain / np.sqrt(variance + node.number("epsilon", 1e-5))
    along = (-1, *[1] * (len(x.shape) - 2))
    x = _times(x, factor.reshape(along))
    return _plus(x, (shift - mean * factor).reshape(along))


@_operator("LayerNormalization")
def _layer_normalization(node: Node) -> Value:
    x = node.flow()
    axis = node.integer("axis", -1) % len(x.shape)
    if math.prod(size or 1 for size in x.shape[axis:]) != x.n or ROWS in x.shape[axis:]:
        raise ConversionError(f"normalizes a part of the row: from axis {axis} of {fl.shown(x.shape)}")
    y = _on(x, ex.standardized, node.number("epsilon", 1e-5))
    y = _times(y, node.constant(1))
    return _plus(y, node.constant(2)) if node.has(2) else y


@_operator("ReduceMean")
def _reduce_mean(node: Node) -> Value:
    x = node.flow()
    axes = node.axes(1)
    if axes is None or len(axes) != 1:
        raise ConversionError("takes the mean over several axes")
    axis = fl.whole_row_axis(x, axes[0])
    mean = ex.helper(x.expression, "mean")
    keeps = node.integer("keepdims", 1)
    return Flow(mean, (*x.shape[:axis], *([1] if keeps else []), *x.shape[axis + 1 :]), x.batch)


@_operator("Softmax", "LogSoftmax")
def _softmax(node: Node) -> Value:
    x = node.flow()
    if node.opset >= 13:
        fl.whole_row_axis(x, node.integer("axis", -1))
    else:
        axis = node.integer("axis", 1) % len(x.shape)
        if ROWS in x.shape[axis:] or math.prod(size or 1 for size in x.shape[axis:]) != x.n:
            raise ConversionError(f"works on a part of the row: from axis {axis} of {fl.shown(x.shape)}")
    return _on(x, ex.softmax, node.operator == "LogSoftmax")


# --- activations ---------------------------------------------------------------------------------------

_PLAIN = {
    "Relu": "relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "Softplus": "softplus",
    "Softsign": "softsign",
    "Mish": "mish",
    "HardSwish": "hard_swish",
    "Neg": "negative",
    "Abs": "absolute",
    "Reciprocal": "reciprocal",
    "Sqrt": "sqrt",
    "Exp": "exp",
    "Log": "log",
    "Erf": "erf",
}


@_operator(*_PLAIN)
def _plain(node: Node) -> Value:
    return _on(node.flow(), ex.ELEMENTWISE[_PLAIN[node.operator]])


# Operator -> activation, default of its attribute alpha.
_WITH_ALPHA = {"LeakyRelu": ("leaky_relu", 0.01), "Elu": ("elu", 1.0), "Celu": ("celu", 1.0)}


@_operator(*_WITH_ALPHA)
def _with_alpha(node: Node) -> Value:
    name, default = _WITH_ALPHA[node.operator]
    return _on(node.flow(), ex.activated, name, node.number("alpha", default))


@_operator("PRelu")
def _prelu(node: Node) -> Value:
    x, slope = fl.with_constant(node.flow(), node.constant(1))
    return _on(x, ex.activated, "prelu", slope)


@_operator("Selu")
def _selu(node: Node) -> Value:
    alpha = node.number("alpha", 1.6732632423543772)
    return _on(node.flow(), ex.selu, alpha, node.number("gamma", 1.0507009873554805))


@_operator("Gelu")
def _gelu(node: Node) -> Value:
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    kind = node.text("approximate", "none")
    if kind not in names:
        raise ConversionError(f"has approximate = {kind!r}")
    return _on(node.flow(), ex.activated, names[kind])


@_operator("Swish")
def _swish(node: Node) -> Value:
    return _on(node.flow(), ex.swish, node.number("alpha", 1.0))


@_operator("HardSigmoid")
def _hard_sigmoid(node: Node) -> Value:
    return _on(node.flow(), ex.hard_sigmoid, node.number("alpha", 0.2), node.number("beta", 0.5))


@_operator("ThresholdedRelu")
def _thresholded_relu(node: Node) -> Value:
    return _on(node.flow(), ex.thresholded_relu, node.number("alpha", 1.0))


@_operator("Clip")
def _clip(node: Node) -> Value:
    bounds = []
    for index, name in ((1, "min"), (2, "max")):
        bound = node.optional(index)
        if bound is not None and bound.size != 1:
            raise ConversionError("has several bounds")
        given = node.attributes.get(name)
        bounds.append(given if bound is None else float(bound.reshape(-1)[0]))
    return _on(node.flow(), ex.clip, *bounds)


# --- ai.onnx.ml: what scikit-learn's models end in -------------------------------------------------------

_ML = "ai.onnx.ml."


def _label_texts(values: Sequence[Any] | Numbers) -> tuple[str, ...]:
    return tuple(
        value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
        for value in (values.reshape(-1).tolist() if isinstance(values, np.ndarray) else values)
    )


def _labels_in(node: Node, *names: str) -> tuple[str, ...] | None:
    for name in names:
        if node.attributes.get(name):
            return _label_texts(node.attributes[name])
    return None


@_operator(_ML + "Scaler")
def _scaler(node: Node) -> Value:
    x = node.flow()
    offset, factor = node.numbers("offset"), node.numbers("scale")
    offset = np.zeros(1, np.float32) if offset is None else offset
    factor = np.ones(1, np.float32) if factor is None else factor
    shift = -offset.astype(np.float64) * factor
    return _plus(_times(x, factor), shift)


@_operator(_ML + "LinearRegressor")
def _linear_regressor(node: Node) -> Value:
    if node.text("post_transform", "NONE") != "NONE":
        raise ConversionError(f"has post_transform {node.text('post_transform', '')}")
    return _linear(node, node.integer("targets", 1))


def _linear(node: Node, outputs: int) -> Flow:
    x = node.flow()
    coefficients, intercepts = node.numbers("coefficients"), node.numbers("intercepts")
    if coefficients is None or coefficients.size != outputs * x.n:
        raise ConversionError(f"has coefficients that are not {outputs} x {x.n}")
    return fl.times_matrix(x, coefficients.reshape(outputs, x.n).T, intercepts)


@_operator(_ML + "LinearClassifier")
def _linear_classifier(node: Node) -> Value:
    labels = _labels_in(node, "classlabels_strings", "classlabels_ints")
    if labels is None:
        raise ConversionError("has no class labels")
    node.labels.append(labels)
    scores = _linear(node, len(labels))
    post = node.text("post_transform", "NONE")
    if post == "SOFTMAX":
        scores = _on(scores, ex.softmax)
    elif post == "LOGISTIC":
        scores = _on(scores, ex.activated, "sigmoid")
    elif post != "NONE":
        raise ConversionError(f"has post_transform {post}")
    return ClassLabels(labels), scores  # type: ignore[return-value]


@_operator(_ML + "Normalizer")
def _normalizer(node: Node) -> Value:
    norm = node.text("norm", "MAX")
    x = node.flow()
    if norm == "L1" and ex.sums_to_one(x.expression):
        return x
    raise ConversionError(f"divides each row by its {norm} norm, which is no layer of a perceptron")


@_operator(_ML + "Binarizer")
def _binarizer(node: Node) -> Value:
    threshold = node.number("threshold", 0.0)
    return _on(node.flow(), lambda x: ex.activated(ex.scale(x, 1.0, -threshold), "step"))


@_operator("ArgMax")
def _argmax(node: Node) -> Value:
    x = node.flow()
    fl.whole_row_axis(x, node.integer("axis", 0))
    if node.integer("select_last_index", 0):
        raise ConversionError("answers the last of equal numbers")
    return ClassIndex()


@_operator(_ML + "ArrayFeatureExtractor")
def _array_feature_extractor(node: Node) -> Value:
    source = node.value(0)
    if isinstance(node.value(1), ClassIndex) and isinstance(source, np.ndarray):
        return ClassLabels(_label_texts(source))
    x, indices = node.flow(), node.constant(1)
    fl.require_whole_row(x, len(x.shape) - 1)
    expression = ex.columns(x.expression, indices)
    return Flow(expression, (*x.shape[:-1], expression.n), x.batch)


@_operator(_ML + "ZipMap")
def _zip_map(node: Node) -> Value:
    labels = _labels_in(node, "classlabels_strings", "classlabels_int64s")
    if labels is not None:
        node.labels.append(labels)
    return node.flow()


@_operator(_ML + "LabelEncoder")
def _label_encoder(node: Node) -> Value:
    value = node.value(0)
    if not isinstance(value, ClassLabels):
        raise ConversionError("encodes something else than class labels")
    keys = _labels_in(node, "keys_strings", "keys_int64s", "keys_floats")
    values = _labels_in(node, "values_strings", "values_int64s", "values_floats")
    if keys is None or values is None or len(keys) != len(values):
        raise ConversionError("has no keys and values for labels")
    names = dict(zip(keys, values, strict=True))
    return ClassLabels(tuple(names.get(label, label) for label in value.labels))
