"""`nncore convert` with a real model of every format: what it reports, checks and writes."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from torch import nn

import nncore

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # of the exporters, about themselves

DATA = Path(__file__).parents[1] / "data"
LINE = r"checked against {} [^ ]+( on torch)? on [\d,]+ rows: largest difference [\d.e-]+, of answers up to"


def run(*arguments):
    """(exit status, standard output, standard error) of `nncore convert` with *arguments*."""
    code = "import sys; from nncore.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "convert", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def digits():
    """A classifier of digits, trained a little by scikit-learn."""
    data = load_digits()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MLPClassifier((32,), max_iter=20, random_state=0).fit(data.data / 16, data.target)


def onnx_of_sklearn(folder):
    from skl2onnx import to_onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = to_onnx(digits(), np.zeros((1, 64), np.float32))
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def torch_module():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.GELU(), nn.LayerNorm(32)),
        *(nn.Dropout(0.1), nn.Linear(32, 10), nn.LogSoftmax(dim=1)),
    ).eval()


def onnx_of_torch(folder):
    program = torch.onnx.export(
        torch_module(), (torch.zeros(2, 8, 8),), dynamo=True, dynamic_shapes=({0: torch.export.Dim("rows")},)
    )
    program.save(folder / "m.onnx", external_data=True)
    return folder / "m.onnx"


def pt2(folder):
    shapes = ({0: torch.export.Dim("rows")},)
    torch.export.save(
        torch.export.export(torch_module(), (torch.zeros(2, 8, 8),), dynamic_shapes=shapes), folder / "m.pt2"
    )
    return folder / "m.pt2"


def keras_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8)),
            *(keras.layers.Rescaling(1 / 16), keras.layers.Flatten()),
            *(keras.layers.Dense(32, activation="gelu"), keras.layers.BatchNormalization()),
            *(keras.layers.LayerNormalization(), keras.layers.Dense(10, activation="softmax")),
        ]
    )


def keras_file(folder):
    keras_model().save(folder / "m.keras")
    return folder / "m.keras"


def h5_file(folder):
    keras_model().save(folder / "m.h5")
    return folder / "m.h5"


FORMATS = [
    (onnx_of_sklearn, "onnxruntime", (64, 10)),
    (onnx_of_torch, "onnxruntime", (64, 10)),
    (pt2, "torch", (64, 10)),
    (keras_file, "keras", (64, 10)),
    (h5_file, "keras", (64, 10)),
    (lambda folder: DATA / "classifier.tflite", "LiteRT", (4, 3)),
    (lambda folder: DATA / "image.tflite", "LiteRT", (12, 2)),
]


@pytest.mark.parametrize(
    ("make", "runtime", "sizes"), FORMATS, ids=lambda value: getattr(value, "__name__", None)
)
def test_every_format(make, runtime, sizes, tmp_path):
    """The report names the source's runtime and the largest difference; the file is what it says."""
    source, out = make(tmp_path), tmp_path / "out.safetensors"
    status, text, err = run(source, "-o", out)
    assert status == 0, err
    first, second = text.splitlines()
    mlp = nncore.load(out)
    assert (mlp.n_in, mlp.n_out) == sizes
    assert first.startswith(f"out.safetensors: {mlp.n_in}-")
    assert first.split(", ")[-1] in (f"{mlp.parameter_count:,} parameters", "10 labels")
    assert re.match(LINE.format(runtime), second), second


def test_labels_and_input_shape_are_carried_over(tmp_path):
    """scikit-learn's labels come through ONNX; an image's shape through Keras."""
    assert run(onnx_of_sklearn(tmp_path), "-o", tmp_path / "a.safetensors")[0] == 0
    assert nncore.load(tmp_path / "a.safetensors").labels == tuple("0123456789")
    assert run(keras_file(tmp_path), "-o", tmp_path / "b.safetensors")[0] == 0
    assert nncore.load(tmp_path / "b.safetensors").input_shape == (8, 8)


@pytest.mark.parametrize("ending", ["pt", "pth", "safetensors"])
def test_state_dict_with_a_description(tmp_path, ending):
    """PyTorch's own files of weights, and those of safetensors."""
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).eval()
    source = tmp_path / f"m.{ending}"
    if ending == "safetensors":
        safetensors.torch.save_file(module.state_dict(), source)
    else:
        torch.save(module.state_dict(), source)
    statistics = {"mean": "1.running_mean", "variance": "1.running_var", "gain": "1.weight", "bias": "1.bias"}
    description = {
        "weights_layout": "out_in",
        "layers": [
            {"weights": "0.weight", "bias": "0.bias"},
            {"batch_norm": statistics, "activation": "relu"},
            {"weights": "3.weight", "bias": "3.bias"},
        ],
    }
    (tmp_path / "m.json").write_text(json.dumps(description))
    status, _, err = run(source, "-o", tmp_path / "out.safetensors")
    assert status == 0, err
    x = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(nncore.load(tmp_path / "out.safetensors").forward(x), expected, atol=1e-5)


def test_a_pickled_module_is_refused(tmp_path):
    """torch.save(module) holds code, and is not unpickled."""
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    (tmp_path / "m.json").write_text('{"weights_layout": "out_in", "layers": [{"weights": "weight"}]}')
    status, _, err = run(tmp_path / "m.pt", "-o", tmp_path / "out.safetensors")
    assert (status, "m.pt is damaged or holds more than tensors, and nothing else is unpickled" in err) == (
        1,
        True,
    )


def test_onnx_without_onnxruntime_is_checked_by_the_reference(tmp_path):
    """Where onnxruntime is missing, onnx's own evaluator in NumPy answers."""
    source = onnx_of_torch(tmp_path)
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'onnxruntime' else find(name, *rest)\n"
        "from nncore.cli import main\n"
        f"sys.exit(main(['convert', {str(source)!r}, '-o', {str(tmp_path / 'o.safetensors')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "checked against onnx's reference" in done.stdout


def test_an_output_has_to_be_chosen(tmp_path):
    """A graph of two outputs says so, and --output chooses."""
    import onnx

    model = onnx.load(onnx_of_torch(tmp_path))
    first = next(node for node in model.graph.node if node.op_type == "Gelu" or node.op_type == "Erf")
    model.graph.output.append(onnx.helper.make_tensor_value_info(first.input[0], 1, None))
    onnx.save(model, tmp_path / "two.onnx")
    status, _, err = run(tmp_path / "two.onnx", "-o", tmp_path / "o.safetensors")
    assert (status, "has 2 outputs; name one of" in err) == (1, True)
    name = model.graph.output[0].name
    status, _, err = run(tmp_path / "two.onnx", "-o", tmp_path / "o.safetensors", "--output", name)
    assert status == 0, err
