"""
Lanes -> Lanes: every activation, its derivative and its second derivative, each formula once.

Written over `nncore.lanes`, so that ufuncs, plain kernels and SIMD tiles of any width compute the same bits
from the same lines. What a formula computes mathematically, its kinks and its default alpha stand in
`nncore.activations`; comments here say why it is computed as it is.

All are stable for every finite and infinite input, infinities give the limit, NaN passes through. Where a
textbook form overflows, the sign of x chooses between forms that do not, or the argument is clamped where the
result no longer changes. No derivative is computed from a rounded output: 1 - h has lost its digits where h
saturates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from nncore import elementary, normal
from nncore.elementary import constants, exp_parts, exp_parts_of_half_square
from nncore.lanes import (
    Lanes,
    absolute,
    call_per_lane,
    copysign,
    fma,
    maximum,
    minimum,
    product_plus,
    select,
    to_double,
    to_single,
)

# Klambauer et al. 2017, "Self-Normalizing Neural Networks".
SELU_SCALE = 1.0507009873554804934193349852946
SELU_SCALE_ALPHA = 1.7580993408473768599402175208123

_TWICE_SQRT_2_OVER_PI = 1.5957691216057307117597842397375
# The same times 0.044715.
_GELU_TANH_CUBIC = 0.07135481627260025


def _keep_nan(x: Lanes, y: Lanes) -> Lanes:
    """y, but NaN where x is: for formulas that compare x without computing with it."""
    return select(x.is_nan(), x, y)


def _in_double(formula: Callable[[Lanes], Lanes], x: Lanes) -> Lanes:
    """
    *formula* of float32 lanes, computed in float64 and rounded.

    For second derivatives: most cross zero somewhere, or multiply several rounded factors.
    """
    return to_single(formula(to_double(x)))


# --- piecewise linear: exact ---------------------------------------------------------------------------


def step(x: Lanes) -> Lanes:
    """0 for x <= 0, else 1."""
    return _keep_nan(x, select(x > 0.0, x.constant(1.0), 0.0))


def step_grad(x: Lanes) -> Lanes:
    """0 everywhere."""
    return _keep_nan(x, x.constant(0.0))


def no_grad2(x: Lanes) -> Lanes:
    """0 everywhere: the second derivative of what is linear piece by piece."""
    return _keep_nan(x, x.constant(0.0))


def identity(x: Lanes) -> Lanes:
    """x."""
    return x


def identity_grad(x: Lanes) -> Lanes:
    """1 everywhere."""
    return _keep_nan(x, x.constant(1.0))


def relu(x: Lanes) -> Lanes:
    """The greater of x and 0; relu(-0) = -0."""
    return maximum(x, 0.0)


def relu_grad(x: Lanes) -> Lanes:
    """1 for x > 0, else 0."""
    return step(x)


def prelu(x: Lanes, alpha: Lanes) -> Lanes:
    """x for x > 0, else alpha * x; also for alpha above 1 or below 0, where it is no maximum of the two."""
    # With alpha = 0 any negative number does for x, and -inf would give NaN.
    finite = select(alpha.equals(0.0), maximum(x, -1.0), x)
    return select(x > 0.0, x, alpha * finite)


def prelu_grad(x: Lanes, alpha: Lanes) -> Lanes:
    """1 for x > 0, else alpha."""
    return _keep_nan(x, select(x > 0.0, 1.0, alpha))


def no_grad2_with_alpha(x: Lanes, alpha: Lanes) -> Lanes:
    """0 everywhere, whatever alpha is."""
    return no_grad2(x)


def thresholded_relu(x: Lanes, alpha: Lanes) -> Lanes:
    """x for x > alpha, else 0."""
    return _keep_nan(x, select(x > alpha, x, 0.0))


def thresholded_relu_grad(x: Lanes, alpha: Lanes) -> Lanes:
    """1 for x > alpha, else 0."""
    return _keep_nan(x, select(x > alpha, x.constant(1.0), 0.0))


def relu6(x: Lanes) -> Lanes:
    """x clipped to [0, 6]."""
    return minimum(maximum(x, 0.0), 6.0)


def relu6_grad(x: Lanes) -> Lanes:
    """1 inside (0, 6), else 0."""
    return _keep_nan(x, select((x > 0.0) & (x < 6.0), x.constant(1.0), 0.0))


def hard_tanh(x: Lanes) -> Lanes:
    """x clipped to [-1, 1]."""
    return minimum(maximum(x, -1.0), 1.0)


def hard_tanh_grad(x: Lanes) -> Lanes:
    """1 inside (-1, 1), else 0."""
    return _keep_nan(x, select((x > -1.0) & (x < 1.0), x.constant(1.0), 0.0))


def _sixth(clipped: Lanes) -> tuple[Lanes, Lanes]:
    """(x + 3) / 6 for x in [-3, 3], and what it lost: the errors of the sum and of the product with 1/6."""
    total = clipped + 3.0
    lost = clipped - (total - 3.0)
    sixth = total * (1.0 / 6.0)
    return sixth, (fma(sixth, -6.0, total) + lost) * (1.0 / 6.0)


def hard_sigmoid(x: Lanes) -> Lanes:
    """x/6 + 1/2 clipped to [0, 1]."""
    sixth, lost = _sixth(minimum(maximum(x, -3.0), 3.0))
    return sixth + lost


def hard_sigmoid_grad(x: Lanes) -> Lanes:
    """1/6 inside (-3, 3), else 0."""
    return _keep_nan(x, select((x > -3.0) & (x < 3.0), x.constant(1.0 / 6.0), 0.0))


def hard_swish(x: Lanes) -> Lanes:
    """x times hard_sigmoid(x): 0 up to -3, x from 3 on."""
    inside = maximum(x, -3.0)
    clipped = minimum(inside, 3.0)
    sixth, lost = _sixth(clipped)
    return fma(inside, sixth, clipped * lost)


def hard_swish_grad(x: Lanes) -> Lanes:
    """x/3 + 1/2 inside (-3, 3), 0 below, 1 above."""
    inside = (x + 1.5) / 3.0
    return select(x >= 3.0, 1.0, select(x <= -3.0, 0.0, inside))


def hard_swish_grad2(x: Lanes) -> Lanes:
    """1/3 inside (-3, 3), else 0."""
    return _keep_nan(x, select((x > -3.0) & (x < 3.0), x.constant(1.0 / 3.0), 0.0))


# --- around the logistic function ----------------------------------------------------------------------


def _logistic_parts(x: Lanes, rest: Lanes | None = None) -> tuple[Lanes, Lanes, float]:
    """
    c, d and u with 1 / (1 + e^-(x + rest)) = u / d, u a power of 2; c is x, or the nearest where that moves.

    d = u (1 + e^-x) is a normal number, where e^-x itself may be too large.
    """
    k = constants(x)
    clamped = maximum(minimum(x, k.saturation), -k.vanishing)
    unit = 2.0**-k.room
    scale, q = exp_parts(clamped, factor=-1, shift=-k.room, rest=rest)
    # The sum of two powers of 2 is exact, or loses the smaller; then the larger stays, and the smaller one is
    # taken up again if it was the 1. Adding 1 to a rounded e^-x instead costs 0.3 ULP, up to 2.3 in sigmoid.
    total = scale + unit
    lost = unit - (total - scale)
    return clamped, total + fma(scale, q, lost), unit


def sigmoid(x: Lanes) -> Lanes:
    """1 / (1 + e^-x)."""
    _, d, unit = _logistic_parts(x)
    return unit / d


def _bell(size: Lanes, factor: int, times: float = 1.0) -> Lanes:
    """times e / (1 + e)^2 with e = e^(-factor size), for size >= 0."""
    k = constants(size)
    scale, q = exp_parts(minimum(size, k.vanishing / factor), factor=-factor, shift=k.room)
    part = fma(scale, q, scale)
    e = part * 2.0**-k.room
    # (1 + e)^2 as 1 + e (2 + e): where e is small, 1 + e would be rounded, and its error doubled.
    return part / fma(e, e + 2.0, 1.0) * (times * 2.0**-k.room)


def sigmoid_grad(x: Lanes) -> Lanes:
    """e / (1 + e)^2 with e = e^-|x|."""
    return _bell(absolute(x), 1)


def sigmoid_grad2(x: Lanes) -> Lanes:
    """s (1 - s) (1 - 2 s) = -s' tanh(x / 2)."""
    if not x.is_double:
        return _in_double(sigmoid_grad2, x)
    return -sigmoid_grad(x) * elementary.tanh(0.5 * x)


