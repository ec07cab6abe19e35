"""save and load: what is written is read back, and nothing else gets through."""

import contextlib
import itertools
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import random_mlp

import nncore
from nncore import Layer, Mlp, ModelFileError
from nncore.model_file import FORMAT, MAX_HEADER_BYTES


def example_mlp(dtype="float32"):
    """A model with everything that a file can hold."""
    return Mlp(
        [
            Layer(np.arange(12.0).reshape(3, 4), [1, 2, 3, 4], "prelu", [0.1, 0.2, 0.3, 0.4]).astype(dtype),
            Layer(np.ones((4, 4)), None, "elu", 0.7).astype(dtype),
            Layer(np.ones((4, 2)), [0.5, -0.5], "softmax").astype(dtype),
        ],
        labels=["nein", "ja – oui"],
        feature_names=["größe", "weight", ""],
        name="example",
    )


def header_and_numbers(content):
    """The parsed header of a safetensors file, and the bytes after it."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, numbers):
    """The bytes of a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


@pytest.fixture
def saved(tmp_path):
    """The path of a valid model file."""
    path = tmp_path / "example.safetensors"
    example_mlp().save(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_load_gives_back_what_save_wrote(tmp_path, dtype):
    """Every number, name and setting of a model survives the file, bit by bit."""
    mlp = example_mlp(dtype)
    mlp.save(tmp_path / "model.safetensors")
    loaded = nncore.load(tmp_path / "model.safetensors")
    assert (loaded.name, loaded.labels, loaded.feature_names) == (mlp.name, mlp.labels, mlp.feature_names)
    assert loaded.dtype == mlp.dtype
    for layer, original in zip(loaded.layers, mlp.layers, strict=True):
        np.testing.assert_array_equal(layer.weights, original.weights)
        np.testing.assert_array_equal(layer.bias, original.bias)
        np.testing.assert_array_equal(layer.alpha, original.alpha)
        assert layer.activation == original.activation
        assert type(layer.alpha) is type(original.alpha)


def test_load_keeps_absent_names_absent(tmp_path):
    """A model without labels and feature names is loaded without them."""
    random_mlp(0, (3, 2)).save(tmp_path / "m")
    loaded = nncore.load(str(tmp_path / "m"))
    assert loaded.labels is None
    assert loaded.feature_names is None


def test_file_is_plain_safetensors(saved):
    """Any safetensors reader finds the arrays, and the metadata tells format and version."""
    tensors = safetensors.numpy.load_file(saved)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "layers.0.weight": (3, 4),
        "layers.0.bias": (4,),
        "layers.0.alpha": (4,),
        "layers.1.weight": (4, 4),
        "layers.1.bias": (4,),
        "layers.2.weight": (4, 2),
        "layers.2.bias": (2,),
    }
    with safetensors.safe_open(saved, framework="np") as file:
        assert (file.metadata()["format"], file.metadata()["format_version"]) == ("nnserve.mlp", "1")


def test_same_model_gives_the_same_file(saved):
    """Files can be compared by their hash: nothing in them depends on the run."""
    code = f"import nncore; nncore.load({str(saved)!r}).save({str(saved) + '2'!r})"
    for _ in range(3):  # each with other hash seeds
        subprocess.run([sys.executable, "-c", code], check=True)
        assert saved.with_name(saved.name + "2").read_bytes() == saved.read_bytes()


def test_save_replaces_a_file_and_leaves_nothing_beside_it(saved):
    """A second save to the same path wins, with the permissions that the umask gives."""
    random_mlp(0, (3, 2), name="second").save(saved)
    assert nncore.load(saved).name == "second"
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    umask = os.umask(0)
    os.umask(umask)
    assert saved.stat().st_mode & 0o777 == 0o666 & ~umask


def test_save_through_a_link_keeps_the_link(saved, tmp_path):
    """Saving to a symbolic link writes the file that it points to."""
    link = tmp_path / "latest"
    link.symlink_to(saved.name)
    random_mlp(0, (3, 2), name="second").save(link)
    assert link.is_symlink()
    assert nncore.load(saved).name == "second"


