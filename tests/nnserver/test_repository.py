"""Repository: which paths are models, what they are called, and errors that name the file."""

import json
import logging
import struct

import numpy as np
import pytest

import nncore
from nnserver.batcher import QueueLimits
from nnserver.errors import ConfigError, NotFound
from nnserver.repository import BUNDLED, load_repository


@pytest.fixture
def save(tmp_path):
    """Save a model of one weight under a path below tmp_path."""

    def save_model(path, weight=2.0):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        nncore.Mlp([nncore.Layer(np.array([[weight]], np.float32))]).save(file)
        return file

    return save_model


def load(*paths):
    return load_repository([str(path) for path in paths], QueueLimits())


def names(repository):
    return [model.name for model in repository]


def load_error(*paths):
    with pytest.raises(ConfigError) as caught:
        load(*paths)
    return str(caught.value)


def test_a_file_is_named_by_its_stem(save):
    """NAME.safetensors is served as NAME, version 1, whatever the model's own name is."""
    repository = load(save("iris.safetensors"))
    assert names(repository) == ["iris"]
    model = repository.get("iris")
    assert (model.version, model.lane.batcher.model_name) == ("1", "iris")
    assert repository.get("iris", "1") is model
    assert repository.has("iris")
    assert not repository.has("rose")


def test_a_folder_is_all_models_in_it(save, tmp_path):
    """Every *.safetensors directly in the folder; hidden and other files, and folders below, are not."""
    save("b.safetensors")
    save("a.safetensors")
    save("below/c.safetensors")
    (tmp_path / ".c.safetensors").write_text("half a model")
    (tmp_path / "README.md").write_text("not a model")
    assert names(load(tmp_path)) == ["a", "b"]


def test_files_and_folders_may_be_mixed(save, tmp_path):
    """All paths together are the repository, in the order of names."""
    save("folder/b.safetensors")
    assert names(load(save("z.safetensors"), tmp_path / "folder", save("a.safetensors"))) == ["a", "b", "z"]


def test_no_path_is_the_bundled_models():
    """Without paths the package's own models are served."""
    assert names(load()) == sorted(path.stem for path in BUNDLED.glob("*.safetensors"))
    assert {"digits", "primer"} <= set(names(load()))


def test_the_lane_runs_the_model_within_the_limits(save):
    """The lane's kernel is the model's forward pass; its queue has the limits that were given."""
    limits = QueueLimits(max_requests=3)
    model = load_repository([str(save("iris.safetensors", weight=3))], limits).get("iris")
    assert model.lane.forward(np.ones((2, 1), np.float32)).tolist() == [[3], [3]]
    assert model.lane.batcher.limits == limits


@pytest.mark.parametrize("name", ["a.b", "A-1_x", "0", "_", "x" * 128])
def test_names(save, name):
    """Letters, digits, '_', '-' and '.', up to 128 of them."""
    assert names(load(save(f"{name}.safetensors"))) == [name]


@pytest.mark.parametrize("name", ["a b", ".hidden", "-a", "ä", "a\nb", "a'b", "x" * 129, "a:b"])
def test_names_that_are_none(save, name):
    """What would not be safe in messages, logs and file names is refused by name, escaped and cut."""
    text = load_error(save(f"{name}.safetensors"))
    shown = repr(name if len(name) <= 80 else name[:77] + "...")
    assert text.endswith(
        f": {shown} cannot be a model's name; use letters, digits, '_', '-' and '.', at most 128, "
        "the first a letter, digit or '_'"
    )


def test_two_models_of_one_name_are_refused(save):
    """The error names both files: which one was meant is not ours to guess."""
    first, second = save("one/iris.safetensors"), save("two/iris.safetensors")
    assert load_error(first, second) == f"two models are named 'iris': {first} and {second}"


def test_a_file_given_twice_is_one_model(save, tmp_path):
    """By itself and by its folder, or by two ways to the same file."""
    file = save("iris.safetensors")
    assert names(load(file, tmp_path)) == ["iris"]
    assert names(load(tmp_path, f"{tmp_path}/../{tmp_path.name}")) == ["iris"]


def test_what_is_not_there_is_named(tmp_path):
    """A missing path, an empty folder and a file of another kind each have their own text."""
    assert load_error(tmp_path / "no") == f"there is no model file or folder {tmp_path / 'no'}"
    assert load_error(tmp_path) == f"{tmp_path} has no model in it (*.safetensors)"
    other = tmp_path / "model.pkl"
    other.write_bytes(b"")
    assert load_error(other) == (
        f"{other} is not a model file; expected NAME.safetensors (see `nncore --help`)"
    )


def foreign_file():
    """A safetensors file of someone else's: valid, but no model of ours."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        b"nonsense" * 100,
        struct.pack("<Q", 2**63) + b"{}",
        foreign_file(),
        foreign_file()[:-3],
    ],
    ids=["empty", "zeros", "noise", "huge header", "foreign", "truncated"],
)
def test_a_file_that_is_no_model_is_named(content, tmp_path):
    """The error has the file, and what nncore says is wrong with it."""
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    text = load_error(file)
    assert text.startswith(f"cannot load {file}: ")
    assert len(text) > len(f"cannot load {file}: ")


@pytest.mark.parametrize("cut", [1, 100, -1])
def test_a_truncated_model_is_named(save, cut):
    """A model file that lacks its end, or all but its beginning."""
    file = save("cut.safetensors")
    file.write_bytes(file.read_bytes()[:cut])
    assert load_error(file).startswith(f"cannot load {file}: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """A link to nowhere and a folder called like a file."""
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "nowhere")
    assert load_error(link) == f"there is no model file or folder {link}"
    assert load_error(tmp_path).startswith(f"cannot load {link}: ")


def test_loading_is_logged_without_paths_of_others(save, caplog):
    """One line a model: name, layers, parameters and time."""
    with caplog.at_level(logging.INFO, "nnserver"):
        load(save("iris.safetensors"))
    (record,) = [record for record in caplog.records if record.name == "nnserver.repository"]
    assert record.getMessage().startswith("model loaded name=iris layers=1 parameters=2 load_s=")


def test_an_unknown_name_lists_what_there_is(save):
    """NotFound has the names; without a name it says that one is missing."""
    repository = load(save("iris.safetensors"), save("tulip.safetensors"))
    with pytest.raises(NotFound, match=r"^unknown model 'rose'; this server has 'iris', 'tulip'$"):
        repository.get("rose")
    with pytest.raises(NotFound, match=r"^no model was named; this server has 'iris', 'tulip'$"):
        repository.get("")
