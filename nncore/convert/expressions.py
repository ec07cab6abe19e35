"""
Operations of a graph -> expressions: what a network computes for a row, in the forms that layers have.

An expression stands for `n` numbers of a row. The functions of this module build expressions out of others
and simplify as they go, so that a graph that spells an activation out (x * sigmoid(x), 0.5 x (1 + erf(x/√2)),
a layer normalization in nine operations) gives the expression of that activation. What has no such form stays
a `Product`, a `Sum` or a `Helper`; `nncore.convert.lowering` refuses it if the output still needs it.

Constants are held as they were given and combined in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nncore.errors import ConversionError

Numbers = npt.NDArray[Any]

# Constants in graphs are rounded to float32, and so are those of formulas that they spell out.
_CLOSE = 1e-5
_SMALL = 1e-6
_SQRT_2 = math.sqrt(2.0)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_GELU_TANH_CUBIC = 0.044715
# Beyond it, clipping by shifted rectifiers would cost float32 digits that count.
_LARGEST_CLIP = 1e3
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# Where e^-x is less than float32 has digits for, beside x.
_LINEAR_SOFTPLUS = 15.0
_MAX_DEGREE = 3
# An identity of so many numbers squared is still made where branches are joined.
_MAX_SQUARE = 4096
# Expressions that look alike are compared so deep; those that graphs repeat are shallow.
_ALIKE_DEPTH = 6


@dataclass(eq=False)
class Expression:
    """
    n numbers of a row.

    origin: the part of the source that computes them, for messages; empty if that is a later one's part.
    """

    n: int
    origin: str = field(default="", kw_only=True)

    @property
    def operands(self) -> tuple[Expression, ...]:
        """What it is computed from."""
        return ()


@dataclass(eq=False)
class Input(Expression):
    """The row itself."""


@dataclass(eq=False)
class _Unary(Expression):
    x: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        """x."""
        return (self.x,)


@dataclass(eq=False)
class Dense(_Unary):
    """x @ weights + bias. weights: (x.n, n); bias: (n,)."""

    weights: Numbers
    bias: Numbers


@dataclass(eq=False)
class Selected(_Unary):
    """Some of x's numbers. indices: (n,), each in [0, x.n)."""

    indices: npt.NDArray[np.int64]


@dataclass(eq=False)
class Polynomial(_Unary):
    """sum over d of coefficients[d] * x ** d, element by element. coefficients: (degree + 1, n) float64."""

    coefficients: npt.NDArray[np.float64]

    @property
    def degree(self) -> int:
        """The highest power of x."""
        return len(self.coefficients) - 1


@dataclass(eq=False)
class Activated(_Unary):
    """An activation of nncore's, element by element. alpha: a number, (n,), or None for none."""

    name: str
    alpha: float | Numbers | None = None


@dataclass(eq=False)
class Standardized(_Unary):
    """(x - mean) / sqrt(variance + epsilon), over the row."""

    epsilon: float


@dataclass(eq=False)
class RowSoftmax(_Unary):
    """Softmax over the row, or its logarithm."""

    log: bool = False


@dataclass(eq=False)
class Helper(_Unary):
    """A function that only makes sense as a part of something else; name: as messages call it."""

    name: str


@dataclass(eq=False)
class _Pair(Expression):
    a: Expression
    b: Expression

    @property
    def operands(self) -> tuple[Expression, ...]:
        """Both."""
        return (self.a, self.b)


@dataclass(eq=False)
class Sum(_Pair):
    """a + b, which is no part of a chain of layers."""


@dataclass(eq=False)
class Product(_Pair):
    """a * b, which is no part of a chain of layers."""


# --- what every source can say -------------------------------------------------------------------------


