"""from_torch: modules and .pt2 files answer what PyTorch answers; what is no chain of layers is refused."""

import io
import json
import pickle
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.torch_builder import FUNCTIONS, LAYERS, Functional, batch_norm, random_module, run
from torch import nn

import nncore
from nncore import ConversionError

# A few roundings of float32, whose sums are of numbers of about 1.
CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}


def rows(n, dtype=np.float32):
    x = np.random.default_rng(n).standard_normal((30, n))
    return np.concatenate([x, np.zeros((1, n)), 20 * np.ones((1, n)), -20 * np.ones((1, n))]).astype(dtype)


def assert_alike(mlp, module, x):
    expected = run(module, x)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(mlp.forward(x), expected.reshape(len(x), -1), rtol=0, atol=2e-5 * scale)


@settings(max_examples=200)
@given(st.integers(0, 1 << 30))
def test_random_module(seed):
    """Layers and functional forms, in any order."""
    module, n = random_module(seed)
    assert_alike(nncore.from_torch(module), module, rows(n))


@settings(max_examples=25)
@given(st.integers(0, 1 << 30))
def test_random_program(tmp_path_factory, seed):
    """The same modules by way of torch.export and a file."""
    module, n = random_module(seed)
    path = exported(module, n, tmp_path_factory.mktemp("pt2") / "m.pt2")
    assert_alike(nncore.from_torch(path), module, rows(n))


def exported(module, shape, path, dynamic=True):
    shape = (shape,) if isinstance(shape, int) else shape
    dimensions = ({0: torch.export.Dim("rows")},) if dynamic else None
    dtype = next(iter([*module.parameters(), torch.zeros(1)])).dtype
    program = torch.export.export(module, (torch.zeros(3, *shape, dtype=dtype),), dynamic_shapes=dimensions)
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("name", list(LAYERS))
def test_every_layer(name, tmp_path):
    """Each kind of layer, as a module and in a file."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), LAYERS[name](5), nn.Linear(5, 3)).eval()
    assert_alike(nncore.from_torch(module), module, rows(4))
    assert_alike(nncore.from_torch(exported(module, 4, tmp_path / "m.pt2")), module, rows(4))


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_every_function(name, tmp_path):
    """Each functional form, traced and exported."""
    torch.manual_seed(0)
    module = Functional([nn.Linear(4, 5), nn.Linear(5, 3)], [name, "relu"], "softmax").eval()
    assert_alike(nncore.from_torch(module), module, rows(4))
    assert_alike(nncore.from_torch(exported(module, 4, tmp_path / "m.pt2")), module, rows(4))


def test_double_precision(tmp_path):
    """float64 parameters make a float64 model."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double().eval()
    for mlp in (nncore.from_torch(module), nncore.from_torch(exported(module, 4, tmp_path / "m.pt2"))):
        assert mlp.dtype == np.float64
        x = rows(4, np.float64)
        np.testing.assert_allclose(mlp.forward(x), run(module, x), rtol=1e-12, atol=1e-12)


def test_narrow_parameters():
    """bfloat16 and float16 parameters are held exactly, in float32."""
    module = nn.Sequential(nn.Linear(4, 3)).to(torch.bfloat16)
    layer = nncore.from_torch(module).layers[0]
    assert isinstance(layer, nncore.Layer)
    np.testing.assert_array_equal(layer.weights, module[0].weight.detach().float().numpy().T)


def test_a_module_in_training_mode_is_converted_as_in_evaluation_and_left_alone():
    """Dropout and batch statistics do not matter, and every part keeps its mode."""
    module = nn.Sequential(nn.Linear(4, 5), batch_norm(5), nn.Dropout(0.9), nn.Linear(5, 2)).train()
    module[1].eval()
    mlp = nncore.from_torch(module)
    assert [part.training for part in module] == [True, False, True, True]
    assert_alike(mlp, module.eval(), rows(4))


def test_weights_are_a_copy():
    """Training on does not change the model."""
    module = nn.Sequential(nn.Linear(2, 2))
    mlp = nncore.from_torch(module)
    before = mlp.forward([1.0, 2.0])
    with torch.no_grad():
        module[0].weight.add_(1.0)
    np.testing.assert_array_equal(mlp.forward([1.0, 2.0]), before)


