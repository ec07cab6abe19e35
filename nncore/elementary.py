"""
Lanes -> Lanes: exp, expm1 and tanh, and the parts of exp from which activations are put together.

Straight-line code without calls, the same for float32 and float64 but for the coefficients, so that a row's
bits depend on no C library. The polynomials are minimax fits to the weighted relative error stated beside
each; those of float32 were fitted with the coefficients already rounded.

The reduction is Cody and Waite's: x = n ln 2 + r with |r| <= ln(2)/2, ln 2 in two parts of which the first is
short, so that its product with n is exact with or without FMA.

What is subnormal in the end is computed 2^room times as large, and scaled back in the last step, which then
rounds to what subnormal numbers there are.
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
)

__all__ = [
    "constants",
    "decay",
    "exp",
    "exp_exponent",
    "exp_parts",
    "exp_parts_of_half_square",
    "expm1",
    "polynomial",
    "tanh",
]

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class _Constants:
    """What differs between float32 and float64."""

    # Adding this rounds a small number to an integer, which stands in the low bits of the sum.
    rounder: float
    # Of the exponent: what is added to it, and how many bits stand below it.
    bias: int
    exponent_at: int
    ln2_high: float  # exact times any exponent
    ln2_low: float
    # exp(x) is 0 below the first and infinite above the second, either with room to spare.
    exp_lowest: float
    exp_highest: float
    # 1 + e^-x is 1 from here on.
    saturation: float
    # x e^x is 0 below -vanishing, where 2^-room e^-x and 2^room e^x are still normal numbers.
    vanishing: float
    room: int
    # (expm1(r) - r) / r^2, |r| <= ln(2)/2, lowest power first.
    expm1: tuple[float, ...]
    # (log1p(u) - u) / u^2, 0 <= u <= 1.
    log1p: tuple[float, ...]


_SINGLE = _Constants(
    rounder=1.5 * 2.0**23,
    bias=127,
    exponent_at=23,
    ln2_high=0.693359375,
    ln2_low=-2.12194440e-4,
    exp_lowest=-104.5,
    exp_highest=89.0,
    saturation=17.5,
    vanishing=109.0,
    room=32,
    # 2^-28.2 of e^r. One more power: sigmoid 1.615 ULP, not 1.642, and 8 % slower.
    expm1=(0.4999999403953552, 0.1666652113199234, 0.04166826605796814, 0.008368677459657192,
           0.001382073387503624),
    # 2^-27.5
    log1p=(-0.4999993145465851, 0.3333047032356262, -0.24958156049251556, 0.19693192839622498,
           -0.15349097549915314, 0.10670012980699539, -0.05756152793765068, 0.020150333642959595,
           -0.003306539496406913),
)  # fmt: skip

_DOUBLE = _Constants(
    rounder=1.5 * 2.0**52,
    bias=1023,
    exponent_at=52,
    ln2_high=6.93147180369123816490e-01,
    ln2_low=1.90821492927058770002e-10,
    exp_lowest=-746.0,
    exp_highest=710.0,
    saturation=37.5,
    vanishing=753.0,
    room=66,
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


def exp_parts(x: Lanes, factor: int = 1, shift: int = 0, rest: Lanes | None = None) -> tuple[Lanes, Lanes]:
    """
    scale and q with exp(factor x) = scale (1 + q) / 2^shift, scale a power of 2, q in [-0.293, 0.415].

    factor: 1, -1, 2 or -2; it costs nothing, as it is taken into the constants.
    shift: such that scale is a normal number; where it is not, or x is NaN, scale has no meaning.
    rest: what is to be added to x, less than its last digit.
    NaN gives q = NaN. q is within 0.6 ULP if scale = 2^shift, else within 0.3 ULP of 1 + q.
    """
    c = constants(x)
    rounder = c.rounder + c.bias + shift
    shifted = fma(x, factor * _LOG2_E, rounder)
    return _scale(shifted), _reduced(shifted - rounder, x, factor, rest)


def exp_exponent(x: Lanes, factor: int = 1) -> tuple[Bits, Lanes]:
    """
    k and q with exp(factor x) = 1 + q, its exponent increased by k: k stands where an exponent does.

    To be added to the bits of 1 + q as an integer. NaN gives q = NaN, but k has no meaning then, and the sum
    may be a number.
    """
    c = constants(x)
    shifted = fma(x, factor * _LOG2_E, c.rounder)
    q = _reduced(shifted - c.rounder, x, factor)
    return shifted.as_bits() << c.exponent_at, q


def exp_parts_of_half_square(t: Lanes, shift: int) -> tuple[Lanes, Lanes]:
    """The parts of exp(-t^2 / 2), as `exp_parts`, and as exact: the square is not rounded."""
    c = constants(t)
    rounder = c.rounder + c.bias + shift
    shifted = fma(t * t, -0.5 * _LOG2_E, rounder)
    n = shifted - rounder
    r = fma(n, -c.ln2_low, product_plus(-0.5 * t, t, n * -c.ln2_high))
    return _scale(shifted), fma(r * r, polynomial(r, c.expm1), r)


def _reduced(n: Lanes, x: Lanes, factor: int, rest: Lanes | None = None) -> Lanes:
    """expm1(factor (x + rest) - n ln 2)."""
    c = constants(x)
    r = fma(n, -c.ln2_high / factor, x)
    r = fma(n, -c.ln2_low / factor, r)
    if rest is not None:
        r = r + rest
    coefficients = [number * factor ** (power + 2) for power, number in enumerate(c.expm1)]
    # An addition, not a product with 2: other units are free for it.
    multiple = r + r if abs(factor) == 2 else r
    return fma(r * r, polynomial(r, coefficients), multiple if factor > 0 else -multiple)


def _scale(shifted: Lanes) -> Lanes:
    """2^k, of which k and the exponent's bias stand in the low bits of *shifted*."""
    return (shifted.as_bits() << constants(shifted).exponent_at).as_lanes()