def dense(x: Expression, weights: Numbers, bias: Numbers | None = None) -> Expression:
    """x @ weights + bias. weights: (x.n, n); bias: (n,), broadcast if it is smaller."""
    weights = np.asarray(weights)
    if weights.ndim != 2 or weights.shape[0] != x.n:
        raise ConversionError(f"weights have shape {weights.shape}; expected ({x.n}, outputs)")
    n = weights.shape[1]
    if n == 0:
        raise ConversionError("has no outputs")
    shift = np.zeros(n, weights.dtype) if bias is None else _vector(bias, n, "bias")
    if isinstance(x, Selected):  # what a transpose or a choice of columns leaves to the next layer
        scattered = np.zeros((x.x.n, n), weights.dtype)
        np.add.at(scattered, x.indices, weights)
        return Dense(n, x.x, scattered, shift)
    return Dense(n, x, weights, shift)


def scale(x: Expression, factor: npt.ArrayLike = 1.0, shift: npt.ArrayLike = 0.0) -> Expression:
    """x * factor + shift, element by element; a row of one number is broadcast."""
    factor, shift = np.asarray(factor, np.float64), np.asarray(shift, np.float64)
    n = max(x.n, factor.size, shift.size)
    factor, shift = _vector(factor, n, "factor"), _vector(shift, n, "shift")
    if x.n != n:
        if x.n != 1:
            raise ConversionError(f"combines {x.n} numbers a row with {n}")
        return dense(x, factor[np.newaxis], shift)
    if (factor == 1.0).all() and (shift == 0.0).all():
        return x
    if isinstance(x, Selected) and len(set(x.indices.tolist())) == n:
        # Before the choice, so that the choice is left to the next layer's weights.
        factors, shifts = np.ones(x.x.n), np.zeros(x.x.n)
        factors[x.indices], shifts[x.indices] = factor, shift
        return Selected(n, scale(x.x, factors, shifts), x.indices)
    base, coefficients = _polynomial_of(x)
    coefficients = coefficients * factor
    coefficients[0] += shift
    return _polynomial(base, coefficients)


def activated(x: Expression, name: str, alpha: float | Numbers | None = None) -> Expression:
    """An activation of nncore's."""
    if name == "identity":
        return x
    if isinstance(alpha, np.ndarray):
        alpha = float(alpha.reshape(-1)[0]) if alpha.size == 1 else _vector(alpha, x.n, "alpha")
    if isinstance(x, Selected) and not isinstance(alpha, np.ndarray):
        return Selected(x.n, activated(x.x, name, alpha), x.indices)
    return Activated(x.n, x, name, alpha)


def softmax(x: Expression, log: bool = False) -> Expression:
    """Softmax over the row, or its logarithm."""
    return RowSoftmax(x.n, x, log)


def standardized(x: Expression, epsilon: float) -> Expression:
    """(x - mean) / sqrt(variance + epsilon), over the row."""
    if not epsilon >= 0.0:
        raise ConversionError(f"has epsilon {epsilon}; expected 0 or more")
    return Standardized(x.n, x, float(epsilon))


def batch_normalized(
    x: Expression, mean: Numbers, variance: Numbers, gain: npt.ArrayLike, shift: npt.ArrayLike, epsilon: float
) -> Expression:
    """(x - mean) / sqrt(variance + epsilon) * gain + shift, with constants, each (n,)."""
    factor = np.asarray(gain, np.float64) / np.sqrt(np.asarray(variance, np.float64) + epsilon)
    return scale(x, factor, np.asarray(shift, np.float64) - np.asarray(mean, np.float64) * factor)


def clip(x: Expression, low: float | None, high: float | None) -> Expression:
    """The nearest number to x in [low, high]; None for no bound."""
    low = None if low is None or low <= -_FLOAT32_MAX else float(low)
    high = None if high is None or high >= _FLOAT32_MAX else float(high)
    bounds = (low, high)
    if any(bound is not None and math.isnan(bound) for bound in bounds):
        raise ConversionError(f"clips to [{low}, {high}]")
    if low is None and high is None:
        return x
    if bounds == (0.0, None):
        return activated(x, "relu")
    if bounds == (0.0, 6.0):
        return activated(x, "relu6")
    if max(abs(bound) for bound in bounds if bound is not None) > _LARGEST_CLIP:
        raise ConversionError(f"clips to [{low}, {high}]; bounds beyond ±{_LARGEST_CLIP:g} are not supported")
    if low is None:
        assert high is not None
        return scale(activated(scale(x, -1.0, high), "relu"), -1.0, high)
    if high is None:
        return scale(activated(scale(x, 1.0, -low), "relu"), 1.0, low)
    if low >= high:
        raise ConversionError(f"clips to [{low}, {high}], which leaves one number")
    half, middle = (high - low) / 2.0, (high + low) / 2.0
    return scale(activated(scale(x, 1.0 / half, -middle / half), "hard_tanh"), half, middle)


