"""The vector vocabulary: each operation has NumPy's bits, for one number and for vectors of 4, 8 and 16."""

import ctypes
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from llvmlite import ir
from support import naive_float32 as naive
from support.emitted import MACHINES_HERE, Code, elementwise

from nncore import lanes
from nncore.lanes import Target

WIDTHS = (1, 4, 8, 16)
BLOCKS = 16  # so many vectors of 16, whatever the width
ELEMENTS = {np.float32: ir.FloatType(), np.float64: ir.DoubleType()}
TABLE = [float(np.float32(math.sin(i))) for i in range(16)]


def flag(mask, like):
    """A mask as numbers: 1 where it holds, else 0."""
    return lanes.select(mask, like.constant(1.0), 0.0)


def bits_of(x):
    return x.view(np.int32 if x.dtype == np.float32 else np.int64)


def on_bits(operation):
    """*operation* on the bit patterns of one or two operands, over Lanes and over arrays."""
    if operation.__code__.co_argcount == 1:
        return (
            lambda x: operation(x.as_bits()).as_lanes(),
            lambda x: operation(bits_of(x)).view(x.dtype),
        )
    return (
        lambda x, y: operation(x.as_bits(), y.as_bits()).as_lanes(),
        lambda x, y: operation(bits_of(x), bits_of(y)).view(x.dtype),
    )


def relation(operation):
    return (
        lambda x, y: flag(operation(x, y), x),
        lambda x, y: operation(x, y).astype(x.dtype),
    )


# name: (over Lanes, over arrays); the number of operands is that of the second.
OPERATIONS = {
    "add": (lambda x, y: x + y, lambda x, y: x + y),
    "subtract": (lambda x, y: x - y, lambda x, y: x - y),
    "multiply": (lambda x, y: x * y, lambda x, y: x * y),
    "divide": (lambda x, y: x / y, lambda x, y: x / y),
    "negative": (lambda x: -x, lambda x: -x),
    "numbers on the right": (
        lambda x: ((x + 0.1) - 0.3) * 0.7 / 1.1,
        lambda x: ((x + x.dtype.type(0.1)) - x.dtype.type(0.3)) * x.dtype.type(0.7) / x.dtype.type(1.1),
    ),
    "numbers on the left": (
        lambda x: 0.7 / (0.3 - 0.9 * (0.1 + x)),
        lambda x: x.dtype.type(0.7) / (x.dtype.type(0.3) - x.dtype.type(0.9) * (x.dtype.type(0.1) + x)),
    ),
    "less": relation(lambda x, y: x < y),
    "less or equal": relation(lambda x, y: x <= y),
    "greater": relation(lambda x, y: x > y),
    "greater or equal": relation(lambda x, y: x >= y),
    "equals": (lambda x, y: flag(x.equals(y), x), lambda x, y: (x == y).astype(x.dtype)),
    "is_nan": (lambda x: flag(x.is_nan(), x), lambda x: np.isnan(x).astype(x.dtype)),
    "and": (
        lambda x, y: flag((x > 0.5) & (y > 0.5), x),
        lambda x, y: ((x > 0.5) & (y > 0.5)).astype(x.dtype),
    ),
    "or": (
        lambda x, y: flag((x > 0.5) | (y > 0.5), x),
        lambda x, y: ((x > 0.5) | (y > 0.5)).astype(x.dtype),
    ),
    "not": (lambda x: flag(~(x > 0.5), x), lambda x: (~(x > 0.5)).astype(x.dtype)),
    "select": (lambda x, y, z: lanes.select(x < y, y, z), lambda x, y, z: np.where(x < y, y, z)),
    "absolute": (lanes.absolute, np.abs),
    "copysign": (lanes.copysign, np.copysign),
    # As documented: NaN if the first is; the bound only where it is beyond.
    "minimum": (lanes.minimum, lambda x, y: np.where(x > y, y, x)),
    "maximum": (lanes.maximum, lambda x, y: np.where(x < y, y, x)),
    "bits +": on_bits(lambda x, y: x + y),
    "bits -": on_bits(lambda x, y: x - y),
    "bits &": on_bits(lambda x, y: x & y),
    "bits |": on_bits(lambda x, y: x | y),
    "bits ^": on_bits(lambda x, y: x ^ y),
    "bits neg": on_bits(lambda x: -x),
    "bits <<": on_bits(lambda x: x << 7),
    "bits >>": on_bits(lambda x: x >> 7),
    "bits of a number": on_bits(lambda x: ((x & 0x7FFFFF) | 0x3F800000) + 1),
}


