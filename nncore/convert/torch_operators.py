"""
One operation of PyTorch with its arguments -> its result, by the names of torch.nn.functional and ATen.

Arguments come by name, as `SIGNATURES` has them. A value is a `Flow`, an array (parameters), a number, a
list, or `BATCH`: the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nncore.convert import expressions as ex
from nncore.convert import flow as fl
from nncore.convert.expressions import Expression
from nncore.convert.flow import ROWS, Flow
from nncore.errors import ConversionError

Numbers = npt.NDArray[Any]
Arguments: TypeAlias = Mapping[str, Any]


class _Batch:
    """The number of rows."""

    def __repr__(self) -> str:
        return "rows"


BATCH = _Batch()

_Operation: TypeAlias = Callable[[Arguments], Any]
_OPERATIONS: dict[str, _Operation] = {}
SIGNATURES: dict[str, tuple[str, ...]] = {}


def apply(name: str, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
    """The result of operation *name*; keywords win over what the position says."""
    name = name.removesuffix("_") if name.removesuffix("_") in _OPERATIONS else name
    if name not in _OPERATIONS:
        raise ConversionError("the operation is not supported")
    names = SIGNATURES[name]
    if len(arguments) > len(names):
        raise ConversionError(f"has {len(arguments)} arguments; at most {len(names)} are understood")
    given = dict(zip(names, arguments, strict=False)) | dict(keywords)
    for other, ours in _OTHER_NAMES.items():
        if other in given and ours in names:
            given[ours] = given.pop(other)
    try:
        with np.errstate(all="ignore"):
            return _OPERATIONS[name](given)
    except ConversionError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise ConversionError(f"has arguments that are not understood: {error}") from None


def as_output(answer: Any) -> Flow:
    """What a module or program returns: one tensor that depends on its input."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, Flow):
        raise ConversionError("the module returns something else than one tensor that depends on its input")
    return answer


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Prefix every ConversionError inside the block with *where*."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{where}: {error}") from None


_OTHER_NAMES = {"self": "input", "x": "input", "tensor": "input"}


def _operation(signature: str, *names: str) -> Callable[[_Operation], _Operation]:
    def register(function: _Operation) -> _Operation:
        for name in names:
            _OPERATIONS[name] = function
            SIGNATURES[name] = tuple(signature.split())
        return function

    return register


def _flow(a: Arguments, name: str = "input") -> Flow:
    value = a[name]
    if not isinstance(value, Flow):
        raise ConversionError(f"has a constant as {name}, where the rows were expected")
    return value


def _array(a: Arguments, name: str) -> Numbers:
    value = a[name]
    if isinstance(value, Flow) or value is None:
        raise ConversionError(f"has {name} depend on the input; expected a parameter")
    return np.asarray(value)


def _number(a: Arguments, name: str, default: float) -> float:
    value = a.get(name)
    return default if value is None else float(value)


def _on(x: Flow, function: Callable[..., Expression], *arguments: Any) -> Flow:
    return fl.elementwise(x, function(x.expression, *arguments))


# --- layers ----------------------------------------------------------------------------------------------


@_operation("input weight bias", "linear")
def _linear(a: Arguments) -> Any:
    y = fl.times_matrix(_flow(a), _array(a, "weight").T)
    return y if a.get("bias") is None else _plus(y, _array(a, "bias"))


@_operation("input other", "matmul", "mm", "__matmul__")
def _matmul(a: Arguments) -> Any:
    if not isinstance(a["input"], Flow):
        return fl.matrix_times(_array(a, "input"), _flow(a, "other"))
    other = _array(a, "other")
    if other.ndim == 1:
        y = fl.times_matrix(_flow(a), other[:, np.newaxis])
        return Flow(y.expression, y.shape[:-1], y.batch)
    return fl.times_matrix(_flow(a), other)


@_operation("bias input other beta alpha", "addmm")
def _addmm(a: Arguments) -> Any:
    if _number(a, "beta", 1.0) != 1.0 or _number(a, "alpha", 1.0) != 1.0:
        raise ConversionError("has factors")
    if "mat1" in a:  # ATen's own names
        a = {"bias": a["input"], "input": a["mat1"], "other": a["mat2"]}
    return _plus(fl.times_matrix(_flow(a), _array(a, "other")), _array(a, "bias"))