def hard_sigmoid(x: Expression, slope: float, offset: float) -> Expression:
    """slope * x + offset, clipped to [0, 1]."""
    return activated(scale(x, _snapped(6.0 * slope), _snapped(6.0 * (offset - 0.5))), "hard_sigmoid")


def thresholded_relu(x: Expression, threshold: float) -> Expression:
    """x for x > threshold, else 0."""
    return activated(x, "thresholded_relu", threshold) if threshold else activated(x, "relu")


def compared(x: Expression, bound: npt.ArrayLike, is_more: bool, or_equal: bool) -> Expression:
    """1 where x is more than *bound* (or less; or equal), else 0."""
    sign = 1.0 if is_more else -1.0
    shift = np.asarray(bound, np.float64)
    if not or_equal:
        return activated(scale(x, sign, -sign * shift), "step")
    return scale(activated(scale(x, -sign, sign * shift), "step"), -1.0, 1.0)


def chosen(condition: Expression, a: Expression | float, b: Expression | float) -> Expression:
    """a where *condition*, a comparison, is 1, and b where it is 0: together an activation, or refused."""
    step, shape = _affine_numbers(condition)
    if isinstance(step, Activated) and step.name == "step":
        found = None
        if shape == (0.0, 1.0):
            found = _joined_halves(step.x, a, b)
        elif shape == (1.0, -1.0):
            found = _joined_halves(step.x, b, a)
        if found is not None:
            return found
    raise ConversionError(
        "chooses between two functions that together are no activation; known are relu, leaky_relu, elu,"
        " selu, softplus and thresholded_relu"
    )


def swish(x: Expression, beta: float = 1.0) -> Expression:
    """x * sigmoid(beta * x)."""
    return scale(activated(scale(x, beta), "swish"), 1.0 / beta) if beta else scale(x, 0.5)


def selu(x: Expression, alpha: float, gamma: float) -> Expression:
    """gamma * (x for x > 0, else alpha * (e^x - 1))."""
    if math.isclose(alpha, 1.6732632423543772, rel_tol=1e-6) and math.isclose(
        gamma, 1.0507009873554805, rel_tol=1e-6
    ):
        return activated(x, "selu")
    return scale(activated(x, "elu", alpha), gamma)


def columns(x: Expression, indices: Sequence[int] | Numbers) -> Expression:
    """Some of x's numbers, in the order of *indices*, which may be negative."""
    chosen = np.asarray(indices, np.int64).reshape(-1)
    if chosen.size == 0 or (chosen < -x.n).any() or (chosen >= x.n).any():
        raise ConversionError(f"takes columns {chosen.tolist()[:8]} of {x.n}")
    chosen = chosen % x.n
    if np.array_equal(chosen, np.arange(x.n)):
        return x
    if isinstance(x, Dense):
        return dense(x.x, x.weights[:, chosen], x.bias[chosen])
    if isinstance(x, Selected):
        return columns(x.x, x.indices[chosen])
    return Selected(chosen.size, x, chosen)


def concatenated(parts: Sequence[Expression]) -> Expression:
    """The numbers of all *parts*, one after another, if they come from the same numbers in the same way."""
    first = parts[0]
    if len(parts) == 1:
        return first
    alike = [part for part in parts if isinstance(part, Activated) and _same_activation(part, first)]
    if len(alike) == len(parts):
        inner = concatenated([part.x for part in alike])
        return activated(inner, alike[0].name, alike[0].alpha)
    affine = [_affine_of(part) for part in parts]
    base = affine[0].x
    if not all(_alike(part.x, base) for part in affine):
        raise ConversionError("joins branches that are no functions of the same layer; a model is a chain")
    return dense(
        base, np.hstack([part.weights for part in affine]), np.hstack([part.bias for part in affine])
    )


