"""from_tflite: files made by TensorFlow, and random ones, answer what LiteRT answers."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tflite_builder import Builder, random_content, run

import nncore
from nncore import ConversionError

DATA = Path(__file__).parents[1] / "data"
OP = schema.BuiltinOperator


def rows(n):
    x = np.random.default_rng(n).standard_normal((30, n))
    return np.concatenate([x, np.zeros((1, n)), 20 * np.ones((1, n)), -20 * np.ones((1, n))]).astype(
        np.float32
    )


def assert_alike(path, content, n):
    x = rows(n)
    expected = run(content, x)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(nncore.from_tflite(path).forward(x), expected, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize(("name", "n"), [("classifier", 4), ("image", 12), ("layer_norm", 4)])
def test_files_of_tensorflow(name, n):
    """Models that TensorFlow's converter made: folded statistics, computed reshapes, layer norm in parts."""
    path = DATA / f"{name}.tflite"
    assert_alike(path, path.read_bytes(), n)
    assert nncore.from_tflite(path).input_shape == ((3, 4, 1) if name == "image" else None)


def test_what_tensorflow_spells_with_a_choice_is_refused():
    """selu becomes a comparison and a selection, which are named."""
    with pytest.raises(ConversionError, match=r"operator 5 \(GREATER\): the operator is not supported"):
        nncore.from_tflite(DATA / "selu.tflite")


@settings(max_examples=100)
@given(st.integers(0, 1 << 30))
def test_random_file(tmp_path_factory, seed):
    """Fully connected layers with fused activations, activations of their own, and scales."""
    content, n = random_content(seed)
    path = tmp_path_factory.mktemp("tflite") / "m.tflite"
    path.write_bytes(content)
    assert_alike(path, content, n)


def refused(tmp_path, content, message):
    path = tmp_path / "m.tflite"
    path.write_bytes(content)
    with pytest.raises((ConversionError, nncore.ModelError), match=message):
        nncore.from_tflite(path)


def test_what_is_no_chain(tmp_path):
    """Residual connections, other operators, and outputs that nothing computes."""
    builder = Builder(4)
    hidden = builder.dense(builder.input, 4, 4, fused=1)
    residual = builder.arithmetic("ADD", [hidden, builder.input], 4)
    refused(tmp_path, builder.content(residual), r"operator 1 \(ADD\): adds two branches")
    builder = Builder(4)
    refused(tmp_path, builder.content(builder.node(OP.SIN, [builder.input], 4)), r"operator 0 \(SIN\)")
    builder = Builder(4)
    refused(tmp_path, builder.content(builder.const([1.0])), "does not depend on its input")


def test_quantized_models_are_refused(tmp_path):
    """Integer inputs and weights are named as what they are."""
    builder = Builder(4, kind=schema.TensorType.INT8)
    refused(
        tmp_path, builder.content(builder.dense(builder.input, 4, 2)), "quantized models are not supported"
    )
    builder = Builder(4)
    weights = builder.tensor((2, 4), np.ones((2, 4), np.int8), schema.TensorType.INT8)
    options: Any = schema.FullyConnectedOptionsT()
    y = builder.node(OP.FULLY_CONNECTED, [builder.input, weights], 2, options, "FullyConnectedOptions")
    refused(tmp_path, builder.content(y), "is quantized")


def test_weights_that_do_not_fit(tmp_path):
    """NaN, and shapes with other numbers of bytes."""
    builder = Builder(2)
    y = builder.node(OP.FULLY_CONNECTED, [builder.input, builder.const([[np.nan, 1.0]])], 1)
    refused(tmp_path, builder.content(y), "is nan")
    builder = Builder(2)
    weights = builder.tensor((1 << 20, 1 << 10), np.ones(2, np.float32))
    y = builder.node(OP.FULLY_CONNECTED, [builder.input, weights], 1)
    refused(tmp_path, builder.content(y), "has 8 bytes")


@pytest.mark.parametrize(
    "content", [b"", b"text", b"\x1c\x00\x00\x00TFL3", b"\xff\xff\xff\xffTFL3" + b"\xff" * 64]
)
def test_files_that_are_no_models(tmp_path, content):
    """Empty, foreign and torn files are one error."""
    refused(tmp_path, content, r"m\.tflite is not a TFLite file")


def test_damaged_files_never_raise_anything_else(tmp_path):
    """A file with any byte changed, or cut anywhere, is converted or refused."""
    content = (DATA / "image.tflite").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "m.tflite"
    for _ in range(1000):
        damaged = bytearray(content)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(damaged))] = rng.integers(256)
        if rng.integers(4) == 0:
            del damaged[rng.integers(8, len(damaged)) :]
        path.write_bytes(damaged)
        with contextlib.suppress(nncore.NncoreError), np.errstate(all="ignore"):
            nncore.from_tflite(path)