def decay(x: Lanes) -> Lanes:
    """e^x for x <= 0, within 1 ULP, subnormal results included; keeps NaN."""
    c = constants(x)
    scale, q = exp_parts(maximum(x, c.exp_lowest), shift=c.room)
    return fma(scale, q, scale) * 2.0**-c.room


def _whole_range(x: Lanes) -> tuple[Lanes, Bits, Bits]:
    """q, a and b with e^x = 2^a 2^b (1 + q): 2^(a + b) need not be a normal number."""
    c = constants(x)
    shifted = fma(x, _LOG2_E, c.rounder)
    q = _reduced(shifted - c.rounder, x, 1)
    n = shifted.as_bits() - x.constant(c.rounder).as_bits()
    half = n >> 1
    return q, half, n - half


def exp(x: Lanes) -> Lanes:
    """e^x, within 1 ULP, subnormal results included; overflows to infinity, keeps NaN."""
    c = constants(x)
    q, first, second = _whole_range(maximum(minimum(x, c.exp_highest), c.exp_lowest))
    scale = power_of_two(second)
    return fma(scale, q, scale) * power_of_two(first)


def expm1(x: Lanes) -> Lanes:
    """e^x - 1, within 1.5 ULP for x <= 0 and 2 for x > 0; -1 below, infinite above, keeps NaN."""
    c = constants(x)
    q, first, second = _whole_range(maximum(minimum(x, c.exp_highest), -40.0))
    scale = power_of_two(second)
    one = power_of_two(-first)  # in units of 2^first
    return fma(scale, q, scale - one) * power_of_two(first)


def tanh(x: Lanes) -> Lanes:
    """
    The hyperbolic tangent, (1 - e^-2|x|) / (1 + e^-2|x|), within 2 ULP; odd, keeps NaN and the sign of zero.

    Both sides of the quotient are rounded once. A polynomial for small x beside 1 - 2 / (e^2x + 1) is right
    to 1.3 ULP, but both would be computed in every lane: 1.5 times as long.
    """
    scale, q = exp_parts(minimum(absolute(x), 20.0), factor=-2)
    return copysign(fma(scale, q, scale - 1.0) / fma(scale, q, scale + 1.0), x)
