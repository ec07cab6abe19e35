"""Catalog: what is on disk is served; loads and unloads at run time; errors that name the file."""

import gc
import json
import logging
import os
import struct
import threading
import weakref

import numpy as np
import pytest
from support.models import save_scale

import nncore
from nnserver import model_loader
from nnserver.batcher import QueueLimits
from nnserver.catalog import Catalog, IndexEntry, load_repository
from nnserver.errors import ConfigError, LoadFailed, NotFound
from nnserver.model_folder import BUNDLED
from nnserver.repository import Repository

LIMITS = QueueLimits()


def load(*paths):
    return load_repository([str(path) for path in paths], LIMITS)


def load_error(*paths):
    with pytest.raises(ConfigError) as caught:
        load(*paths)
    return str(caught.value)


def answer(model):
    """What the model makes of 1: its weight."""
    return float(model.lane.forward(np.ones((1, 1), np.float32))[0, 0])


class Served:
    """A folder and the catalog of it."""

    def __init__(self, folder):
        self.folder = folder
        self.changes = 0
        self.repository = Repository()
        self.repository.watch(self._note_change)
        self.catalog = Catalog([str(folder)], LIMITS, self.repository)
        self.catalog.load_all(may_be_empty=True)

    def _note_change(self):
        self.changes += 1

    def save(self, path="iris.safetensors", weight=2.0, **of_model):
        return save_scale(self.folder / path, weight, **of_model)

    def load_error(self, name="iris"):
        with pytest.raises(LoadFailed) as caught:
            self.catalog.load(name)
        text = str(caught.value)
        assert str(self.folder) not in text
        return text

    def answer(self, version=""):
        return answer(self.repository.get("iris", version))

    def versions(self):
        return [model.version for model in self.repository.versions("iris")]


@pytest.fixture
def served(tmp_path):
    return Served(tmp_path)


# At start


def test_a_file_is_served_under_its_name(tmp_path):
    """NAME.safetensors is NAME, version 1, whatever the model's own name is; its limits are the server's."""
    limits = QueueLimits(max_requests=3)
    repository = load_repository([str(save_scale(tmp_path / "iris.safetensors", 3.0))], limits)
    model = repository.get("iris", "1")
    assert (model.version, model.lane.batcher.model_name, model.lane.batcher.limits) == ("1", "iris", limits)
    assert answer(model) == 3


def test_without_paths_the_bundled_models_are_served():
    assert load().names() == sorted(path.stem for path in BUNDLED.glob("*.safetensors"))


def test_a_folder_must_have_a_model_unless_more_may_come(tmp_path):
    assert load_error(tmp_path) == (
        f"{tmp_path} has no model in it (NAME.safetensors, NAME.onnx or NAME/VERSION/model.safetensors)"
    )
    Served(tmp_path)