def swish(x: Lanes) -> Lanes:
    """x / (1 + e^-x)."""
    clamped, d, unit = _logistic_parts(x)
    return select(x > constants(x).saturation, x, clamped / d * unit)


def swish_grad(x: Lanes) -> Lanes:
    """s + x s (1 - s), s = 1 / (1 + e^-x)."""
    if not x.is_double:
        return to_single(swish_grad(to_double(x)))  # in float32, 4.5 ULP; 5 times that where it crosses zero
    limit = constants(x).vanishing
    clamped = maximum(minimum(x, limit), -limit)
    return _logistic_product_grad(clamped, None, clamped)


def swish_grad2(x: Lanes) -> Lanes:
    """s' (2 - x tanh(x / 2))."""
    if not x.is_double:
        return _in_double(swish_grad2, x)
    limit = constants(x).vanishing
    x = maximum(minimum(x, limit), -limit)
    return sigmoid_grad(x) * fma(-x, elementary.tanh(0.5 * x), 2.0)


def _logistic_product_grad(z: Lanes, rest: Lanes | None, weight: Lanes) -> Lanes:
    """
    s + weight s (1 - s), s = 1 / (1 + e^-(z + rest)).

    With e = e^-|z|: (1 + e (1 + weight)) / (1 + e)^2 for z >= 0, else e (1 + e + weight) / (1 + e)^2.
    """
    left = z < 0.0
    opposite = None if rest is None else select(left, -rest, rest)
    part, e = _exp_of_minus(absolute(z), opposite)
    d = 1.0 + e
    above = select(left, part * (d + weight) * 2.0 ** -constants(z).room, fma(e, weight + 1.0, 1.0))
    return above / (d * d)