def test_bare_layer_and_nested_modules():
    """A single layer, and modules in modules."""
    layer = nn.Linear(3, 2)
    assert_alike(nncore.from_torch(layer), layer, rows(3))
    nested = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 2)))
    assert_alike(nncore.from_torch(nested, name="nested", labels=["a", "b"]), nested, rows(3))


def test_weight_normalization_is_seen_through():
    """A parametrized weight is taken as it is now."""
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    module = nn.Sequential(layer, nn.Tanh())
    assert_alike(nncore.from_torch(module), module, rows(3))


def test_names(tmp_path):
    """A program is called by its file's name, a module "mlp", unless a name is given."""
    module = nn.Sequential(nn.Linear(4, 2)).eval()
    path = exported(module, 4, tmp_path / "gate.pt2")
    assert nncore.from_torch(path).name == "gate"
    assert nncore.from_torch(path, name="other", labels=["a", "b"]).class_labels == ("a", "b")
    assert nncore.from_torch(module).name == "mlp"
    with pytest.raises(ConversionError, match=r"a \.pt2 file says its own"):
        nncore.from_torch(path, input_shape=(4,))


class Standardizing(nn.Module):
    """Vectors on either side of every operator."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mean", torch.tensor([0.5, -1.0, 2.0, 0.0]))
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 0.5, 4.0]))

    def forward(self, x):
        y = self.mean - self.layer((x - self.mean) / self.scale) * self.scale
        return self.scale * y + self.mean


@pytest.mark.parametrize("is_exported", [False, True])
def test_arithmetic_with_buffers_and_parameters(is_exported, tmp_path):
    """Normalization with statistics that the module holds is folded."""
    torch.manual_seed(0)
    module = Standardizing().eval()
    source = exported(module, 4, tmp_path / "m.pt2") if is_exported else module
    mlp = nncore.from_torch(source)
    assert len(mlp.layers) == 1
    assert_alike(mlp, module, rows(4))


@pytest.mark.parametrize("how", ["traced", "exported", "exported for one row"])
def test_images_are_flattened(how, tmp_path):
    """An input of several axes is flattened, and its shape kept."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Softmax(dim=1)).eval()
    if how == "traced":
        mlp = nncore.from_torch(module, input_shape=(1, 3, 4))
    else:
        program = torch.zeros(1 if "one" in how else 3, 1, 3, 4)
        dimensions = None if "one" in how else ({0: torch.export.Dim("rows")},)
        exported_program = torch.export.export(module, (program,), dynamic_shapes=dimensions)
        torch.export.save(exported_program, tmp_path / "m.pt2")
        mlp = nncore.from_torch(tmp_path / "m.pt2")
    assert mlp.input_shape == (1, 3, 4)
    x = rows(12)
    np.testing.assert_allclose(mlp.forward(x), run(module, x.reshape(-1, 1, 3, 4)), **CLOSE)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_decomposed_program(tmp_path):
    """A program in ATen's core operations: addmm, permute, native_layer_norm, _softmax."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.SiLU(), nn.Linear(5, 3), nn.Softmax(1)).eval()
    program = torch.export.export(module, (torch.zeros(3, 4),), dynamic_shapes=({0: torch.export.Dim("r")},))
    torch.export.save(program.run_decompositions(), tmp_path / "m.pt2")
    assert_alike(nncore.from_torch(tmp_path / "m.pt2"), module, rows(4))


# Refusals


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.layer(x)) + x


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, y):
        return self.layer(x) + y


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Residual, r"operation 'add' \(add\): adds two branches"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(1, 1, 1)),
            r"module '1' \(Conv1d\): the module is not supported",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.GLU()), r"module '1' \(GLU\)"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Threshold(0.5, 1.0)), "replaces small numbers by 1"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 1)),
            "softmax is followed by more",
        ),
        (lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)), "keeps no running statistics"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(2)), "normalizes .*not the whole row"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(3, 2)),
            r"module '1' \(Linear\): weights have shape",
        ),
        (Branching, "torch.fx cannot trace Branching"),
        (lambda: Calls(torch.sin), r"operation 'sin' \(sin\): the operation is not supported"),
        (lambda: Calls(lambda x: x[:, 0]), "picks a part of the rows"),
        (lambda: Calls(lambda x: x.view(-1)), "mixes rows"),
        (lambda: Calls(lambda x: torch.stack([x, x])), r"\(stack\): the operation is not supported"),
        (lambda: Calls(lambda x: (x, x)), "something else than one tensor"),
        (lambda: Calls(lambda x: x @ x.T), "two matrices|depend on the input"),
        (TwoInputs, "forward takes several tensors; the second is 'y'"),
        (lambda: nn.Sequential(nn.ReLU()), "no layer says how many numbers it takes; give input_shape"),
        (lambda: torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), "a scripted module cannot be traced"),
        (lambda: "not a path", "No such file"),
        (lambda: 3, "int is no torch.nn.Module"),
        (lambda: nn.Linear(3, 2, device="meta"), "no plain numbers"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_cannot_be_converted(make, message):
    """The error names the module or operation, and why."""
    with pytest.raises((ConversionError, OSError), match=message):
        nncore.from_torch(make())


def edited(path, change):
    """*path* with its members changed by *change*, a function of the dict of them."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def edit_json(ending, change):
    def apply(members):
        name = next(name for name in members if name.endswith(ending))
        value = json.loads(members[name])
        change(value)
        members[name] = json.dumps(value).encode()

    return apply


