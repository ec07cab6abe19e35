"""
One ONNX node with its inputs -> its outputs: what each operator means for rows of numbers.

An operator stands in `_OPERATORS` under its name, those of ai.onnx.ml with their domain before it. Where all
inputs are constants, `nncore.convert.onnx_constants` computes the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from nncore.convert import expressions as ex
from nncore.convert import flow as fl
from nncore.convert.expressions import Expression
from nncore.convert.flow import ROWS, Dims, Flow
from nncore.convert.onnx_constants import FOLDED, slices
from nncore.convert.onnx_node import FLOAT_TYPES, ClassIndex, ClassLabels, Failure, Node, Numbers, Value
from nncore.errors import ConversionError

_Operator: TypeAlias = Callable[[Node], Any]
_OPERATORS: dict[str, _Operator] = {}
_CONTROL_FLOW = ("If", "Loop", "Scan")


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
    if node.operator in _CONTROL_FLOW:
        raise ConversionError("is control flow: which nodes run depends on numbers; a model is a fixed chain")
    if node.operator not in _OPERATORS and node.operator not in FOLDED:
        raise ConversionError("the operator is not supported")
    given = [value for value in node.inputs if value is not None]
    if node.operator in FOLDED and given and all(isinstance(value, np.ndarray) for value in given):
        with np.errstate(all="ignore"):
            return np.asarray(FOLDED[node.operator](node))
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
        for _, start, end, step in slices(node, 1):
            values = values[start:end:step]
        return _settled(Dims(values))
    x = node.flow()
    for axis, start, end, step in slices(node, len(x.shape)):
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
    if isinstance(value, Flow) and node.operator == "Cast" and node.integer("to", 1) not in FLOAT_TYPES:
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
    at = 0 if isinstance(node.value(0), Flow) else 1
    is_more = node.operator.startswith("Greater") == (at == 0)
    x, bound = fl.with_constant(node.flow(at), node.constant(1 - at))
    return _on(x, ex.compared, bound, is_more, node.operator.endswith("OrEqual"))


@_operator("Where")
def _where(node: Node) -> Value:
    condition = node.flow(0)
    branches = []
    for index in (1, 2):
        value = node.value(index)
        branches.append(fl.branch(value if isinstance(value, Flow) else node.constant(index), condition))
    return _on(condition, ex.chosen, *branches)


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