# --- arithmetic between two expressions ------------------------------------------------------------------


def add(a: Expression, b: Expression) -> Expression:
    """a + b; a row of one number is broadcast."""
    for x, mean in ((a, b), (b, a)):
        if _is_mean_of(mean, x):
            return Helper(x.n, x, "centered")
    common = _common_base(a, b)
    if common is not None:
        base, of_a, of_b = common
        coefficients = np.zeros((max(len(of_a), len(of_b)), a.n))
        coefficients[: len(of_a)] += of_a
        coefficients[: len(of_b)] += of_b
        return _polynomial(base, coefficients)
    return _factored(a, b) or Sum(_joint_size(a, b), a, b)


def subtract(a: Expression, b: Expression) -> Expression:
    """a - b."""
    return add(a, scale(b, -1.0))


def multiply(a: Expression, b: Expression) -> Expression:
    """a * b, element by element; a row of one number is broadcast."""
    common = _common_base(a, b)
    if common is not None and len(common[1]) + len(common[2]) - 2 <= _MAX_DEGREE:
        return _polynomial(common[0], _multiplied(*common[1:]))
    for y, gate in ((a, b), (b, a)):
        found = _gated(y, gate) or _normalized(y, gate)
        if found is not None:
            return found
    return Product(_joint_size(a, b), a, b)


def divide(a: Expression, b: Expression) -> Expression:
    """a / b."""
    return multiply(a, reciprocal(b))


def reciprocal(x: Expression) -> Expression:
    """1 / x."""
    base, shape = _affine_numbers(x)
    if isinstance(base, Helper) and base.name == "exp" and shape == (1.0, 1.0):
        return activated(scale(base.x, -1.0), "sigmoid")  # 1 / (1 + e^u) = σ(-u)
    if isinstance(x, Helper) and x.name == "reciprocal":
        return x.x
    return Helper(x.n, x, "reciprocal")


def power(x: Expression, exponent: float) -> Expression:
    """x ** exponent."""
    if exponent in (1.0, 2.0, 3.0):
        result = x
        for _ in range(int(exponent) - 1):
            result = multiply(result, x)
        return result
    if exponent == -1.0:
        return reciprocal(x)
    if exponent == 0.5:
        return helper(x, "sqrt")
    if exponent == -0.5:
        return reciprocal(helper(x, "sqrt"))
    raise ConversionError(f"raises to the power {exponent:g}; supported are -1, -0.5, 0.5, 1, 2 and 3")


def absolute(x: Expression) -> Expression:
    """|x|."""
    return activated(x, "leaky_relu", -1.0)


def erf(x: Expression) -> Expression:
    """The error function, of use in gelu only."""
    return helper(x, "erf")


def helper(x: Expression, name: str) -> Expression:
    """sqrt, exp, erf or mean of x: of use as a part of something else."""
    if name == "mean":
        if x.n == 1:
            return x
        base, coefficients = _polynomial_of(x)
        is_square = len(coefficients) == 3 and (coefficients == [[0.0], [0.0], [1.0]]).all()
        if is_square and isinstance(base, Helper) and base.name == "centered":
            return Helper(1, base.x, "variance")
        return Helper(1, x, "mean")
    return Helper(x.n, x, name)


def logarithm(x: Expression) -> Expression:
    """ln x, of a softmax or of 1 + e^u."""
    if isinstance(x, RowSoftmax) and not x.log:
        return softmax(x.x, log=True)
    base, shape = _affine_numbers(x)
    if isinstance(base, Helper) and base.name == "exp" and shape == (1.0, 1.0):
        return activated(base.x, "softplus")
    return helper(x, "log")


