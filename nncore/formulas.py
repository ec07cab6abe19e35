"""
Lanes -> Lanes: every activation and its derivative, each formula once.

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

from nncore import elementary, normal
from nncore.elementary import constants, exp_parts, halves
from nncore.lanes import (
    Bits,
    Lanes,
    absolute,
    call_per_lane,
    fma,
    maximum,
    minimum,
    power_of_two,
    select,
    to_double,
    to_single,
)

# Klambauer et al. 2017, "Self-Normalizing Neural Networks".
SELU_SCALE = 1.0507009873554804934193349852946
SELU_SCALE_ALPHA = 1.7580993408473768599402175208123

_TWICE_SQRT_2_OVER_PI = 1.5957691216057307117597842397375
_GELU_TANH_CUBIC = 0.044715


def _keep_nan(x: Lanes, y: Lanes) -> Lanes:
    """y, but NaN where x is: for formulas that compare x without computing with it."""
    return select(x.is_nan(), x, y)


# --- piecewise linear: exact ---------------------------------------------------------------------------


def step(x: Lanes) -> Lanes:
    """0 for x <= 0, else 1."""
    return _keep_nan(x, select(x > 0.0, x.constant(1.0), 0.0))


def step_grad(x: Lanes) -> Lanes:
    """0 everywhere."""
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


def hard_sigmoid(x: Lanes) -> Lanes:
    """x/6 + 1/2 clipped to [0, 1]."""
    # (x + 3) / 6 rounded once: the sum's rounding error, and the product's with 1/6, are known and put back.
    clipped = minimum(maximum(x, -3.0), 3.0)
    total = clipped + 3.0
    lost = clipped - (total - 3.0)
    sixth = total * (1.0 / 6.0)
    return fma(fma(sixth, -6.0, total) + lost, 1.0 / 6.0, sixth)


def hard_sigmoid_grad(x: Lanes) -> Lanes:
    """1/6 inside (-3, 3), else 0."""
    return _keep_nan(x, select((x > -3.0) & (x < 3.0), x.constant(1.0 / 6.0), 0.0))


def hard_swish(x: Lanes) -> Lanes:
    """x times hard_sigmoid(x): 0 up to -3, x from 3 on."""
    inside = maximum(x, -3.0)
    return select(x >= 3.0, x, inside * (minimum(inside, 3.0) + 3.0) / 6.0)


def hard_swish_grad(x: Lanes) -> Lanes:
    """x/3 + 1/2 inside (-3, 3), 0 below, 1 above."""
    inside = (x + 1.5) / 3.0
    return select(x >= 3.0, 1.0, select(x <= -3.0, 0.0, inside))


# --- around the logistic function ----------------------------------------------------------------------


def _one_plus_exp(x: Lanes) -> tuple[Lanes, Bits]:
    """
    d and a with 1 + e^x = d / 2^a, for |x| up to the saturation constant, where e^x itself may overflow.

    2^a is between the square roots of 1 and e^-x, so that d, and the quotient of anything moderate and d, are
    normal numbers: whatever is divided by d becomes subnormal only in the last step, the product with 2^a.
    """
    n, q = exp_parts(x)
    first, second = halves(n)
    a = -first
    one, scale = power_of_two(a), power_of_two(second)
    # The sum of two powers of 2 is exact, or loses the smaller; then the larger stays, and the smaller one is
    # taken up again if it was the 1. Adding 1 to a rounded e^x instead costs 0.3 ULP, up to 2.3 in sigmoid.
    total = one + scale
    lost = one - (total - scale)
    return total + fma(scale, q, lost), a


def _clamped(x: Lanes) -> Lanes:
    """x where 1 + e^x and x e^x are still moving, else the nearest such number."""
    limit = constants(x).saturation
    return maximum(minimum(x, limit), -limit)


def sigmoid(x: Lanes) -> Lanes:
    """1 / (1 + e^-x)."""
    d, a = _one_plus_exp(-_clamped(x))
    return (1.0 / d) * power_of_two(a)


def sigmoid_grad(x: Lanes) -> Lanes:
    """e / (1 + e)^2 with e = e^-|x|."""
    n, q = exp_parts(-minimum(absolute(x), constants(x).saturation))
    first, second = halves(n)
    scale, shift = power_of_two(second), power_of_two(first)
    part = fma(scale, q, scale)
    e = part * shift
    # (1 + e)^2 as 1 + e (2 + e): where e is small, 1 + e would be rounded, and its error doubled.
    return part / fma(e, e + 2.0, 1.0) * shift


def swish(x: Lanes) -> Lanes:
    """x / (1 + e^-x)."""
    d, a = _one_plus_exp(-_clamped(x))
    # x, not the clamped x, so that it grows without bound to the right.
    return maximum(x, -constants(x).saturation) / d * power_of_two(a)


def swish_grad(x: Lanes) -> Lanes:
    """With e = e^-|x|: (1 + e (1 + x)) / (1 + e)^2 for x >= 0, else e (1 + e + x) / (1 + e)^2."""
    if not x.is_double:
        return to_single(swish_grad(to_double(x)))  # in float32, 4.5 ULP; 5 times that where it crosses zero
    clamped = _clamped(x)
    n, q = exp_parts(-absolute(clamped))
    first, second = halves(n)
    scale, shift = power_of_two(second), power_of_two(first)
    part = fma(scale, q, scale)
    e = part * shift
    d = 1.0 + e
    right = fma(e, clamped + 1.0, 1.0) / (d * d)
    left = part * (d + clamped) / (d * d) * shift
    return select(clamped < 0.0, left, right)


def tanh(x: Lanes) -> Lanes:
    """(1 - e^-2x) / (1 + e^-2x)."""
    return elementary.tanh(x)


def tanh_grad(x: Lanes) -> Lanes:
    """1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = e^-2|x|."""
    return 4.0 * sigmoid_grad(x + x)


def softplus(x: Lanes) -> Lanes:
    """ln(1 + e^x), as max(x, 0) + log1p(e^-|x|)."""
    return maximum(x, 0.0) + elementary.log1p_unit(elementary.exp(-absolute(x)))


def softplus_grad(x: Lanes) -> Lanes:
    """sigmoid(x)."""
    return sigmoid(x)


def softsign(x: Lanes) -> Lanes:
    """x / (1 + |x|)."""
    largest = sys.float_info.max if x.is_double else (2.0 - 2.0**-23) * 2.0**127
    finite = maximum(minimum(x, largest), -largest)
    return finite / (1.0 + absolute(finite))


def softsign_grad(x: Lanes) -> Lanes:
    """1 / (1 + |x|)^2."""
    inverse = 1.0 / (1.0 + absolute(x))
    return inverse * inverse


def mish(x: Lanes) -> Lanes:
    """
    x tanh(softplus(x)).

    With e = e^-|x|: x (1 + 2e) / (1 + 2e + 2e^2) for x >= 0, else x e (e + 2) / (e (e + 2) + 2).
    """
    if not x.is_double:
        return to_single(mish(to_double(x)))
    clamped = _clamped(x)
    n, q = exp_parts(-absolute(clamped))
    first, second = halves(n)
    scale, shift = power_of_two(second), power_of_two(first)
    part = fma(scale, q, scale)
    e = part * shift
    right = x * fma(2.0, e, 1.0) / fma(e + e, e + 1.0, 1.0)
    left = clamped * (part * (e + 2.0)) / fma(e, e + 2.0, 2.0) * shift
    return select(clamped < 0.0, left, right)


def mish_grad(x: Lanes) -> Lanes:
    """
    With e = e^-|x|, d = e^2 + 2e + 2 and D = 2e^2 + 2e + 1:

    for x < 0   e (4 (x + 1) + e (4x + 6) + 4e^2 + e^3) / d^2
    for x >= 0  (1 + 4e + e^2 (4x + 6) + 4e^3 (x + 1)) / D^2
    """
    if not x.is_double:
        return to_single(mish_grad(to_double(x)))
    x = _clamped(x)
    n, q = exp_parts(-absolute(x))
    first, second = halves(n)
    scale, shift = power_of_two(second), power_of_two(first)
    part = fma(scale, q, scale)
    e = part * shift
    d = fma(e, e + 2.0, 2.0)
    right_d = fma(e + e, e + 1.0, 1.0)
    linear = fma(4.0, x, 6.0)
    four = 4.0 * (x + 1.0)
    left = part * fma(e, fma(e, e + 4.0, linear), four) / (d * d) * shift
    right = fma(e, fma(e, fma(e, four, linear), 4.0), 1.0) / (right_d * right_d)
    return select(x < 0.0, left, right)


# --- exponential on the left ---------------------------------------------------------------------------


def _expm1_left(x: Lanes) -> Lanes:
    """e^x - 1 for x <= 0; for x > 0 a number that is not used."""
    n, q = exp_parts(maximum(minimum(x, 0.0), -40.0))
    scale = power_of_two(n)
    return fma(scale, q, scale - 1.0)


def elu(x: Lanes, alpha: Lanes) -> Lanes:
    """x for x >= 0, else alpha (e^x - 1)."""
    return select(x >= 0.0, x, alpha * _expm1_left(x))


def elu_grad(x: Lanes, alpha: Lanes) -> Lanes:
    """1 for x >= 0, else alpha e^x."""
    return select(x >= 0.0, 1.0, alpha * elementary.exp(minimum(x, 0.0)))


def selu(x: Lanes) -> Lanes:
    """1.0507 x for x >= 0, else 1.7581 (e^x - 1)."""
    return select(x >= 0.0, SELU_SCALE * x, SELU_SCALE_ALPHA * _expm1_left(x))


def selu_grad(x: Lanes) -> Lanes:
    """1.0507 for x >= 0, else 1.7581 e^x."""
    return select(x >= 0.0, SELU_SCALE, SELU_SCALE_ALPHA * elementary.exp(minimum(x, 0.0)))


def celu(x: Lanes, alpha: Lanes) -> Lanes:
    """x for x >= 0, else alpha (e^(x / alpha) - 1)."""
    return select(x >= 0.0, x, alpha * elementary.expm1(x / alpha))


def celu_grad(x: Lanes, alpha: Lanes) -> Lanes:
    """1 for x >= 0, else e^(x / alpha)."""
    return select(x >= 0.0, 1.0, elementary.exp(x / alpha))


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
    slope = -1.1283791670955126 * elementary.exp(-(quotient * quotient))
    return fma(slope, rest, call_per_lane("erfc", quotient))


def gelu_grad(x: Lanes) -> Lanes:
    """Phi(x) + x phi(x), phi(x) = e^(-x^2 / 2) / sqrt(2 pi)."""
    if not x.is_double:
        return normal.gelu_grad(x)
    clamped = maximum(minimum(x, 40.0), -40.0)
    density = 0.3989422804014327 * elementary.exp(clamped * clamped * -0.5)
    return fma(clamped, density, 0.5 * _erfc_over_sqrt_2(-clamped))


def gelu_tanh(x: Lanes) -> Lanes:
    """x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): x (1 + tanh u) / 2 without its cancellation."""
    if not x.is_double:
        return to_single(gelu_tanh(to_double(x)))
    clamped = maximum(minimum(x, 40.0), -40.0)
    inner = fma(clamped * clamped, _GELU_TANH_CUBIC, 1.0)
    d, a = _one_plus_exp(-_clamped(_TWICE_SQRT_2_OVER_PI * clamped * inner))
    return maximum(x, -40.0) / d * power_of_two(a)


def gelu_tanh_grad(x: Lanes) -> Lanes:
    """s + x s (1 - s) 2u', s = 1 / (1 + e^-2u), 2u' = 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2)."""
    if not x.is_double:
        return to_single(gelu_tanh_grad(to_double(x)))
    clamped = maximum(minimum(x, 40.0), -40.0)
    square = clamped * clamped
    twice_u = _clamped(_TWICE_SQRT_2_OVER_PI * clamped * fma(square, _GELU_TANH_CUBIC, 1.0))
    slope = _TWICE_SQRT_2_OVER_PI * fma(square, 3.0 * _GELU_TANH_CUBIC, 1.0)
    return fma(clamped * slope, sigmoid_grad(twice_u), sigmoid(twice_u))