def define_all(operations):
    """*operations* at every width and in both dtypes, as functions of a module."""

    def define(module, machine):
        functions = {}
        for (index, (name, (formula, twin))), width, (dtype, element) in itertools.product(
            enumerate(operations.items()), WIDTHS, ELEMENTS.items()
        ):
            label = f"f{index}_{width}_{dtype.__name__}"
            functions[name, width, dtype] = elementwise(
                module, machine, label, formula, arity(twin), width, element
            )
        return functions

    return define


def arity(twin):
    return twin.nin if isinstance(twin, np.ufunc) else twin.__code__.co_argcount


# A width that is forced on a machine changes nothing here: every width is tested on each.
KINDS = [machine for machine in MACHINES_HERE if "forced" not in machine.name]


@pytest.fixture(scope="module", params=KINDS, ids=lambda machine: machine.name)
def machine(request):
    return request.param


@pytest.fixture(scope="module")
def code(machine):
    return Code(machine, define_all(OPERATIONS | rounded_operations(machine.target.has_fma)))


def operands(dtype, count):
    """Each special number with each other, and random ones: bit patterns and numbers near 1."""
    info = np.finfo(dtype)
    positive = [0.0, 1.0, 0.5, math.pi, info.tiny, info.smallest_subnormal, info.max, np.inf, 1 + info.eps]
    special = np.array([*positive, *(-number for number in positive), np.nan], dtype)
    rng = np.random.default_rng(0)
    shape = (count, 1024 * 16)
    patterns = rng.integers(0, 256, (*shape, info.dtype.itemsize), dtype=np.uint8).view(dtype)[..., 0]
    numbers = rng.standard_normal(shape).astype(dtype)
    crossed = np.array(list(itertools.islice(itertools.product(special, repeat=count), 8192)), dtype).T
    mixed = np.concatenate([crossed, patterns[:, :4096], numbers[:, :4096]], axis=1)
    return list(np.ascontiguousarray(mixed[:, : mixed.shape[1] // 16 * 16]))


def same_bits(x, y):
    """Equal bit for bit, but for which NaN a NaN is."""
    nan = np.isnan(x)
    return np.array_equal(nan, np.isnan(y)) and np.array_equal(bits_of(x)[~nan], bits_of(y)[~nan])


def applied(function, width, result_dtype, *xs):
    out = np.empty(xs[0].size, result_dtype)
    function(*xs, out, xs[0].size // width)
    return out


@pytest.mark.parametrize("dtype", ELEMENTS, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_have_numpy_s_bits(code, name, dtype):
    """At every width, for infinities, NaN, signed zeros, subnormals and any bit pattern."""
    _, twin = OPERATIONS[name]
    xs = operands(dtype, arity(twin))
    with np.errstate(all="ignore"):
        expected = twin(*xs)
    assert expected.dtype == dtype
    for width in WIDTHS:
        assert same_bits(applied(code[name, width, dtype], width, dtype, *xs), expected), width


# Operations whose roundings depend on the machine


def exact_fma(x, y, z):
    """x * y + z with one rounding, of float64 numbers one by one."""
    if math.isfinite(x) and math.isfinite(y) and not math.isfinite(z):
        return z
    if not all(map(math.isfinite, (x, y, z))):
        with np.errstate(all="ignore"):
            return x * y + z
    exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
    if exact == 0:
        return x * y + z  # for the sign of the zero
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def fma_twin(x, y, z):
    if x.dtype == np.float32:
        return naive.fma(x, y, z)
    with np.errstate(all="ignore"):
        return np.array([exact_fma(*numbers) for numbers in zip(x, y, z, strict=True)])


def twice_rounded(x, y, z):
    return x * y + z


def rounded_operations(has_fma):
    return {
        "fma": (lanes.fma, fma_twin if has_fma else twice_rounded),
        "fma of numbers": (
            lambda x: lanes.fma(0.3, x, lanes.fma(x, 0.7, 0.1)),
            lambda x: x,  # only its number of operands counts: see the test
        ),
        # z near -x y: what is left is the error of the product.
        "product_plus": (lambda x, y: lanes.product_plus(x, y, -(x * y)), lambda x, y: x),
    }


@pytest.mark.parametrize("dtype", ELEMENTS, ids=lambda dtype: dtype.__name__)
def test_fma_rounds_once_where_there_is_the_instruction(machine, code, dtype):
    """And twice where there is none; the same at every width."""
    # Exact fractions take their time: every third of the combinations.
    xs = [np.ascontiguousarray(x[::3][: x.size // 48 * 16]) for x in operands(dtype, 3)]
    twin = fma_twin if machine.target.has_fma else twice_rounded
    with np.errstate(all="ignore"):
        expected = twin(*xs)
    x = xs[0]
    a, b, c = (np.full_like(x, number) for number in (0.3, 0.7, 0.1))
    with np.errstate(all="ignore"):
        of_numbers = twin(a, x, twin(x, b, c))
    for width in WIDTHS:
        assert same_bits(applied(code["fma", width, dtype], width, dtype, *xs), expected), width
        assert same_bits(applied(code["fma of numbers", width, dtype], width, dtype, x), of_numbers), width


@pytest.mark.parametrize("dtype", ELEMENTS, ids=lambda dtype: dtype.__name__)
def test_product_plus_loses_nothing_of_the_product(code, dtype):
    """x y - round(x y) is exact, with and without fused multiply-add."""
    rng = np.random.default_rng(1)
    x, y = (rng.standard_normal(1024).astype(dtype) for _ in range(2))
    pairs = zip(x, y, x * y, strict=True)
    exact = [float(Fraction(float(a)) * Fraction(float(b)) - Fraction(float(ab))) for a, b, ab in pairs]
    for width in WIDTHS:
        result = applied(code["product_plus", width, dtype], width, dtype, x, y)
        assert np.array_equal(result, np.array(exact, dtype)), width


# Operations that change the type, or that one dtype alone has


def power_formula(x):
    """2 ** n for the n in the low bits of x."""
    spread = 511 if x.is_double else 63
    return lanes.power_of_two((x.as_bits() & (2 * spread + 1)) - spread)


def power_twin(x):
    spread = 511 if x.dtype == np.float64 else 63
    return np.exp2((bits_of(x) & (2 * spread + 1)) - spread).astype(x.dtype)


def define_others(module, machine):
    single, double = ELEMENTS[np.float32], ELEMENTS[np.float64]
    functions = {}
    for width in WIDTHS:
        for name, formula, element in (
            ("power32", power_formula, single),
            ("power64", power_formula, double),
            ("to_double", lanes.to_double, single),
            ("to_single", lanes.to_single, double),
            ("lookup", lambda x: lanes.lookup(TABLE, x.as_bits()), single),
            ("cbrt32", lambda x: lanes.call_per_lane("cbrt", x), single),
            ("cbrt64", lambda x: lanes.call_per_lane("cbrt", x), double),
        ):
            functions[name, width] = elementwise(
                module, machine, f"{name}_{width}", formula, 1, width, element
            )
    return functions


@pytest.fixture(scope="module")
def others(machine):
    return Code(machine, define_others)


def libm(name, kind):
    function = getattr(ctypes.CDLL(None), name)
    function.argtypes, function.restype = [kind], kind
    return np.vectorize(function, otypes=[kind])


OTHERS = {
    "power32": (np.float32, power_twin),
    "power64": (np.float64, power_twin),
    "to_double": (np.float32, lambda x: x.astype(np.float64)),
    "to_single": (np.float64, lambda x: x.astype(np.float32)),
    "lookup": (np.float32, lambda x: np.array(TABLE, np.float32)[bits_of(x) & 15]),
    "cbrt32": (np.float32, libm("cbrtf", ctypes.c_float)),
    "cbrt64": (np.float64, libm("cbrt", ctypes.c_double)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_conversions_and_tables_have_numpy_s_bits(others, name):
    """Conversions, powers of two, look-ups and calls of the C library, at every width."""
    dtype, twin = OTHERS[name]
    (x,) = operands(dtype, 1)
    with np.errstate(all="ignore"):
        expected = twin(x)
    for width in WIDTHS:
        assert same_bits(applied(others[name, width], width, expected.dtype, x), expected), width


# What is generated for


@pytest.mark.parametrize(
    ("triple", "features", "expected"),
    [
        ("x86_64-unknown-linux-gnu", "+avx2,+fma,+avx512f", Target(512, True)),
        ("x86_64-unknown-linux-gnu", "+avx2,+fma,-avx512f", Target(256, True)),
        ("x86_64-unknown-linux-gnu", "+avx2,-fma", Target(256, False)),
        ("x86_64-unknown-linux-gnu", "+avx,+fma", Target(128, True)),
        ("x86_64-apple-darwin", "+sse2", Target(128, False)),
        ("x86_64-unknown-linux-gnu", "", Target(128, False)),
        ("aarch64-unknown-linux-gnu", "", Target(128, True)),
        ("arm64-apple-darwin", "+neon", Target(128, True)),
        ("riscv64-unknown-linux-gnu", "+v", Target(128, False)),
    ],
)
def test_the_target_is_read_from_the_features(triple, features, expected):
    """What is not named counts as missing."""
    assert Target.from_features(triple, features) == expected
    assert expected.lanes(ELEMENTS[np.float32]) == expected.vector_bits // 32
    assert expected.lanes(ELEMENTS[np.float64]) == expected.vector_bits // 64
