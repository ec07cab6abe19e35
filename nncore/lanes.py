"""
LLVM values -> LLVM values: the vector vocabulary in which every formula is written once.

A `Lanes` is a float32 or float64 value of any width: one number, or a vector of n numbers treated alike.
Formulas (`nncore.elementary`, `nncore.formulas`) are ordinary Python functions over Lanes. Running one emits
straight-line LLVM instructions, so the same definition serves a ufunc's scalar tail, its vector body, and any
tile of a kernel:

    y = formulas.sigmoid(Lanes(builder, value, target)).value

Every operation rounds on its own: nothing is left to the optimiser to fuse, `fma` is asked for by name. That
is why a formula gives the same bits at width 1 and at every vector width.

Shapes: a width of 1 is a plain float or double, not a vector of one. Python numbers on either side of an
operator become constants in the dtype of the other side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from llvmlite import ir

__all__ = [
    "Bits",
    "Lanes",
    "Mask",
    "Target",
    "absolute",
    "call_per_lane",
    "copysign",
    "fma",
    "lookup",
    "maximum",
    "minimum",
    "power_of_two",
    "product_plus",
    "select",
    "to_double",
    "to_single",
]

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_FLOAT = ir.FloatType()
_DOUBLE = ir.DoubleType()


@dataclass(frozen=True)
class Target:
    """
    What code is generated for.

    vector_bits: the widest vector to use.  has_fma: whether fused multiply-add is one instruction.
    """

    vector_bits: int
    has_fma: bool

    @classmethod
    @lru_cache(maxsize=32)
    def from_features(cls, triple: str, features: str) -> Target:
        """
        Read *features*, an LLVM feature string such as "+avx2,+fma,-avx512f", of a machine with *triple*.

        Features that are not named count as missing: slower code, never an illegal instruction.
        """
        present = {f[1:] for f in features.split(",") if f.startswith("+")}
        if triple.startswith(("aarch64", "arm64")):
            return cls(vector_bits=128, has_fma=True)  # both belong to the base instruction set
        if "avx512f" in present:
            return cls(vector_bits=512, has_fma=True)
        if "avx2" in present:
            return cls(vector_bits=256, has_fma="fma" in present)
        return cls(vector_bits=128, has_fma="fma" in present)

    def lanes(self, dtype: ir.Type) -> int:
        """The number of values of *dtype* (float or double) in one vector."""
        return self.vector_bits // (64 if dtype == _DOUBLE else 32)


class _Value:
    """A typed SSA value and the builder that places instructions after it."""

    __slots__ = ("builder", "target", "value")

    def __init__(self, builder: ir.IRBuilder, value: ir.Value, target: Target) -> None:
        self.builder = builder
        self.value = value
        self.target = target

    @property
    def width(self) -> int:
        """The number of lanes."""
        return self.value.type.count if isinstance(self.value.type, ir.VectorType) else 1

    @property
    def element(self) -> ir.Type:
        """The LLVM type of one lane."""
        return self.value.type.element if isinstance(self.value.type, ir.VectorType) else self.value.type

    def _shaped(self, element: ir.Type) -> ir.Type:
        """The type of as many lanes as this has, of another element."""
        return ir.VectorType(element, self.width) if isinstance(self.value.type, ir.VectorType) else element

    def _splat(self, constant: float) -> ir.Constant:
        """*constant* in every lane."""
        kind = self.value.type
        return ir.Constant(kind, [constant] * kind.count if isinstance(kind, ir.VectorType) else constant)


class Mask(_Value):
    """One truth value a lane, as comparisons give it. Combine with & | ~, use with `select`."""

    __slots__ = ()

    def __and__(self, other: Mask) -> Mask:
        return Mask(self.builder, self.builder.and_(self.value, other.value), self.target)

    def __or__(self, other: Mask) -> Mask:
        return Mask(self.builder, self.builder.or_(self.value, other.value), self.target)

    def __invert__(self) -> Mask:
        return Mask(self.builder, self.builder.not_(self.value), self.target)


class Bits(_Value):
    """The bit patterns of Lanes as signed integers of the same size. Arithmetic wraps; >> keeps the sign."""

    __slots__ = ()

    def _with(self, emit: Callable[..., ir.Value], other: Bits | int) -> Bits:
        operand = other.value if isinstance(other, Bits) else self._splat(other)
        return Bits(self.builder, emit(self.value, operand), self.target)

    def __add__(self, other: Bits | int) -> Bits:
        return self._with(self.builder.add, other)

    def __sub__(self, other: Bits | int) -> Bits:
        return self._with(self.builder.sub, other)

    def __and__(self, other: Bits | int) -> Bits:
        return self._with(self.builder.and_, other)

    def __or__(self, other: Bits | int) -> Bits:
        return self._with(self.builder.or_, other)

    def __xor__(self, other: Bits | int) -> Bits:
        return self._with(self.builder.xor, other)

    def __lshift__(self, other: Bits | int) -> Bits:
        return self._with(self.builder.shl, other)

    def __rshift__(self, other: Bits | int) -> Bits:
        return self._with(self.builder.ashr, other)

    def __neg__(self) -> Bits:
        return Bits(self.builder, self.builder.neg(self.value), self.target)

    def at_least(self, bound: int) -> Bits:
        """The greater of each and *bound*."""
        flag = self.builder.icmp_signed(">", self.value, self._splat(bound))
        return Bits(self.builder, self.builder.select(flag, self.value, self._splat(bound)), self.target)

    def as_lanes(self) -> Lanes:
        """The same bits, read as floating-point numbers."""
        kind = self._shaped(_DOUBLE if self.element == _I64 else _FLOAT)
        return Lanes(self.builder, self.builder.bitcast(self.value, kind), self.target)


class Lanes(_Value):
    """Floating-point numbers under one operation at a time. See the module's docstring."""

    __slots__ = ()

    @property
    def is_double(self) -> bool:
        """Whether the lanes are float64 (else float32)."""
        return bool(self.element == _DOUBLE)

    def constant(self, number: float) -> Lanes:
        """*number*, rounded to the lanes' dtype, in every lane."""
        number = float(number) if self.is_double else float(np.float32(number))
        return Lanes(self.builder, self._splat(number), self.target)

    def as_bits(self) -> Bits:
        """The same bits, read as signed integers."""
        kind = self._shaped(_I64 if self.is_double else _I32)
        return Bits(self.builder, self.builder.bitcast(self.value, kind), self.target)

    # Arithmetic. IEEE 754, round to nearest even, one rounding an operation.

    def _with(self, emit: Callable[..., ir.Value], other: Lanes | float) -> Lanes:
        return Lanes(self.builder, emit(self.value, _lift(other, self).value), self.target)

    def __add__(self, other: Lanes | float) -> Lanes:
        return self._with(self.builder.fadd, other)

    def __sub__(self, other: Lanes | float) -> Lanes:
        return self._with(self.builder.fsub, other)

    def __mul__(self, other: Lanes | float) -> Lanes:
        return self._with(self.builder.fmul, other)

    def __truediv__(self, other: Lanes | float) -> Lanes:
        return self._with(self.builder.fdiv, other)

    def __radd__(self, other: float) -> Lanes:
        return _lift(other, self) + self

    def __rsub__(self, other: float) -> Lanes:
        return _lift(other, self) - self

    def __rmul__(self, other: float) -> Lanes:
        return _lift(other, self) * self

    def __rtruediv__(self, other: float) -> Lanes:
        return _lift(other, self) / self

    def __neg__(self) -> Lanes:
        return Lanes(self.builder, self.builder.fneg(self.value), self.target)

    # Comparisons. False where either side is NaN.

    def _compare(self, relation: str, other: Lanes | float) -> Mask:
        flag = self.builder.fcmp_ordered(relation, self.value, _lift(other, self).value)
        return Mask(self.builder, flag, self.target)

    def __lt__(self, other: Lanes | float) -> Mask:
        return self._compare("<", other)

    def __le__(self, other: Lanes | float) -> Mask:
        return self._compare("<=", other)

    def __gt__(self, other: Lanes | float) -> Mask:
        return self._compare(">", other)

    def __ge__(self, other: Lanes | float) -> Mask:
        return self._compare(">=", other)

    def equals(self, other: Lanes | float) -> Mask:
        """Where both sides are equal. (A method: == stays Python's identity.)"""
        return self._compare("==", other)

    def is_nan(self) -> Mask:
        """Where there is no number."""
        flag = self.builder.fcmp_unordered("uno", self.value, self.value)
        return Mask(self.builder, flag, self.target)