def sums_to_one(x: Expression) -> bool:
    """Whether the numbers of a row, none negative, always add up to 1."""
    if isinstance(x, RowSoftmax):
        return not x.log
    if isinstance(x, Activated) and x.name == "sigmoid" and x.n == 2 and isinstance(x.x, Dense):
        w, b = x.x.weights, x.x.bias
        return bool((w[:, 0] == -w[:, 1]).all() and b[0] == -b[1])
    return False


# --- patterns ----------------------------------------------------------------------------------------


class _Gate(NamedTuple):
    """p + q * f(inner)."""

    p: float
    q: float
    name: str
    inner: Expression


def _gated(y: Expression, gate: Expression) -> Expression | None:
    """y * gate, if that is an activation of y."""
    view = _gate_of(gate)
    if view is None or view.q == 0.0:
        return None
    p, q, name, inner = view
    if name == "softplus-tanh":
        name, expected_p = "mish", 0.0
    elif name == "sigmoid":
        name, expected_p = "swish", 0.0
    elif name in ("erf", "tanh", "hard_tanh"):
        expected_p = q
    elif name == "softsign" and p == 0.0:
        relation = _relative(inner, y)
        if relation is not None and _all_close(relation, (0.0, 1.0)):
            return scale(activated(y, "softsign"), q)
        return None
    else:
        return None
    if not math.isclose(p, expected_p, rel_tol=_CLOSE, abs_tol=_CLOSE * abs(q)):
        return None
    shape = _relative(inner, y)
    if shape is None or abs(shape[0]) > _CLOSE:
        return None
    slope = shape[1]
    if name == "tanh":  # 0.5 t (1 + tanh(√(2/π) (t + 0.044715 t³))), t = inner's slope times y
        if len(shape) != 4:
            return None
        factor = slope / _SQRT_2_OVER_PI
        expected = (0.0, slope, 0.0, _SQRT_2_OVER_PI * _GELU_TANH_CUBIC * factor**3)
        if not _all_close(shape, expected):
            return None
        name = "gelu_tanh"
    elif len(shape) != 2:
        return None
    elif name == "erf":  # 0.5 t (1 + erf(t / √2))
        name, factor = "gelu", slope * _SQRT_2
    elif name == "hard_tanh":  # t (0.5 + 0.5 clip(t / 3, -1, 1))
        name, factor = "hard_swish", slope * 3.0
    else:
        factor = slope
    if factor == 0.0 or (factor < 0.0 and name != "swish"):
        return None
    factor = _snapped(factor)
    halves = 1.0 if expected_p == 0.0 else 2.0
    return scale(activated(scale(y, factor), name), _snapped(halves * q / factor))


def _joined_halves(
    inner: Expression, above: Expression | float, below: Expression | float
) -> Expression | None:
    """The activation that is *above* where inner > 0 and *below* elsewhere; None if there is none."""
    for y, other, sign in ((above, below, 1.0), (below, above, -1.0)):
        shape = _relative(inner, y) if isinstance(y, Expression) else None
        if isinstance(y, Expression) and shape is not None and len(shape) == 2 and sign * shape[1] > 0.0:
            # y where y > bound, or >= if sign is -1; the other one below.
            found = _rectified(y, -shape[0] / shape[1], other, is_strict=sign > 0.0)
            if found is not None:
                return found
    return None


def _rectified(y: Expression, bound: float, below: Expression | float, is_strict: bool) -> Expression | None:
    """The activation that is y above *bound* and *below* elsewhere, if there is one."""
    is_at_zero = abs(bound) <= _SMALL
    if not isinstance(below, Expression):
        if below != 0.0 or not (is_strict or is_at_zero):
            return None
        return thresholded_relu(y, 0.0 if is_at_zero else bound)
    slope = _relative(below, y)
    if slope is not None and is_at_zero and len(slope) == 2 and abs(slope[0]) <= _SMALL:
        return activated(y, "leaky_relu", slope[1])
    curve, shape = _affine_numbers(below)
    if shape is None or len(shape) != 2 or not isinstance(curve, Activated | Helper):
        return None
    p, q = shape
    relation = _relative(curve.x, y)
    if relation is None or len(relation) != 2 or abs(relation[0]) > _SMALL or relation[1] <= 0.0:
        return None
    factor = relation[1]
    if curve.name == "softplus" and p == 0.0 and math.isclose(q * factor, 1.0, rel_tol=_CLOSE):
        # From there on softplus is its argument, but for e^-15.
        return below if bound * factor >= _LINEAR_SOFTPLUS else None
    if curve.name == "exp" and is_at_zero and math.isclose(p, -q, rel_tol=_CLOSE):
        return selu(curve.x, _snapped(q * factor), _snapped(1.0 / factor))
    return None