def _exp_of_minus(size: Lanes, rest: Lanes | None = None) -> tuple[Lanes, Lanes]:
    """2^room e and e = e^-(size + rest), for size >= 0; 2^room e is still moving where e times size is 0."""
    k = constants(size)
    scale, q = exp_parts(minimum(size, k.vanishing), factor=-1, shift=k.room, rest=rest)
    part = fma(scale, q, scale)
    return part, part * 2.0**-k.room


def tanh(x: Lanes) -> Lanes:
    """(1 - e^-2x) / (1 + e^-2x)."""
    return elementary.tanh(x)


def tanh_grad(x: Lanes) -> Lanes:
    """1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = e^-2|x|."""
    return _bell(absolute(x), 2, 4.0)


def tanh_grad2(x: Lanes) -> Lanes:
    """-2 tanh(x) (1 - tanh(x)^2)."""
    if not x.is_double:
        return _in_double(tanh_grad2, x)
    return -2.0 * tanh(x) * tanh_grad(x)


def softplus(x: Lanes) -> Lanes:
    """ln(1 + e^x), as max(x, 0) + ln(1 + e^-|x|)."""
    k = constants(x)
    exponent, q = elementary.exp_exponent(minimum(absolute(x), k.vanishing), factor=-1)
    # Integers carry the exponent: the multipliers are what this formula waits for.
    bits = (1.0 + q).as_bits() + exponent
    e = bits.at_least(0).as_lanes()  # or 0 where it would be subnormal
    large = (bits + (k.room << k.exponent_at)).as_lanes()  # 2^room e
    # The larger part comes last. A NaN that the integers have lost is still in the maximum.
    rest = fma(e * e, elementary.polynomial(e, k.log1p), maximum(x, 0.0))
    return fma(large, 2.0**-k.room, rest)


def softplus_grad(x: Lanes) -> Lanes:
    """sigmoid(x)."""
    return sigmoid(x)


