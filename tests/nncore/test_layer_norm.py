"""LayerNorm, log_softmax and input_shape: what they compute, refuse and keep."""

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import naive

import nncore
from nncore import DtypeError, Layer, LayerNorm, Mlp, ModelError, ModelFileError, ShapeError

# In float32 a row is normalized in float64 and rounded once; dense layers round each product.
TOLERANCES = {"float32": 2e-5, "float64": 1e-12}


def normalized(x, gain, bias, epsilon):
    """The slow twin: layer normalization in NumPy, float64."""
    x = np.asarray(x, np.float64)
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * gain + bias


def example(dtype, n=13, activation="gelu"):
    """A model with a layer normalization after each of its dense layers but the last."""
    rng = np.random.default_rng(n)
    layers: list[Any] = [
        LayerNorm(rng.uniform(0.5, 1.5, 7), rng.standard_normal(7), 1e-3),
        Layer(rng.standard_normal((7, n)), rng.standard_normal(n)),
        LayerNorm(rng.uniform(0.5, 1.5, n), rng.standard_normal(n), 1e-5, activation),
        Layer(rng.standard_normal((n, 4)) / n, rng.standard_normal(4), "log_softmax"),
    ]
    return Mlp([layer.astype(dtype) for layer in layers], input_shape=(7, 1))


