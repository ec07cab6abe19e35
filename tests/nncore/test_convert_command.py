"""`nncore convert` with what the development environment has: scikit-learn and bare weights."""

import json
import pickle
import subprocess
import sys

import joblib
import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LinearRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import nncore
from nncore import ConversionError, Layer, Mlp
from nncore.convert.sources import kind_of
from nncore.convert.verification import Source, check

X, Y = load_iris(return_X_y=True)


def run(*arguments, stdin=None):
    """(exit status, standard output, standard error) of `nncore convert` with *arguments*."""
    code = "import sys; from nncore.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "convert", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, input=stdin)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def classifier():
    return make_pipeline(StandardScaler(), MLPClassifier((8,), max_iter=2000, random_state=0)).fit(X, Y)


@pytest.mark.parametrize("ending", ["pkl", "joblib"])
def test_pickled_estimator(tmp_path, classifier, ending):
    """The model is checked against scikit-learn and written; the pickle is warned of."""
    source = tmp_path / f"iris.{ending}"
    joblib.dump(classifier, source) if ending == "joblib" else source.write_bytes(pickle.dumps(classifier))
    status, out, err = run(source, "-o", tmp_path / "iris.safetensors")
    assert status == 0, err
    assert "warning: a pickle runs code when it is read" in err
    assert out.startswith("iris.safetensors: 4-8-3 (relu, identity), float32, 67 parameters, 3 labels\n")
    assert "checked against scikit-learn" in out
    mlp = nncore.load(tmp_path / "iris.safetensors")
    assert (mlp.name, mlp.labels) == ("iris", ("0", "1", "2"))
    np.testing.assert_allclose(mlp.predict_proba(X), classifier.predict_proba(X), atol=1e-5)


def test_names_and_rows(tmp_path, classifier):
    """Labels in the command, feature names in a file, rows to check on, no check, another dtype."""
    source, out = tmp_path / "m.pkl", tmp_path / "m.safetensors"
    source.write_bytes(pickle.dumps(classifier))
    (tmp_path / "features.txt").write_text("a\nb\nc\nd\n")
    np.save(tmp_path / "x.npy", X)
    names = ["--labels", "setosa,versicolor,virginica", "--feature-names", f"@{tmp_path / 'features.txt'}"]
    more = ["--rows", tmp_path / "x.npy", "--dtype", "float64", "--name", "iris", "--tolerance", "1e-12"]
    status, text, err = run(source, "-o", out, *names, *more)
    assert status == 0, err
    mlp = nncore.load(out)
    assert (mlp.name, str(mlp.dtype), mlp.feature_names) == ("iris", "float64", ("a", "b", "c", "d"))
    assert mlp.labels == ("setosa", "versicolor", "virginica")
    status, text, err = run(source, "-o", out, "--no-verify")
    assert (status, text.splitlines()[-1]) == (0, "not checked")


def test_bare_weights(tmp_path):
    """A description lies beside the file, or is named; nothing can be checked."""
    np.savez(tmp_path / "w.npz", w=np.ones((2, 2), np.float32))
    source, out = tmp_path / "w.npz", tmp_path / "w.safetensors"
    status, _, err = run(source, "-o", out)
    assert (status, "needs a description of its layers: w.json beside it" in err) == (1, True)
    description = {"weights_layout": "in_out", "layers": [{"weights": "w", "activation": "tanh"}]}
    (tmp_path / "w.json").write_text(json.dumps(description))
    for arguments in ([], ["--description", tmp_path / "w.json"]):
        status, text, err = run(source, "-o", out, *arguments)
        assert status == 0, err
        assert text.endswith("not checked: weights alone answer nothing\n")
        assert (nncore.load(out).layers[0].activation, nncore.load(out).name) == ("tanh", "w")
    (tmp_path / "w.json").write_text(json.dumps({**description, "name": "gate"}))
    for arguments, name in ([], "gate"), (["--name", "other"], "other"):
        assert run(source, "-o", out, *arguments)[0] == 0
        assert nncore.load(out).name == name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.txt", b"hello", "m.txt is of no kind that is known; supported are .onnx"),
        ("m", b"\x80\x04K\x01.", "m is of no kind that is known"),
        ("m.zip", b"PK\x03\x04" + b"\x00" * 50, "m.zip is a damaged archive"),
        ("m.pkl", b"\x80\x04K\x01.", "int cannot be converted"),
        ("m.pkl", b"torn", "m.pkl cannot be unpickled"),
        ("m.h5", b"torn", "h5py is not installed|is not an HDF5 file"),
        ("m.onnx", b"torn", "onnx is not installed|is not an ONNX"),
        ("m.tflite", b"torn", "ai-edge-litert is not installed|is not a TFLite file"),
        ("m.pt2", b"torn", "is not a zip archive"),
        ("m.keras", b"torn", "h5py is not installed|m.keras"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, content, message):
    """One line says what is wrong, or what to install; nothing is written."""
    (tmp_path / name).write_bytes(content)
    status, out, err = run(tmp_path / name, "-o", tmp_path / "out.safetensors")
    last = err.splitlines()[-1]
    assert (status, out, last.startswith("nncore: error: ")) == (1, "", True)
    assert any(part in last for part in message.split("|")), last
    assert not (tmp_path / "out.safetensors").exists()


