"""from_weights: arrays and a description make the model that they say, and nothing is unpickled."""

import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from support import naive

import nncore
from nncore import ConversionError

RNG = np.random.default_rng(0)
ARRAYS: dict[str, Any] = {
    "0.weight": RNG.standard_normal((5, 4)).astype(np.float32),
    "0.bias": RNG.standard_normal(5).astype(np.float32),
    "2.weight": RNG.standard_normal((3, 5)).astype(np.float32),
}
DESCRIPTION: dict[str, Any] = {
    "weights_layout": "out_in",
    "layers": [
        {"weights": "0.weight", "bias": "0.bias", "activation": "relu"},
        {"weights": "2.weight", "activation": "softmax"},
    ],
    "labels": ["a", "b", "c"],
    "feature_names": ["w", "x", "y", "z"],
    "input_shape": [2, 2],
    "name": "described",
}
X = RNG.standard_normal((10, 4)).astype(np.float32)


def expected(x):
    h = np.maximum(x.astype(np.float64) @ ARRAYS["0.weight"].T + ARRAYS["0.bias"], 0) @ ARRAYS["2.weight"].T
    e = np.exp(h - h.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def described(tmp_path, description=DESCRIPTION):
    path = tmp_path / "layers.json"
    path.write_text(json.dumps(description))
    return path


@pytest.mark.parametrize("form", ["arrays", "npz", "npz compressed", "safetensors"])
def test_every_form_of_arrays(tmp_path, form):
    """Arrays in memory and in each kind of file give the same model, with all that the description says."""
    source: Any = ARRAYS
    if form.startswith("npz"):
        source = tmp_path / "w.npz"
        (np.savez_compressed if "compressed" in form else np.savez)(source, **ARRAYS)
    elif form == "safetensors":
        source = tmp_path / "w.safetensors"
        safetensors.numpy.save_file(ARRAYS, source)
    mlp = nncore.from_weights(source, described(tmp_path))
    assert (mlp.labels, mlp.name, mlp.input_shape) == (("a", "b", "c"), "described", (2, 2))
    assert mlp.feature_names == ("w", "x", "y", "z")
    np.testing.assert_allclose(mlp.forward(X), expected(X), rtol=1e-5, atol=1e-6)


def test_layout_in_out():
    """Weights (inputs, outputs) are taken as they are."""
    arrays = {"w": np.arange(6.0).reshape(2, 3)}
    mlp = nncore.from_weights(arrays, {"weights_layout": "in_out", "layers": [{"weights": "w"}]})
    np.testing.assert_array_equal(mlp.forward([1.0, 0.0]), [0, 1, 2])
    assert str(mlp.dtype) == "float64"


@settings(max_examples=60)
@given(st.integers(0, 1 << 30))
def test_random_descriptions(seed):
    """Scales, both normalizations and every activation, in any order."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    layers = []
    x = rng.standard_normal((20, 4))
    h = x

    def array(*shape):
        name = f"a{len(arrays)}"
        arrays[name] = rng.uniform(0.5, 1.5, shape)
        return name

    for _ in range(rng.integers(1, 5)):
        n = h.shape[1]
        kind = rng.integers(4)
        if kind == 0:
            w, b = array(n, int(rng.integers(1, 6))), None
            b = array(arrays[w].shape[1]) if rng.integers(2) else None
            layer: dict[str, Any] = {"weights": w, "bias": b}
            h = h @ arrays[w] + (arrays[b] if b else 0)
        elif kind == 1:
            f, s = array(n), array(n)
            layer = {"scale": {"factor": f, "shift": s}}
            h = h * arrays[f] + arrays[s]
        elif kind == 2:
            m, v, g, b = (array(n) for _ in range(4))
            layer = {"batch_norm": {"mean": m, "variance": v, "gain": g, "bias": b, "epsilon": 1e-3}}
            h = (h - arrays[m]) / np.sqrt(arrays[v] + 1e-3) * arrays[g] + arrays[b]
        else:
            g = array(n)
            layer = {"layer_norm": {"gain": g, "epsilon": 1e-2}}
            mean, variance = h.mean(axis=1, keepdims=True), h.var(axis=1, keepdims=True)
            h = (h - mean) / np.sqrt(variance + 1e-2) * arrays[g]
        name = sorted(naive.FUNCTIONS)[rng.integers(len(naive.FUNCTIONS))]
        if name == "step":
            name = "relu"  # a step turns roundings into ones
        default = nncore.ACTIVATIONS[name].default_alpha
        alpha = None if default is None else 0.5
        layers.append(layer | {"activation": name, "alpha": alpha})
        h = naive.FUNCTIONS[name](h, alpha)
    mlp = nncore.from_weights(arrays, {"weights_layout": "in_out", "layers": layers}, dtype="float64")
    scale = max(1.0, np.abs(h).max())
    np.testing.assert_allclose(mlp.forward(x), h, rtol=0, atol=1e-10 * scale)


def changed(**changes):
    return DESCRIPTION | changes


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({}, 'needs "weights_layout"'),
        (changed(weights_layout="rows"), 'needs "weights_layout"'),
        (changed(layers=[]), "has no layers"),
        (changed(layers="all"), "has no layers"),
        (changed(extra=1), "unknown field 'extra'"),
        (changed(layers=[3]), "layer 0 of the description: is no object"),
        (changed(layers=[{}]), "layer 0 of the description: has none of weights"),
        (changed(layers=[{"weights": "0.weight", "scale": {}}]), "expected one"),
        (changed(layers=[{"weights": "0.weight", "bia": "0.bias"}]), "unknown field 'bia'"),
        (
            changed(layers=[{"weights": "9.weight"}]),
            "'9.weight', which is no array of the file",
        ),
        (changed(layers=[{"weights": "0.bias"}]), r"weights has shape \(5,\); expected two axes"),
        (changed(layers=[{"weights": "0.weight", "activation": "wave"}]), "has activation 'wave'"),
        (changed(layers=[{"weights": "0.weight", "bias": "0.bias"}]), "does not name '2.weight'; add"),
        (changed(layers=[{"scale": 3}]), "is no object"),
        (changed(layers=[{"batch_norm": {"mean": "0.bias"}}]), "is not understood: 'variance'"),
        (
            changed(layers=[{"weights": "0.weight"}, {"weights": "0.weight"}]),
            r"layer 1 .*weights have shape \(4, 5\); expected \(5, outputs\)",
        ),
        (changed(labels=["a"]), "labels has 1 entries"),
    ],
)
def test_descriptions_that_do_not_fit(description, message):
    """What is missing, unknown or left over is named."""
    with pytest.raises((ConversionError, nncore.ModelError), match=message):
        nncore.from_weights(ARRAYS, description)


def test_leftover_arrays_can_be_ignored():
    """num_batches_tracked always is, others on request."""
    arrays = ARRAYS | {"1.num_batches_tracked": np.array(3), "other": np.ones(2)}
    with pytest.raises(ConversionError, match="does not name 'other'"):
        nncore.from_weights(arrays, DESCRIPTION)
    assert nncore.from_weights(arrays, changed(ignore=["other"])).n_out == 3


def npz(tmp_path, name, content):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return path


def npy(array=None, header=None, data=b"", allow_pickle=False):
    buffer = io.BytesIO()
    if header is None:
        np.lib.format.write_array(buffer, array, allow_pickle=allow_pickle)
    else:
        np.lib.format.write_array_header_1_0(buffer, header)
        buffer.write(data)
    return buffer.getvalue()


HUGE = {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 1 << 10)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.array([{}], dtype=object), allow_pickle=True), "has dtype object; expected numbers"),
        (npy(np.array(["a"])), "has dtype <U1; expected numbers"),
        (npy(header=HUGE), "has 0 bytes; its shape"),
        (b"not npy", "is no .npy file"),
        (b"\x93NUMPY\x07\x00" + b"\x00" * 100, "is no .npy file"),
        (b"\x00" * (80 << 20), r"unpacks from .* to 83,886,080 bytes"),
    ],
)
def test_hostile_npz(tmp_path, content, message):
    """Pickled objects, shapes without numbers, and bombs."""
    with pytest.raises(ConversionError, match=message):
        nncore.from_weights(npz(tmp_path, "0.weight.npy", content), DESCRIPTION)


def test_fortran_order(tmp_path):
    """An array that lies column by column is read right."""
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    path = npz(tmp_path, "w.npy", npy(array))
    mlp = nncore.from_weights(path, {"weights_layout": "in_out", "layers": [{"weights": "w"}]})
    np.testing.assert_array_equal(mlp.forward([0.0, 1.0]), [3, 4, 5])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"text"])
@pytest.mark.parametrize("name", ["w.npz", "w.pt", "w.safetensors"])
def test_files_that_are_no_weights(tmp_path, name, content):
    """Empty and foreign files, and bare pickles, are refused unread."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="w"):
        nncore.from_weights(path, DESCRIPTION)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": ' + "[" * 100_000, "\xff"])
def test_descriptions_that_are_no_json(tmp_path, text):
    """A torn description is an error that names its file."""
    path = tmp_path / "layers.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConversionError, match=r"layers\.json"):
        nncore.from_weights(ARRAYS, path)