@_operation("input running_mean running_var weight bias training momentum eps", "batch_norm")
@_operation("input weight bias running_mean running_var momentum eps", "_native_batch_norm_legit_no_training")
def _batch_norm(a: Arguments) -> Any:
    x = _flow(a)
    if a.get("running_mean") is None or a.get("running_var") is None:
        raise ConversionError("keeps no running statistics, so that rows depend on their batch")
    mean, variance = (_array(a, name).astype(np.float64) for name in ("running_mean", "running_var"))
    if len(x.shape) < 2 or x.shape[1] != mean.size:
        raise ConversionError(
            f"has statistics of {mean.size} features; its input has shape {fl.shown(x.shape)}"
        )
    gain = np.ones(mean.size) if a.get("weight") is None else _array(a, "weight").astype(np.float64)
    shift = np.zeros(mean.size) if a.get("bias") is None else _array(a, "bias").astype(np.float64)
    factor = gain / np.sqrt(variance + _number(a, "eps", 1e-5))
    along = (-1, *[1] * (len(x.shape) - 2))
    return _plus(_times(x, factor.reshape(along)), (shift - mean * factor).reshape(along))


@_operation("input normalized_shape weight bias eps", "layer_norm", "native_layer_norm")
def _layer_norm(a: Arguments) -> Any:
    x = _flow(a)
    shape = [int(size) for size in a["normalized_shape"]]
    if math.prod(shape) != x.n or list(x.shape[len(x.shape) - len(shape) :]) != shape:
        raise ConversionError(f"normalizes {tuple(shape)} of {fl.shown(x.shape)}, which is not the whole row")
    y = _on(x, ex.standardized, _number(a, "eps", 1e-5))
    if a.get("weight") is not None:
        y = _times(y, _array(a, "weight"))
    return y if a.get("bias") is None else _plus(y, _array(a, "bias"))


@_operation("input dim _stacklevel dtype", "softmax", "_softmax", "special_softmax")
def _softmax(a: Arguments) -> Any:
    x = _flow(a)
    dim = a.get("dim")
    if dim is None:  # what torch itself takes, with a warning, for rows of numbers
        dim = 1 if len(x.shape) == 2 else -1
    fl.whole_row_axis(x, int(dim))
    return _on(x, ex.softmax)


@_operation("input dim _stacklevel dtype", "log_softmax", "_log_softmax", "special_log_softmax")
def _log_softmax(a: Arguments) -> Any:
    x = _softmax(a)
    return fl.elementwise(x, ex.softmax(x.expression.operands[0], True))


@_operation("input dim _stacklevel dtype", "softmin")
def _softmin(a: Arguments) -> Any:
    return _softmax(dict(a) | {"input": _on(_flow(a), ex.scale, -1.0)})