def weights_edit(**changes):
    def change(value):
        for entry in value["config"].values():
            for key, new in changes.items():
                (entry if key in entry else entry["tensor_meta"])[key] = new

    return edit_json("model_weights_config.json", change)


def drop(ending):
    def change(members):
        for name in [name for name in members if name.endswith(ending)]:
            del members[name]

    return change


def bomb(members):
    members["m/models/model.json"] = b"[" + b" " * (100 << 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (weights_edit(use_pickle=True), "is pickled, and nothing is unpickled here"),
        (weights_edit(dtype=10), "has element type number 10"),
        (weights_edit(storage_offset={"as_int": 1 << 40}), "does not lie inside its bytes"),
        (weights_edit(storage_offset={"as_int": -4}), "does not lie inside its bytes"),
        (weights_edit(path_name="../../weight_0"), r"has no '.*\.\./\.\./weight_0' in it"),
        (drop("model.json"), "has 0 members 'models/model.json'"),
        (drop("weight_0"), "has no '.*weight_0' in it"),
        (drop("model_weights_config.json"), "has no '.*model_weights_config.json' in it"),
        (edit_json("model.json", lambda v: v.clear()), "is not a .pt2 file that is understood"),
        (edit_json("model.json", lambda v: v["graph_module"]["graph"]["nodes"].clear()), "understood"),
        (bomb, "unpacks from .* to 104,857,601 bytes"),
    ],
)
def test_damaged_programs(tmp_path, change, message):
    """Pickles, offsets outside, paths that lead out, missing members and bombs are refused."""
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    path = edited(exported(module, 4, tmp_path / "m.pt2"), change)
    with pytest.raises(ConversionError, match=message):
        nncore.from_torch(path)


def test_a_program_in_training_mode_is_refused(tmp_path):
    """Batch statistics in a program would make rows depend on their batch."""
    module = nn.Sequential(nn.Linear(4, 4), batch_norm(4)).train()
    program = torch.export.export(module, (torch.zeros(3, 4),))
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(ConversionError, match="batch_norm"):
        nncore.from_torch(tmp_path / "m.pt2")


def test_nothing_in_a_program_is_unpickled(tmp_path):
    """Its pickled sample inputs may hold anything."""

    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("was unpickled",))

    def change(members):
        name = next(name for name in members if name.endswith("sample_inputs/model.pt"))
        buffer = io.BytesIO()
        pickle.dump(Evil(), buffer)
        members[name] = buffer.getvalue()

    module = nn.Sequential(nn.Linear(4, 4)).eval()
    path = edited(exported(module, 4, tmp_path / "m.pt2"), change)
    assert_alike(nncore.from_torch(path), module, rows(4))


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04" + b"\x00" * 60])
def test_files_that_are_no_archive(tmp_path, content):
    """Anything but a zip archive is one error."""
    path = tmp_path / "m.pt2"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"m\.pt2"):
        nncore.from_torch(path)
