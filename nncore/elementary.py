"""
Lanes -> Lanes: exp, expm1, log1p and tanh, and the parts of exp from which activations are put together.

Straight-line code without calls, the same for float32 and float64 but for the coefficients, so that a row's
bits depend on no C library. The polynomials are minimax fits to the weighted relative error stated beside
each; those of float32 were fitted with the coefficients already rounded.

The reduction is Cody and Waite's: x = n ln 2 + r with |r| <= ln(2)/2, ln 2 in two parts of which the first is
short, so that its product with n is exact with or without FMA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nncore.lanes import (
    Bits,
    Lanes,
    absolute,
    copysign,
    fma,
    maximum,
    minimum,
    power_of_two,
    product_plus,
    select,
)

__all__ = [
    "constants",
    "exp",
    "exp_parts",
    "exp_parts_of_half_square",
    "expm1",
    "halves",
    "log1p_unit",
    "polynomial",
    "tanh",
]

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class _Constants:
    """What differs between float32 and float64."""

    # Adding this rounds a small number to an integer, which stands in the low bits of the sum.
    rounder: float
    ln2_high: float  # exact times any exponent
    ln2_low: float
    # exp(x) is 0 below the first and infinite above the second, either with room to spare.
    exp_lowest: float
    exp_highest: float
    # x exp(x) is -0 below -saturation, and 1 + exp(-x) is 1 above it; exp(saturation) may overflow.
    saturation: float
    # (expm1(r) - r) / r^2, |r| <= ln(2)/2, lowest power first.
    expm1: tuple[float, ...]
    # (log1p(u) - u) / u^2, 0 <= u <= 1.
    log1p: tuple[float, ...]
    # (tanh(x) - x) / x^3 in powers of x^2, |x| <= 0.55.
    tanh: tuple[float, ...]


_SINGLE = _Constants(
    rounder=1.5 * 2.0**23,
    ln2_high=0.693359375,
    ln2_low=-2.12194440e-4,
    exp_lowest=-104.5,
    exp_highest=89.0,
    saturation=111.0,
    # 2^-31.1
    expm1=(0.5, 0.1666666567325592, 0.04166649281978607, 0.008333545178174973, 0.0013932330766692758,
           0.00019762571901082993),
    # 2^-30.1
    log1p=(-0.49999988079071045, 0.33332714438438416, -0.24988864362239838, 0.19899621605873108,
           -0.16135157644748688, 0.12479481101036072, -0.08323805034160614, 0.042113907635211945,
           -0.013691186904907227, 0.0020844400860369205),
    # 2^-29.7
    tanh=(-0.33333316445350647, 0.133325457572937, -0.05384784936904907, 0.021052472293376923,
          -0.006245992612093687),
)  # fmt: skip

_DOUBLE = _Constants(
    rounder=1.5 * 2.0**52,
    ln2_high=6.93147180369123816490e-01,
    ln2_low=1.90821492927058770002e-10,
    exp_lowest=-746.0,
    exp_highest=710.0,
    saturation=760.0,
    # 2^-61.7
    expm1=(0.5, 0.16666666666666677, 0.04166666666666651, 0.008333333333321653, 0.0013888888888962554,
           0.00019841269886076125, 2.4801587172291785e-05, 2.755724425168528e-06, 2.755740274052557e-07,
           2.5109025289959433e-08, 2.08753367123549e-09),
    # 2^-61.7
    log1p=(-0.49999999999999983, 0.33333333333329535, -0.24999999999707082, 0.1999999998839899,
           -0.16666666388029566, 0.14285709821747944, -0.12499949270997256, 0.111106843554635,
           -0.09997258641994312, 0.09077144862402219, -0.08278330894586874, 0.07514839837790956,
           -0.06674903981913162, 0.05647234348521398, -0.043948001197246477, 0.030252953524472475,
           -0.01768331624567317, 0.008402106716007617, -0.003082230993259708, 0.0008127881919555164,
           -0.00013639310356618138, 1.0899962992165919e-05),
    # 2^-60.6
    tanh=(-0.333333333333333, 0.1333333333332662, -0.05396825396376037, 0.021869488385849935,
          -0.008863232601357924, 0.0035920920297024283, -0.001455542841556799, 0.0005884444705193659,
          -0.00023338152810935015, 8.331639662710666e-05, -1.9494657007081074e-05),
)  # fmt: skip


def constants(x: Lanes) -> _Constants:
    """The constants of the dtype of *x*."""
    return _DOUBLE if x.is_double else _SINGLE


def polynomial(x: Lanes, coefficients: Sequence[float]) -> Lanes:
    """The sum of coefficients[i] * x^i, by Horner's rule."""
    result = x.constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = fma(result, x, coefficient)
    return result