def test_failed_save_keeps_the_old_file(saved, monkeypatch):
    """When the disk fails in the middle, the old model is still there, whole, and no other file is."""

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        random_mlp(0, (3, 2), name="second").save(saved)
    assert nncore.load(saved).name == "example"
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_loaded_model_needs_no_file(saved):
    """Truncating or removing the file after load changes nothing."""
    mlp = nncore.load(saved)
    before = mlp.layers[0].weights.copy()
    os.truncate(saved, 10)
    np.testing.assert_array_equal(mlp.layers[0].weights, before)
    saved.unlink()
    np.testing.assert_array_equal(mlp.layers[0].weights, before)


def test_missing_file_is_an_os_error(tmp_path):
    """A path without a file raises what open() raises."""
    with pytest.raises(FileNotFoundError):
        nncore.load(tmp_path / "nowhere")


def test_save_refuses_names_that_no_file_can_hold(tmp_path):
    """Labels beyond the header's limit are refused when saving, not when loading."""
    label = "x" * MAX_HEADER_BYTES
    mlp = Mlp([Layer(np.ones((1, 1)))], labels=[label, "y"])
    with pytest.raises(
        ModelFileError, match=f"need a header of .* bytes; a model file may have {MAX_HEADER_BYTES}"
    ):
        mlp.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())


# Files that are no model


def edited(content, **changes):
    """*content* with the given keys of its architecture replaced; ... removes one."""
    header, numbers = header_and_numbers(content)
    architecture = json.loads(header["__metadata__"]["architecture"])
    for key, value in changes.items():
        if value is ...:
            del architecture[key]
        else:
            architecture[key] = value
    header["__metadata__"]["architecture"] = json.dumps(architecture)
    return with_header(header, numbers)


def edited_layer(content, index, **changes):
    """*content* with keys of one layer of its architecture replaced."""
    layers = json.loads(header_and_numbers(content)[0]["__metadata__"]["architecture"])["layers"]
    layers[index].update(changes)
    return edited(content, layers=layers)


def edited_metadata(content, **changes):
    """*content* with keys of its metadata replaced; ... removes one."""
    header, numbers = header_and_numbers(content)
    metadata = header["__metadata__"] | changes
    header["__metadata__"] = {key: value for key, value in metadata.items() if value is not ...}
    return with_header(header, numbers)


def edited_tensor(content, name, **changes):
    """*content* with keys of one tensor's entry replaced."""
    header, numbers = header_and_numbers(content)
    header[name].update(changes)
    return with_header(header, numbers)


def renamed_tensor(content, name, new_name):
    """*content* with one tensor under another name."""
    header, numbers = header_and_numbers(content)
    header[new_name] = header.pop(name)
    return with_header(header, numbers)


def with_number(content, name, number):
    """*content* with the first number of a float32 tensor replaced."""
    header, numbers = header_and_numbers(content)
    start = header[name]["data_offsets"][0]
    return with_header(header, numbers[:start] + struct.pack("<f", number) + numbers[start + 4 :])