def slow_forward(mlp, x):
    """*mlp* layer by layer in float64."""
    h = np.asarray(x, np.float64)
    for layer in mlp.layers:
        if isinstance(layer, LayerNorm):
            h = normalized(h, layer.gain, layer.bias, layer.epsilon)
        else:
            h = h @ layer.weights.astype(np.float64) + layer.bias
        if layer.activation == "log_softmax":
            h = h - h.max(axis=-1, keepdims=True)
            h = h - np.log(np.exp(h).sum(axis=-1, keepdims=True))
        else:
            h = naive.FUNCTIONS[layer.activation](h, layer.alpha)
    return h


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 64, 300])
def test_forward_is_what_the_slow_twin_answers(dtype, n):
    """Every width, with sums that fill the partial sums and such that do not."""
    mlp = example(dtype, n)
    x = np.random.default_rng(0).standard_normal((40, 7)).astype(dtype)
    np.testing.assert_allclose(mlp.forward(x), slow_forward(mlp, x), rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_has_the_same_bits_in_any_batch(dtype):
    """Rows alone, in batches that are cut into groups, and by two threads."""
    mlp = example(dtype, 100)
    x = np.random.default_rng(0).standard_normal((3000, 7)).astype(dtype)
    whole = mlp.forward(x)
    np.testing.assert_array_equal(mlp.forward(x, threads=2), whole)
    np.testing.assert_array_equal(mlp.forward(x[1234:1300]), whole[1234:1300])
    for row in (0, 1499, 2999):
        np.testing.assert_array_equal(mlp.forward(x[row]), whole[row])


@settings(max_examples=60)
@given(
    st.integers(1, 40),
    st.floats(-1e4, 1e4),
    st.floats(1e-3, 1e3),
    st.sampled_from(["float32", "float64"]),
)
def test_a_normalization_alone_is_right_to_a_few_units(n, center, spread, dtype):
    """Rows far from zero lose nothing but what their own rounding took."""
    rng = np.random.default_rng(n)
    x = (center + spread * rng.standard_normal((5, n))).astype(dtype)
    mlp = Mlp([LayerNorm(np.ones(n, dtype), None, 1e-5)])
    expected = normalized(x, 1.0, 0.0, 1e-5)
    # float64: the mean's rounding error, |center| ulps, over the spread.
    tolerance = 2e-7 if dtype == "float32" else 1e-13
    condition = 1 + np.abs(x).max() / np.sqrt(x.astype(np.float64).var(axis=1).min() + 1e-5)
    limit = tolerance * max(1.0, np.abs(expected).max()) + (1e-15 * condition * n)
    assert np.abs(mlp.forward(x) - expected).max() <= limit


def test_constant_rows_and_special_values():
    """A row without spread gives the bias; NaN and infinities spoil their own row only."""
    mlp = Mlp([LayerNorm(np.ones(3, np.float32), [1, 2, 3])])
    x: Any = [[5, 5, 5], [np.nan, 0, 0], [np.inf, 0, 0], [1, 2, 3]]
    y = mlp.forward(x)
    np.testing.assert_array_equal(y[0], [1, 2, 3])
    assert np.isnan(y[1]).all()
    assert np.isnan(y[2]).any()
    np.testing.assert_allclose(y[3], normalized([1, 2, 3], 1, [1, 2, 3], 1e-5), rtol=1e-6)
    assert mlp.forward(np.empty((0, 3))).shape == (0, 3)


def test_trace_shows_every_layer():
    """The last activation of a trace has the bits that forward answers."""
    mlp = example("float32")
    x = np.random.default_rng(0).standard_normal((5, 7))
    traces = mlp.trace(x)
    assert [trace.activation.shape for trace in traces] == [(5, 7), (5, 13), (5, 13), (5, 4)]
    np.testing.assert_array_equal(traces[-1].activation, mlp.forward(x))
    np.testing.assert_array_equal(traces[0].pre_activation, traces[0].activation)


def test_probabilities_of_log_softmax_are_its_exponentials():
    """predict_proba of a log_softmax model sums to one."""
    mlp = example("float64")
    x = np.random.default_rng(0).standard_normal((5, 7))
    np.testing.assert_allclose(mlp.predict_proba(x), np.exp(mlp.forward(x)), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_file_gives_back_what_was_saved(tmp_path, dtype):
    """Every array, epsilon and the input shape survive save and load, bit by bit."""
    mlp = example(dtype)
    mlp.save(tmp_path / "m.safetensors")
    loaded = nncore.load(tmp_path / "m.safetensors")
    assert loaded.input_shape == (7, 1)
    assert repr(loaded.layers) == repr(mlp.layers)
    x = np.random.default_rng(0).standard_normal((5, 7))
    np.testing.assert_array_equal(loaded.forward(x), mlp.forward(x))


def metadata_of(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def test_version_2_is_written_only_where_it_is_needed(tmp_path):
    """What version 1 can say stays readable for older versions."""
    path = tmp_path / "m.safetensors"
    layer = Layer(np.ones((2, 2)))
    cases = {
        "1": [Mlp([layer])],
        "2": [
            Mlp([layer], input_shape=(2, 1)),
            Mlp([layer, LayerNorm(np.ones(2))]),
            Mlp([Layer(np.ones((2, 2)), None, "log_softmax")]),
        ],
    }
    for version, models in cases.items():
        for mlp in models:
            mlp.save(path)
            assert metadata_of(path)["format_version"] == version
            assert nncore.load(path).input_shape == mlp.input_shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "conv"}, "layer 0 of the architecture has kind 'conv'"),
        ({"kind": ["dense"]}, r"layer 0 of the architecture has kind \['dense'\]"),
        ({"epsilon": None}, "has epsilon = None"),
        ({"epsilon": -1.0}, "layer 0: epsilon is -1.0; expected a positive number"),
        ({"n_out": 9}, r"bias has shape \[3\]; its architecture says \[9\]"),
        ({"activation": "softmax"}, "unknown activation 'softmax'"),
    ],
)
def test_a_broken_description_is_refused(tmp_path, change, message):
    """Kinds, numbers and activations that make no layer normalization name the layer."""
    path = tmp_path / "m.safetensors"
    Mlp([LayerNorm(np.ones(3))]).save(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    architecture = json.loads(header["__metadata__"]["architecture"])
    architecture["layers"][0] |= change
    header["__metadata__"]["architecture"] = json.dumps(architecture)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ModelFileError, match=message):
        nncore.load(path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LayerNorm([[1.0]]), ShapeError, r"gain has shape \(1, 1\); expected \(n,\)"),
        (lambda: LayerNorm([]), ShapeError, "gain has shape"),
        (lambda: LayerNorm([1.0, np.nan]), ModelError, r"gain\[1\] is nan"),
        (lambda: LayerNorm([1.0], [1.0, 2.0]), ShapeError, r"bias has shape \(2,\); expected \(1,\)"),
        (lambda: LayerNorm(np.ones(1), np.ones(1, np.float32)), DtypeError, "but gain is float64"),
        (lambda: LayerNorm([1.0], epsilon=0.0), ModelError, "epsilon is 0.0; expected a positive number"),
        (lambda: LayerNorm([1.0], epsilon=True), ModelError, "epsilon is True"),
        (lambda: LayerNorm([1.0], epsilon=np.inf), ModelError, "epsilon is inf"),
        (lambda: LayerNorm([1.0], activation="softmax"), ModelError, "unknown activation 'softmax'"),
        (lambda: Mlp([LayerNorm([1.0, 1.0]), Layer([[1.0]])]), ShapeError, "layer 1 takes 1 inputs"),
        (lambda: Mlp([Layer([[1.0, 1.0]])], input_shape=(2,)), ModelError, r"input_shape is \(2,\)"),
        (lambda: Mlp([Layer([[1.0]])], input_shape=()), ModelError, r"input_shape is \(\)"),
        (lambda: Mlp([Layer([[1.0]])], input_shape=(True,)), ModelError, "input_shape is"),
    ],
)
def test_arguments_that_do_not_fit_are_named(make, error, message):
    """A layer normalization or input shape that makes no sense is refused."""
    with pytest.raises(error, match=message):
        make()


def test_copies_and_descriptions():
    """copy, pickle, astype and repr know a layer normalization."""
    mlp = example("float64")
    for clone in (copy.deepcopy(mlp), pickle.loads(pickle.dumps(mlp))):
        assert repr(clone.layers) == repr(mlp.layers)
        assert clone.input_shape == (7, 1)
    assert repr(LayerNorm([1.0, 2.0], epsilon=1e-3)) == "<LayerNorm 2 identity, epsilon=0.001, float64>"
    assert mlp.astype("float32").layers[0].epsilon == 1e-3
    assert LayerNorm([1.0, 2.0], activation="prelu").parameter_count == 5
    assert LayerNorm([1.0, 2.0], activation="elu", alpha=[1.0, 2.0]).nbytes == 48
