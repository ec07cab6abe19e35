"""from_onnx: random graphs answer what onnxruntime answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.onnx_builder import random_model, run, save

import nncore

# Rows of moderate numbers, of zeros, and large ones. Elements of a few hundred keep float32's exp finite.
EDGES = np.array([0.0, 1.0, -1.0, 30.0, -30.0])


def assert_alike(answer, expected, tolerance):
    """Wherever the graph itself does not overflow: log(1 + exp(x)) does, spelled out."""
    expected = expected.reshape(answer.shape)
    finite = np.isfinite(expected).all(axis=1)
    assert finite.any()
    scale = max(1.0, np.abs(expected[finite]).max())
    np.testing.assert_allclose(answer[finite], expected[finite], rtol=0, atol=tolerance * scale)


def rows(n, dtype):
    x = np.random.default_rng(n).standard_normal((40, n))
    return np.concatenate([x, np.tile(EDGES[:, None], (1, n))]).astype(dtype)


@settings(max_examples=400)
@given(st.integers(0, 1 << 30))
def test_random_graph(tmp_path_factory, seed):
    """
    Whatever way a perceptron is spelled in, the model answers what the runtime does.

    float32 sums differ by their order, and folded constants by their rounding: 1e-4 of the largest output is
    two hundred roundings; a wrong constant or a lost bias is far beyond it.
    """
    model, n = random_model(seed)
    path = save(model, tmp_path_factory.mktemp("onnx") / "m.onnx")
    x = rows(n, np.float32)
    expected = run(model, x)
    assert_alike(nncore.from_onnx(path).forward(x), expected, 1e-4)


@settings(max_examples=100)
@given(st.integers(0, 1 << 30))
def test_random_graph_in_float64(tmp_path_factory, seed):
    """The same in float64, against onnx's own reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    model, n = random_model(seed, np.float64)
    path = save(model, tmp_path_factory.mktemp("onnx") / "m.onnx")
    x = rows(n, np.float64)
    with np.errstate(all="ignore"):
        expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    mlp = nncore.from_onnx(path)
    assert mlp.dtype == np.float64
    # Attributes of operators are float32 in the file, and the reference rounds some of them otherwise.
    assert_alike(mlp.forward(x), expected, 1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_conversion_is_repeatable(tmp_path, seed):
    """The same file gives the same bits."""
    model, n = random_model(seed)
    path = save(model, tmp_path / "m.onnx")
    x = rows(n, np.float32)
    np.testing.assert_array_equal(nncore.from_onnx(path).forward(x), nncore.from_onnx(path).forward(x))