def foreign_file():
    """A safetensors file of someone else's: valid, but no model of ours."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


BAD_FILES = {
    "empty": b"",
    "zeros": b"\x00" * 8,
    "noise": b"nonsense" * 100,
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "foreign": foreign_file(),
    "truncated": foreign_file()[:-3],
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_model_is_named(content, tmp_path):
    """At start the error has the file, and what nncore says is wrong with it."""
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    text = load_error(file)
    assert text.startswith(f"cannot load {file}: bad.safetensors: ")
    assert len(text) > len(f"cannot load {file}: bad.safetensors: ")


@pytest.mark.parametrize("cut", [1, 100, -1])
def test_a_truncated_model_is_named(cut, tmp_path):
    """A model file that lacks its end, or all but its beginning."""
    file = save_scale(tmp_path / "cut.safetensors")
    file.write_bytes(file.read_bytes()[:cut])
    assert load_error(file).startswith(f"cannot load {file}: ")


def test_a_link_to_nowhere_is_named(tmp_path):
    """Among the files of a folder, where it does not lead out; a folder called like a file as well."""
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "nowhere")
    assert load_error(tmp_path) == f"cannot load {link}: link.safetensors: No such file or directory"
    link.unlink()
    link.mkdir()
    assert load_error(tmp_path) == f"cannot load {link}: link.safetensors: Is a directory"


def test_a_pipe_is_not_waited_for(tmp_path):
    """Opening one would block until somebody writes to it."""
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert load_error(tmp_path) == f"cannot load {pipe}: pipe.safetensors is no regular file"
    pipe.unlink()
    (tmp_path / "circle.safetensors").symlink_to("circle.safetensors")
    assert "Too many levels of symbolic links" in load_error(tmp_path)


def test_a_config_that_is_wrong_is_named(tmp_path):
    save_scale(tmp_path / "iris" / "1" / "model.safetensors")
    config = tmp_path / "iris" / "config.toml"
    config.write_text("colour = 1")
    assert load_error(tmp_path) == f"cannot load {config}: config.toml: unknown setting colour"
    config.write_bytes(b"\xff")
    assert load_error(tmp_path).startswith(f"cannot load {config}: config.toml: ")
    config.write_text("labels = ['a', 'b', 'c']")
    assert "labels" in load_error(tmp_path)


def test_a_name_or_link_that_is_refused_stops_the_start(tmp_path):
    save_scale(tmp_path / "a b.safetensors")
    assert load_error(tmp_path).startswith(f"{tmp_path / 'a b.safetensors'}: 'a b' cannot be a model's name")


def test_onnx_is_read_by_nncores_converter(tmp_path, monkeypatch):
    """model.onnx goes through nncore.from_onnx, whose errors are reasons like any other."""
    file = tmp_path / "iris.onnx"
    file.touch()
    given = []

    def from_onnx(path):
        given.append(path)
        return nncore.Mlp([nncore.Layer(np.full((1, 1), 5, np.float32))])

    monkeypatch.setattr(nncore, "from_onnx", from_onnx, raising=False)
    assert answer(load(tmp_path).get("iris")) == 5
    assert given == [file]

    def refuse(path):
        raise nncore.ConversionError("node 'loop' is control flow")

    monkeypatch.setattr(nncore, "from_onnx", refuse)
    assert load_error(tmp_path) == f"cannot load {file}: node 'loop' is control flow"


def test_loading_is_logged_without_paths(tmp_path, caplog):
    """One line a version: name, version, layers, parameters and time."""
    with caplog.at_level(logging.INFO, "nnserver"):
        load(save_scale(tmp_path / "iris.safetensors"))
    (record,) = [record for record in caplog.records if record.name == "nnserver.model_loader"]
    text = record.getMessage()
    assert text.startswith("model loaded name=iris version=1 layers=1 parameters=2 load_s=")


# Versions and settings


def test_the_latest_version_is_served_unless_told_otherwise(served):
    for version in (9, 10, 1):
        served.save(f"iris/{version}/model.safetensors", weight=version)
    served.catalog.load("iris")
    assert served.versions() == ["10"]
    (served.folder / "iris" / "config.toml").write_text("version_policy = 'all'\ndefault_version = 9")
    served.catalog.load("iris")
    assert served.versions() == ["1", "9", "10"]
    assert (served.answer(), served.answer("10"), served.answer("1")) == (9, 10, 1)


def test_a_default_that_is_not_served_is_refused(served):
    served.save("iris/1/model.safetensors")
    (served.folder / "iris" / "config.toml").write_text("default_version = 2")
    assert served.load_error() == (
        "model 'iris' cannot be loaded: default_version is 2; the versions served are [1]"
    )


def test_settings_of_the_model_go_before_the_files_and_the_servers(served):
    """Labels, the queue's limits and the batch's."""
    served.save("iris/1/model.safetensors", n=2, labels=["x", "y"])
    (served.folder / "iris" / "config.toml").write_text(
        "labels = ['a', 'b']\noutputs = ['labels']\n[limits]\nmax_queue_requests = 7\n"
        "[batching]\nmax_batch_rows = 5"
    )
    served.catalog.load("iris")
    model = served.repository.get("iris")
    assert model.mlp.labels == ("a", "b")
    assert model.settings.outputs == ("labels",)
    assert model.lane.batcher.limits == QueueLimits(7, LIMITS.max_bytes, 5)


# Loading and unloading


def test_a_model_is_loaded_and_unloaded_by_name(served):
    """A file that came after the start is served once it is loaded; unloaded, it is unknown again."""
    served.save()
    with pytest.raises(NotFound):
        served.repository.get("iris")
    served.catalog.load("iris")
    assert (served.answer(), served.changes) == (2, 1)
    served.catalog.unload("iris")
    assert served.changes == 2
    with pytest.raises(NotFound):
        served.repository.get("iris")
    with pytest.raises(NotFound, match=r"^no model 'iris' is being served$"):
        served.catalog.unload("iris")
    served.catalog.load("iris")
    assert served.answer() == 2


@pytest.mark.parametrize("name", ["rose", "", "..", "../iris", "iris.safetensors", "a\x00b", "x" * 10_000])
def test_a_name_that_is_not_in_the_repository_is_not_found(served, name):
    """A name is looked up among those found; it never becomes a path."""
    served.save()
    with pytest.raises(NotFound) as caught:
        served.catalog.load(name)
    assert str(caught.value).startswith("the repository has no model ")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_load_that_fails_leaves_the_old_version_serving_and_says_why(served, content, caplog):
    """The client hears the reason without a path, the log has it with the file, the index keeps it."""
    file = served.save()
    served.catalog.load("iris")
    file.write_bytes(content)
    text = served.load_error()
    assert text.startswith("model 'iris' cannot be loaded: iris.safetensors: ")
    assert text.endswith("; version '1' is still served")
    assert served.answer() == 2
    (entry,) = served.catalog.index()
    assert (entry.name, entry.version, entry.is_ready) == ("iris", "1", True)
    assert text == f"model 'iris' cannot be loaded: {entry.reason}; version '1' is still served"
    assert str(file) in caplog.text
    served.save(weight=3.0)
    served.catalog.load("iris")
    assert served.answer() == 3
    assert served.catalog.index() == [IndexEntry("iris", "1", True, "")]


def test_a_load_is_all_or_nothing(served):
    """One bad version of two leaves both as they were."""
    (served.folder / "iris").mkdir()
    (served.folder / "iris" / "config.toml").write_text("version_policy = 'all'")
    served.save("iris/1/model.safetensors", weight=1)
    served.save("iris/2/model.safetensors", weight=2)
    served.catalog.load("iris")
    served.save("iris/1/model.safetensors", weight=10)
    bad = served.save("iris/3/model.safetensors")
    bad.write_bytes(bad.read_bytes()[:-1])
    assert "still served" in served.load_error()
    assert served.versions() == ["1", "2"]
    assert (served.answer("1"), served.answer("2")) == (1, 2)


def test_versions_whose_files_have_not_changed_are_kept(served):
    """With their queue and statistics; the one that was written anew is another model."""
    (served.folder / "iris").mkdir()
    (served.folder / "iris" / "config.toml").write_text("version_policy = 'all'")
    served.save("iris/1/model.safetensors")
    served.save("iris/2/model.safetensors")
    served.catalog.load("iris")
    first, second = served.repository.versions("iris")
    served.save("iris/2/model.safetensors", weight=5)
    served.catalog.load("iris")
    assert served.repository.get("iris", "1") is first
    assert served.repository.get("iris", "2") is not second
    (served.folder / "iris" / "config.toml").write_text("version_policy = 'all'\nlabels = ['a', 'b']")
    served.catalog.load("iris")
    assert served.repository.get("iris", "1") is not first
    assert served.repository.get("iris", "1").mlp.labels == ("a", "b")


def test_a_fault_of_ours_while_loading_is_no_text_for_clients(served, monkeypatch):
    def fault(*arguments):
        raise RuntimeError("secret detail")

    served.save()
    monkeypatch.setattr("nnserver.catalog.load_versions", fault)
    assert served.load_error() == (
        "model 'iris' cannot be loaded: internal error; the server's log has the details"
    )


def test_a_file_that_changes_while_it_is_read_is_not_served(served, monkeypatch):
    """Whether it could be read or not: what was read may be half of one model and half of another."""
    file = served.save()
    before = served.catalog.files()["iris"]

    def read_while_written(path):
        mlp = nncore.load(path)
        os.utime(file, ns=(1, 1))
        return mlp

    monkeypatch.setitem(model_loader._READERS, ".safetensors", read_while_written)
    assert served.load_error() == (
        "model 'iris' cannot be loaded: iris.safetensors changed while it was read"
    )
    assert served.catalog.files()["iris"] != before
    assert not served.catalog.is_current("iris", served.catalog.files()["iris"])
    monkeypatch.undo()
    served.catalog.load("iris")
    assert served.answer() == 2


def test_requests_in_flight_finish_on_the_version_they_started_with(served):
    """Who has looked the model up has it, whatever is loaded or unloaded meanwhile."""
    served.save(weight=2)
    served.catalog.load("iris")
    in_flight = served.repository.get("iris")
    served.save(weight=3)
    served.catalog.load("iris")
    assert (answer(in_flight), served.answer()) == (2, 3)
    served.catalog.unload("iris")
    assert answer(in_flight) == 2


@pytest.mark.parametrize("how", ["unload", "replace"])
def test_a_model_that_is_served_no_longer_is_freed_at_once(served, how):
    """With its last reference, not with the next run of the garbage collector."""
    served.save()
    served.catalog.load("iris")
    model = weakref.ref(served.repository.get("iris"))
    mlp = weakref.ref(served.repository.get("iris").mlp)
    served.answer()
    gc.disable()
    try:
        if how == "unload":
            served.catalog.unload("iris")
        else:
            served.save(weight=3)
            served.catalog.load("iris")
        assert (model(), mlp()) == (None, None)
    finally:
        gc.enable()


def test_look_ups_beside_loads_always_find_a_whole_model(served):
    """A thread replaces the model as fast as it can; every answer is one of the weights that were saved."""
    served.save(weight=2.0)
    served.catalog.load("iris")
    answers = {served.answer()}
    is_done = threading.Event()

    def replace():
        for i in range(30):
            served.save(weight=2.0 + i % 2)
            served.catalog.load("iris")
        is_done.set()

    thread = threading.Thread(target=replace)
    thread.start()
    while not is_done.is_set():
        answers.add(served.answer())
    thread.join()
    answers.add(served.answer())
    assert answers == {2.0, 3.0}


def test_the_index_lists_what_there_is_and_why_it_is_not_served(served):
    """Served versions are ready; the rest is not, each with a reason; nothing has a path."""
    served.save("good.safetensors")
    served.save("bad.safetensors").write_bytes(b"")
    served.save("no name.safetensors")
    served.save("later.safetensors")
    served.catalog.load("good")
    served.load_error("bad")
    served.save("gone.safetensors")
    served.catalog.load("gone")
    served.catalog.unload("gone")
    entries = {entry.name: entry for entry in served.catalog.index()}
    assert entries["good"] == IndexEntry("good", "1", True, "")
    assert entries["later"] == IndexEntry("later", "", False, "not loaded")
    assert entries["gone"] == IndexEntry("gone", "", False, "unloaded")
    assert entries["bad"].reason.startswith("bad.safetensors: has 0 bytes")
    assert entries["no name"].reason.startswith("'no name' cannot be a model's name")
    assert [entry.name for entry in served.catalog.index()] == sorted(entries)
    assert not any(str(served.folder) in entry.reason for entry in entries.values())


def test_a_folder_that_has_gone_hurts_nothing_that_is_served(served, caplog):
    served.save()
    served.catalog.load("iris")
    served.folder.rename(served.folder.with_name("elsewhere"))
    assert served.load_error() == "the repository cannot be read; the server's log has the details"
    assert served.answer() == 2
    assert served.catalog.index() == [IndexEntry("iris", "1", True, "")]
    assert "cannot look for models" in caplog.text