def _gate_of(expression: Expression) -> _Gate | None:
    """*expression* as p + q f(inner), clipping brought to one form."""
    base, shape = _affine_numbers(expression)
    if shape is None or len(shape) != 2:
        return None
    p, q = shape
    if isinstance(base, Helper) and base.name == "erf":
        return _Gate(p, q, "erf", base.x)
    if isinstance(base, Helper) and base.name == "reciprocal":
        # 1 / (1 + |x|), with |x| as a leaky relu of slope -1
        inner, of_inner = _affine_numbers(base.x)
        if of_inner == (1.0, 1.0) and isinstance(inner, Activated):
            is_absolute = inner.name in ("leaky_relu", "prelu") and _is_number(inner.alpha, -1.0)
            return _Gate(p, q, "softsign", inner.x) if is_absolute else None
        return None
    if not isinstance(base, Activated):
        return None
    if base.name == "tanh" and isinstance(base.x, Activated) and base.x.name == "softplus":
        return _Gate(p, q, "softplus-tanh", base.x.x)
    if base.name == "relu6":
        return _Gate(p + 3.0 * q, 3.0 * q, "hard_tanh", scale(base.x, 1.0 / 3.0, -1.0))
    if base.name == "hard_sigmoid":
        return _Gate(p + 0.5 * q, 0.5 * q, "hard_tanh", scale(base.x, 1.0 / 3.0))
    return _Gate(p, q, base.name, base.x)


def _normalized(a: Expression, b: Expression) -> Expression | None:
    """a * b as a standardized row: a centered, b = 1 / sqrt(variance + epsilon)."""
    base, factor = _scaled(a)
    if not isinstance(base, Helper) or base.name != "centered" or factor is None:
        return None
    b, gain = _scaled(b)
    if gain is None:
        return None
    factor = factor * gain
    if isinstance(b, Dense) and b.x.n == 1 and not b.bias.any():  # one number a row, for all elements
        factor = factor * b.weights[0]
        b = b.x
    if not isinstance(b, Helper) or b.name != "reciprocal":
        return None
    root = b.x
    if not isinstance(root, Helper) or root.name != "sqrt":
        return None
    variance, shape = _affine_numbers(root.x)
    if not isinstance(variance, Helper) or variance.name != "variance" or shape is None or len(shape) != 2:
        return None
    if shape[1] != 1.0 or not _alike(variance.x, base.x):
        return None
    return scale(standardized(base.x, shape[0]), factor)


def _factored(a: Expression, b: Expression) -> Expression | None:
    """p * r + q * r as (p + q) * r: TensorFlow's layer normalization is x * r + (shift - mean * r)."""
    base_a, of_a = _polynomial_of(a)
    base_b, of_b = _polynomial_of(b)
    if not isinstance(base_a, Product) or not isinstance(base_b, Product):
        return None
    factors = [_same_for_all(of[1:]) for of in (of_a, of_b)]
    if factors[0] is None or factors[1] is None or len(factors[0]) != 1 or len(factors[1]) != 1:
        return None
    for p, r in (base_a.operands, base_a.operands[::-1]):
        for q, other in (base_b.operands, base_b.operands[::-1]):
            if _alike(r, other):
                total = add(scale(p, factors[0][0]), scale(q, factors[1][0]))
                return scale(multiply(total, r), 1.0, of_a[0] + of_b[0])
    return None