def softplus_grad2(x: Lanes) -> Lanes:
    """The derivative of sigmoid."""
    return sigmoid_grad(x)


def softsign(x: Lanes) -> Lanes:
    """x / (1 + |x|)."""
    largest = sys.float_info.max if x.is_double else (2.0 - 2.0**-23) * 2.0**127
    finite = maximum(minimum(x, largest), -largest)
    return finite / (1.0 + absolute(finite))


def softsign_grad(x: Lanes) -> Lanes:
    """1 / (1 + |x|)^2."""
    inverse = 1.0 / (1.0 + absolute(x))
    return inverse * inverse


def softsign_grad2(x: Lanes) -> Lanes:
    """-2 sign(x) / (1 + |x|)^3; 0 at 0, where it jumps from 2 to -2."""
    if not x.is_double:
        return _in_double(softsign_grad2, x)
    inverse = 1.0 / (1.0 + absolute(x))
    return select(x.equals(0.0), 0.0, copysign(2.0 * inverse * inverse * inverse, -x))


def mish(x: Lanes) -> Lanes:
    """
    x tanh(softplus(x)) = x (1 - 2/d) with d = (e + 1)^2 + 1, e = e^x.

    To the left, where that would cancel, x e (1 - (e^2 + e)/d); between -1 and 0, where that quotient is
    large, (x e / 2) (1 + (2 - e^2)/d). So the quotient's rounding errors count for half or less.
    """
    k = constants(x)
    clamped = maximum(minimum(x, k.saturation), -k.vanishing)
    scale, q = exp_parts(clamped, shift=k.room)
    product = clamped * scale
    product = fma(product, q, product)  # 2^room x e, rounded once
    # e = unit + rest without a rounding, d = (unit^2 + 2 unit + 2) + rest (2 unit + 2 + rest) with one.
    unit = scale * 2.0**-k.room
    rest = unit * q
    double = unit + unit + 2.0
    d = fma(rest, double + rest, fma(unit, unit, double))
    e = unit + rest
    left, far = x <= 0.0, x <= -1.0  # -0, too, whose sign the other side would lose
    above = fma(-e, e, select(far, -e, 2.0))
    ratio = select(left, above, -2.0) / d
    factor = select(far, x.constant(2.0**-k.room), 2.0 ** -(k.room + 1))
    # The clamped x, where it is infinite.
    return fma(select(left, product, clamped), ratio, select(left, product, x)) * select(left, factor, 1.0)


def mish_grad(x: Lanes) -> Lanes:
    """
    With e = e^-|x|, d = e^2 + 2e + 2 and D = 2e^2 + 2e + 1:

    for x < 0   e (4 (x + 1) + e (4x + 6) + 4e^2 + e^3) / d^2
    for x >= 0  (1 + 4e + e^2 (4x + 6) + 4e^3 (x + 1)) / D^2
    """
    if not x.is_double:
        return to_single(mish_grad(to_double(x)))
    limit = constants(x).vanishing
    x = maximum(minimum(x, limit), -limit)
    part, e = _exp_of_minus(absolute(x))
    d = fma(e, e + 2.0, 2.0)
    right_d = fma(e + e, e + 1.0, 1.0)
    linear = fma(4.0, x, 6.0)
    four = 4.0 * (x + 1.0)
    left = part * fma(e, fma(e, e + 4.0, linear), four) / (d * d) * 2.0 ** -constants(x).room
    right = fma(e, fma(e, fma(e, four, linear), 4.0), 1.0) / (right_d * right_d)
    return select(x < 0.0, left, right)


