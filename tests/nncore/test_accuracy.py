"""How far from exact: activations and derivatives in both dtypes, softmax, whole models."""

import subprocess
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from numba.core.registry import cpu_target
from support import naive, processes
from support.models import random_mlp

import nncore
from nncore import Layer, Mlp
from nncore.compilation import target_of
from nncore.tiles import CHUNK
from nnserver.model_folder import BUNDLED

EXHAUSTIVE = Path(__file__).parents[1] / "exhaustive" / "run.py"

# --- float32, against float64 --------------------------------------------------------------------------


def test_every_forty_thousandth_float32_is_within_the_bounds():
    """2 ULP for functions, 4 for derivatives, exact where linear; `make test-exhaustive` takes all."""
    command = [sys.executable, str(EXHAUSTIVE), "--stride", "40009"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr


WITHOUT_FMA = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse2"}


def test_a_machine_without_fma_is_within_3_ulp(tmp_path):
    """There the products of `fma` are rounded, too; derivatives keep their 4 ULP."""
    command = [sys.executable, str(EXHAUSTIVE), "--stride", "100003"]
    environment = processes.environment(tmp_path, **WITHOUT_FMA)
    del environment["PYTHONSAFEPATH"]  # the script's neighbours are its modules
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
    assert done.returncode == 0, done.stderr


# --- float64, against mpmath ---------------------------------------------------------------------------


def _sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


def _softplus(x):
    return mpmath.log1p(mpmath.exp(x))


def _normal(x):
    return mpmath.erfc(-x / mpmath.sqrt(2)) / 2


def _twice_u(x):
    return 2 * mpmath.sqrt(2 / mp.pi) * (x + mpf("0.044715") * x**3)


def _twice_u_grad(x):
    return 2 * mpmath.sqrt(2 / mp.pi) * (1 + 3 * mpf("0.044715") * x**2)


LAMBDA = mpf(naive.SELU_LAMBDA)
LAMBDA_ALPHA = LAMBDA * mpf(naive.SELU_ALPHA)

FUNCTIONS = {
    "sigmoid": _sigmoid,
    "tanh": mpmath.tanh,
    "swish": lambda x: x * _sigmoid(x),
    "elu": lambda x: x if x > 0 else mpmath.expm1(x),
    "selu": lambda x: LAMBDA * x if x > 0 else LAMBDA_ALPHA * mpmath.expm1(x),
    "celu": lambda x: x if x > 0 else mpmath.expm1(x),
    "gelu": lambda x: x * _normal(x),
    "gelu_tanh": lambda x: x * _sigmoid(_twice_u(x)),
    "softplus": _softplus,
    "softsign": lambda x: x / (1 + abs(x)),
    "mish": lambda x: x * mpmath.tanh(_softplus(x)),
    "hard_sigmoid": lambda x: min(max(x + 3, 0), 6) / mpf(6),
    "hard_swish": lambda x: x * min(max(x + 3, 0), 6) / mpf(6),
}

DERIVATIVES = {
    "sigmoid": lambda x: _sigmoid(x) * _sigmoid(-x),
    "tanh": lambda x: mpmath.sech(x) ** 2,
    "swish": lambda x: _sigmoid(x) * (1 + x * _sigmoid(-x)),
    "elu": lambda x: mpf(1) if x >= 0 else mpmath.exp(x),
    "selu": lambda x: LAMBDA if x >= 0 else LAMBDA_ALPHA * mpmath.exp(x),
    "celu": lambda x: mpf(1) if x >= 0 else mpmath.exp(x),
    "gelu": lambda x: _normal(x) + x * mpmath.exp(-x * x / 2) / mpmath.sqrt(2 * mp.pi),
    "gelu_tanh": lambda x: _sigmoid(_twice_u(x)) * (1 + x * _twice_u_grad(x) * _sigmoid(-_twice_u(x))),
    "softplus": _sigmoid,
    "softsign": lambda x: 1 / (1 + abs(x)) ** 2,
    "mish": lambda x: mpmath.tanh(_softplus(x)) + x * _sigmoid(x) * mpmath.sech(_softplus(x)) ** 2,
    "hard_sigmoid": lambda x: mpf(1) / 6 if abs(x) < 3 else mpf(0),
    "hard_swish": lambda x: mpf(0) if x <= -3 else mpf(1) if x >= 3 else x / 3 + mpf(1) / 2,
}

# Where one of these crosses zero, two numbers near 0.25 cancel, and what is left has their rounding errors.
CROSS_ZERO = ("swish", "gelu", "gelu_tanh", "mish")

# Left of this gelu is subnormal, and has no more digits than the C library's erfc: see below.
GELU_NORMAL = -37.5

EDGES = [0.0, 3.0, 6.0, 1e-310, 5e-324, 1e-160, 20.0, 37.5, 38.0, 40.0, 700.0, 709.8, 745.2, 760.0, 1e10]


def samples(seed):
    """Numbers of every magnitude, and the edges, of either sign."""
    rng = np.random.default_rng(seed)
    powers = 10.0 ** rng.uniform(-310, 3, 60) * rng.choice([-1, 1], 60)
    spread = [rng.uniform(-40, 40, 150), rng.uniform(-3, 3, 150), rng.uniform(-760, -30, 60), powers]
    return np.concatenate([*spread, EDGES, np.negative(EDGES)])


def ulp(exact):
    """The gap between float64 numbers at *exact*, an mpf."""
    exponent = mpmath.frexp(exact)[1] - 1 if exact else -1022
    return mpf(2) ** (max(exponent, -1022) - 52)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_functions_are_within_4_ulp(name):
    """On samples of every magnitude, the far tails and every edge; results may be subnormal, but gelu's."""
    x = samples(1)
    if name == "gelu":
        x = x[x > GELU_NORMAL]
    y = nncore.ACTIVATIONS[name].function(x)
    with mpmath.workdps(60):
        for value, got in zip(x, y, strict=True):
            exact = mpf(FUNCTIONS[name](mpf(float(value))))
            assert abs(mpf(float(got)) - exact) <= 4 * ulp(exact), value


@pytest.mark.parametrize("name", DERIVATIVES)
def test_float64_derivatives_are_within_4_ulp(name):
    """Or, where they cross zero, within 2^-53."""
    x = samples(2)
    near_zero = mpf(2) ** -53 if name in CROSS_ZERO else 0
    slopes = nncore.ACTIVATIONS[name].derivative(x)
    with mpmath.workdps(60):
        for value, got in zip(x, slopes, strict=True):
            exact = mpf(DERIVATIVES[name](mpf(float(value))))
            crossing = near_zero if -1.6 < value < -0.5 else 0
            assert abs(mpf(float(got)) - exact) <= max(4 * ulp(exact), crossing), value


def test_the_last_results_of_gelu_are_within_4_ulp_or_32_of_the_smallest_number():
    """The C library's erfc is subnormal there, off by half the smallest number, and multiplied by x / 2."""
    x = np.linspace(-38.6, GELU_NORMAL, 300)
    with mpmath.workdps(60):
        for value, got in zip(x, nncore.gelu(x), strict=True):
            exact = FUNCTIONS["gelu"](mpf(float(value)))
            assert abs(mpf(float(got)) - exact) <= max(4 * ulp(exact), 32 * mpf(2) ** -1074), value


# --- edges, both dtypes --------------------------------------------------------------------------------

BOTH = pytest.mark.parametrize("dtype", ["float32", "float64"])
EVERY = pytest.mark.parametrize("name", nncore.ACTIVATIONS)


@EVERY
@BOTH
def test_zeros_keep_their_sign(name, dtype):
    """Where f(0) = 0, f(-0) = -0; but step and thresholded_relu choose a constant 0."""
    zero, minus_zero = nncore.ACTIVATIONS[name].function(np.array([0.0, -0.0], dtype))
    assert zero == minus_zero
    assert not np.signbit(zero)
    assert np.signbit(minus_zero) == (zero == 0 and name not in ("step", "thresholded_relu"))


@EVERY
@BOTH
def test_subnormal_numbers_are_numbers(name, dtype):
    """f(x) = f(0) + f'(0) x, on either side of 0, to the last digit there is."""
    activation, info = nncore.ACTIVATIONS[name], np.finfo(dtype)
    x = np.array([1, 3, 1000, 12345], dtype) * info.smallest_subnormal
    for side in (x, -x):
        slope = activation.derivative(side).astype(np.longdouble)
        start = activation.function(np.array([1 if name == "step" and side is x else 0], dtype))
        error = np.abs(activation.function(side) - (start + slope * side))
        assert (error <= np.maximum(np.spacing(np.abs(start)), info.smallest_subnormal)).all()


@EVERY
@BOTH
def test_the_largest_numbers_overflow_only_where_the_exact_result_does(name, dtype):
    """selu's slope is above 1; every other result is finite, and so are all slopes."""
    largest = np.finfo(dtype).max * np.array([-1, 1], dtype)
    y, slope = nncore.ACTIVATIONS[name].function(largest), nncore.ACTIVATIONS[name].derivative(largest)
    assert np.isfinite(y).tolist() == [True, name != "selu"]
    assert np.isfinite(slope).all()


# --- softmax -------------------------------------------------------------------------------------------


def softmax_layer(logits):
    """The same softmax in the SIMD kernels: a layer that passes its input on."""
    n = logits.shape[-1]
    return Mlp([Layer(np.eye(n, dtype=np.float32), None, "softmax")]).forward(logits)


def softmax_of_products(logits):
    """The same of infinities: each row as 4, or NaN, times the finite weights of a model of its own."""
    weights = np.nan_to_num(np.clip(logits / 4, -3e38, 3e38))
    x = np.where(np.isnan(logits).any(-1), np.nan, 4.0)
    rows = zip(weights, x, strict=True)
    return np.concatenate(
        [Mlp([Layer(row[None], None, "softmax")]).forward([[factor]]) for row, factor in rows]
    )


SOFTMAXES = pytest.mark.parametrize("softmax", [nncore.softmax, softmax_layer])


@SOFTMAXES
@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 600), rows=st.sampled_from([1, 3, 17]))
def test_probabilities_are_within_4_ulp_and_what_the_difference_costs(softmax, seed, n, rows):
    """Each within 4 + |x - max| ULP of long double's, and a row's sum in float64 within 2^-22 of 1."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, n)) * 10.0 ** rng.uniform(-2, 2)).astype(np.float32)
    y = softmax(x)
    below = x.max(-1, keepdims=True).astype(np.longdouble) - x
    exact = np.exp(-below)
    exact /= exact.sum(-1, keepdims=True)
    gap = np.spacing(exact.astype(np.float32)).astype(np.longdouble)
    assert (np.abs(y - exact) <= (4 + below) * gap).all()
    assert np.abs(y.astype(np.float64).sum(-1) - 1).max() <= 2.0**-22


@SOFTMAXES
@pytest.mark.parametrize("n", [1000, 4096])
def test_rows_of_softmax_sum_to_1_within_2_to_the_minus_22(softmax, n):
    """Up to 4,096 classes: all alike, of one winner, and of any size."""
    rng = np.random.default_rng(n)
    random = rng.standard_normal((5, n)) * [[0.1], [1], [3], [9], [50]]
    x = np.concatenate([[np.zeros(n), 40 * (np.arange(n) == 7), -np.arange(n)], random])
    sums = softmax(x.astype(np.float32)).astype(np.float64).sum(-1)
    assert np.abs(sums - 1).max() <= 2.0**-22


@pytest.mark.parametrize("softmax", [nncore.softmax, softmax_of_products])
def test_softmax_of_infinities_and_nan(softmax):
    """-inf has nothing, +inf shares the whole, all alike share alike; NaN is its own row's."""
    inf, nan = np.inf, np.nan
    cases = [
        ([0, -inf, 0, -inf], [0.5, 0, 0.5, 0]),
        ([-inf] * 4, [0.25] * 4),
        ([inf, 1, inf, 2], [0.5, 0, 0.5, 0]),
        ([nan, 1, 2, 3], [nan] * 4),
        ([1, 1, nan, inf], [nan] * 4),
        ([-3e38, -3e38, -3e38, -3e38], [0.25] * 4),
        ([3e38, -3e38, 3e38, 0], [0.5, 0, 0.5, 0]),
    ]
    y = softmax(np.array([x for x, _ in cases], np.float32))
    np.testing.assert_array_equal(y, np.array([expected for _, expected in cases], np.float32))