def _scaled(x: Expression) -> tuple[Expression, Numbers | None]:
    """x as factor * base; None for the factor if there is more to it."""
    base, coefficients = _polynomial_of(x)
    if len(coefficients) != 2 or coefficients[0].any():
        return base, None
    return base, coefficients[1]


def _is_mean_of(mean: Expression, x: Expression) -> bool:
    """Whether *mean* is minus the mean of x's row."""
    base, shape = _affine_numbers(mean)
    return isinstance(base, Helper) and base.name == "mean" and shape == (0.0, -1.0) and _alike(base.x, x)


def _relative(inner: Expression, y: Expression) -> tuple[float, ...] | None:
    """The numbers c with inner = c[0] + c[1] y + c[2] y² …, the same for every element; None if not so."""
    common = _common_base(inner, y)
    if common is None:
        return None
    _, of_inner, of_y = common
    if len(of_y) != 2 or (of_y[1] == 0.0).any():
        return None
    inverse = np.vstack([-of_y[0] / of_y[1], 1.0 / of_y[1]])
    return _same_for_all(_composed(of_inner, inverse))


def _common_base(
    a: Expression, b: Expression
) -> tuple[Expression, npt.NDArray[np.float64], npt.NDArray[np.float64]] | None:
    """An expression of which a and b both are polynomials, and those; the nearest there is."""
    if a.n != b.n:
        return None
    for base_a, of_a in _views(a):
        for base_b, of_b in _views(b):
            if _alike(base_a, base_b):
                return base_a, of_a, of_b
    return None


def _views(x: Expression) -> list[tuple[Expression, npt.NDArray[np.float64]]]:
    """x as a polynomial of itself, and of what it was computed from."""
    views = [(x, np.vstack([np.zeros(x.n), np.ones(x.n)]))]
    while isinstance(x, Polynomial) and len(views[-1][1]) + x.degree - 2 <= _MAX_DEGREE:
        views.append((x.x, _composed(views[-1][1], x.coefficients)))
        x = x.x
    return views


def _multiplied(a: Numbers, b: Numbers) -> npt.NDArray[np.float64]:
    """The product of two polynomials, element by element."""
    product = np.zeros((len(a) + len(b) - 1, a.shape[1]))
    for degree, row in enumerate(a):
        product[degree : degree + len(b)] += row * b
    return product


def _composed(outer: Numbers, inner: Numbers) -> npt.NDArray[np.float64]:
    """The polynomial outer(inner(x)), element by element."""
    result: npt.NDArray[np.float64] = outer[-1:].astype(np.float64)
    for row in outer[-2::-1]:
        result = _multiplied(result, inner)
        result[0] += row
    return result


def _affine_numbers(x: Expression) -> tuple[Expression, tuple[float, ...] | None]:
    """x as a polynomial of a base, if its coefficients are the same for every element."""
    base, coefficients = _polynomial_of(x)
    return base, _same_for_all(coefficients)


def _same_for_all(coefficients: Numbers) -> tuple[float, ...] | None:
    first = coefficients[:, :1]
    if np.allclose(coefficients, first, rtol=_CLOSE, atol=_SMALL):
        return tuple(float(value) for value in first[:, 0])
    return None


def _polynomial_of(x: Expression) -> tuple[Expression, npt.NDArray[np.float64]]:
    """x as a polynomial: (base, coefficients), which the caller may change."""
    if isinstance(x, Polynomial):
        return x.x, x.coefficients.copy()
    return x, np.vstack([np.zeros(x.n), np.ones(x.n)])


def _polynomial(base: Expression, coefficients: npt.NDArray[np.float64]) -> Expression:
    while len(coefficients) > 2 and not coefficients[-1].any():
        coefficients = coefficients[:-1]
    if len(coefficients) == 2 and not coefficients[0].any() and (coefficients[1] == 1.0).all():
        return base
    if (
        isinstance(base, Activated)
        and base.name == "sigmoid"
        and np.array_equal(coefficients.T, [[1, -1]] * base.n)
    ):
        return activated(scale(base.x, -1.0), "sigmoid")  # 1 - σ(x), as the first of two probabilities
    return Polynomial(base.n, base, coefficients)


