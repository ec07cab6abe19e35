"""Every activation and derivative beside its slow twin, at edges, and in ULP."""

import subprocess
import sys
import warnings

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import naive

import nncore

NAMES = list(nncore.ACTIVATIONS)
WITH_ALPHA = [name for name in NAMES if nncore.ACTIVATIONS[name].default_alpha is not None]
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
EVERY = pytest.mark.parametrize("name", NAMES)

# Infinite inputs: the limits. {a}: alpha.
LIMITS = {
    "identity": (-np.inf, np.inf),
    "step": (0, 1),
    "sigmoid": (0, 1),
    "relu": (0, np.inf),
    "relu6": (0, 6),
    "tanh": (-1, 1),
    "swish": (0, np.inf),
    "gelu": (0, np.inf),
    "gelu_tanh": (0, np.inf),
    "softplus": (0, np.inf),
    "softsign": (-1, 1),
    "mish": (0, np.inf),
    "selu": (-naive.SELU_LAMBDA * naive.SELU_ALPHA, np.inf),
    "hard_sigmoid": (0, 1),
    "hard_swish": (0, np.inf),
    "hard_tanh": (-1, 1),
    "thresholded_relu": (0, np.inf),
    "elu": (-1, np.inf),
    "celu": (-1, np.inf),
    "leaky_relu": (-np.inf, np.inf),
    "prelu": (-np.inf, np.inf),
}

# Derivatives where there is none: at kinks, as the primer has them, else as documented.
KINKS = [
    ("step", 0, 0),
    ("relu", 0, 0),
    ("leaky_relu", 0, 0.01),
    ("prelu", 0, 0.25),
    ("elu", 0, 1),
    ("selu", 0, naive.SELU_LAMBDA),
    ("relu6", 0, 0),
    ("relu6", 6, 0),
    ("hard_sigmoid", -3, 0),
    ("hard_sigmoid", 3, 0),
    ("hard_swish", -3, 0),
    ("hard_swish", 3, 1),
    ("hard_tanh", -1, 0),
    ("hard_tanh", 1, 0),
    ("thresholded_relu", 1, 0),
]


def both(name):
    """The ufunc of the activation and of its derivative."""
    activation = nncore.ACTIVATIONS[name]
    return activation.function, activation.derivative


def dense(dtype, rng):
    """Numbers of every magnitude, most of them where something happens."""
    small = np.float64(10) ** rng.uniform(-30, 1, 4000) * rng.choice([-1, 1], 4000)
    return np.concatenate([rng.uniform(-20, 20, 8000), rng.uniform(-120, 120, 4000), small]).astype(dtype)


def ulp_error(actual, exact):
    """How far *actual* is from *exact* (float64, or wider), in ULP of actual's dtype at *exact*."""
    rounded = exact.astype(actual.dtype)
    spacing = np.spacing(np.abs(rounded)).astype(np.float64)
    return np.abs(actual.astype(exact.dtype) - exact) / spacing