# --- whole models --------------------------------------------------------------------------------------

# Largest slopes: how much of an error in its argument a function passes on.
SLOPES = {"relu": 1, "tanh": 1, "sigmoid": 0.25, "swish": 1.1, "gelu": 1.13, "softplus": 1, "identity": 1}
UNIT = 2.0**-24


def roundings(n_in):
    """
    How often a product, or a sum that it is part of, is rounded on its way into a pre-activation.

    Once for each term of its chunk, once for each further chunk; without fused multiply-add once more.
    """
    chunk = min(n_in, CHUNK)
    further = -(-n_in // CHUNK) - 1
    return chunk + further + (0 if target_of(cpu_target.target_context).has_fma else 1)


def error_bound(mlp, x):
    """
    How far float32 outputs may be from the exact ones: (rows, n_out), as docs/accuracy.md derives it.

    A sum's error is at most k u / (1 - k u) times the sum of the magnitudes (Higham 2002, section 3.1), k as
    `roundings` has it; an activation adds 3 ULP, and passes on its argument's error times its slope.
    """
    h, error = np.asarray(x, np.float64), np.zeros(x.shape)
    for layer in mlp.layers:
        w, b = np.abs(layer.weights.astype(np.float64)), np.abs(layer.bias.astype(np.float64))
        k = roundings(layer.n_in) * UNIT
        error = error @ w + k / (1 - k) * ((np.abs(h) + error) @ w + b)
        h = naive.layer_forward(layer, h)
        own = 0 if layer.activation in ("relu", "identity") else 6 * UNIT
        error = SLOPES[layer.activation] * error
        error += own * (np.abs(h) + error) + np.finfo(np.float32).smallest_subnormal
    return error


def test_the_digits_model_is_within_its_bound():
    """And well within: sums of 64 terms lose about the root of what they could."""
    mlp = nncore.load(BUNDLED / "digits.safetensors")
    x = np.random.default_rng(0).integers(0, 17, (500, 64)).astype(np.float32)
    exact = naive.forward(mlp, x)
    error = np.abs(mlp.forward(x) - exact)
    assert (error <= error_bound(mlp, x)).all()
    assert error.max() <= 1e-6 * np.abs(exact).max()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.sampled_from([1, 2, 7, 16, 33, 100, 255, 256, 257, 600]), min_size=2, max_size=4).map(
        tuple
    ),
    activation=st.sampled_from(sorted(SLOPES)),
    rows=st.sampled_from([1, 5, 40]),
)
def test_random_models_are_within_their_bound(seed, sizes, activation, rows):
    """Of any width, depth and activation, in both kinds of tile."""
    mlp = random_mlp(seed, sizes, activation, "identity")
    x = np.random.default_rng(seed).standard_normal((rows, sizes[0])).astype(np.float32)
    assert (np.abs(mlp.forward(x) - naive.forward(mlp, x)) <= error_bound(mlp, x)).all()


def test_the_bound_notices_a_lost_term():
    """One product missing among 600 is out of bounds: the test above can fail."""
    mlp = random_mlp(0, (600, 20), last="identity")
    x = np.random.default_rng(0).standard_normal((8, 600)).astype(np.float32)
    fewer = x.copy()
    fewer[:, 300] = 0
    assert (np.abs(mlp.forward(fewer) - naive.forward(mlp, x)) > error_bound(mlp, x)).mean() > 0.9