def _affine_of(x: Expression) -> Dense:
    """x as x.x @ weights + bias, of whatever it is an affine function of."""
    if isinstance(x, Dense):
        return x
    if isinstance(x, Selected):
        inner = _affine_of(x.x)
        return Dense(x.n, inner.x, inner.weights[:, x.indices], inner.bias[x.indices])
    if isinstance(x, Polynomial) and x.degree == 1:
        inner = _affine_of(x.x)
        shift, factor = x.coefficients
        return Dense(x.n, inner.x, inner.weights * factor, inner.bias * factor + shift)
    if x.n > _MAX_SQUARE:
        raise ConversionError(f"joins branches of {x.n} numbers a row; at most {_MAX_SQUARE} are supported")
    return Dense(x.n, x, np.eye(x.n), np.zeros(x.n))


def _alike(a: Expression, b: Expression, depth: int = _ALIKE_DEPTH) -> bool:
    """Whether a and b are the same expression, or computed twice in the same way."""
    if a is b:
        return True
    if depth == 0 or type(a) is not type(b) or a.n != b.n or isinstance(a, Input):
        return False
    mine, other = vars(a), vars(b)
    for name, value in mine.items():
        if name == "origin" or isinstance(value, Expression):
            continue
        if not np.array_equal(value, other[name]):
            return False
    return all(_alike(x, y, depth - 1) for x, y in zip(a.operands, b.operands, strict=True))


def _same_activation(a: Activated, b: Expression) -> bool:
    """Whether both are the same function, with one number for all elements as its parameter."""
    if not isinstance(b, Activated) or isinstance(a.alpha, np.ndarray) or isinstance(b.alpha, np.ndarray):
        return False
    return (a.name, a.alpha) == (b.name, b.alpha)


def _joint_size(a: Expression, b: Expression) -> int:
    if a.n != b.n and 1 not in (a.n, b.n):
        raise ConversionError(f"combines {a.n} numbers a row with {b.n}")
    return max(a.n, b.n)


def _vector(values: npt.ArrayLike, n: int, what: str) -> Numbers:
    """*values* as (n,); one number is repeated."""
    array = np.asarray(values)
    if array.size not in (1, n):
        raise ConversionError(f"{what} has {array.size} numbers; expected {n}")
    return np.array(np.broadcast_to(array.reshape(-1), (n,)))


def _snapped(value: float) -> float:
    """*value*, or the whole number that it is but for the rounding of constants."""
    nearest = round(value)
    return float(nearest) if abs(value - nearest) <= 1e-6 * max(1.0, abs(nearest)) else value


def _is_number(value: Any, number: float) -> bool:
    return value is not None and bool(np.all(np.asarray(value) == number))


def _all_close(values: Sequence[float], expected: Sequence[float]) -> bool:
    return len(values) == len(expected) and all(
        math.isclose(value, wanted, rel_tol=10 * _CLOSE, abs_tol=_CLOSE)
        for value, wanted in zip(values, expected, strict=True)
    )


# Elementwise operations of one operand that sources call by different names.
ELEMENTWISE: dict[str, Callable[[Expression], Expression]] = {
    "relu": lambda x: activated(x, "relu"),
    "relu6": lambda x: activated(x, "relu6"),
    "sigmoid": lambda x: activated(x, "sigmoid"),
    "tanh": lambda x: activated(x, "tanh"),
    "softplus": lambda x: activated(x, "softplus"),
    "softsign": lambda x: activated(x, "softsign"),
    "mish": lambda x: activated(x, "mish"),
    "hard_swish": lambda x: activated(x, "hard_swish"),
    "identity": lambda x: x,
    "negative": lambda x: scale(x, -1.0),
    "absolute": absolute,
    "reciprocal": reciprocal,
    "sqrt": lambda x: helper(x, "sqrt"),
    "exp": lambda x: helper(x, "exp"),
    "log": logarithm,
    "erf": erf,
}