def test_wrong_usage(tmp_path):
    """A missing file, the same file, another ending, and a tolerance that is none."""
    np.savez(tmp_path / "w.npz", w=np.ones((2, 2)))
    assert run(tmp_path / "none.onnx", "-o", tmp_path / "m.safetensors")[0] == 1
    assert run(tmp_path / "w.npz", "-o", tmp_path / "m.npz")[0] == 1
    assert run(tmp_path / "w.npz")[0] == 2
    assert run(tmp_path / "w.npz", "-o", tmp_path / "m.safetensors", "--tolerance", "0")[0] == 2


def test_options_that_do_not_belong_to_a_source(tmp_path):
    """A model file is no source; outputs are ONNX's, descriptions belong to bare weights."""
    np.savez(tmp_path / "w.npz", w=np.ones((2, 2)))
    Mlp([Layer(np.ones((2, 2)))]).save(tmp_path / "m.safetensors")
    out = tmp_path / "out.safetensors"
    cases = {
        "m.safetensors is a model file already": [tmp_path / "m.safetensors"],
        "an output can be named for ONNX only": [tmp_path / "w.npz", "--output", "y"],
        "a description belongs to bare weights": [tmp_path / "m.pkl", "--description", "d.json"],
        "SOURCE and MODEL are the same file": [tmp_path / "m.safetensors"],
    }
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(1))
    for message, arguments in cases.items():
        target = arguments[0] if "same" in message else out
        status, _, err = run(*arguments, "-o", target)
        assert (status, message in err) == (1, True), err


def test_a_model_that_differs_is_not_written(tmp_path):
    """
    A scaler of timestamps costs float32 its digits: the check sees it, and says what to do.

    The differences lie far from where random rows do, around the features' mean.
    """
    rng = np.random.default_rng(0)
    x = 1.7e9 + rng.standard_normal((50, 2))
    estimator = make_pipeline(StandardScaler(), LinearRegression()).fit(x, x[:, 0] - 1.7e9)
    source, out = tmp_path / "m.pkl", tmp_path / "m.safetensors"
    source.write_bytes(pickle.dumps(estimator))
    status, _, err = run(source, "-o", out)
    assert (status, out.exists()) == (1, False)
    assert "the converted model differs from scikit-learn" in err
    assert "around the first layer's middle" in err
    assert run(source, "-o", out, "--dtype", "float64", "--tolerance", "1e-3")[0] == 0


# The check itself


MLP = Mlp([Layer(np.random.default_rng(0).standard_normal((4, 3)), None, "tanh").astype("float32")])


def slow(x):
    layer = MLP.layers[0]
    assert isinstance(layer, Layer)
    return np.tanh(x @ layer.weights.astype(np.float64))


def test_check_reports_the_largest_difference():
    """Rows, answers and differences are counted."""
    report = check(MLP, Source("slow", slow))
    assert report.rows > 500
    assert 0 < report.difference < 1e-6
    assert report.largest == pytest.approx(1.0)
    assert str(report).startswith(f"checked against slow on {report.rows:,} rows: largest difference")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: slow(x) + 2e-4,
        lambda x: slow(x)[:, ::-1],
        lambda x: np.where(np.abs(x).max(axis=1, keepdims=True) == 100.0, 0.0, slow(x)),
        lambda x: slow(x) * np.where(np.abs(x).max(axis=1, keepdims=True) < 0.01, 1.001, 1.0),
    ],
)
def test_check_finds_what_differs(wrong):
    """A shift, swapped outputs, and rows of one size only, however large others are."""
    with pytest.raises(ConversionError, match=r"differs from wrong by .* of the largest answer on "):
        check(MLP, Source("wrong", wrong))


def test_check_leaves_out_what_overflows_in_the_source():
    """Rows without finite answers are counted apart, and must not be all."""

    def overflowing(x):
        return np.where(np.abs(x).max(axis=1, keepdims=True) > 50.0, np.nan, slow(x))

    report = check(MLP, Source("s", overflowing))
    assert report.skipped >= 2
    assert f"({report.skipped:,} rows left out, where the source overflows)" in str(report)
    with pytest.raises(ConversionError, match="answers no finite numbers"):
        check(MLP, Source("s", lambda x: slow(x) * np.nan))


def test_check_compares_widths_and_given_rows():
    """A source of other outputs is refused; given rows are checked, too."""
    with pytest.raises(ConversionError, match="answers 2 numbers a row; the converted model 3"):
        check(MLP, Source("s", lambda x: slow(x)[:, :2]))
    special = np.full((1, 4), 0.123)

    def wrong_there(x):
        return np.where((x == special.astype(np.float32)).all(axis=1, keepdims=True), 9.0, slow(x))

    check(MLP, Source("s", wrong_there))
    with pytest.raises(ConversionError, match="the given rows"):
        check(MLP, Source("s", wrong_there), rows=special)


def test_kinds_by_content(tmp_path):
    """Without an ending that is known, a file is known by how it begins; a pickle never is."""
    path = tmp_path / "model.bin"
    cases = {
        "onnx": b"\x08\x07\x12\x04test",
        "tflite": b"\x1c\x00\x00\x00TFL3",
        "keras": b"\x89HDF\r\n\x1a\n",
    }
    for kind, content in cases.items():
        path.write_bytes(content)
        assert kind_of(path) == kind
    path.write_bytes(pickle.dumps(1))
    with pytest.raises(ConversionError, match="of no kind that is known"):
        kind_of(path)