def mish_grad2(x: Lanes) -> Lanes:
    """
    With e, d and D as in `mish_grad`:

    for x < 0   4 e (1 + e) / d^2 (2 + x (1 - 2 e^2 (e + 2) / d) / (1 + e))
    for x >= 0  4 e^2 (1 + e) / D^2 (2 + x (e - 2 (1 + 2 e) / D) / (1 + e))
    """
    if not x.is_double:
        return _in_double(mish_grad2, x)
    limit = constants(x).vanishing
    x = maximum(minimum(x, limit), -limit)
    e = elementary.decay(-absolute(x))
    left = x < 0.0
    d = select(left, fma(e, e + 2.0, 2.0), fma(e + e, e + 1.0, 1.0))
    inner = select(left, 1.0 - 2.0 * e * e * (e + 2.0) / d, e - 2.0 * (1.0 + e + e) / d)
    part = select(left, e, e * e) / d * (1.0 + e) / d
    return 4.0 * part * (2.0 + x * inner / (1.0 + e))


# --- exponential on the left ---------------------------------------------------------------------------


def _expm1_left(x: Lanes) -> Lanes:
    """e^x - 1 for x <= 0; for x > 0 a number that is not used."""
    scale, q = exp_parts(maximum(minimum(x, 0.0), -40.0))
    return fma(scale, q, scale - 1.0)


def elu(x: Lanes, alpha: Lanes) -> Lanes:
    """x for x >= 0, else alpha (e^x - 1)."""
    return select(x >= 0.0, x, alpha * _expm1_left(x))


def elu_grad(x: Lanes, alpha: Lanes) -> Lanes:
    """1 for x >= 0, else alpha e^x."""
    return select(x >= 0.0, 1.0, alpha * elementary.decay(minimum(x, 0.0)))


def elu_grad2(x: Lanes, alpha: Lanes) -> Lanes:
    """0 for x >= 0, else alpha e^x."""
    return select(x >= 0.0, 0.0, alpha * elementary.decay(minimum(x, 0.0)))


def selu(x: Lanes) -> Lanes:
    """1.0507 x for x >= 0, else 1.7581 (e^x - 1)."""
    return select(x >= 0.0, SELU_SCALE * x, SELU_SCALE_ALPHA * _expm1_left(x))


def selu_grad(x: Lanes) -> Lanes:
    """1.0507 for x >= 0, else 1.7581 e^x."""
    return select(x >= 0.0, SELU_SCALE, SELU_SCALE_ALPHA * elementary.decay(minimum(x, 0.0)))


def selu_grad2(x: Lanes) -> Lanes:
    """0 for x >= 0, else 1.7581 e^x."""
    return select(x >= 0.0, 0.0, SELU_SCALE_ALPHA * elementary.decay(minimum(x, 0.0)))


def celu(x: Lanes, alpha: Lanes) -> Lanes:
    """x for x >= 0, else alpha (e^(x / alpha) - 1)."""
    return select(x >= 0.0, x, alpha * elementary.expm1(x / alpha))


def celu_grad(x: Lanes, alpha: Lanes) -> Lanes:
    """1 for x >= 0, else e^(x / alpha)."""
    return select(x >= 0.0, 1.0, elementary.exp(x / alpha))


def celu_grad2(x: Lanes, alpha: Lanes) -> Lanes:
    """0 for x >= 0, else e^(x / alpha) / alpha; 0 for alpha = 0, as to the left of it for alpha near 0."""
    slope = select((x >= 0.0) | alpha.equals(0.0), 0.0, elementary.exp(x / alpha) / alpha)
    return _keep_nan(x, slope)


# --- around the normal distribution --------------------------------------------------------------------


def gelu(x: Lanes) -> Lanes:
    """x Phi(x), Phi(x) = erfc(-x / sqrt 2) / 2."""
    if not x.is_double:
        return normal.gelu(x)
    return 0.5 * maximum(x, -40.0) * _erfc_over_sqrt_2(-maximum(minimum(x, 40.0), -40.0))


def _erfc_over_sqrt_2(x: Lanes) -> Lanes:
    """
    erfc(x / sqrt 2), for float64.

    The quotient's rounding error, times 2x, is the result's: 600 ULP where gelu ends. It is known, from an
    fma and the constant's own error, and the derivative of erfc takes it back: 3 ULP, but for subnormal
    results, where erfc has no more digits to give.
    """
    high, low = 0.7071067811865476, -4.833646656726457e-17
    quotient = x * high
    rest = fma(x, high, -quotient) + x * low
    slope = -1.1283791670955126 * elementary.decay(-(quotient * quotient))
    return fma(slope, rest, call_per_lane("erfc", quotient))