FOREIGN = safetensors.numpy.save({"w": np.ones((2, 2), np.float32)}, {"format": "pt"})
NESTED = b'{"a":' * 100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: b"", "has 0 bytes; its first 8 should give a length"),
        (lambda c: c[:5], "has 5 bytes; its first 8 should give a length"),
        (lambda c: c[:100], "is truncated: its header needs [0-9]+ bytes, 92 follow"),
        (lambda c: c[:-1], "has 199 bytes of numbers; its architecture needs 200"),
        (lambda c: c + b"\0", "has 201 bytes of numbers; its architecture needs 200"),
        (lambda c: b"PK\x03\x04 a zip file, say", "is no safetensors file, or its header is too large"),
        (
            lambda c: struct.pack("<Q", MAX_HEADER_BYTES + 1) + c[8:],
            f"header is too large: {MAX_HEADER_BYTES + 1} bytes, at most {MAX_HEADER_BYTES} are read",
        ),
        (lambda c: with_header(b"\xff\xfe", b""), "header is not valid JSON"),
        (lambda c: with_header(b"[]", b""), "header is no JSON object"),
        (lambda c: with_header(b'{"a": NaN}', b""), "header is not valid JSON: NaN"),
        (lambda c: with_header(b'{"a": 1, "a": 2}', b""), "header is not valid JSON: a key occurs twice"),
        (lambda c: with_header(NESTED, b""), "header is not valid JSON"),
        (lambda c: with_header(b'{"a": ' + b"9" * 10_000 + b"}", b""), "header is not valid JSON"),
        (lambda c: FOREIGN, f"is no model file: its metadata has no format '{FORMAT}'"),
        (lambda c: with_header(b"{}", b""), "is no model file"),
        (
            lambda c: edited_metadata(c, format_version="3"),
            "has format version '3'; this nncore reads '1' and '2'",
        ),
        (lambda c: edited_metadata(c, format_version=...), "has format version None; this nncore reads '1'"),
        (lambda c: edited_metadata(c, architecture=...), "has no architecture in its metadata"),
        (lambda c: edited_metadata(c, architecture="{"), "architecture is not valid JSON"),
        (lambda c: edited_metadata(c, architecture="7"), "architecture is no JSON object"),
        (lambda c: edited_metadata(c, architecture=NESTED.decode()), "architecture is not valid JSON"),
        (lambda c: edited_metadata(c, more={"a": "b"}), "is not valid safetensors"),
        (lambda c: edited(c, name=...), "architecture lacks field 'name'"),
        (lambda c: edited(c, more=1), "architecture has an unexpected field 'more'"),
        (lambda c: edited(c, name=7), "architecture has name = 7"),
        (lambda c: edited(c, name=""), "name is ''; expected printable text"),
        (lambda c: edited(c, layers=[]), "has no layers in its architecture"),
        (lambda c: edited(c, layers=[7]), "layer 0 of the architecture is no object"),
        (lambda c: edited(c, labels=["a"]), "labels has 1 entries; the model has 2 outputs"),
        (lambda c: edited(c, labels=["a", 7]), r"labels\[1\] is 7; expected a string"),
        (lambda c: edited(c, labels=["\ud800", "b"]), "not valid Unicode"),
        (lambda c: edited_layer(c, 1, n_in=True), "layer 1 of the architecture has n_in = True"),
        (lambda c: edited_layer(c, 1, n_in=2.0), r"layer 1 of the architecture has n_in = 2\.0"),
        (
            lambda c: edited_layer(c, 1, n_in=-4),
            r"layers.1.weight has shape \[4, 4\]; .* says \[-4, 4\]",
        ),
        (lambda c: edited_layer(c, 1, activation="tanhh"), "layer 1: unknown activation 'tanhh'"),
        (lambda c: edited_layer(c, 1, activation="softmax"), "layer 1: activation softmax takes no alpha"),
        (lambda c: edited_layer(c, 1, alpha=None), "layer 1 lacks the alpha of its activation elu"),
        (lambda c: edited_layer(c, 1, alpha="per_output"), "lacks tensor layers.1.alpha"),
        (lambda c: edited_layer(c, 1, alpha="0.1"), "layer 1: alpha has dtype"),
        (lambda c: edited_layer(c, 1, alpha=1e300), "layer 1: alpha is 1e[+]300"),
        (lambda c: edited_layer(c, 1, alpha=10**400), "layer 1: alpha has dtype object"),
        (lambda c: edited_layer(c, 0, alpha=0.1), "has an unexpected tensor layers.0.alpha"),
        (
            lambda c: renamed_tensor(c, "layers.1.bias", "layers.1.bais"),
            "unexpected tensor layers.1.bais",
        ),
        (lambda c: renamed_tensor(c, "layers.1.bias", "layers.9.bias"), "lacks tensor layers.1.bias"),
        (
            lambda c: edited_tensor(c, "layers.1.bias", dtype="I32"),
            "bias has dtype I32; expected all F32",
        ),
        (
            lambda c: edited_tensor(c, "layers.1.bias", dtype="F64"),
            "bias has dtype F64; expected all F32",
        ),
        (lambda c: edited_tensor(c, "layers.0.alpha", dtype=[]), r"alpha has dtype \[\]; expected all F32"),
        (
            lambda c: edited_tensor(c, "layers.0.weight", dtype="F16"),
            "has dtype .*; expected all F32 or all F64",
        ),
        (lambda c: edited_tensor(c, "layers.1.bias", shape=[2, 2]), r"layers.1.bias has shape \[2, 2\]"),
        (lambda c: edited_tensor(c, "layers.1.bias", data_offsets=[0, 16]), "is not valid safetensors"),
        (
            lambda c: edited_tensor(c, "layers.1.bias", data_offsets=[999, 1015]),
            "is not valid safetensors",
        ),
        (lambda c: with_number(c, "layers.1.weight", np.nan), r"layer 1: weights\[0, 0\] is nan"),
        (lambda c: with_number(c, "layers.0.alpha", -np.inf), r"layer 0: alpha\[0\] is -inf"),
    ],
)
def test_load_says_what_is_wrong_with_a_file(saved, change, message):
    """Truncated, foreign, newer, mismatched and hostile files are ModelFileErrors that name the file."""
    content = change(saved.read_bytes())
    bad = saved.with_name("bad.safetensors")
    bad.write_bytes(content)
    with pytest.raises(ModelFileError, match=f"^bad.safetensors: .*({message})"):
        nncore.load(bad)