def exp_parts(x: Lanes) -> tuple[Bits, Lanes]:
    """
    n and q with exp(x) = 2^n (1 + q), q in [-0.293, 0.415].

    For |x| up to 1,000 in float64, 130 in float32; NaN gives q = NaN and an n without meaning. q is within
    0.6 ULP if n = 0, else within 0.3 ULP of 1 + q.
    """
    c = constants(x)
    shifted = fma(x, _LOG2_E, c.rounder)
    n = shifted - c.rounder
    return _parts(shifted, fma(n, -c.ln2_high, x))


def exp_parts_of_half_square(t: Lanes) -> tuple[Bits, Lanes]:
    """n and q with exp(-t^2 / 2) = 2^n (1 + q), as `exp_parts`, and as exact: the square is not rounded."""
    c = constants(t)
    shifted = fma(t * t, -0.5 * _LOG2_E, c.rounder)
    n = shifted - c.rounder
    return _parts(shifted, product_plus(-0.5 * t, t, n * -c.ln2_high))


def _parts(shifted: Lanes, rest: Lanes) -> tuple[Bits, Lanes]:
    """n, in the low bits of *shifted*, and q; rest: what x is more than n times the first part of ln 2."""
    c = constants(rest)
    r = fma(shifted - c.rounder, -c.ln2_low, rest)
    q = fma(r * r, polynomial(r, c.expm1), r)
    return shifted.as_bits() - rest.constant(c.rounder).as_bits(), q


def halves(n: Bits) -> tuple[Bits, Bits]:
    """n as a sum of two: 2^n may leave the range of normal numbers where neither of its factors does."""
    half = n >> 1
    return half, n - half


def exp(x: Lanes) -> Lanes:
    """e^x, within 1 ULP, subnormal results included; overflows to infinity, keeps NaN."""
    c = constants(x)
    n, q = exp_parts(maximum(minimum(x, c.exp_highest), c.exp_lowest))
    first, second = halves(n)
    scale = power_of_two(second)
    return fma(scale, q, scale) * power_of_two(first)


def expm1(x: Lanes) -> Lanes:
    """e^x - 1, within 1.5 ULP for x <= 0 and 2 for x > 0; -1 below, infinite above, keeps NaN."""
    c = constants(x)
    n, q = exp_parts(maximum(minimum(x, c.exp_highest), -40.0))
    first, second = halves(n)
    scale = power_of_two(second)
    one = power_of_two(second - n)  # in units of 2^first
    return fma(scale, q, scale - one) * power_of_two(first)


def log1p_unit(u: Lanes) -> Lanes:
    """ln(1 + u) for u in [0, 1], within 1.1 ULP."""
    return fma(u * u, polynomial(u, constants(u).log1p), u)


def tanh(x: Lanes) -> Lanes:
    """The hyperbolic tangent, within 2 ULP; odd, keeps NaN and the sign of zero."""
    size = absolute(x)
    square = size * size
    small = fma(size * square, polynomial(square, constants(x).tanh), size)
    # 1 - 2 / (e^2x + 1); at 20 the quotient is less than half an ULP of 1 in float64 too.
    n, q = exp_parts(minimum(size + size, 40.0))
    scale = power_of_two(n)
    large = 1.0 - 2.0 / fma(scale, q, scale + 1.0)
    return copysign(select(size < 0.55, small, large), x)
