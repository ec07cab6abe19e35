"""find_models: which paths are models, what they are called, and what is wrong with the rest."""

import os
from pathlib import Path

import pytest
from support.models import save_scale

from nnserver.errors import ConfigError
from nnserver.model_folder import BUNDLED, Problem, find_models


def found(*paths):
    return find_models([str(path) for path in paths])


def versions(*paths):
    """Name -> versions of all models found; nothing may be wrong."""
    result = found(*paths)
    assert result.problems == {}
    return {name: sorted(source.versions) for name, source in result.sources.items()}


def problem(name, *paths):
    result = found(*paths)
    assert name not in result.sources
    return result.problems[name]


def test_a_folder_has_files_and_folders_of_models(tmp_path):
    """NAME.safetensors, NAME.onnx and NAME/VERSION/model.*; versions are whole numbers."""
    for file in (
        *("a.safetensors", "b.onnx", "c/1/model.safetensors", "c/20/model.onnx"),
        *("c/notes/model.onnx", "c/01/model.onnx", "c/0/model.onnx", "c/-1/model.onnx"),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "c" / "3").mkdir()
    assert versions(tmp_path) == {"a": [1], "b": [1], "c": [1, 20]}


def test_what_is_no_model_is_left_alone(tmp_path):
    """Hidden files and folders, other files, folders without a version; also what is being copied."""
    for file in (
        *(".a.safetensors", "README.md", "b.safetensors.part", ".git/1/model.onnx"),
        *("data/2024/rows.csv", "below/c.safetensors"),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert versions(tmp_path) == {}


def test_one_models_folder_can_be_given(tmp_path, monkeypatch):
    """A path to NAME is that model, also as `.` or with `..` in it."""
    save_scale(tmp_path / "iris" / "2" / "model.safetensors")
    assert versions(tmp_path / "iris") == {"iris": [2]}
    assert versions(tmp_path / "iris" / ".." / "iris") == {"iris": [2]}
    monkeypatch.chdir(tmp_path / "iris")
    assert versions(".") == {"iris": [2]}
    assert find_models(["."]).sources["iris"].name == "iris"


def test_files_and_folders_may_be_mixed(tmp_path):
    """All paths together are the repository; a file that is given twice is one model."""
    file = save_scale(tmp_path / "folder" / "b.safetensors")
    other = save_scale(tmp_path / "z.safetensors")
    assert versions(other, tmp_path / "folder", file) == {"z": [1], "b": [1]}


def test_no_path_is_the_bundled_models():
    assert sorted(versions()) == sorted(path.stem for path in BUNDLED.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["a.b", "A-1_x", "0", "_", "x" * 128])
def test_names(name, tmp_path):
    """Letters, digits, '_', '-' and '.', up to 128 of them."""
    save_scale(tmp_path / f"{name}.safetensors")
    save_scale(tmp_path / "below" / name / "1" / "model.safetensors")
    assert versions(tmp_path) == {name: [1]}
    assert versions(tmp_path / "below") == {name: [1]}


@pytest.mark.parametrize("name", ["a b", "-a", "ä", "a\nb", "a'b", "x" * 129, "a:b", "a\\b", "…"])
@pytest.mark.parametrize("suffix", [".safetensors", "/1/model.safetensors"])
def test_names_that_are_none(name, suffix, tmp_path):
    """What would not be safe in messages, logs and file names is refused by name, escaped and cut."""
    save_scale(tmp_path / f"{name}{suffix}")
    shown = repr(name if len(name) <= 80 else name[:77] + "...")
    reason = (
        f"{shown} cannot be a model's name; use letters, digits, '_', '-' and '.', at most 128, "
        "the first a letter, digit or '_'"
    )
    what = problem(name, tmp_path)
    assert what.reason == reason
    assert what.text.endswith(f": {reason}")


@pytest.mark.parametrize(
    "other", ["two/iris.safetensors", "one/iris.onnx", "one/iris/1/model.safetensors"], ids=str
)
def test_two_models_of_one_name_are_none(other, tmp_path):
    """In other folders, in other formats, as a file and a folder: which was meant is not ours to guess."""
    first, second = tmp_path / "one" / "iris.safetensors", tmp_path / other
    save_scale(first)
    save_scale(second)
    what = (
        problem("iris", tmp_path / "one", tmp_path / "two")
        if "two" in other
        else problem("iris", first.parent)
    )
    assert what.reason == "two models have this name"
    assert what.text.startswith("two models are named 'iris': ")


def test_two_models_in_one_version_are_none(tmp_path):
    save_scale(tmp_path / "iris" / "1" / "model.safetensors")
    (tmp_path / "iris" / "1" / "model.onnx").touch()
    assert problem("iris", tmp_path).reason == "version 1 has two models: model.safetensors and model.onnx"


def test_a_folder_with_a_config_and_no_version_is_none(tmp_path):
    (tmp_path / "iris").mkdir()
    (tmp_path / "iris" / "config.toml").touch()
    assert problem("iris", tmp_path) == Problem(
        f"{tmp_path / 'iris'} has no version with a model in it (1/model.safetensors or 1/model.onnx)",
        "there is no version with a model in it (1/model.safetensors or 1/model.onnx)",
    )


def test_a_problem_of_one_name_is_not_the_others(tmp_path):
    save_scale(tmp_path / "good.safetensors")
    save_scale(tmp_path / "not good.safetensors")
    result = found(tmp_path)
    assert (list(result.sources), list(result.problems)) == (["good"], ["not good"])


class TestLinks:
    """Links are followed inside the folder that was given, and not out of it."""

    @pytest.fixture
    def outside(self, tmp_path):
        save_scale(tmp_path / "outside" / "1" / "model.safetensors")
        (tmp_path / "outside" / "config.toml").touch()
        return tmp_path / "outside"

    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "folder").mkdir()
        return tmp_path / "folder"

    def test_inside_is_followed(self, folder):
        """As Kubernetes lays out a volume: name -> ..data/name, ..data -> ..2026/."""
        save_scale(folder / "..2026" / "iris.safetensors")
        (folder / "..data").symlink_to("..2026")
        (folder / "iris.safetensors").symlink_to("..data/iris.safetensors")
        assert versions(folder) == {"iris": [1]}

    def test_a_path_that_is_given_may_be_a_link(self, folder, outside):
        (folder / "link").symlink_to(outside)
        (folder / "file.safetensors").symlink_to(outside / "1" / "model.safetensors")
        assert versions(folder / "link") == {"link": [1]}
        assert versions(folder / "file.safetensors") == {"file": [1]}

    @pytest.mark.parametrize(
        ("link", "target"),
        [
            ("iris.safetensors", "1/model.safetensors"),
            ("iris", "."),
            ("iris/1", "1"),
            ("iris/1/model.safetensors", "1/model.safetensors"),
            ("iris/config.toml", "config.toml"),
        ],
    )
    def test_out_is_refused(self, folder, outside, link, target):
        """The file, the model's folder, a version's folder, the file in it, the configuration."""
        if link == "iris/config.toml":
            save_scale(folder / "iris" / "1" / "model.safetensors")
        (folder / link).parent.mkdir(parents=True, exist_ok=True)
        (folder / link).symlink_to(outside / target)
        what = problem("iris", folder)
        assert what.reason == "it is a link that leads out"
        assert str(folder) in what.text

    def test_relative_ways_out_are_refused(self, folder, outside):
        (folder / "iris.safetensors").symlink_to(os.path.join("..", "outside", "1", "model.safetensors"))
        assert problem("iris", folder).reason == "it is a link that leads out"

    def test_a_circle_of_links_is_refused_like_any_file(self, folder):
        """It leads nowhere; that it cannot be opened is found when it is loaded."""
        (folder / "a.safetensors").symlink_to("b.safetensors")
        (folder / "b.safetensors").symlink_to("a.safetensors")
        (folder / "c").symlink_to("c")
        assert versions(folder) == {"a": [1], "b": [1]}


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    """One that may be a model is a problem; one that cannot be by its name, like lost+found, is not."""
    save_scale(tmp_path / "good.safetensors")
    (tmp_path / "private").mkdir()
    (tmp_path / "lost+found").mkdir()
    iterdir = Path.iterdir

    def refuse(path):  # As for any user but root, whom no mode keeps out.
        if path.name in ("private", "lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    result = found(tmp_path)
    assert list(result.sources) == ["good"]
    assert {name: problem.reason for name, problem in result.problems.items()} == {
        "private": "its folder cannot be read: Permission denied"
    }


def test_what_is_not_there_is_named(tmp_path):
    """A missing path and a file of another kind each have their own text."""
    with pytest.raises(ConfigError, match=r"^there is no model file or folder "):
        found(tmp_path / "no")
    other = tmp_path / "model.pkl"
    other.write_bytes(b"")
    with pytest.raises(ConfigError) as caught:
        found(other)
    assert str(caught.value) == (
        f"{other} is not a model file; expected NAME.safetensors or NAME.onnx (see `nncore --help`)"
    )


def test_a_model_file_may_be_gone_while_a_server_runs(tmp_path):
    """A file that was given is then no model; a folder that was given must be there."""
    assert find_models([str(tmp_path / "iris.safetensors")], may_be_gone=True).sources == {}
    with pytest.raises(ConfigError):
        find_models([str(tmp_path / "no")], may_be_gone=True)


def stamps(tmp_path):
    return found(tmp_path).sources["iris"].stamps()


@pytest.mark.parametrize(
    "change",
    [
        lambda iris: save_scale(iris / "1" / "model.safetensors", 3.0),
        lambda iris: save_scale(iris / "2" / "model.safetensors"),
        lambda iris: (iris / "config.toml").write_text('version_policy = "all"'),
        lambda iris: (iris / "1" / "model.onnx.data").touch(),
        lambda iris: os.utime(iris / "1" / "model.safetensors"),
    ],
    ids=["weights", "a version", "config", "external data", "touched"],
)
def test_every_change_shows_in_the_stamps(change, tmp_path):
    """And without one they are equal."""
    save_scale(tmp_path / "iris" / "1" / "model.safetensors")
    os.utime(tmp_path / "iris" / "1" / "model.safetensors", ns=(1, 1))
    before = stamps(tmp_path)
    assert stamps(tmp_path) == before
    change(tmp_path / "iris")
    assert stamps(tmp_path) != before