def _lift(operand: Lanes | float, like: Lanes) -> Lanes:
    return operand if isinstance(operand, Lanes) else like.constant(operand)


def _first_lanes(*operands: Lanes | float) -> Lanes:
    return next(o for o in operands if isinstance(o, Lanes))


def _call(like: _Value, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    """Call the LLVM intrinsic or C function *name*, declared on first use in the module being built."""
    module = like.builder.module
    function = module.globals.get(name)
    if function is None:
        function = ir.Function(module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return like.builder.call(function, arguments)


def _suffix(lanes: Lanes) -> str:
    """The type's part of an overloaded intrinsic's name: f32, v16f32, ..."""
    scalar = "f64" if lanes.is_double else "f32"
    return f"v{lanes.width}{scalar}" if isinstance(lanes.value.type, ir.VectorType) else scalar


def fma(x: Lanes | float, y: Lanes | float, z: Lanes | float) -> Lanes:
    """
    x * y + z, rounded once where the target has the instruction, else rounded twice.

    Without the instruction llvm.fma would be a call of the C library for each lane. Formulas must therefore
    be accurate either way: only their bits differ between machines with and without FMA.
    """
    like = _first_lanes(x, y, z)
    x, y, z = _lift(x, like), _lift(y, like), _lift(z, like)
    if not like.target.has_fma:
        return x * y + z
    result = _call(like, f"llvm.fma.{_suffix(like)}", like.value.type, [x.value, y.value, z.value])
    return Lanes(like.builder, result, like.target)


def product_plus(x: Lanes, y: Lanes | float, z: Lanes) -> Lanes:
    """
    x * y + z without a rounding of the product, for z near -x * y: also where there is no fused multiply-add.

    There x and y are split into halves whose products are exact (Dekker); they must not be near overflow.
    """
    y = _lift(y, x)
    if x.target.has_fma:
        return fma(x, y, z)
    (x_high, x_low), (y_high, y_low) = _split(x), _split(y)
    product = x * y
    error = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low
    return (product + z) + error


def _split(x: Lanes) -> tuple[Lanes, Lanes]:
    """x as the sum of two numbers of half its digits."""
    scaled = x * (2.0**27 + 1.0 if x.is_double else 2.0**12 + 1.0)
    high = scaled - (scaled - x)
    return high, x - high


def absolute(x: Lanes) -> Lanes:
    """|x|: clears the sign bit, of a NaN too."""
    return Lanes(x.builder, _call(x, f"llvm.fabs.{_suffix(x)}", x.value.type, [x.value]), x.target)


def copysign(x: Lanes | float, sign: Lanes) -> Lanes:
    """The magnitude of *x* with the sign bit of *sign*."""
    magnitude = _lift(x, sign)
    value = _call(sign, f"llvm.copysign.{_suffix(sign)}", sign.value.type, [magnitude.value, sign.value])
    return Lanes(sign.builder, value, sign.target)


def select(mask: Mask, x: Lanes | float, y: Lanes | float) -> Lanes:
    """x where *mask* holds, else y. At least one of them must be Lanes."""
    like = _first_lanes(x, y)
    value = mask.builder.select(mask.value, _lift(x, like).value, _lift(y, like).value)
    return Lanes(mask.builder, value, mask.target)


def minimum(x: Lanes, bound: Lanes | float) -> Lanes:
    """The lesser of *x* and *bound*; where x is NaN, NaN."""
    return select(x > bound, bound, x)


def maximum(x: Lanes, bound: Lanes | float) -> Lanes:
    """The greater of *x* and *bound*; where x is NaN, NaN."""
    return select(x < bound, bound, x)


def power_of_two(exponent: Bits) -> Lanes:
    """2^exponent, for exponents of normal numbers: [-126, 127] in float32, [-1022, 1023] in float64."""
    if exponent.element == _I64:
        return ((exponent + 1023) << 52).as_lanes()
    return ((exponent + 127) << 23).as_lanes()


def to_double(x: Lanes) -> Lanes:
    """float32 lanes as float64 lanes of the same count. Exact. Costs two vectors where there was one."""
    return Lanes(x.builder, x.builder.fpext(x.value, x._shaped(_DOUBLE)), x.target)


def to_single(x: Lanes) -> Lanes:
    """float64 lanes rounded to float32 lanes of the same count."""
    return Lanes(x.builder, x.builder.fptrunc(x.value, x._shaped(_FLOAT)), x.target)


def lookup(table: Sequence[float], index: Bits) -> Lanes:
    """
    table[index] as float32, for a table of 16 numbers; only the low 4 bits of *index* count.

    One permutation of a register with AVX-512, two and a blend with AVX2, a load for each lane elsewhere.
    """
    b, width = index.builder, index.width
    is_x86 = b.module.triple.startswith("x86_64")
    if is_x86 and index.target.vector_bits == 512 and width % 16 == 0:
        register = ir.VectorType(_FLOAT, 16)
        permute = _declare(b, "llvm.x86.avx512.permvar.sf.512", register, [register, ir.VectorType(_I32, 16)])
        numbers = _row(table)
        parts = [b.call(permute, [numbers, part]) for part in _pieces(index, 16)]
    elif is_x86 and index.target.vector_bits >= 256 and width % 8 == 0:
        register = ir.VectorType(_FLOAT, 8)
        permute = _declare(b, "llvm.x86.avx2.permps", register, [register, ir.VectorType(_I32, 8)])
        low, high = _row(table[:8]), _row(table[8:])
        parts = []
        for part in _pieces(index, 8):
            in_high = b.icmp_signed("!=", b.and_(part, ir.Constant(part.type, [8] * 8)), part.type(None))
            parts.append(b.select(in_high, b.call(permute, [high, part]), b.call(permute, [low, part])))
    else:
        return _lookup_per_lane(table, index)
    return Lanes(b, _joined(b, parts), index.target)


def _lookup_per_lane(table: Sequence[float], index: Bits) -> Lanes:
    b = index.builder
    kind = ir.ArrayType(_FLOAT, len(table))
    name = f"table.{hashlib.sha256(repr(tuple(table)).encode()).hexdigest()[:16]}"
    data = b.module.globals.get(name)
    if data is None:
        data = ir.GlobalVariable(b.module, kind, name)
        data.linkage = "internal"
        data.global_constant = True
        data.initializer = ir.Constant(kind, [float(np.float32(number)) for number in table])
    wrapped = (index & 15).value
    zero = _I32(0)
    if index.width == 1:
        return Lanes(b, b.load(b.gep(data, [zero, wrapped])), index.target)
    result = ir.Constant(ir.VectorType(_FLOAT, index.width), ir.Undefined)
    for i in range(index.width):
        number = b.load(b.gep(data, [zero, b.extract_element(wrapped, _I32(i))]))
        result = b.insert_element(result, number, _I32(i))
    return Lanes(b, result, index.target)


def _row(numbers: Sequence[float]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_FLOAT, len(numbers)), [float(np.float32(n)) for n in numbers])


def _declare(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Type]) -> ir.Function:
    function = builder.module.globals.get(name)
    return function or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def _pieces(index: Bits, width: int) -> list[ir.Value]:
    """The lanes of *index*, *width* at a time."""
    b, value = index.builder, index.value
    if index.width == width:
        return [value]
    undefined = ir.Constant(value.type, ir.Undefined)
    places = ir.VectorType(_I32, width)
    return [
        b.shuffle_vector(value, undefined, ir.Constant(places, list(range(first, first + width))))
        for first in range(0, index.width, width)
    ]


def _joined(builder: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    """Vectors of one width, a power of two of them, end to end."""
    while len(parts) > 1:
        width = 2 * parts[0].type.count
        places = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
        parts = [
            builder.shuffle_vector(first, second, places)
            for first, second in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def call_per_lane(name: str, x: Lanes) -> Lanes:
    """*name*, a function of one number from the C library, for each lane in turn."""
    symbol = name if x.is_double else name + "f"
    if not isinstance(x.value.type, ir.VectorType):
        return Lanes(x.builder, _call(x, symbol, x.value.type, [x.value]), x.target)
    result = ir.Constant(x.value.type, ir.Undefined)
    for i in range(x.width):
        lane = x.builder.extract_element(x.value, _I32(i))
        result = x.builder.insert_element(result, _call(x, symbol, x.element, [lane]), _I32(i))
    return Lanes(x.builder, result, x.target)