def gelu_grad(x: Lanes) -> Lanes:
    """Phi(x) + x phi(x), phi(x) = e^(-x^2 / 2) / sqrt(2 pi)."""
    if not x.is_double:
        return normal.gelu_grad(x)
    k = constants(x)
    clamped = maximum(minimum(x, 38.75), -38.75)
    scale, q = exp_parts_of_half_square(clamped, shift=k.room)
    # The product with the power of 2 before that with x, which makes the result normal for longer.
    part = fma(scale, q, scale) * (clamped * 0.3989422804014327)
    return fma(part, 2.0**-k.room, 0.5 * _erfc_over_sqrt_2(-clamped))


def gelu_grad2(x: Lanes) -> Lanes:
    """phi(x) (2 - x^2)."""
    if not x.is_double:
        return _in_double(gelu_grad2, x)
    k = constants(x)
    clamped = maximum(minimum(x, 38.75), -38.75)
    scale, q = exp_parts_of_half_square(clamped, shift=k.room)
    part = product_plus(-clamped, clamped, x.constant(2.0)) * 0.3989422804014327
    return select(absolute(x) > 38.75, 0.0, fma(scale, q, scale) * part * 2.0**-k.room)


def _gelu_tanh_argument(x: Lanes) -> tuple[Lanes, Lanes]:
    """
    2u = 2 sqrt(2 / pi) (x + 0.044715 x^3) for |x| <= 22, as a number and what its rounding lost.

    e^-2u multiplies 2u's relative error by up to 110 in float32 and 750 in float64.
    """
    # 2u = x (c + d x^2); c in two parts, of which the first is short, so that its difference below is exact.
    c_high, c_low = 1.595703125, 6.599660573071176e-05
    d_high = _GELU_TANH_CUBIC
    d_low = -6.175149918155315e-19 if x.is_double else 2.3988323959931355e-09
    square = x * x
    square_low = product_plus(x, x, -square)
    inner = fma(square, d_high, c_high)
    inner_low = product_plus(square, d_high, c_high - inner) + fma(
        square_low, d_high, fma(square, d_low, c_low)
    )
    high = x * inner
    return high, fma(x, inner_low, product_plus(x, inner, -high))


def gelu_tanh(x: Lanes) -> Lanes:
    """x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): x (1 + tanh u) / 2 without its cancellation."""
    clamped = maximum(minimum(x, 22.0), -22.0)
    _, d, unit = _logistic_parts(*_gelu_tanh_argument(clamped))
    return select(x > 22.0, x, clamped / d * unit)


def gelu_tanh_grad(x: Lanes) -> Lanes:
    """s + x s (1 - s) 2u', s = 1 / (1 + e^-2u), 2u' = 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2)."""
    if not x.is_double:
        return to_single(gelu_tanh_grad(to_double(x)))  # it crosses zero, as swish_grad does
    clamped = maximum(minimum(x, 22.0), -22.0)
    slope = fma(clamped * clamped, 3.0 * _GELU_TANH_CUBIC, _TWICE_SQRT_2_OVER_PI)
    return _logistic_product_grad(*_gelu_tanh_argument(clamped), clamped * slope)


def gelu_tanh_grad2(x: Lanes) -> Lanes:
    """s' (2 w' + x w'' - x w'^2 tanh(w / 2)), w = 2u as above, s' = s (1 - s) at w."""
    if not x.is_double:
        return _in_double(gelu_tanh_grad2, x)
    clamped = maximum(minimum(x, 22.0), -22.0)
    high, low = _gelu_tanh_argument(clamped)
    w = high + low
    slope = fma(clamped * clamped, 3.0 * _GELU_TANH_CUBIC, _TWICE_SQRT_2_OVER_PI)
    # x w'' = 6 * cubic * x^2
    even = fma(clamped * clamped, 6.0 * _GELU_TANH_CUBIC, 2.0 * slope)
    return sigmoid_grad(w) * fma(-clamped * slope, slope * elementary.tanh(0.5 * w), even)