@_operation(
    "input p training inplace",
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("feature_dropout", "native_dropout"),
)
@_operation("input memory_format", "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "identity")
def _unchanged(a: Arguments) -> Any:
    return a["input"]


@_operation("input dtype layout device", "to", "_to_copy", "float", "double", "type_as")
def _converted(a: Arguments) -> Any:
    return _flow(a)


# --- shapes ----------------------------------------------------------------------------------------------


def _sizes(values: Any) -> list[int | None]:
    values = values if isinstance(values, Sequence) else [values]
    return [ROWS if size is BATCH else int(size) for size in values]


@_operation("input start_dim end_dim", "flatten")
def _flatten(a: Arguments) -> Any:
    x = _flow(a)
    rank = len(x.shape)
    start, end = int(a.get("start_dim", 0)) % rank, int(a.get("end_dim", -1)) % rank
    joined = x.shape[start : end + 1]
    if ROWS in joined and math.prod(size or 1 for size in joined) != 1 and len(joined) > 1:
        raise ConversionError(f"flattens the rows of {fl.shown(x.shape)}")
    size = ROWS if ROWS in joined else math.prod(size or 1 for size in joined)
    return Flow(x.expression, (*x.shape[:start], size, *x.shape[end + 1 :]), x.batch)


@_operation("input size", "view", "reshape", "_unsafe_view", "view_copy", "unsafe_view")
def _view(a: Arguments) -> Any:
    size = a.get("size", a.get("shape"))
    if isinstance(a["input"], np.ndarray):
        return a["input"].reshape(_sizes(size))
    return fl.reshaped(_flow(a), _sizes(size), zero_copies=False)


@_operation("input dim sizes", "unflatten")
def _unflatten(a: Arguments) -> Any:
    x = _flow(a)
    axis = int(a["dim"]) % len(x.shape)
    sizes = _sizes(a.get("sizes", a.get("unflattened_size")))
    return fl.reshaped(x, [*x.shape[:axis], *sizes, *x.shape[axis + 1 :]], zero_copies=False)


@_operation("input dim", "squeeze")
def _squeeze(a: Arguments) -> Any:
    dim = a.get("dim")
    axes = None if dim is None else [int(d) for d in (dim if isinstance(dim, Sequence) else [dim])]
    x = _flow(a)
    kept = axes if axes is None else [axis for axis in axes if x.shape[axis] == 1]
    return fl.squeezed(x, kept)


@_operation("input dim", "unsqueeze")
def _unsqueeze(a: Arguments) -> Any:
    x = _flow(a)
    return fl.unsqueezed(x, [int(a["dim"]) % (len(x.shape) + 1)])


@_operation("input", "t", "numpy_T")
@_operation("input dim0 dim1", "transpose")
def _transpose(a: Arguments) -> Any:
    x = a["input"]
    rank = len(x.shape)
    order = list(range(rank))
    first, second = int(a.get("dim0", 0)) % rank, int(a.get("dim1", rank - 1)) % rank
    order[first], order[second] = order[second], order[first]
    return x.transpose(order) if isinstance(x, np.ndarray) else fl.transposed(_flow(a), order)


@_operation("input dims", "permute")
def _permute(a: Arguments) -> Any:
    order = [int(axis) for axis in a["dims"]]
    x = a["input"]
    return x.transpose(order) if isinstance(x, np.ndarray) else fl.transposed(_flow(a), order)


@_operation("input dim", "size", "sym_size")
def _size(a: Arguments) -> Any:
    x = a["input"]
    sizes = tuple(BATCH if size is ROWS else size for size in x.shape)
    return sizes if a.get("dim") is None else sizes[int(a["dim"])]


@_operation("input index", "getitem")
def _getitem(a: Arguments) -> Any:
    source, index = a["input"], a["index"]
    if isinstance(source, Flow):
        if index == 0:  # of an operation with several results
            return source
        raise ConversionError("picks a part of the rows")
    return source[index]


@_operation("tensors dim", "cat", "concat", "concatenate")
def _cat(a: Arguments) -> Any:
    flows = [value for value in a.get("tensors", a.get("input")) if isinstance(value, Flow)]
    if len(flows) != len(a.get("tensors", a.get("input"))):
        raise ConversionError("joins the rows with constants")
    axis = fl.whole_row_axis(flows[0], int(a.get("dim", 0)))
    for flow in flows:
        fl.whole_row_axis(flow, axis)
    expression = ex.concatenated([flow.expression for flow in flows])
    shape = list(flows[0].shape)
    shape[axis] = expression.n
    return Flow(expression, tuple(shape), flows[0].batch)


# --- arithmetic ------------------------------------------------------------------------------------------


def _plus(x: Flow, constant: Any) -> Flow:
    x, shift = fl.with_constant(x, np.asarray(constant))
    return _on(x, ex.scale, 1.0, shift)


def _times(x: Flow, constant: Any) -> Flow:
    x, factor = fl.with_constant(x, np.asarray(constant))
    return _on(x, ex.scale, factor)


def _binary(a: Arguments, both: Callable[..., Expression], right: Any, left: Any, constants: Any) -> Any:
    first, second = a["input"], a["other"]
    if first is BATCH or second is BATCH:  # not ==, which an array answers number by number
        raise ConversionError("computes with the number of rows")
    if isinstance(first, Flow) and isinstance(second, Flow):
        shape = fl.joined(first, second)
        return Flow(both(first.expression, second.expression), shape.shape, shape.batch)
    if isinstance(first, Flow):
        return right(first, np.asarray(second, np.float64))
    if isinstance(second, Flow):
        return left(second, np.asarray(first, np.float64))
    return constants(np.asarray(first), np.asarray(second))


@_operation("input other alpha", "add", "__add__", "__radd__", "iadd")
def _add(a: Arguments) -> Any:
    _require_plain(a)
    return _binary(a, ex.add, _plus, _plus, np.add)


@_operation("input other alpha", "sub", "subtract", "isub")
def _sub(a: Arguments) -> Any:
    _require_plain(a)
    return _binary(
        a, ex.subtract, lambda x, c: _plus(x, -c), lambda x, c: _plus(_times(x, -1.0), c), np.subtract
    )


@_operation("input other alpha", "rsub")
def _rsub(a: Arguments) -> Any:
    return _sub(dict(a) | {"input": a["other"], "other": a["input"]})


def _require_plain(a: Arguments) -> None:
    if _number(a, "alpha", 1.0) != 1.0:
        raise ConversionError(f"has alpha = {a['alpha']}")


@_operation("input other", "mul", "multiply", "imul")
def _mul(a: Arguments) -> Any:
    return _binary(a, ex.multiply, _times, _times, np.multiply)


@_operation("input other rounding_mode", "div", "divide", "truediv", "true_divide", "itruediv")
def _div(a: Arguments) -> Any:
    if a.get("rounding_mode") is not None:
        raise ConversionError("rounds a quotient")
    return _binary(
        a,
        ex.divide,
        lambda x, c: _times(x, 1.0 / c),
        lambda x, c: _times(_on(x, ex.reciprocal), c),
        np.divide,
    )


@_operation("input exponent", "pow", "ipow")
def _pow(a: Arguments) -> Any:
    return _on(_flow(a), ex.power, float(a["exponent"]))


@_operation("input", "square")
def _square(a: Arguments) -> Any:
    return _on(_flow(a), ex.power, 2.0)


@_operation("input", "rsqrt")
def _rsqrt(a: Arguments) -> Any:
    return _on(_flow(a), ex.power, -0.5)


@_operation("input dim keepdim dtype", "mean")
def _mean(a: Arguments) -> Any:
    x = _flow(a)
    dim = a.get("dim")
    axes = list(dim) if isinstance(dim, Sequence) else [dim]
    if len(axes) != 1 or axes[0] is None:
        raise ConversionError("takes the mean over several axes")
    axis = fl.whole_row_axis(x, int(axes[0]))
    kept = (1,) if a.get("keepdim") else ()
    return Flow(ex.helper(x.expression, "mean"), (*x.shape[:axis], *kept, *x.shape[axis + 1 :]), x.batch)


# Name -> whether it asks for more, and whether equal numbers do.
_COMPARISONS = {"gt": (True, False), "ge": (True, True), "lt": (False, False), "le": (False, True)}


def _register_comparisons() -> None:
    for name, (is_more, is_equal) in _COMPARISONS.items():

        def compare(a: Arguments, is_more: bool = is_more, is_equal: bool = is_equal) -> Any:
            x, bound = fl.with_constant(_flow(a), _array(a, "other"))
            return _on(x, ex.compared, bound, is_more, is_equal)

        _operation("input other", name)(compare)


_register_comparisons()


@_operation("condition input other", "where")
def _where(a: Arguments) -> Any:
    condition = _flow(a, "condition")
    branches = [fl.branch(a[name], condition) for name in ("input", "other")]
    return _on(condition, ex.chosen, *branches)


# --- activations -----------------------------------------------------------------------------------------

_PLAIN = {
    "relu": "relu",
    "relu6": "relu6",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "mish": "mish",
    "softsign": "softsign",
    "hardswish": "hard_swish",
    "neg": "negative",
    "abs": "absolute",
    "reciprocal": "reciprocal",
    "sqrt": "sqrt",
    "exp": "exp",
    "log": "log",
    "erf": "erf",
}


def _register_plain() -> None:
    for name, ours in _PLAIN.items():
        function = ex.ELEMENTWISE[ours]
        _operation("input inplace", name)(lambda a, function=function: _on(_flow(a), function))  # type: ignore[misc]


_register_plain()


@_operation("input inplace", "silu")
def _silu(a: Arguments) -> Any:
    return _on(_flow(a), ex.activated, "swish")


@_operation("input inplace", "hardsigmoid")
def _hardsigmoid(a: Arguments) -> Any:
    return _on(_flow(a), ex.activated, "hard_sigmoid")


@_operation("input inplace", "selu")
def _selu(a: Arguments) -> Any:
    return _on(_flow(a), ex.activated, "selu")


@_operation("input approximate", "gelu")
def _gelu(a: Arguments) -> Any:
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    return _on(_flow(a), ex.activated, names[a.get("approximate", "none")])


@_operation("input alpha scale input_scale", "elu")
def _elu(a: Arguments) -> Any:
    scale, input_scale = (
        float(a[n]) if type(a.get(n)) in (int, float) else 1.0 for n in ("scale", "input_scale")
    )
    if input_scale != 1.0:
        raise ConversionError(f"has input_scale = {input_scale}")
    return _on(_flow(a), ex.selu, _number(a, "alpha", 1.0), scale)


@_operation("input alpha inplace", "celu")
def _celu(a: Arguments) -> Any:
    return _on(_flow(a), ex.activated, "celu", _number(a, "alpha", 1.0))


@_operation("input negative_slope inplace", "leaky_relu")
def _leaky_relu(a: Arguments) -> Any:
    return _on(_flow(a), ex.activated, "leaky_relu", _number(a, "negative_slope", 0.01))


@_operation("input lower upper training inplace", "rrelu")
def _rrelu(a: Arguments) -> Any:
    slope = (_number(a, "lower", 1 / 8) + _number(a, "upper", 1 / 3)) / 2
    return _on(_flow(a), ex.activated, "leaky_relu", slope)


@_operation("input weight", "prelu", "_prelu_kernel")
def _prelu(a: Arguments) -> Any:
    x, slope = _flow(a), _array(a, "weight")
    if slope.size > 1 and len(x.shape) > 2 and slope.ndim == 1:
        slope = slope.reshape(-1, *[1] * (len(x.shape) - 2))
    x, slope = fl.with_constant(x, slope)
    return _on(x, ex.activated, "prelu", slope)


@_operation("input min_val max_val inplace", "hardtanh")
def _hardtanh(a: Arguments) -> Any:
    return _on(_flow(a), ex.clip, _number(a, "min_val", -1.0), _number(a, "max_val", 1.0))


@_operation("input min max", "clamp", "clip", "clamp_min", "clamp_max")
def _clamp(a: Arguments) -> Any:
    low, high = (None if a.get(name) is None else float(a[name]) for name in ("min", "max"))
    return _on(_flow(a), ex.clip, low, high)


@_operation("input threshold value inplace", "threshold")
def _threshold(a: Arguments) -> Any:
    if float(a["value"]) != 0.0:
        raise ConversionError(f"replaces small numbers by {a['value']}")
    return _on(_flow(a), ex.thresholded_relu, float(a["threshold"]))


@_operation("input beta threshold", "softplus")
def _softplus(a: Arguments) -> Any:
    # Above the threshold torch takes x itself, which softplus is there to 2e-9.
    beta, threshold = _number(a, "beta", 1.0), _number(a, "threshold", 20.0)
    if beta <= 0.0 or threshold < 15.0:
        raise ConversionError(f"has beta = {beta:g}, threshold = {threshold:g}")
    y = _on(_flow(a), lambda x: ex.scale(ex.activated(ex.scale(x, beta), "softplus"), 1.0 / beta))
    return y


@_operation("input", "logsigmoid", "log_sigmoid")
def _logsigmoid(a: Arguments) -> Any:
    return _on(_flow(a), lambda x: ex.scale(ex.activated(ex.scale(x, -1.0), "softplus"), -1.0))