def test_load_does_not_read_a_foreign_file(tmp_path):
    """A file of a terabyte (of holes) that is no model is refused without reading it."""
    path = tmp_path / "big"
    path.write_bytes(FOREIGN)
    os.truncate(path, 1 << 40)
    with pytest.raises(ModelFileError, match="is no model file"):
        nncore.load(path)


def test_load_does_not_allocate_what_a_header_promises(saved):
    """A header that claims more numbers than the file has is refused before anything is allocated."""
    n = 1 << 30
    content = edited_layer(saved.read_bytes(), 1, n_in=n, n_out=n)
    content = edited_tensor(content, "layers.1.weight", shape=[n, n])
    content = edited_tensor(content, "layers.1.bias", shape=[n])
    saved.write_bytes(content)
    with pytest.raises(ModelFileError, match="has 200 bytes of numbers; its architecture needs 46"):
        nncore.load(saved)


@pytest.fixture(scope="module")
def fuzz_target(tmp_path_factory):
    """A valid file's bytes, and a path to write variants to."""
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    example_mlp().save(path)
    return path.read_bytes(), path


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_damaged_files_raise_nothing_else(fuzz_target, data):
    """Flipped, cut or inserted bytes give a valid model or a ModelFileError, never anything else."""
    content, path = fuzz_target
    damaged = bytearray(content)
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        # Three times in four in the header, where it hurts; one time in four in the numbers.
        limit = data.draw(st.sampled_from([header_end, header_end, header_end, len(content)]))
        at = data.draw(st.integers(0, min(limit, len(damaged)) - 1))
        match data.draw(st.sampled_from(["flip", "byte", "cut", "insert", "digit"])):
            case "flip":
                damaged[at] ^= 1 << data.draw(st.integers(0, 7))
            case "byte":
                damaged[at] = data.draw(st.integers(0, 255))
            case "cut":
                del damaged[at : at + data.draw(st.integers(1, len(damaged) - 1))]
            case "insert":
                damaged[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "digit":
                damaged[at] = ord(data.draw(st.sampled_from('0123456789-.e,:{}[]"')))
        if not damaged:
            break
    path.write_bytes(damaged)
    with contextlib.suppress(ModelFileError):
        mlp = nncore.load(path)
        assert all(np.isfinite(layer.weights).all() for layer in mlp.layers)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_model_survives_its_file(fuzz_target, data):
    """Whatever a model holds comes back from its file."""
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    layers = []
    for n_in, n_out in itertools.pairwise(sizes):
        weights = data.draw(st.lists(numbers, min_size=n_in * n_out, max_size=n_in * n_out))
        activation = data.draw(st.sampled_from(sorted(nncore.ACTIVATIONS)))
        alpha = None
        if nncore.ACTIVATIONS[activation].default_alpha is not None:
            alpha = data.draw(
                st.one_of(st.none(), numbers, st.lists(numbers, min_size=n_out, max_size=n_out))
            )
        layers.append(Layer(np.reshape(weights, (n_in, n_out)), activation=activation, alpha=alpha))
    class_count = max(2, sizes[-1])
    labels = data.draw(st.none() | st.lists(names, min_size=class_count, max_size=class_count, unique=True))
    features = data.draw(st.none() | st.lists(names, min_size=sizes[0], max_size=sizes[0]))
    mlp = Mlp(layers, labels, features)
    path = fuzz_target[1]
    mlp.save(path)
    loaded = nncore.load(path)
    assert (loaded.labels, loaded.feature_names, loaded.name) == (mlp.labels, mlp.feature_names, mlp.name)
    for layer, original in zip(loaded.layers, mlp.layers, strict=True):
        np.testing.assert_array_equal(layer.weights, original.weights)
        np.testing.assert_array_equal(layer.alpha, original.alpha)
        assert layer.activation == original.activation