@EVERY
@DTYPES
def test_agrees_with_its_slow_twin(name, dtype):
    """Function and derivative, within a few roundings of float64's textbook formula."""
    x = dense(dtype, np.random.default_rng(0))
    alpha = nncore.ACTIVATIONS[name].default_alpha or 1.0
    # The twins cancel in float64: 1e-13 of the largest value nearby, or float32's own rounding.
    eps = 4 * np.finfo(dtype).eps + 1e-13
    for fast, slow in zip(both(name), (naive.activation, naive.derivative), strict=True):
        expected = slow(name, x, np.asarray(alpha, dtype))
        assert fast(x).dtype == np.dtype(dtype)
        np.testing.assert_allclose(fast(x), expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("name", WITH_ALPHA)
@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float32", "float64"]))
def test_alpha_may_be_any_number_and_one_a_feature(name, seed, dtype):
    """Negative, above 1, and a vector (n,) against rows (m, n)."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((5, 7)) * 3).astype(dtype)
    alpha = (rng.standard_normal(7) * 2 + 0.01).astype(dtype)
    if name == "celu":
        alpha = np.abs(alpha) + np.asarray(0.1, dtype)
    eps = 16 * np.finfo(dtype).eps
    for fast, slow in zip(both(name), (naive.activation, naive.derivative), strict=True):
        np.testing.assert_allclose(fast(x, alpha), slow(name, x, alpha), rtol=eps, atol=eps)
        assert np.array_equal(fast(x, alpha)[:, 3], fast(x[:, 3], alpha[3]))


@EVERY
@DTYPES
def test_infinities_give_the_limit_and_nan_passes_without_a_warning(name, dtype):
    """No flag that NumPy would warn of, at the infinities, the largest and the smallest numbers."""
    info = np.finfo(dtype)
    edges = np.array(
        [
            0.0,
            -0.0,
            np.inf,
            -np.inf,
            info.max,
            -info.max,
            info.tiny,
            -info.tiny,
            1e3,
            -1e3,
            88.8,
            -88.8,
            104,
            -104,
        ],
        dtype,
    )
    function, derivative = both(name)
    with np.errstate(over="raise", invalid="raise", divide="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        y, slope = function(edges), derivative(edges)
        nans = function(np.array([np.nan], dtype))
    assert not np.isnan(y).any()
    assert not np.isnan(slope).any()
    low, high = LIMITS[name]
    np.testing.assert_allclose(y[3:1:-1], [low, high], rtol=np.finfo(dtype).eps, atol=0)
    assert np.isnan(nans).all()


@pytest.mark.parametrize("name", WITH_ALPHA)
@DTYPES
def test_alpha_zero_gives_zero_below_zero_even_at_minus_infinity(name, dtype):
    """0 * inf is not in it."""
    if name == "celu":
        return  # x / alpha: alpha is not 0
    function, derivative = both(name)
    x = np.array([-np.inf, -1.0, 2.0, np.inf], dtype)
    assert np.array_equal(function(x, np.asarray(0, dtype)), np.array([0, 0, 2, np.inf], dtype))
    assert np.array_equal(derivative(x, np.asarray(0, dtype)), np.array([0, 0, 1, 1], dtype))


@pytest.mark.parametrize(("name", "at", "expected"), KINKS)
@DTYPES
def test_derivatives_at_kinks(name, at, expected, dtype):
    """primer.json decides where it speaks; the rest is as documented."""
    assert both(name)[1](np.array([at], dtype))[0] == np.asarray(expected, dtype)
    assert nncore.ACTIVATIONS[name].kink


def test_prelu_with_alpha_above_one_is_not_a_maximum():
    """max(x, alpha * x) would be wrong for alpha > 1."""
    x = np.array([-2.0, 2.0])
    assert np.array_equal(nncore.prelu(x, 3.0), [-6.0, 2.0])
    assert np.array_equal(nncore.prelu(x, -1.0), [2.0, 2.0])


def test_saturated_derivatives_keep_their_digits():
    """h (1 - h) of the rounded output would be 0 at 20."""
    assert nncore.sigmoid_grad(np.float32(20.0)) == pytest.approx(2.0611537e-9, rel=1e-6)
    assert nncore.sigmoid_grad(40.0) == pytest.approx(4.248354255291589e-18, rel=1e-13)
    assert nncore.tanh_grad(np.float32(15.0)) == pytest.approx(3.743049e-13, rel=1e-6)


MP = {
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "swish": lambda x: x / (1 + mpmath.exp(-x)),
    "elu": lambda x: x if x > 0 else mpmath.expm1(x),
    "selu": lambda x: (
        mpmath.mpf(naive.SELU_LAMBDA) * (x if x > 0 else mpmath.mpf(naive.SELU_ALPHA) * mpmath.expm1(x))
    ),
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "gelu": lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2,
    "mish": lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))),
}


@pytest.mark.parametrize("name", list(MP))
def test_float64_is_within_4_ulp_of_mpmath(name):
    """On samples of every magnitude, and in the far tails."""
    rng = np.random.default_rng(1)
    # gelu: to where its results are subnormal, which no double erfc can give in full.
    end = -37.5 if name == "gelu" else -700
    x = np.concatenate(
        [rng.uniform(-37, 40, 300), rng.uniform(end, -30, 60), 10.0 ** rng.uniform(-300, 1, 100)]
    )
    y = both(name)[0](x)
    with mpmath.workdps(60):
        for value, got in zip(x, y, strict=True):
            exact = MP[name](mpmath.mpf(float(value)))
            ulp = float(np.spacing(abs(float(exact))))
            assert abs(mpmath.mpf(float(got)) - exact) <= 4 * ulp, (name, value)


@pytest.mark.parametrize("name", list(MP))
def test_float32_is_within_2_ulp(name):
    """Against the float64 form, good to 4 of its own, far smaller, ULP; tails and subnormals included."""
    rng = np.random.default_rng(2)
    bits = rng.integers(0, 2**32, 400_000, dtype=np.uint64).astype(np.uint32)
    with np.errstate(invalid="ignore"):  # signalling NaN among them
        x = bits.view(np.float32)
        x = np.concatenate([x[np.isfinite(x)], rng.uniform(-110, 20, 400_000).astype(np.float32)])
    y = both(name)[0](x)
    exact = both(name)[0](x.astype(np.float64))
    finite = np.abs(exact) < np.finfo(np.float32).max
    assert ulp_error(y[finite], exact[finite]).max() <= 2


def test_integers_are_float64_as_numpy_has_it():
    assert nncore.sigmoid(np.arange(3)).dtype == np.float64
    assert nncore.relu(np.array([-1, 2], np.int8)).dtype in (np.float32, np.float64)


def test_functions_write_into_out_and_broadcast():
    x = np.linspace(-3, 3, 12).reshape(3, 4)
    out = np.empty_like(x)
    assert nncore.tanh(x, out=out) is out
    assert np.array_equal(out, nncore.tanh(x))
    assert np.array_equal(nncore.tanh(x[:, ::2]), out[:, ::2])


def test_importing_nncore_compiles_nothing():
    """It does not even import Numba."""
    code = "import sys, nncore; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@DTYPES
def test_softmax_and_log_softmax_agree_with_their_slow_twins(dtype):
    """Rows of softmax sum to 1, even at 1e4; large numbers do not overflow; a NaN row is alone."""
    rng = np.random.default_rng(3)
    eps = 8 * np.finfo(dtype).eps
    for shape in ((1, 1), (3, 2), (5, 10), (4, 1000), (2, 3, 4)):
        x = (rng.standard_normal(shape) * 5).astype(dtype)
        np.testing.assert_allclose(nncore.softmax(x), naive.softmax(x), rtol=20 * eps, atol=0)
        np.testing.assert_allclose(nncore.log_softmax(x), naive.log_softmax(x), rtol=eps, atol=eps)
        assert np.abs(nncore.softmax(x + 1e4).astype(np.float64).sum(-1) - 1).max() <= 2.0**-22
    x = np.array([[1.0, 2.0], [np.nan, 1.0], [np.inf, 0.0], [3.0, 3.0]], dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = nncore.softmax(x)
    assert np.isnan(y[1]).all()
    assert np.array_equal(y[3], np.array([0.5, 0.5], dtype))
    assert np.array_equal(y[0], nncore.softmax(x[0]))
